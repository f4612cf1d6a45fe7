"""Point-wise mutual information between a prompt and an image, in nats, from differences of a denoiser's conditional and unconditional predictions.

| here | paper |
|---|---|
| `timesteps` (diffusers' index 0..T-1) | t = index + 1 |
| `alphas_cumprod[t]` | bar alpha_t |
| `eps_cond`, `eps_null` | eps(z_t, p, t), eps(z_t, null, t) |
| `kappa` | kappa_t of Eq. 2 |

Sums run over all entries of a latent. Terms are stored without kappa, so that every weighting and range of t is a query on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mitune.models import Conditioning, Denoiser, signal_and_noise

FORMS = ("orthogonal", "standard", "path")
VARIANTS = ("paper", "authors")


class Kernel(NamedTuple):
    """One reverse step, p(z_prev | z_t) = N(scale z_t - gain eps, sigma^2 I)."""

    scale: float
    gain: float
    sigma: float

    def mean(self, z_t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return self.scale * z_t - self.gain * eps


@dataclass(frozen=True)
class Estimate:
    """Point-wise MI of each sample, in nats.

    `profile` (..., S) holds what is averaged (orthogonal, standard) or summed (path) over the kept `timesteps` (S,). `standard_error`
    takes these as independent draws; for evenly spaced timesteps that is an upper bound. It is nan for a single timestep.
    """

    value: torch.Tensor  # (...)
    standard_error: torch.Tensor  # (...)
    profile: torch.Tensor  # (..., S)
    timesteps: torch.Tensor  # (S,)


def kappa(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, variant: str = "paper") -> torch.Tensor:
    """kappa_t = beta_t T / (2 alpha_t (1 - abar_t)), Eq. 2; (S,) float64. `variant="authors"`, their code, leaves out alpha_t.

    Raises:
        ValueError: an unknown variant, or timesteps outside 0..T-1.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown kappa {variant!r}; choose {' or '.join(VARIANTS)}")
    abar, t = alphas_cumprod.double(), torch.as_tensor(timesteps)
    if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < len(abar):
        raise ValueError(f"timesteps {int(t.min())}..{int(t.max())} must lie in 0..{len(abar) - 1}")
    alpha = abar / torch.cat([abar.new_ones(1), abar[:-1]])
    value = (1 - alpha) * len(abar) / (2 * (1 - abar))
    return (value / alpha if variant == "paper" else value)[t]


def orthogonal_terms(eps_cond: torch.Tensor, eps_null: torch.Tensor) -> torch.Tensor:
    """||eps_c - eps_u||^2 of Eq. 2, (B,); never negative."""
    return _sum((eps_cond.float() - eps_null.float()).square())


def standard_terms(noise: torch.Tensor, eps_cond: torch.Tensor, eps_null: torch.Tensor) -> torch.Tensor:
    """||noise - eps_u||^2 - ||noise - eps_c||^2, (B,): the point-wise log-ratio (Kong et al. 2024); signed.

    Computed as (eps_c - eps_u) . (2 noise - eps_c - eps_u), which does not subtract two large numbers.
    """
    noise, eps_cond, eps_null = noise.float(), eps_cond.float(), eps_null.float()
    return _sum((eps_cond - eps_null) * (2 * noise - eps_cond - eps_null))


def path_terms(z_t: torch.Tensor, z_prev: torch.Tensor, eps_cond: torch.Tensor, eps_null: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """log N(z_prev; mu_c, sigma^2) - log N(z_prev; mu_u, sigma^2), (B,) nats, mu the `kernel`'s mean under either prediction.

    Summed over a trajectory it is the log-ratio of the two path measures. Its mean on unguided conditional paths is their KL, an upper
    bound of that of z_0; with guidance w a step's is (2w - 1) gain^2 / (2 sigma^2) ||eps_c - eps_u||^2 and a noise of mean zero.

    Raises:
        ValueError: a deterministic step.
    """
    if not kernel.sigma > 0:
        raise ValueError("the path log-ratio needs a stochastic step, and this one has sigma = 0; sample with deterministic=False")
    mean_cond, mean_null = kernel.mean(z_t.float(), eps_cond.float()), kernel.mean(z_t.float(), eps_null.float())
    return _sum((mean_cond - mean_null) * (2 * z_prev.float() - mean_cond - mean_null)) / (2 * kernel.sigma**2)


def both_branches(
    denoiser: Denoiser, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning, null: Conditioning
) -> tuple[torch.Tensor, torch.Tensor]:
    """eps_c and eps_u, each (B, C, H, W), in one call of the denoiser; `null` has length 1 or B."""
    twice = Conditioning.cat([conditioning, null if len(null) == len(conditioning) else null[[0] * len(conditioning)]])
    timesteps = timesteps.repeat(2) if isinstance(timesteps, torch.Tensor) and timesteps.ndim else timesteps
    eps_cond, eps_null = denoiser.eps(latents.repeat(2, 1, 1, 1), timesteps, twice).chunk(2)
    return eps_cond, eps_null


def renoised_timesteps(total: int, count: int) -> torch.Tensor:
    """Timesteps (count,) at the middles of `count` equal parts of 0..total-1."""
    return ((torch.arange(count) + 0.5) * total / count).long()


@torch.inference_mode()
def renoised_terms(
    denoiser: Denoiser, latents: torch.Tensor, conditioning: Conditioning, null: Conditioning, *,
    timesteps: torch.Tensor, noise: torch.Tensor | Callable[[int], torch.Tensor], batch_size: int = 256, progress: Callable[[int], object] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Terms of given images z_0 (N, C, H, W) at z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, without kappa.

    Candidates of one prompt are best given the same noise: what they share then cancels in their ranking.

    Args:
        null: of the empty prompt, length 1; or of N other prompts, against which each image's own is then held.
        timesteps: (R,), one for each noise; a timestep may occur several times.
        noise: (N, R, C, H, W), or a function from an image's number to its (R, C, H, W).
        batch_size: latents in one call of the denoiser, each of them in both branches.
        progress: called with the number of images done since its last call.

    Returns:
        {"orthogonal": (N, R), "standard": (N, R)}, float32, on the CPU.
    """
    _check(latents, conditioning, null)
    timesteps, step = torch.as_tensor(timesteps), max(batch_size // len(timesteps), 1)
    draw = noise if callable(noise) else noise.__getitem__
    terms: dict[str, list[torch.Tensor]] = {"orthogonal": [], "standard": []}
    for start in range(0, len(latents), step):
        rows = torch.arange(start, min(start + step, len(latents)))
        pairs = (rows.repeat_interleave(len(timesteps)), timesteps.repeat(len(rows)), torch.cat([draw(int(row)) for row in rows]))
        for row, t, n in zip(*(part.split(batch_size) for part in pairs), strict=True):
            n = n.to(denoiser.device)
            signal, sigma = signal_and_noise(denoiser.alphas_cumprod, t, n)
            z_t = signal * latents[row].to(denoiser.device) + sigma * n
            eps_cond, eps_null = both_branches(denoiser, z_t, t.to(denoiser.device), conditioning[row], null if len(null) == 1 else null[row])
            terms["orthogonal"].append(orthogonal_terms(eps_cond, eps_null).cpu())
            terms["standard"].append(standard_terms(n, eps_cond, eps_null).cpu())
        if progress:
            progress(len(rows))
    return {form: torch.cat(parts).reshape(len(latents), len(timesteps)) for form, parts in terms.items()}


def estimate(terms: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, *, form: str, t_min: int = 0, variant: str = "paper") -> Estimate:
    """Point-wise MI from stored terms (..., S) at `timesteps` (S,), counting only t > `t_min`.

    orthogonal, standard: the mean over the kept timesteps of kappa_t term_t (Eq. 2; the authors' code takes t_min = 50).
    path: the sum of the kept steps' increments; `variant` has no effect.

    Raises:
        ValueError: an unknown form, terms that do not fit the timesteps, path terms of a deterministic sampler, no timestep above t_min.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; choose {', '.join(FORMS)}")
    if terms is None:
        raise ValueError(f"there are no {form} terms: a deterministic sampler has none; sample with deterministic=False, terms=True")
    timesteps = torch.as_tensor(timesteps)
    if terms.shape[-1] != len(timesteps):
        raise ValueError(f"terms of shape {tuple(terms.shape)} do not fit {len(timesteps)} timesteps; the last axis must be theirs")
    kept = timesteps > t_min
    if not kept.any():
        raise ValueError(f"no timestep lies above t_min = {t_min}; the largest is {int(timesteps.max())}")
    profile, count = terms[..., kept].double(), int(kept.sum())
    if form != "path":
        profile = profile * kappa(alphas_cumprod, timesteps[kept], variant)
    spread = profile.std(-1) if count > 1 else torch.full(profile.shape[:-1], float("nan"), dtype=profile.dtype)
    scale = count if form == "path" else 1
    return Estimate(profile.mean(-1) * scale, spread / count**0.5 * scale, profile, timesteps[kept])


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Sums (B,) over all entries of each latent."""
    return values.flatten(1).sum(1)


def _check(latents: torch.Tensor, conditioning: Conditioning, null: Conditioning) -> None:
    if len(latents) != len(conditioning) or len(null) not in (1, len(latents)):
        counts = f"{len(latents)} latents, {len(conditioning)} prompts, {len(null)} null prompts"
        raise ValueError(f"{counts}; give each latent a prompt, and one null prompt or one each")
