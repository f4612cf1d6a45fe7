"""Speed on a GPU of the architectures of Stable Diffusion 2.1 base and SDXL at random weights (`make bench DEVICE=cuda`); nothing is downloaded.

Set construction by `sampling.sample` and fine-tuning by `finetuning.finetune`, held against what the card's matrix products reach. The configurations are
those of the published models' `unet/config.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mitune.denoisers import Conditioning
from mitune.finetuning import add_adapter, objective
from mitune.models import device_of
from mitune.pipelines import DTYPES, LatentDiffusion
from mitune.probe import device_name, evaluation_rate, keep, timed, training_rate
from mitune.recipes import Timesteps, Tuning

COMMON = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "use_linear_projection": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd21-base": COMMON
    | {
        "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": COMMON
    | {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "transformer_layers_per_block": (1, 2, 10),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
IMAGES = {"sd21-base": 50, "sdxl": 16}  # of one call of the sampler, each in both branches
MICRO_BATCHES = {"sd21-base": 25, "sdxl": 4}
EVALUATIONS = 50 * 50 * 2  # of one prompt of the paper: candidates, steps, branches
TUNING = Tuning(
    adapter="dora", rank=32, lora_alpha=32, target_modules=("attention", "ff"), text_encoder=False, learning_rate=1e-4, betas=(0.9, 0.999), weight_decay=1e-2,
    epsilon=1e-8, max_grad_norm=1.0, steps=300, batch_size=400, micro_batch_size=50, mixed_precision="bf16", timesteps=Timesteps(500, 1000),
    checkpoint_every=300, save_dtype="float16",
)  # fmt: skip
HEAD = "| architecture | work | precision | rate | seconds a prompt (50 x 50 x 2) | TFLOP/s | of the ceiling | peak memory |\n|---|---|---|--:|--:|--:|--:|--:|"


class Bare(LatentDiffusion):
    """A UNet of random weights as a `Denoiser`, without text encoder and autoencoder."""

    def __init__(self, settings: Mapping[str, Any], *, device: str = "meta", dtype: str = "float32"):
        from diffusers import DDPMScheduler, UNet2DConditionModel

        with torch.device("meta"):
            unet = UNet2DConditionModel(**settings)
        if device != "meta":
            unet.to_empty(device=device)
            for parameter in unet.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        torch.nn.Module.to(unet, dtype=DTYPES[dtype], memory_format=torch.channels_last)
        unet.requires_grad_(False).eval()
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        parts = {"unet": unet, "unet_name": "unet", "text_encoder": torch.nn.Module(), "text_encoder_name": "text_encoder", "scheduler": scheduler}
        super().__init__(SimpleNamespace(**parts, unload_lora_weights=unet.unload_lora))

    def prompt(self) -> Conditioning:
        """Noise in the place of a prompt's conditioning, of the size of CLIP's: length 1."""
        tensors = {"encoder_hidden_states": torch.randn(1, 77, self.network.config.cross_attention_dim)}
        if self.network.config.addition_embed_type == "text_time":
            times = 6 * self.network.config.addition_time_embed_dim
            tensors |= {"text_embeds": torch.randn(1, self.network.config.projection_class_embeddings_input_dim - times), "time_ids": torch.ones(1, 6)}
        return Conditioning(tensors)

    def predict(self, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        place = {"device": self.device, "dtype": self.network.dtype}
        tensors = {name: tensor.to(**place) for name, tensor in conditioning.tensors.items()}
        states = tensors.pop("encoder_hidden_states")
        return self.network(latents.to(**place), torch.as_tensor(timesteps, device=self.device), states, added_cond_kwargs=tensors or None).sample


def operations(settings: Mapping[str, Any]) -> int:
    """Floating-point operations (two a multiplication and addition) of one denoiser evaluation, counted on one call without weights."""
    model = Bare(settings)
    conditioning = model.prompt()[[0]]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.predict(torch.zeros(1, *model.latent_shape, device="meta"), 500, conditioning)
    return counter.get_total_flops()


def ceiling(device: torch.device, dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """Operations a second of products of square matrices."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)

    def work() -> int:
        for _ in range(20):
            torch.mm(a, b)
        return 20 * 2 * size**3

    return timed(work, device)[0]


def rows(name: str, settings: Mapping[str, Any], device: torch.device, most: float, *, compiled: bool = False) -> Iterator[str]:
    """The table's rows of one architecture; `most` is the ceiling. What does not fit into the device's memory is a row that says so."""
    each, images, micro = operations(settings), IMAGES.get(name, 2), MICRO_BATCHES.get(name, 2)
    tuning = replace(TUNING, micro_batch_size=micro, batch_size=4 * micro)

    def row(work: str, precision: str, measure: Callable[[], tuple[float, int]]) -> str:
        try:
            rate, peak = measure()
        except torch.OutOfMemoryError:
            return f"| {name} | {work} | {precision} | does not fit: {images} images, micro-batches of {micro} | | | | |"
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        if work.startswith("set"):
            shown = [f"{rate:.1f} evaluations/s", f"{EVALUATIONS / rate:.1f}", f"{rate * each / 1e12:.0f}", f"{rate * each / most:.0%}"]
        else:
            shown = [f"{rate:.1f} samples/s", "", "", ""]
        return f"| {name} | {work} | {precision} | {' | '.join(shown)} | {peak / 2**30:.1f} GiB |"

    for precision in ("float32", "tf32", "bfloat16", "float16"):
        with products("tf32" if precision == "tf32" else "ieee"):
            yield row("set construction", precision, lambda precision=precision: _sampling(settings, device, precision, images, compiled))
    for adapter in ("dora", "lora"):
        chosen = replace(tuning, adapter=adapter)
        yield row(f"fine-tuning, {adapter}", "bfloat16 products", lambda chosen=chosen: _training(settings, device, chosen))
    yield row("fine-tuning, PEFT's own dora", "bfloat16 products", lambda: _plain(settings, device, tuning))


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Within the context float32 products and convolutions are exact ("ieee") or of 10 bits of mantissa ("tf32")."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _sampling(settings, device, precision: str, images: int, compiled: bool) -> tuple[float, int]:
    model = Bare(settings, device=device, dtype="float32" if precision == "tf32" else precision)
    if compiled:
        model.network.compile()
    return evaluation_rate(model, model.prompt(), model.prompt(), images)


def _training(settings, device, tuning: Tuning) -> tuple[float, int]:
    model = Bare(settings, device=device)
    return training_rate(model, model.prompt(), tuning)


def _plain(settings, device, tuning: Tuning) -> tuple[float, int]:
    """Forward and backward passes with PEFT's own forward, which takes the norm of every weight in each."""
    model, count = Bare(settings, device=device), tuning.micro_batch_size
    add_adapter(model, tuning, seed=0)
    latents, timesteps = torch.randn(count, *model.latent_shape, device=device), torch.full((count,), 700, device=device)

    def work() -> int:
        with torch.autocast(device.type, torch.bfloat16):
            objective(model, latents, latents.flip(0), timesteps, model.prompt()[[0] * count]).backward()
        return count

    return timed(work, device)


def main() -> int:
    parser = argparse.ArgumentParser(prog="mitune.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=CONFIGS, help="one architecture")
    parser.add_argument("--compile", action="store_true", help="sample with a compiled network; minutes more")
    parser.add_argument("--write", action="store_true", help="write the table to bench/, named by the device")
    chosen = parser.parse_args()
    try:
        device = device_of(chosen.device)
        if device.type != "cuda":
            raise ValueError
    except ValueError:
        print(
            f"mitune: device {chosen.device!r} is no GPU that torch sees here; `make bench` without DEVICE measures the model of params.yaml", file=sys.stderr
        )
        return 1
    most, name = ceiling(device), device_name(chosen.device)
    about = f"Random weights, torch {torch.__version__}. The ceiling: {most / 1e12:.0f} TFLOP/s in products of 8192 x 8192 matrices in bfloat16."
    lines = [f"# {name}", "", about, "", *HEAD.splitlines()]
    print("\n".join(lines), flush=True)
    for architecture in (chosen.only,) if chosen.only else CONFIGS:
        for row in rows(architecture, CONFIGS[architecture], device, most, compiled=chosen.compile):
            print(row, flush=True)
            lines.append(row)
    if chosen.write:
        keep(name, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
