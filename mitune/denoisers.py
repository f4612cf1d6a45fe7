"""One denoiser interface: what the method sees of a latent diffusion model, whichever it is.

Forward process: z_t = a z_0 + s noise, a = sqrt(abar_t), s = sqrt(1 - abar_t), abar = `alphas_cumprod`; timesteps are diffusers' indices 0..T-1
(index i is the paper's t = i + 1). What a network predicts of it, by the name that diffusers has for it:

| prediction_type | p | eps |
|---|---|---|
| epsilon | noise | p |
| v_prediction (Salimans & Ho 2022, Appendix D) | a noise - s z_0 | a p + s z_t |
| flow | noise - z_0 | (z_t + a p) / (a + s) |

A rectified flow's (Liu et al. 2023) is x_t = (1 - t) z_0 + t noise, with times t from 0 to 1. It is the process above on another scale,
x_t = z_t / (a + s) with t = s / (a + s): the two hold the same information, and what is said of eps holds for a flow. Euler's step of x_t
is the step of DDIM of z_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


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
    """What estimators are handed of a rectified flow in its own times."""

    @property
    def device(self) -> torch.device: ...

    def velocity(self, latents: torch.Tensor, times: float | torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The predicted noise - z_0 (B, C, H, W), float32, of x_t (B, C, H, W) at one time or at one each (B,); eps = x_t + (1 - t) velocity."""


def signal_and_noise(alphas_cumprod: torch.Tensor, timesteps: int | torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), broadcastable against `latents` (B, C, H, W) and on its device."""
    abar = alphas_cumprod[torch.as_tensor(timesteps, device=alphas_cumprod.device)].to(latents.device).reshape(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def flow_signal_and_noise(times: float | torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - t and t of a rectified flow (Liu et al. 2023), broadcastable against `latents` (B, C, H, W) and on its device."""
    t = torch.as_tensor(times).to(latents).reshape(-1, 1, 1, 1)
    return 1 - t, t


def flow_schedule(shift: float = 1.0, num_train_timesteps: int = 1000) -> torch.Tensor:
    """`alphas_cumprod` (T,), float32, of a rectified flow: (1 - t)^2 / ((1 - t)^2 + t^2) at t = c u / (1 + (c - 1) u), u = (i + 1/2) / T, c = `shift`.

    The shift is that of the flow's scheduler (Esser et al. 2024, Section 5.3.2), so that timesteps that are uniform in 0..T-1 are so in its u.
    The middles of the parts leave out t = 1, where there is no image left to predict.
    """
    u = (torch.arange(num_train_timesteps, dtype=torch.float64) + 0.5) / num_train_timesteps
    t = shift * u / (1 + (shift - 1) * u)
    return ((1 - t) ** 2 / ((1 - t) ** 2 + t**2)).float()


def to_flow(z_t: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and t, as broadcastable as `signal`, of a rectified flow at z_t = signal z_0 + sigma noise."""
    return z_t / (signal + sigma), sigma / (signal + sigma)


def target_of(prediction_type: str, z_0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What a network of this kind learns to predict."""
    if prediction_type == "epsilon":
        return noise
    return noise - z_0 if prediction_type == "flow" else signal * noise - sigma * z_0


def eps_of(prediction_type: str, prediction: torch.Tensor, z_t: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The noise that a prediction implies."""
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "flow":
        return (z_t.to(prediction) + signal * prediction) / (signal + sigma)
    return signal * prediction + sigma * z_t.to(prediction)


def finite(values: torch.Tensor, what: str, key: str = "dtype") -> torch.Tensor:
    """The values, on the CPU. Raises ValueError where one is not finite, naming the key of params.yaml that says how the network runs."""
    if not values.isfinite().all():
        raise ValueError(f"{what} are not finite, as where float16 overflows; set {key}: bfloat16 or float32")
    return values
