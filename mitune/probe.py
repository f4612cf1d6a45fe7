"""Rates of a model on this device, measured in seconds: denoiser evaluations and training samples a second, and the memory that either takes."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mitune import config
from mitune.artifacts import atomic
from mitune.denoisers import Conditioning
from mitune.finetuning import adapter_size, finetune, remove_adapter
from mitune.loading import describe
from mitune.pipelines import LatentDiffusion
from mitune.recipes import Tuning
from mitune.sampling import noise_generator, sample
from mitune.stages import open_model

SECONDS = 4.0
"""Sampling is measured for so long, after a turn that does not count."""


@dataclass(frozen=True)
class Rates:
    """Denoiser evaluations and training samples a second, and the peak of the device's memory in bytes for either, where it was measured."""

    evaluations: float
    samples: float
    memory: tuple[int, int] | None = None


def rates(params) -> Rates:
    """Of the model of `params` on its device, as the stages `pool` and `finetune` use it."""
    model = open_model(params)
    conditioning = model.encode(["a red circle"])
    evaluations, sampling = evaluation_rate(model, conditioning, model.null, params.pool.batch_size, params.pool.guidance_scale)
    model = open_model(params, dtype="float32")
    samples, training = training_rate(model, conditioning, params.finetune)
    return Rates(evaluations, samples, (sampling, training) if model.device.type == "cuda" else None)


def evaluation_rate(model: LatentDiffusion, conditioning: Conditioning, null: Conditioning, images: int, guidance_scale: float = 7.5) -> tuple[float, int]:
    """Denoiser evaluations (one latent in one branch) a second of `sampling.sample` with MI terms, `images` of one prompt at once, and its peak of memory."""

    def work() -> int:
        sample(
            model, conditioning[[0] * images], null, guidance_scale=guidance_scale, num_inference_steps=2, terms=True, batch_size=images,
            generators=[noise_generator(0, "", image) for image in range(images)],
        )  # fmt: skip
        return 2 * 2 * images

    return timed(work, model.device)


def training_rate(model: LatentDiffusion, conditioning: Conditioning, tuning: Tuning, *, passes: int = 4) -> tuple[float, int]:
    """Training samples a second of `finetuning.finetune` and its peak of memory: two steps of at most `passes` micro-batches, after one that does not count."""
    peak, ends = _memory(model.device), []

    def step(_) -> None:
        _finish(model.device)
        ends.append(time.perf_counter())

    batch = min(tuning.batch_size, passes * tuning.micro_batch_size)
    short = replace(tuning, steps=3, checkpoint_every=3, batch_size=batch, text_encoder=False)
    latents = torch.randn((batch, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        finetune(model, latents, conditioning[[0] * batch], short, seed=0, folder_checkpoints=Path(folder), progress=step)
    remove_adapter(model)
    return 2 * batch / (ends[2] - ends[0]), peak()


def timed(work: Callable[[], int], device: torch.device) -> tuple[float, int]:
    """Units a second of `work`, which returns how many it has done, and its peak of device memory in bytes."""
    work()
    _finish(device)
    peak, units, started = _memory(device), 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < SECONDS:
        units += work()
        _finish(device)
    return units / spent, peak()


def sizes(network: torch.nn.Module, tuning: Tuning) -> tuple[int, int]:
    """Entries of a denoiser's latent, and parameters of its adapter."""
    import diffusers

    part = "unet" if isinstance(network, diffusers.UNet2DConditionModel) else "transformer"
    return network.config.in_channels * network.config.sample_size**2, adapter_size(network, tuning, part)


def blank(source: Path | str, unet: Path | str | None = None) -> torch.nn.Module:
    """The denoiser of a pipeline without weights, on torch's device `meta`.

    Raises ValueError where its configuration cannot be read.
    """
    import diffusers

    name, _, revision = (str(source), "", "") if Path(source).is_dir() else str(source).partition("@")
    places = [(unet, None)] if unet else [(name, "unet"), (name, "transformer")]
    for place, folder in places:
        try:
            settings = diffusers.UNet2DConditionModel.load_config(place, subfolder=folder, revision=revision or None)
        except OSError as error:
            why = describe(error)
        else:
            with torch.device("meta"):
                return getattr(diffusers, settings["_class_name"]).from_config(settings)
    raise ValueError(f"cannot read the denoiser's configuration of {str(source)!r}: {why}")


def device_name(device: str) -> str:
    """What a table says of the device that its numbers are of."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def keep(name: str, lines: Sequence[str]) -> None:
    """Write a table to `bench/`, in a file called by `name`."""
    with atomic(config.root() / "bench" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> Callable[[], int]:
    """What tells the peak of this device's memory, in bytes, from now on; 0 on a CPU."""
    if device.type != "cuda":
        return lambda: 0
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: torch.cuda.max_memory_allocated(device)
