"""The loader: a diffusers pipeline from a folder or from the hub, with or without adapters, as the denoiser that the method sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from mitune import adapters, memory
from mitune.loading import check_pipeline, check_tokenizer, check_weights, describe, located, quiet
from mitune.pipelines import KINDS, LatentDiffusion, dtype_of


def load(
    source: str | Path, *, unet: str | Path | None = None, vae: str | Path | None = None, device: str = "cpu", dtype: str = "float32",
    text_dtype: str = "float32", vae_dtype: str = "float32", attention: str = "sdpa", tf32: bool = False, compile: bool = False, variance: str = "large",
    adapter: Path | Sequence[Path] | None = None, fuse: bool = True, images: int | None = None,
) -> LatentDiffusion:  # fmt: skip
    """A pipeline from a folder, or from the hub as "owner/name" or "owner/name@revision", with an adapter fused into it or (`fuse=False`) attached.

    The denoiser in the folder `unet`, and the autoencoder `vae` (a folder, or of the hub), take the place of the pipeline's own, if they are named.

    Of several adapters, each trained on top of those before it, all are fused in turn, or all but the last. Fusing is done in float32 before
    `dtype` is applied to the denoiser, and leaves a network of the base model's shape and speed. Text encoders and autoencoder have dtypes of their own.

    Args:
        unet: of a flow the transformer.
        attention: sdpa, torch's choice of a kernel, or math, its plain one; for the whole process.
        tf32: whether a GPU takes the products and convolutions of float32 with 10 bits of mantissa; for the whole process.
        compile: by torch.compile, on the first call.
        images: so many at once, each in both branches, must fit into the accelerator's free memory; None asks nothing.

    Raises:
        ValueError: no such model, device, dtype or adapter; files that are missing, cut off or pickles; a pipeline of another kind; a denoiser, an
            autoencoder or an adapter that does not fit, or an adapter that changes nothing; a text encoder that overflows in float16; too little memory.
    """
    kind, text_kind, vae_kind = map(dtype_of, (dtype, text_dtype, vae_dtype))
    place = device_of(device)
    _use_attention(attention)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32  # torch's own default is TF32 in convolutions alone
    pipeline = _pipeline(str(source))
    family = KINDS[type(pipeline).__name__]
    if unet is not None:
        pipeline.register_modules(**{family.network_name: _denoiser(Path(unet), getattr(pipeline, family.network_name))})
    if vae is not None:
        pipeline.register_modules(vae=_vae(vae, pipeline.vae))
    if pipeline.vae.config.latents_mean is not None:
        raise ValueError("the autoencoder has a mean for each channel of its latents, which is not supported; use one with a scaling factor alone")
    folders = [] if adapter is None else [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    for n, folder in enumerate(folders, start=1):
        parts = adapters.attach(pipeline, Path(folder))
        if fuse or n < len(folders):
            pipeline.fuse_lora(components=parts)
            pipeline.unload_lora_weights()
    texts = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None]
    if text_kind == torch.float16 and (wide := [type(part).__name__ for part in texts if part._keep_in_fp32_modules]):
        raise ValueError(f"the text encoder {wide[0]} overflows in float16; set text_dtype: bfloat16 or float32")
    for part, its in [(pipeline.vae, vae_kind), *((text, text_kind) for text in texts)]:
        torch.nn.Module.to(part, dtype=its)
    model = family(pipeline, variance=variance)
    torch.nn.Module.to(model.network, dtype=kind, memory_format=torch.channels_last)  # diffusers' own `to` warns of a list of exceptions that is empty
    if images is not None and place.type == "cuda":
        memory.check(memory.footprint(model), images, torch.cuda.mem_get_info(place)[0])
    if place.type != "cpu":  # where it was loaded; there diffusers warns of float16
        pipeline.to(place)
    for part in (model.network, *texts):
        part.requires_grad_(False).eval()
    if compile:
        model.network.compile()
    return model


def _pipeline(source: str):
    """The float32 pipeline at `source`, whatever dtype its files have."""
    with quiet():
        import diffusers

    folder = located(source)
    kind, parts = check_pipeline(folder)
    if kind not in KINDS:
        raise ValueError(f"{source!r} holds a {kind or 'pipeline without a name'}; supported are {', '.join(KINDS)}")
    without = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
    if kind == "StableDiffusion3Pipeline":  # its T5 is left out by leaving out its lines
        without |= dict.fromkeys({"text_encoder_3", "tokenizer_3"} - set(parts))
    try:
        with quiet():
            family = getattr(diffusers, kind)
        with quiet(warnings=True):
            pipeline = family.from_pretrained(folder, dtype=torch.float32, **without)
    except Exception as error:
        raise ValueError(f"cannot load a diffusers pipeline from {source!r}: {describe(error)}") from error
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            check_tokenizer(part, folder / name)
    return pipeline


def _denoiser(folder: Path, own: torch.nn.Module):
    """The float32 denoiser in `folder`, which reads and makes what the pipeline's own does."""
    check_weights(folder)
    try:
        with quiet():
            denoiser = type(own).from_pretrained(folder, dtype=torch.float32)
    except Exception as error:
        raise ValueError(f"cannot load a denoiser from {str(folder)!r}: {describe(error)}") from error
    for name in ("in_channels", "out_channels", "sample_size", "cross_attention_dim", "joint_attention_dim"):
        here, wanted = denoiser.config.get(name), own.config.get(name)
        if here != wanted:
            raise ValueError(f"the denoiser {str(folder)!r} does not fit the pipeline: its {name} is {here}, not {wanted}")
    return denoiser


def _vae(source: str | Path, own: torch.nn.Module):
    """The float32 autoencoder at `source`, for latents as the pipeline's own makes them."""
    folder = located(source)
    check_weights(folder)
    try:
        with quiet():
            vae = type(own).from_pretrained(folder, dtype=torch.float32)
    except Exception as error:
        raise ValueError(f"cannot load an autoencoder from {str(source)!r}: {describe(error)}") from error
    for name in ("latent_channels", "scaling_factor", "shift_factor"):
        if vae.config[name] != own.config[name]:
            raise ValueError(f"the autoencoder {str(source)!r} does not fit the pipeline: its {name} is {vae.config[name]}, not {own.config[name]}")
    return vae


def device_of(name: str) -> torch.device:
    """Raises ValueError for a device that is unknown, or not here."""
    match = re.fullmatch(r"cpu|mps|cuda(?::(\d+))?", name)
    if not match:
        raise ValueError(f"unknown device {name!r}; choose cpu, cuda, cuda:<number> or mps")
    there = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": int(match[1] or 0) < torch.cuda.device_count()}
    if not there[name.partition(":")[0]]:
        raise ValueError(f"device {name!r} is not available here; choose cpu")
    return torch.device(name)


def _use_attention(name: str) -> None:
    if name not in ("sdpa", "math"):
        raise ValueError(f"unknown attention {name!r}; choose sdpa or math")
    for switch in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(name == "sdpa")
