"""Pipelines of diffusers as denoisers: Stable Diffusion, SDXL and Stable Diffusion 3 behind one interface.

Each class says how its pipeline reads prompts and calls its network; the rest is common. Nothing above knows which it is.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from mitune import adapters
from mitune.denoisers import PREDICTION_TYPES, Conditioning, eps_of, finite, flow_schedule, signal_and_noise, target_of, to_flow
from mitune.memory import PIXELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """Raises ValueError for a dtype that is none of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose {', '.join(DTYPES)}")
    return DTYPES[name]


class LatentDiffusion:
    """A Stable Diffusion pipeline as a `Denoiser`. Tensors come and go in float32; only the networks run in their own dtypes.

    `variance` is that of the sampler's steps (see `mitune.sampling`), for the stages that sample.
    """

    network_name = "unet"
    trains_text = True  # whether an adapter may be put on the text encoder

    def __init__(self, pipeline, *, variance: str = "large"):
        self.pipeline, self.variance, self._encoding = pipeline, variance, threading.Lock()  # tokenizers take one thread at a time
        self.network: torch.nn.Module = getattr(pipeline, self.network_name)
        self._check()
        self.prediction_type, self.alphas_cumprod = self._schedule()
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"the scheduler's prediction_type is {self.prediction_type!r}; use a model of type {' or '.join(PREDICTION_TYPES)}")

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.network.config.sample_size
        return (self.network.config.in_channels, size, size)

    @property
    def flow(self) -> bool:
        """Whether it is a rectified flow, for which the terms of RFMI's form are kept too."""
        return self.prediction_type == "flow"

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """What can carry an adapter, by the pipeline's own names."""
        text = {self.pipeline.text_encoder_name: self.pipeline.text_encoder} if self.trains_text else {}
        return {self.network_name: self.network, **text}

    @property
    def adapted(self) -> dict[str, torch.nn.Module]:
        """Those of `networks` that carry an adapter."""
        return {name: network for name, network in self.networks.items() if getattr(network, "peft_config", None)}

    @cached_property
    def null(self) -> Conditioning:
        """What stands for no prompt, length 1: the empty one."""
        return self.encode([""])

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], *, batch_size: int = 256) -> Conditioning:
        """What the pipeline's text encoders say of N prompts, as the pipeline itself computes it; each distinct prompt is encoded once."""
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"cannot encode {prompts!r}; pass a list of at least one prompt")
        distinct = list(dict.fromkeys(prompts))
        batches = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
        with self._encoding:
            parts = [Conditioning({name: tensor.float() for name, tensor in self._read(batch).items()}) for batch in batches]
        row = {prompt: n for n, prompt in enumerate(distinct)}
        return Conditioning.cat(parts)[[row[prompt] for prompt in prompts]]

    def tokenize(self, prompts: Sequence[str]) -> Conditioning:
        """What `encode` starts from: token ids (N, tokens). `predict` reads them with the text encoder as it then is, differentiably.

        Raises:
            ValueError: a model of several text encoders.
        """
        if not self.trains_text:
            raise ValueError(f"finetune.text_encoder: a {type(self.pipeline).__name__} has several text encoders, which are not trained; set it to false")
        tokenizer = self.pipeline.tokenizer
        with self._encoding:
            ids = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
        return Conditioning({"input_ids": ids})

    def predict(self, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The network's raw output (B, C, H, W) at z_t, in the network's dtype; differentiable."""
        tensors = self._placed(conditioning)
        return self._call(latents.to(self.device, self.network.dtype), torch.as_tensor(timesteps, device=self.device), tensors)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise."""
        signal, sigma = signal_and_noise(self.alphas_cumprod, timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """What `predict` learns (see `mitune.denoisers`)."""
        return target_of(self.prediction_type, latents, noise, *signal_and_noise(self.alphas_cumprod, timesteps, latents))

    @torch.inference_mode()
    def eps(self, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The predicted noise (B, C, H, W), float32."""
        prediction = self.predict(latents, timesteps, conditioning).float()
        return eps_of(self.prediction_type, prediction, latents, *signal_and_noise(self.alphas_cumprod, timesteps, prediction))

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, *, batch_size: int | None = None) -> torch.Tensor:
        """Images (N, 3, H, W) in [-1, 1], float32, on the CPU, of latents as the network sees them; by default `PIXELS` at once.

        Raises ValueError for images that are not finite.
        """
        vae, pixels = self.pipeline.vae, latents.shape[-2:].numel() * self.pipeline.vae_scale_factor**2
        scaled = (part / vae.config.scaling_factor + self._shift for part in latents.split(batch_size or max(PIXELS // pixels, 1)))
        parts = [vae.decode(part.to(vae.device, vae.dtype)).sample for part in scaled]
        return finite(torch.cat([part.float().cpu() for part in parts]), "images", "vae_dtype").clamp(-1, 1)

    @torch.inference_mode()
    def encode_images(self, images: torch.Tensor, *, batch_size: int | None = None) -> torch.Tensor:
        """Latents (N, C, h, w) as the network sees them, (mean of the posterior - shift) times scaling factor, of images (N, 3, H, W) in [-1, 1]."""
        vae, pixels = self.pipeline.vae, images.shape[-2:].numel()
        batches = images.split(batch_size or max(PIXELS // pixels, 1))
        parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean for part in batches]
        return (torch.cat([part.float().cpu() for part in parts]) - self._shift) * vae.config.scaling_factor

    def save_adapter(self, folder: Path, *, dtype: str = "float32") -> None:
        """Write the attached adapter as the pipeline's `load_lora_weights` reads it. Raises ValueError if there is none, or for an unknown dtype."""
        adapters.save(self.pipeline, self.adapted, folder, dtype_of(dtype))

    @property
    def _shift(self) -> float:
        return self.pipeline.vae.config.shift_factor or 0.0

    def _placed(self, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        """The tensors of a conditioning as the network takes them; token ids are read first."""
        tensors = conditioning.tensors
        if "input_ids" in tensors:
            tensors = {"encoder_hidden_states": self.pipeline.text_encoder(tensors["input_ids"].to(self.device))[0]}
        return {name: tensor.to(self.device, self.network.dtype) for name, tensor in tensors.items()}

    def _schedule(self) -> tuple[str, torch.Tensor]:
        """The prediction type, and abar."""
        scheduler = self.pipeline.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"the scheduler is a {type(scheduler).__name__}, which has no alphas_cumprod; use a model whose scheduler is DDPM's, DDIM's or alike"
            )
        return scheduler.config.prediction_type, scheduler.alphas_cumprod.float().cpu()

    def _check(self) -> None:
        """Raises ValueError for a network of another use."""

    def _read(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)[0]}

    def _call(self, latents: torch.Tensor, timesteps: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.network(latents, timesteps, **tensors).sample


class StableDiffusionXL(LatentDiffusion):
    """An SDXL pipeline: hidden states of two text encoders side by side, the second's pooled embedding, and time ids: the image's height and width
    before and after cropping, in px, and the corner of the crop (Podell et al. 2023, Section 2.2), here of whole images of the model's own size."""

    trains_text = False

    @cached_property
    def null(self) -> Conditioning:
        """The empty prompt; where the pipeline says so, as SDXL's does, zeros in its place."""
        empty = self.encode([""])
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return Conditioning({name: tensor if name == "time_ids" else torch.zeros_like(tensor) for name, tensor in empty.tensors.items()})

    def _check(self) -> None:
        config = self.network.config
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        if config.projection_class_embeddings_input_dim != pooled + 6 * config.addition_time_embed_dim:
            raise ValueError("this SDXL network does not take the six time ids of a base model; a refiner or an edit model is not supported")
        vae = self.pipeline.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            raise ValueError("this SDXL autoencoder overflows in float16, its configuration says; set vae_dtype: float32, or name a mended one as `vae`")

    def _read(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=self.device).expand(len(prompts), -1)
        return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": sizes}

    def _call(self, latents: torch.Tensor, timesteps: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        added = {name: tensors[name] for name in ("text_embeds", "time_ids")}
        return self.network(latents, timesteps, tensors["encoder_hidden_states"], added_cond_kwargs=added).sample


class StableDiffusion3(LatentDiffusion):
    """A Stable Diffusion 3 pipeline, a rectified flow by a transformer, with or without its T5 text encoder; as a `Flow` in its own times too.

    As a `Denoiser` its timesteps are those of `flow_schedule` with its scheduler's shift.
    """

    network_name = "transformer"
    trains_text = False

    @torch.inference_mode()
    def velocity(self, latents: torch.Tensor, times: float | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The predicted noise - z_0 (B, C, H, W), float32, of x_t (B, C, H, W) at one time or at one each (B,)."""
        return self._at(latents, torch.as_tensor(times), self._placed(conditioning)).float()

    def predict(self, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The network's raw output, noise - z_0 (B, C, H, W), at z_t, in the network's dtype; differentiable."""
        x_t, times = to_flow(latents, *signal_and_noise(self.alphas_cumprod, timesteps, latents))
        return self._at(x_t, times.flatten(), self._placed(conditioning))

    def _at(self, x_t: torch.Tensor, times: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        scaled = self.pipeline.scheduler.config.num_train_timesteps * times.to(self.device, torch.float32).expand(len(x_t))
        return self.network(x_t.to(self.device, self.network.dtype), timestep=scaled, **tensors).sample

    def _schedule(self) -> tuple[str, torch.Tensor]:
        config = self.pipeline.scheduler.config
        if config.use_dynamic_shifting or config.shift_terminal:
            raise ValueError("the flow's scheduler shifts its times by the image's size; only a constant shift is supported")
        return "flow", flow_schedule(config.shift, config.num_train_timesteps)

    def _read(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, device=self.device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}


KINDS = {"StableDiffusionPipeline": LatentDiffusion, "StableDiffusionXLPipeline": StableDiffusionXL, "StableDiffusion3Pipeline": StableDiffusion3}
"""By the name of the pipeline's class in diffusers."""
