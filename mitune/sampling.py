"""Sampling with classifier-free guidance, and the MI terms of the trajectory (Algorithm 2), which cost nothing where both branches run anyway.

Every step is z_prev = scale z_t - gain eps + sigma n, with alpha = abar_t / abar_prev and beta = 1 - alpha of the respaced chain:

| `variance` | scale | gain | sigma |
|---|---|---|---|
| large: DDPM ancestral, sigma^2 = beta (Ho et al. 2020, Eq. 11) | 1 / sqrt(alpha) | beta / sqrt(alpha (1 - abar_t)) | sqrt(beta) |
| small: the same, sigma^2 that of the posterior (Eq. 7) | as above | as above | sqrt(beta (1 - abar_prev) / (1 - abar_t)) |
| none: DDIM, eta = 0 (Song et al. 2021, Eq. 12); of a flow Euler's step | 1 / sqrt(alpha) | sqrt((1 - abar_t) / alpha) - sqrt(1 - abar_prev) | 0 |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mitune.denoisers import Conditioning, Denoiser, finite, signal_and_noise
from mitune.information import Kernel, both_branches, inner_product_terms, orthogonal_terms, path_terms

VARIANCES = ("large", "small", "none")


def noise_generator(seed: int, prompt: str, image: int, stream: str = "sample") -> torch.Generator:
    """A generator of its own for each (seed, prompt, image, stream): noise depends on no batch size, order or number of processes."""
    digest = hashlib.sha256(repr((int(seed), str(prompt), int(image), str(stream))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def noises(owners: Sequence[tuple[str, int]], count: int, shape: tuple[int, int, int], *, seed: int, stream: str) -> torch.Tensor:
    """`count` noises (N, count, C, H, W) of each (prompt, image), from the generator that `noise_generator` gives it."""
    return torch.stack([torch.randn((count, *shape), generator=noise_generator(seed, prompt, image, stream)) for prompt, image in owners])


@dataclass(frozen=True)
class Sampler:
    """A respaced reverse chain: its timesteps (S,), descending, and each step's kernel."""

    timesteps: torch.Tensor
    kernels: tuple[Kernel, ...]

    @classmethod
    def of(cls, alphas_cumprod: torch.Tensor, num_inference_steps: int, *, variance: str = "large") -> Sampler:
        """Leading spacing with offset 1 as in Stable Diffusion: t = 1, 1 + T // S, ...; from t = 1 to abar = 1. A step from t = 0 adds no noise.

        Where S does not divide T the chain starts that much below T (S = 400 of T = 1000 at t = 799), as diffusers' does.

        Raises:
            ValueError: fewer than 1 or more than T steps, an unknown variance.
        """
        if variance not in VARIANCES:
            raise ValueError(f"unknown variance {variance!r}; choose {', '.join(VARIANCES)}")
        n = len(alphas_cumprod)
        if not 1 <= num_inference_steps <= n:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must lie in 1..{n}")
        ratio = n // num_inference_steps
        offset = int((num_inference_steps - 1) * ratio + 1 < n)
        timesteps = (torch.arange(num_inference_steps) * ratio + offset).flip(0)
        abar = alphas_cumprod.double()[timesteps]
        abar_prev = torch.cat([abar[1:], abar.new_ones(1)])
        alpha, beta = abar / abar_prev, 1 - abar / abar_prev
        if variance == "none":
            gain, sigma = ((1 - abar) / alpha).sqrt() - (1 - abar_prev).sqrt(), torch.zeros_like(abar)
        else:
            gain, sigma = beta / (alpha * (1 - abar)).sqrt(), beta.sqrt() * (timesteps > 0)
            if variance == "small":
                sigma = sigma * ((1 - abar_prev) / (1 - abar)).sqrt()
        return cls(timesteps, tuple(Kernel(*row) for row in torch.stack([alpha.rsqrt(), gain, sigma], -1).tolist()))

    def __len__(self) -> int:
        return len(self.kernels)

    def path_drift(self, orthogonal: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """The path increments (..., S) of `Samples` without their noise: (2w - 1) k_i ||eps_c - eps_u||^2, k_i = gain_i^2 / (2 sigma_i^2); 0 at the last step.

        From the `orthogonal` terms (..., S) of trajectories sampled with guidance w; nats, float64. The noise left out is
        sqrt(2 k_i) (eps_c - eps_u) . n, of mean zero and variance 2 k_i ||eps_c - eps_u||^2 given z_i.

        Raises:
            ValueError: a deterministic chain, which has no path.
        """
        if not all(kernel.sigma > 0 for kernel in self.kernels[:-1]):
            raise ValueError("a deterministic chain has no path: its steps have sigma = 0")
        rates = torch.tensor([kernel.gain**2 / (2 * kernel.sigma**2) for kernel in self.kernels[:-1]] + [0.0], dtype=torch.float64)
        return (2 * guidance_scale - 1) * rates * orthogonal.double()


@dataclass(frozen=True)
class Samples:
    """Final latents (N, C, H, W) and, where asked for, the raw terms (N, S) at `timesteps` (S,), by form; float32, on the CPU.

    The last step's path increment is left out, as 0: its kernel leads to an image without noise, where the ratio means nothing.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    orthogonal: torch.Tensor | None = None
    path: torch.Tensor | None = None
    inner_product: torch.Tensor | None = None


@torch.inference_mode()
def sample(
    denoiser: Denoiser, conditioning: Conditioning, null: Conditioning, *,
    guidance_scale: float, num_inference_steps: int, generators: Sequence[torch.Generator], terms: bool = False, inner_product: bool = False,
    variance: str = "large", batch_size: int = 256, progress: Callable[[int], object] | None = None,
) -> Samples:  # fmt: skip
    """N samples by eps = eps_u + w (eps_c - eps_u), w = `guidance_scale`; with `terms`, the MI terms of their trajectories.

    At w = 1 without terms only the conditional branch is evaluated.

    Args:
        conditioning: of N prompts; `null` of one empty prompt.
        generators: one an image, on the CPU; each draws z_T, then the noise of all steps in their order.
        inner_product: with `terms`, those of this form too.
        variance: of the steps; a chain with none has no path terms.
        batch_size: images in one call of the denoiser (twice as many latents where both branches run).
        progress: called after each step with the number of images in it: N * num_inference_steps in all.

    Raises:
        ValueError: counts that differ, an impossible guidance scale, number of steps or variance; samples that are not finite.
    """
    if not (len(generators) == len(conditioning) > 0) or len(null) != 1:
        raise ValueError(f"{len(conditioning)} prompts, {len(generators)} generators, {len(null)} null prompts; give each prompt a generator, and one null")
    if not 0 <= guidance_scale < float("inf"):
        raise ValueError(f"guidance_scale is {guidance_scale}; it must be 0 or more (1 is none)")
    sampler = Sampler.of(denoiser.alphas_cumprod, num_inference_steps, variance=variance)
    parts = [
        _sample(denoiser, sampler, conditioning[rows], null, guidance_scale, [generators[row] for row in rows], terms, progress)
        for rows in torch.arange(len(generators)).split(batch_size)
    ]
    latents, orthogonal, path, inner = (torch.cat(part) for part in zip(*parts, strict=True))
    kept = {"orthogonal": orthogonal, "path": path if variance != "none" else None, "inner_product": inner if inner_product else None}
    return Samples(finite(latents, "samples"), sampler.timesteps, **kept if terms else {})


def _sample(denoiser, sampler, conditioning, null, guidance_scale, generators, terms, progress) -> tuple[torch.Tensor, ...]:
    """Latents (B, C, H, W) and the terms (B, S) of one batch: orthogonal, path, inner product; terms that were not asked for stay 0."""
    z_t = torch.stack([torch.randn(denoiser.latent_shape, generator=generator) for generator in generators]).to(denoiser.device)
    noises = _step_noises(generators, sampler, denoiser.latent_shape)
    orthogonal, path, inner = torch.zeros(3, len(generators), len(sampler))
    for i, (timestep, kernel) in enumerate(zip(sampler.timesteps.tolist(), sampler.kernels, strict=True)):
        if guidance_scale == 1 and not terms:
            eps = denoiser.eps(z_t, timestep, conditioning)
        else:
            eps_cond, eps_null = both_branches(denoiser, z_t, timestep, conditioning, null)
            eps = eps_null + guidance_scale * (eps_cond - eps_null)
        z_prev = kernel.mean(z_t, eps)
        if kernel.sigma > 0:
            z_prev = z_prev + kernel.sigma * noises[:, i].to(z_t)
        if terms:
            orthogonal[:, i] = orthogonal_terms(eps_cond, eps_null).cpu()
            inner[:, i] = inner_product_terms(z_t, eps_cond, eps_null, *signal_and_noise(denoiser.alphas_cumprod, timestep, z_t)).cpu()
            if kernel.sigma > 0 and i < len(sampler) - 1:
                path[:, i] = path_terms(z_t, z_prev, eps_cond, eps_null, kernel).cpu()
        z_t = z_prev
        if progress:
            progress(len(generators))
    return z_t.cpu(), orthogonal, path, inner


def _step_noises(generators: Sequence[torch.Generator], sampler: Sampler, shape: tuple[int, int, int]) -> torch.Tensor:
    """The noise of all steps, (B, S, C, H, W), each image's from its own generator; of no step for a deterministic sampler."""
    steps = len(sampler) if any(kernel.sigma for kernel in sampler.kernels) else 0
    return torch.stack([torch.randn((steps, *shape), generator=generator) for generator in generators])
