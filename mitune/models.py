"""One denoiser interface: what the method sees of a latent diffusion model, and the loader that puts a diffusers pipeline behind it.

Forward process: z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, abar = `alphas_cumprod`; timesteps are diffusers' indices 0..T-1
(index i is the paper's t = i + 1). A rectified flow's is z_t = (1 - t) z_0 + t noise, with times t from 0 to 1.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told of N prompts: tensors (N, ...) by name, meaningful only to the denoiser that made them."""

    tensors: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Sequence[int] | torch.Tensor | slice) -> Conditioning:
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all `parts`, in order."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Denoiser(Protocol):
    """What estimators and samplers are handed."""

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """abar (T,), float32, on the CPU."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def device(self) -> torch.device: ...

    def eps(self, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The predicted noise (B, C, H, W), float32, of z_t (B, C, H, W) at one timestep or at one each (B,)."""


class Flow(Protocol):
    """What estimators are handed of a rectified flow."""

    @property
    def device(self) -> torch.device: ...

    def velocity(self, latents: torch.Tensor, times: float | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The predicted noise - z_0 (B, C, H, W), float32, of z_t (B, C, H, W) at one time or at one each (B,); eps = z_t + (1 - t) velocity."""


def signal_and_noise(alphas_cumprod: torch.Tensor, timesteps: int | torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), broadcastable against `latents` (B, C, H, W) and on its device."""
    abar = alphas_cumprod[torch.as_tensor(timesteps, device=alphas_cumprod.device)].to(latents.device).reshape(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def flow_signal_and_noise(times: float | torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - t and t of a rectified flow (Liu et al. 2023), broadcastable against `latents` (B, C, H, W) and on its device."""
    t = torch.as_tensor(times).to(latents).reshape(-1, 1, 1, 1)
    return 1 - t, t


class LatentDiffusion:
    """A Stable Diffusion pipeline of diffusers as a `Denoiser`. Tensors come and go in float32; only the network runs in its own dtype."""

    def __init__(self, pipeline):
        self.pipeline, self.network, self._encoding = pipeline, pipeline.unet, threading.Lock()  # tokenizers take one thread at a time
        self.prediction_type: str = pipeline.scheduler.config.prediction_type
        self.alphas_cumprod: torch.Tensor = pipeline.scheduler.alphas_cumprod.float().cpu()
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
    def networks(self) -> dict[str, torch.nn.Module]:
        """What can carry an adapter, by the pipeline's own names."""
        return {self.pipeline.unet_name: self.network, self.pipeline.text_encoder_name: self.pipeline.text_encoder}

    @property
    def adapted(self) -> dict[str, torch.nn.Module]:
        """Those of `networks` that carry an adapter."""
        return {name: network for name, network in self.networks.items() if getattr(network, "peft_config", None)}

    @cached_property
    def null(self) -> Conditioning:
        """The conditioning of the empty prompt, length 1."""
        return self.encode([""])

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], *, batch_size: int = 256) -> Conditioning:
        """The text encoder's hidden states (N, tokens, width) as the pipeline computes them; each distinct prompt is encoded once."""
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"cannot encode {prompts!r}; pass a list of at least one prompt")
        distinct = list(dict.fromkeys(prompts))
        batches = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
        with self._encoding:
            states = torch.cat([self.pipeline.encode_prompt(batch, self.device, 1, do_classifier_free_guidance=False)[0] for batch in batches])
        row = {prompt: n for n, prompt in enumerate(distinct)}
        return Conditioning({"encoder_hidden_states": states.float()[[row[prompt] for prompt in prompts]]})

    def tokenize(self, prompts: Sequence[str]) -> Conditioning:
        """What `encode` starts from: token ids (N, tokens). `predict` reads them with the text encoder as it then is, differentiably."""
        tokenizer = self.pipeline.tokenizer
        with self._encoding:
            ids = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
        return Conditioning({"input_ids": ids})

    def predict(self, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The network's raw output (B, C, H, W) at z_t, in the network's dtype; differentiable."""
        place = {"device": self.device, "dtype": self.network.dtype}
        if "input_ids" in conditioning.tensors:
            states = self.pipeline.text_encoder(conditioning.tensors["input_ids"].to(self.device))[0]
            conditioning = Conditioning({"encoder_hidden_states": states})
        tensors = {name: tensor.to(**place) for name, tensor in conditioning.tensors.items()}
        return self.network(latents.to(**place), torch.as_tensor(timesteps, device=self.device), **tensors).sample

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise."""
        signal, sigma = signal_and_noise(self.alphas_cumprod, timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """What `predict` learns: the noise, or v = sqrt(abar_t) noise - sqrt(1 - abar_t) z_0 (Salimans & Ho 2022, Appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = signal_and_noise(self.alphas_cumprod, timesteps, latents)
        return signal * noise - sigma * latents

    @torch.inference_mode()
    def eps(self, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The predicted noise, float32; from v: eps = sqrt(abar_t) v + sqrt(1 - abar_t) z_t."""
        prediction = self.predict(latents, timesteps, conditioning).float()
        if self.prediction_type == "epsilon":
            return prediction
        signal, sigma = signal_and_noise(self.alphas_cumprod, timesteps, prediction)
        return signal * prediction + sigma * latents.to(prediction)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, *, batch_size: int = 256) -> torch.Tensor:
        """Images (N, 3, H, W) in [-1, 1], float32, on the CPU, of latents as the network sees them."""
        vae = self.pipeline.vae
        parts = [vae.decode((part / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample for part in latents.split(batch_size)]
        return torch.cat([part.float().cpu() for part in parts]).clamp(-1, 1)

    @torch.inference_mode()
    def encode_images(self, images: torch.Tensor, *, batch_size: int = 256) -> torch.Tensor:
        """Latents (N, C, h, w) as the network sees them, the posterior's mean times the scaling factor, of images (N, 3, H, W) in [-1, 1]."""
        vae = self.pipeline.vae
        parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean for part in images.split(batch_size)]
        return torch.cat([part.float().cpu() for part in parts]) * vae.config.scaling_factor

    def save_adapter(self, folder: Path, *, dtype: str = "float32") -> None:
        """Write the attached adapter as the pipeline's `load_lora_weights` reads it, its rank and alpha in the metadata; equal adapters give equal bytes.

        Raises:
            ValueError: the network carries no adapter, or an unknown dtype.
        """
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
        from safetensors.torch import save_file

        if not self.adapted:
            raise ValueError("the model carries no adapter to save; attach one, or load it with fuse=False")
        layers, settings = {}, {}
        for part, network in self.adapted.items():
            ((_, config),) = network.peft_config.items()
            state = sorted(_layers(network).items())
            layers[f"{part}_lora_layers"] = {key: value.detach().to("cpu", _dtype(dtype)).contiguous() for key, value in state}
            settings |= {f"{part}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}  # one entry: safetensors writes several in random order
        self.pipeline.save_lora_weights(folder, save_function=partial(save_file, metadata=metadata), **layers)


def load(
    source: str | Path, *, unet: str | Path | None = None, device: str = "cpu", dtype: str = "float32",
    adapter: Path | Sequence[Path] | None = None, fuse: bool = True,
) -> LatentDiffusion:  # fmt: skip
    """A pipeline from a folder, or from the hub as "owner/name" or "owner/name@revision", with an adapter fused into it or (`fuse=False`) attached.

    The denoiser in the folder `unet` takes the place of the pipeline's own, if one is named.

    Of several adapters, each trained on top of those before it, all are fused in turn, or all but the last. Fusing is done in float32 before
    `dtype` is applied to the network, and leaves a network of the base model's shape and speed.

    Raises:
        ValueError: no such model, device, dtype or adapter; a model that is not Stable Diffusion's; a denoiser or an adapter that does not fit, or an
            adapter that changes nothing.
    """
    kind = _dtype(dtype)
    place = _device(device)
    pipeline = _pipeline(str(source))
    if unet is not None:
        pipeline.register_modules(unet=_unet(Path(unet), pipeline.unet))
    folders = [] if adapter is None else [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    for n, folder in enumerate(folders, start=1):
        parts = _attach(pipeline, Path(folder))
        if fuse or n < len(folders):
            pipeline.fuse_lora(components=parts)
            pipeline.unload_lora_weights()
    pipeline.to(place)
    torch.nn.Module.to(pipeline.unet, dtype=kind, memory_format=torch.channels_last)  # diffusers' own `to` warns of a list of exceptions that is empty
    pipeline.unet.requires_grad_(False).eval()
    pipeline.text_encoder.requires_grad_(False).eval()
    return LatentDiffusion(pipeline)


def _pipeline(source: str):
    """The float32 pipeline at `source`, whatever dtype its files have."""
    with quiet():
        from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

    name, _, revision = source.partition("@")
    if Path(source).is_dir():
        name, revision = source, None
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"there is no model in {source!r}; name a diffusers pipeline folder or a hub model 'owner/name'")
    try:
        with quiet(warnings=True):
            pipeline = DiffusionPipeline.from_pretrained(name, revision=revision or None, dtype=torch.float32)
    except Exception as error:
        raise ValueError(f"cannot load a diffusers pipeline from {source!r}: {_line(error)}") from error
    if not isinstance(pipeline, StableDiffusionPipeline) or not isinstance(pipeline.unet, UNet2DConditionModel):
        raise ValueError(f"{source!r} holds a {type(pipeline).__name__}; only a StableDiffusionPipeline (one text encoder, one UNet) is supported")
    return pipeline


def _unet(folder: Path, own: torch.nn.Module):
    """The float32 denoiser in `folder`, which reads and makes what the pipeline's own does."""
    try:
        with quiet():
            unet = type(own).from_pretrained(folder, dtype=torch.float32)
    except Exception as error:
        raise ValueError(f"cannot load a denoiser from {str(folder)!r}: {_line(error)}") from error
    for name in ("in_channels", "out_channels", "sample_size", "cross_attention_dim"):
        if unet.config[name] != own.config[name]:
            raise ValueError(f"the denoiser {str(folder)!r} does not fit the pipeline: its {name} is {unet.config[name]}, not {own.config[name]}")
    return unet


def _attach(pipeline, folder: Path) -> list[str]:
    """Load the adapter in `folder` into the networks of the pipeline that it is for, in float32; their names.

    Raises:
        ValueError: unless every tensor of the file found its place, all are finite, and some product B A is not zero.
    """
    file, unet = folder / ADAPTER_FILE, pipeline.unet_name
    if not file.is_file():
        raise ValueError(f"there is no adapter in {str(folder)!r}: {ADAPTER_FILE} is missing; write it with save_adapter")
    try:
        stored, _, settings = pipeline.lora_state_dict(folder, weight_name=ADAPTER_FILE, return_lora_metadata=True)
        parts = sorted({key.partition(".")[0] for key in stored})
        if unet in parts:
            pipeline.unet.load_lora_adapter(folder, prefix=unet, weight_name=ADAPTER_FILE, adapter_name="default")
        if pipeline.text_encoder_name in parts:
            with quiet(warnings=True):
                pipeline.load_lora_into_text_encoder(stored, None, pipeline.text_encoder, adapter_name="default", metadata=settings)
        networks = {part: getattr(pipeline, part) for part in parts}
        loaded = {f"{part}.{key}": value for part, network in networks.items() for key, value in _layers(network).items()}
    except Exception as error:
        raise ValueError(f"the adapter {str(file)!r} does not fit the model: {_line(error)}; was it trained on another?") from error
    if stored.keys() != loaded.keys():
        different = len(stored.keys() ^ loaded.keys())
        raise ValueError(f"the adapter {str(file)!r} does not fit the model: {different} tensors differ by name; was it trained on another?")
    if not all(value.isfinite().all() for value in loaded.values()):
        raise ValueError(f"the adapter {str(file)!r} holds values that are not finite; train it again with a lower learning rate")
    if not any(value.any() for key, value in loaded.items() if "lora_B" in key):
        raise ValueError(f"the adapter {str(file)!r} changes no weight: its B matrices are zero; train it first")
    for network in networks.values():
        network.float()  # the file may be float16
    return parts


def _layers(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """An attached adapter's tensors by the names that the network's own library finds again: transformers' loader knows DoRA's magnitudes
    by their full name only, which PEFT shortens."""
    from peft.utils import get_peft_model_state_dict
    from transformers import PreTrainedModel

    (name,) = network.peft_config
    ending = ".weight" if isinstance(network, PreTrainedModel) else ""
    layers = get_peft_model_state_dict(network, adapter_name=name)
    return {key + ending if key.endswith(".lora_magnitude_vector") else key: value for key, value in layers.items()}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose {', '.join(DTYPES)}")
    return DTYPES[name]


def _device(name: str) -> torch.device:
    match = re.fullmatch(r"cpu|mps|cuda(?::(\d+))?", name)
    if not match:
        raise ValueError(f"unknown device {name!r}; choose cpu, cuda, cuda:<number> or mps")
    there = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": int(match[1] or 0) < torch.cuda.device_count()}
    if not there[name.partition(":")[0]]:
        raise ValueError(f"device {name!r} is not available here; choose cpu")
    return torch.device(name)


def _line(error: Exception) -> str:
    """An error in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def quiet(*, warnings: bool = False) -> Iterator[None]:
    """The libraries' loading bars off, which would end up in saved notebooks, and unless `warnings` transformers' about torchvision on importing."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown, verbosity = [module for module in (of_diffusers, of_transformers) if module.is_progress_bar_enabled()], of_transformers.get_verbosity()
    for module in shown:
        module.disable_progress_bar()
    if not warnings:
        of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        of_transformers.set_verbosity(verbosity)
        for module in shown:
            module.enable_progress_bar()
