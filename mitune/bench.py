"""Speed of set construction (`make bench`): denoiser evaluations a second, the denoiser's share of the wall time, and the ratio to a plain loop.

The plain loop is the obvious program: one prompt, one image, one branch at a time. Both run on the same prompts in one process, one after
the other, and their ratio is what is reported; absolute times are this machine's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mitune import commands, config
from mitune.information import both_branches, orthogonal_terms
from mitune.pipelines import LatentDiffusion
from mitune.prompts import Prompt
from mitune.sampling import Sampler, noise_generator
from mitune.shards import shards
from mitune.stages import open_model, read_prompts
from mitune.stages.pool import sampler
from mitune.threads import workers


@dataclass
class Timed:
    """A denoiser that counts its evaluations (rows) and the seconds spent in them."""

    model: LatentDiffusion
    evaluations: int = 0
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def eps(self, latents, timesteps, conditioning):
        started = time.perf_counter()
        result = self.model.eps(latents, timesteps, conditioning)
        with self.lock:
            self.seconds += time.perf_counter() - started
            self.evaluations += len(latents)
        return result


def batched(model, prompts: list[Prompt], params) -> None:
    """As stage `pool` does it."""
    with tempfile.TemporaryDirectory() as folder:
        shards(Path(folder), prompts, params.pool.shard_prompts, sampler(model, params.pool, params.pool.guidance_scale, params.seed), device=params.device)


def plain(model, prompts: list[Prompt], params) -> None:
    chain = Sampler.of(model.alphas_cumprod, params.pool.num_inference_steps)
    for prompt in prompts:
        conditioning = model.encode([prompt.text])
        for image in range(2):
            generator = noise_generator(params.seed, prompt.text, image)
            z_t = torch.randn((1, *model.latent_shape), generator=generator)
            for timestep, kernel in zip(chain.timesteps.tolist(), chain.kernels, strict=True):
                eps_cond, eps_null = model.eps(z_t, timestep, conditioning), model.eps(z_t, timestep, model.null)
                orthogonal_terms(eps_cond, eps_null)
                eps = eps_null + params.pool.guidance_scale * (eps_cond - eps_null)
                z_t = kernel.mean(z_t, eps) + kernel.sigma * torch.randn(z_t.shape, generator=generator)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mitune.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=commands.count, default=16, help="prompts in the batched run (default: 16)")
    chosen = parser.parse_args(arguments)
    try:
        params = config.load()
        model = Timed(open_model(params))
        prompts = read_prompts(params, params.categories[0], "train", chosen.prompts)
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    both_branches(model, torch.randn(2, *model.latent_shape), 500, model.encode([prompts[0].text] * 2), model.null)  # warm up
    rates = {}
    for name, run, of, at_once in (("batched", batched, prompts, workers(params.device)), ("plain loop", plain, prompts[:1], 1)):
        model.evaluations, model.seconds, started = 0, 0.0, time.perf_counter()
        run(model, of, params)
        wall = time.perf_counter() - started
        rates[name] = model.evaluations / wall
        share = model.seconds / wall / at_once
        print(f"{name:11s} {rates[name]:8.0f} denoiser evaluations/s   {share:6.1%} of the wall time in the denoiser   n = {model.evaluations}")
    print(f"ratio       {rates['batched'] / rates['plain loop']:8.1f} x   ({torch.get_num_threads()} threads, {params.dtype})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
