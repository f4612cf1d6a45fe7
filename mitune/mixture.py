"""Exact worlds: Gaussian mixtures whose denoiser, point-wise log-ratio and mutual information are known in closed form.

Component k is what prompt k asks for. Captions are wrong at a set rate, so q(z|p) is itself a mixture, as in web data:

    q_t(z|p) = sum_k pi(k|p) N(z; sqrt(abar_t) mu_k, v_t I),  v_t = abar_t std^2 + 1 - abar_t,
    eps(z, p, t) = -sqrt(1 - abar_t) grad log q_t(z|p) = sqrt(1 - abar_t) (z - sqrt(abar_t) E[mu_k | z, p]) / v_t.

As a rectified flow the same mixture has 1 - t for sqrt(abar_t), t for sqrt(1 - abar_t), and E[noise - z_0 | z, p] for eps.

pi(k|p) = 1 - e for k = p and e / (K - 1) otherwise; prompts are uniform, and so is the marginal of the components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mitune.denoisers import Conditioning, flow_signal_and_noise, signal_and_noise


def stable_diffusion_schedule(num_train_timesteps: int = 1000) -> torch.Tensor:
    """`alphas_cumprod` (T,), float32, of Stable Diffusion: betas scaled linear from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


@dataclass(frozen=True)
class MixtureWorld:
    """A world of K prompts, numbered from 0, that is its own perfect `Denoiser`, and its own perfect `Flow`.

    Raises:
        ValueError: fewer than two components, or a caption error outside 0..1.
    """

    means: torch.Tensor  # (K, C, H, W)
    std: float
    caption_error: float
    alphas_cumprod: torch.Tensor  # (T,)

    def __post_init__(self):
        if self.means.ndim != 4 or len(self.means) < 2:
            raise ValueError(f"means have shape {tuple(self.means.shape)}; give (K, C, H, W) with K of 2 or more")
        if not 0 <= self.caption_error < 1:
            raise ValueError(f"caption_error is {self.caption_error}; it must be a rate, 0 or more and below 1")

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return tuple(self.means.shape[1:])

    @property
    def null(self) -> Conditioning:
        """The marginal: all components alike."""
        return Conditioning({"weights": torch.full((1, len(self.means)), 1 / len(self.means))})

    def encode(self, prompts: Sequence[int]) -> Conditioning:
        """pi(k|p), (N, K)."""
        k = len(self.means)
        wrong = self.caption_error / (k - 1)
        return Conditioning({"weights": torch.full((len(prompts), k), wrong) + (1 - self.caption_error - wrong) * torch.eye(k)[torch.as_tensor(prompts)]})

    def eps(self, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The best prediction of the noise, (B, C, H, W)."""
        signal, sigma = signal_and_noise(self.alphas_cumprod, timesteps, latents)
        return sigma * (latents - signal * self._expected(latents, signal, sigma, conditioning)) / (signal**2 * self.std**2 + sigma**2)

    def velocity(self, latents: torch.Tensor, times: float | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The best prediction of noise - z_0, (B, C, H, W): (t - (1 - t) std^2) (z - (1 - t) E[mu_k | z, p]) / v_t - E[mu_k | z, p]."""
        signal, sigma = flow_signal_and_noise(times, latents)
        expected = self._expected(latents, signal, sigma, conditioning)
        return (sigma - signal * self.std**2) * (latents - signal * expected) / (signal**2 * self.std**2 + sigma**2) - expected

    def captioned(self, prompts: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Components (N,) ~ pi(k|p): what the images of these prompts show, the prompt's own or, by a wrong caption, another."""
        return torch.multinomial(self.encode(prompts).tensors["weights"], 1, generator=generator)[:, 0]

    def around(self, components: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Exact samples of the given components, (N, C, H, W)."""
        return self.means[components] + self.std * torch.randn((len(components), *self.latent_shape), generator=generator)

    def draw(self, prompts: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Exact samples z_0 ~ q(z|p), (N, C, H, W)."""
        return self.around(self.captioned(prompts, generator), generator)

    def posterior(self, latents: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Probability of each component given z_0, (N, K)."""
        return self._joint(latents, *flow_signal_and_noise(0.0, latents), conditioning).softmax(-1)

    def log_ratio(self, latents: torch.Tensor, prompts: Sequence[int], timestep: int | None = None, *, time: float = 0.0) -> torch.Tensor:
        """log q_t(z|p) / q_t(z), (N,) nats: the point-wise MI of z_t at a diffusion `timestep`, or else at the `time` of a flow (0: of z_0)."""
        signal, sigma = self._signal_and_noise(latents, timestep, time)
        cond, null = (self._joint(latents, signal, sigma, weights).logsumexp(-1) for weights in (self.encode(prompts), self.null))
        return cond - null

    def information(self, *, n: int, generator: torch.Generator, timestep: int | None = None, time: float = 0.0) -> tuple[float, float]:
        """MI between prompt and z_t in nats, the mean over p of KL(q_t(z|p) || q_t(z)), and its standard error; t as in `log_ratio`.

        E over z ~ q_t(z) of sum_p q(p|z) log q_t(z|p) / q_t(z), by `n` samples; the sum over prompts is exact, and q(p|z) = q(z|p) / K q(z).
        """
        k = len(self.means)
        z = self.draw(torch.randint(k, (n,), generator=generator), generator)
        signal, sigma = self._signal_and_noise(z, timestep, time)
        z = signal * z + sigma * torch.randn(z.shape, generator=generator)
        found = self._joint(z, signal, sigma, self.null).double().softmax(-1)  # q(k|z)
        ratio = k * found @ self.encode(range(k)).tensors["weights"].double().T  # q(z|p) / q(z) = sum_k pi(k|p) q(k|z) / (1 / K)
        values = torch.xlogy(ratio, ratio).mean(-1)
        return float(values.mean()), float(values.std() / math.sqrt(n))

    def _signal_and_noise(self, latents: torch.Tensor, timestep: int | None, time: float) -> tuple[torch.Tensor, torch.Tensor]:
        return flow_signal_and_noise(time, latents) if timestep is None else signal_and_noise(self.alphas_cumprod, timestep, latents)

    def _expected(self, latents, signal, sigma, conditioning: Conditioning) -> torch.Tensor:
        """E[mu_k | z, p], (N, C, H, W)."""
        return torch.einsum("nk,kchw->nchw", self._joint(latents, signal, sigma, conditioning).softmax(-1), self.means)

    def _joint(self, latents, signal, sigma, conditioning: Conditioning) -> torch.Tensor:
        """log pi(k|p) N(z; signal mu_k, v I) up to a constant of the latents alone, (N, K)."""
        scaled = signal.expand(len(latents), 1, 1, 1).flatten(1)
        variance = (scaled * self.std) ** 2 + sigma.expand(len(latents), 1, 1, 1).flatten(1) ** 2
        means = self.means.flatten(1)
        distance = scaled**2 * means.square().sum(1) - 2 * scaled * (latents.flatten(1) @ means.T)
        return conditioning.tensors["weights"].log() - distance / (2 * variance)
