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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mitune import config
from mitune.denoisers import Conditioning, Denoiser, finite, signal_and_noise

FORMS = ("orthogonal", "standard", "path", "inner_product")
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
    """||eps_c - eps_u||^2 of Eq. 2, (B,); never negative. Likewise of two velocities."""
    return summed((eps_cond.float() - eps_null.float()).square())


def standard_terms(noise: torch.Tensor, eps_cond: torch.Tensor, eps_null: torch.Tensor) -> torch.Tensor:
    """||noise - eps_u||^2 - ||noise - eps_c||^2, (B,): the point-wise log-ratio (Kong et al. 2024); signed. Likewise of velocities, with noise - z_0 for noise.

    Computed as (eps_c - eps_u) . (2 noise - eps_c - eps_u), which does not subtract two large numbers.
    """
    noise, eps_cond, eps_null = noise.float(), eps_cond.float(), eps_null.float()
    return summed((eps_cond - eps_null) * (2 * noise - eps_cond - eps_null))


def inner_product_terms(z_t: torch.Tensor, eps_cond: torch.Tensor, eps_null: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(eps_c - z_t / (a + s)) . (eps_c - eps_u), (B,): v_c . (v_c - v_u) of RFMI (Wang et al. 2025), weighted like the others; signed. Their code
    takes the guided velocity in the place of v_c: that is `flow.guided_inner_product` of these terms and the orthogonal ones.

    x_t = z_t / (a + s) is the latent of a rectified flow, eps = x_t + (1 - t) v (see `mitune.denoisers`). The mean of eps_c - eps_u over prompts
    given z_t is 0, so that over all prompts the mean is that of `orthogonal_terms`; of one prompt by itself it is not.
    """
    eps_cond, eps_null = eps_cond.float(), eps_null.float()
    return summed((eps_cond - z_t.float() / (signal + sigma)) * (eps_cond - eps_null))


def path_terms(z_t: torch.Tensor, z_prev: torch.Tensor, eps_cond: torch.Tensor, eps_null: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """log N(z_prev; mu_c, sigma^2) - log N(z_prev; mu_u, sigma^2), (B,) nats, mu the `kernel`'s mean under either prediction.

    Summed over a trajectory it is the log-ratio of the two path measures. Its mean on unguided conditional paths is their KL, an upper
    bound of that of z_0; with guidance w a step's is (2w - 1) gain^2 / (2 sigma^2) ||eps_c - eps_u||^2 and a noise of mean zero.

    Raises:
        ValueError: a deterministic step.
    """
    if not kernel.sigma > 0:
        raise ValueError("the path log-ratio needs a stochastic step, and this one has sigma = 0; choose another variance")
    mean_cond, mean_null = kernel.mean(z_t.float(), eps_cond.float()), kernel.mean(z_t.float(), eps_null.float())
    return summed((mean_cond - mean_null) * (2 * z_prev.float() - mean_cond - mean_null)) / (2 * kernel.sigma**2)


def both_branches(
    denoiser: Denoiser, latents: torch.Tensor, timesteps: int | torch.Tensor, conditioning: Conditioning, null: Conditioning
) -> tuple[torch.Tensor, torch.Tensor]:
    """eps_c and eps_u, each (B, C, H, W), in one call of the denoiser; `null` has length 1 or B."""
    return both(denoiser.eps, latents, timesteps, conditioning, null)


def renoised_timesteps(total: int, count: int) -> torch.Tensor:
    """Timesteps (count,) at the middles of `count` equal parts of 0..total-1."""
    return ((torch.arange(count) + 0.5) * total / count).long()


@torch.inference_mode()
def renoised_terms(
    denoiser: Denoiser, latents: torch.Tensor, conditioning: Conditioning, null: Conditioning, *,
    timesteps: torch.Tensor, noise: torch.Tensor | Callable[[int], torch.Tensor], inner_product: bool = False, batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Terms of given images z_0 (N, C, H, W) at z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, without kappa.

    Candidates of one prompt are best given the same noise: what they share then cancels in their ranking.

    Args:
        null: of the empty prompt, length 1; or of N other prompts, against which each image's own is then held.
        timesteps: (R,), one for each noise; a timestep may occur several times.
        noise: (N, R, C, H, W), or a function from an image's number to its (R, C, H, W).
        inner_product: measure this form too.
        batch_size: latents in one call of the denoiser, each of them in both branches.
        progress: called with the number of images done since its last call.

    Returns:
        {"orthogonal": (N, R), "standard": (N, R)}, and "inner_product" if asked for, float32, on the CPU.

    Raises:
        ValueError: not as many prompts as latents; terms that are not finite.
    """

    def terms(rows, z_0, t, n):
        signal, sigma = signal_and_noise(denoiser.alphas_cumprod, t, n)
        z_t = signal * z_0 + sigma * n
        eps_cond, eps_null = both_branches(denoiser, z_t, t, conditioning[rows], of_rows(null, rows))
        found = {"orthogonal": orthogonal_terms(eps_cond, eps_null), "standard": standard_terms(n, eps_cond, eps_null)}
        return found | {"inner_product": inner_product_terms(z_t, eps_cond, eps_null, signal, sigma)} if inner_product else found

    must_fit(latents, conditioning, null)
    found = of_copies(terms, latents, timesteps, noise, denoiser.device, batch_size, progress)
    return {form: finite(values, "MI terms") for form, values in found.items()}


@torch.inference_mode()
def phrase_terms(
    denoiser: Denoiser, latents: torch.Tensor, conditioning: Conditioning, null: Conditioning, phrases: Sequence[Conditioning], *,
    timesteps: torch.Tensor, noise: torch.Tensor | Callable[[int], torch.Tensor], batch_size: int = 256, progress: Callable[[int], object] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The terms of `renoised_terms`, and those of each prompt's phrases at the same z_t; arguments as there, `phrases` one Conditioning a latent.

    CompLift (2505.13740) asks a prompt phrase by phrase: standard |n - eps_u|^2 - |n - eps_phrase|^2, and its variance-reduced form
    |eps_p - eps_u|^2 - |eps_p - eps_phrase|^2, the whole prompt's prediction in the place of the noise. That of the whole prompt itself
    is the orthogonal term.

    Returns:
        {"orthogonal": (N, R), "standard": (N, R), "phrase_standard": (N, P, R), "phrase_reduced": (N, P, R)}, float32, on the CPU, P the most
        phrases of a prompt; nan where one has fewer.

    Raises:
        ValueError: not as many prompts, or lists of phrases, as latents.
    """
    must_fit(latents, conditioning, null)
    if len(phrases) != len(latents):
        raise ValueError(f"{len(latents)} latents, {len(phrases)} lists of phrases; give each latent the phrases of its prompt")
    counts, every = torch.tensor([len(own) for own in phrases]), Conditioning.cat(phrases)
    first = counts.cumsum(0) - counts

    def terms(rows, z_0, t, n):
        copy = torch.arange(len(rows)).repeat_interleave(counts[rows])  # of each phrase asked
        place = torch.cat([torch.arange(count) for count in counts[rows].tolist()])
        asked = Conditioning.cat([of_rows(null, rows), conditioning[rows], every[first[rows][copy] + place]])
        signal, sigma = signal_and_noise(denoiser.alphas_cumprod, t, n)
        z_t, at = signal * z_0 + sigma * n, torch.cat([torch.arange(len(rows)).repeat(2), copy])
        null_eps, prompt_eps, phrase_eps = denoiser.eps(z_t[at], t[at], asked).split([len(rows), len(rows), len(copy)])
        found = {"orthogonal": orthogonal_terms(prompt_eps, null_eps), "standard": standard_terms(n, prompt_eps, null_eps)}
        for form, target in {"standard": n, "reduced": prompt_eps}.items():
            padded = torch.full((len(rows), int(counts.max())), float("nan"))
            padded[copy, place] = standard_terms(target[copy], phrase_eps, null_eps[copy]).cpu()
            found[f"phrase_{form}"] = padded
        return found

    found = of_copies(terms, latents, timesteps, noise, denoiser.device, batch_size, progress)
    return {name: values.movedim(1, -1) for name, values in found.items()}


def estimate(terms: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, *, form: str, t_min: int = 0, variant: str = "paper") -> Estimate:
    """Point-wise MI from stored terms (..., S) at `timesteps` (S,), counting only t > `t_min`.

    orthogonal, standard, inner_product: the mean over the kept timesteps of kappa_t term_t (Eq. 2; the authors' code takes t_min = 50).
    path: the sum of the kept steps' increments; `variant` has no effect.

    Raises:
        ValueError: an unknown form, terms that do not fit the timesteps, path terms of a deterministic sampler, no timestep above t_min.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; choose {', '.join(FORMS)}")
    if terms is None:
        why = "a deterministic sampler has none; choose another variance" if form == "path" else "they are kept for rectified flows alone"
        raise ValueError(f"there are no {form} terms: {why}")
    timesteps = torch.as_tensor(timesteps)
    if terms.shape[-1] != len(timesteps):
        raise ValueError(f"terms of shape {tuple(terms.shape)} do not fit {len(timesteps)} timesteps; the last axis must be theirs")
    kept = timesteps > t_min
    if not kept.any():
        raise ValueError(f"no timestep lies above t_min = {t_min}; the largest is {int(timesteps.max())}")
    profile, timesteps = terms[..., kept].double(), timesteps[kept]
    if form == "path":
        return average(profile, timesteps, scale=len(timesteps))
    return average(profile * kappa(alphas_cumprod, timesteps, variant), timesteps)


def query(estimator: config.Estimator, terms: Mapping[str, torch.Tensor], alphas_cumprod: torch.Tensor) -> Estimate:
    """What an entry of `estimators` in params.yaml asks of stored terms: forms (..., S) at `timesteps` (S,), `renoised_` ones at `renoised_timesteps`."""
    prefix = "renoised_" if estimator.latents == "renoised" else ""
    stored, timesteps = terms.get(prefix + estimator.form), terms[f"{prefix}timesteps"]
    return estimate(stored, timesteps, alphas_cumprod, form=estimator.form, t_min=estimator.t_min, variant=estimator.kappa or "paper")


def average(profile: torch.Tensor, timesteps: torch.Tensor, scale: int = 1) -> Estimate:
    """The mean over the last axis of `profile`, times `scale`."""
    count = len(timesteps)
    spread = profile.std(-1) if count > 1 else torch.full(profile.shape[:-1], float("nan"), dtype=profile.dtype)
    return Estimate(profile.mean(-1) * scale, spread / count**0.5 * scale, profile, timesteps)


def both(predict: Callable[..., torch.Tensor], latents, timesteps, conditioning: Conditioning, null: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditional and the unconditional prediction, in one call of `predict(latents, timesteps, conditioning)`."""
    twice = Conditioning.cat([conditioning, of_rows(null, torch.arange(len(conditioning)))])
    timesteps = timesteps.repeat(2) if isinstance(timesteps, torch.Tensor) and timesteps.ndim else timesteps
    cond, uncond = predict(latents.repeat(2, 1, 1, 1), timesteps, twice).chunk(2)
    return cond, uncond


def of_rows(null: Conditioning, rows: torch.Tensor) -> Conditioning:
    """The null prompts of some latents, one each, whether all share one or each has its own."""
    return null[[0] * len(rows)] if len(null) == 1 else null[rows]


def of_copies(measure: Callable[..., dict[str, torch.Tensor]], latents, timesteps, noise, device, batch_size, progress):
    """What `measure(rows, z_0, t, noise)` gives of each image with each noise, by form (N, R, ...); arguments as of `renoised_terms`."""
    timesteps, step = torch.as_tensor(timesteps), max(batch_size // len(timesteps), 1)
    draw = noise if callable(noise) else noise.__getitem__
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(latents), step):
        rows = torch.arange(start, min(start + step, len(latents)))
        pairs = (rows.repeat_interleave(len(timesteps)), timesteps.repeat(len(rows)), torch.cat([draw(int(row)) for row in rows]))
        for row, t, n in zip(*(part.split(batch_size) for part in pairs), strict=True):
            measured = measure(row, latents[row].to(device), t.to(device), n.to(device))
            parts.append({form: values.cpu() for form, values in measured.items()})
        if progress:
            progress(len(rows))
    return {form: torch.cat([part[form] for part in parts]).unflatten(0, (len(latents), len(timesteps))) for form in parts[0]}


def summed(values: torch.Tensor) -> torch.Tensor:
    """Sums (B,) over all entries of each latent."""
    return values.flatten(1).sum(1)


def must_fit(latents: torch.Tensor, conditioning: Conditioning, null: Conditioning) -> None:
    """Raises ValueError unless each latent has a prompt, and one null prompt or its own."""
    if len(latents) != len(conditioning) or len(null) not in (1, len(latents)):
        counts = f"{len(latents)} latents, {len(conditioning)} prompts, {len(null)} null prompts"
        raise ValueError(f"{counts}; give each latent a prompt, and one null prompt or one each")
