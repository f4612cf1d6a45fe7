"""Estimators held against exact worlds: tables of images whose point-wise MI is known, and what each form makes of two components.

| here | meaning |
|---|---|
| a table | a row an image: `world`, `prompt`, `unit` (both), `aligned`, `exact` (MI of the world), `log_ratio` (of the image), each estimate; nats |
| `orthogonal_renoised`, `standard` | at re-noised copies of the image |
| `orthogonal_trajectory`, `path` | along the trajectory that made it |
| `path_drift` | the path without its noise of mean zero (`Sampler.path_drift`) |
| `start` | MI of z_0 in that world |
| `standard_t300`, `path_t300` | t > 300 only |
| `flow_orthogonal`, `flow_standard`, `flow_inner_product` | at re-noised copies by a rectified flow of the same mixture |

Two components at distance |Delta mu| hold D = abar |Delta mu|^2 / v of evidence about an image, v the variance of a component of z_t. The logit l of "shows
what was asked" grows with D as a Brownian motion of drift +-1/2: given the finished image, as a bridge from 0 to its last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from mitune.flow import flow_estimate, flow_terms, flow_times
from mitune.information import estimate, kappa, renoised_terms, renoised_timesteps
from mitune.mixture import MixtureWorld, stable_diffusion_schedule
from mitune.sampling import Sampler, noise_generator, sample
from mitune.threads import side_by_side

RENOISED = {"orthogonal_renoised": ("orthogonal", 0), "standard": ("standard", 0), "standard_t300": ("standard", 300)}
TRAJECTORY = {"orthogonal_trajectory": ("orthogonal", 0), "path": ("path", 0), "path_t300": ("path", 300)}


# ---------------------------------------------------------------- worlds and tables


def random_world(*, dimensions: int, modes: int, caption_error: float, separation: float, std: float, seed: int) -> MixtureWorld:
    """Normal random means (modes, dimensions, 1, 1), scaled so that the root mean square distance of two of them is `separation` std."""
    means = torch.randn((modes, dimensions), generator=noise_generator(seed, "means", modes))
    distance = torch.pdist(means).square().mean().sqrt()
    return MixtureWorld((means * separation * std / distance)[..., None, None], std, caption_error, stable_diffusion_schedule())


def drawn(world: MixtureWorld, *, images: int, timesteps: int, noises: int = 1, seed: int = 0) -> pd.DataFrame:
    """Exact samples of all prompts in turn; an image is aligned if it was drawn from the component that its prompt asks for."""
    prompts, latents, components = _drawn(world, images, seed)
    return _table(world, prompts, latents, components, renoised(world, prompts, latents, timesteps=timesteps, noises=noises, seed=seed))


def flowed(world: MixtureWorld, *, images: int, times: int, low: float, high: float, seed: int = 0) -> pd.DataFrame:
    """The images of `drawn`, with each form of a rectified flow at evenly spaced times of low..high."""
    prompts, latents, components = _drawn(world, images, seed)
    at = flow_times(times, low, high)
    noise = torch.randn((images, times, *world.latent_shape), generator=noise_generator(seed, "flowed", 0))
    terms = flow_terms(world, latents, world.encode(prompts), world.null, times=at, noise=noise, batch_size=16_384)
    values = {f"flow_{form}": flow_estimate(terms[form], at, low=low, high=high).value for form in terms}
    return _table(world, prompts, latents, components, values)


def sampled(world: MixtureWorld, *, images: int, guidance_scale: float, num_inference_steps: int, timesteps: int, seed: int = 0) -> pd.DataFrame:
    """Samples of the reverse chain; an image is aligned if the component of its largest posterior is what its prompt asks for."""
    prompts = [i % len(world.means) for i in range(images)]
    generators = [noise_generator(seed, str(prompt), i) for i, prompt in enumerate(prompts)]
    options = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, "generators": generators, "terms": True, "batch_size": images}
    samples, abar = sample(world, world.encode(prompts), world.null, **options), world.alphas_cumprod
    along = {name: estimate(getattr(samples, form), samples.timesteps, abar, form=form, t_min=t_min) for name, (form, t_min) in TRAJECTORY.items()}
    values = {name: found.value for name, found in along.items()}
    values["path_drift"] = Sampler.of(abar, num_inference_steps).path_drift(samples.orthogonal, guidance_scale).sum(-1)
    values |= renoised(world, prompts, samples.latents, timesteps=timesteps, seed=seed)
    return _table(world, prompts, samples.latents, world.posterior(samples.latents, world.null).argmax(-1), values)


def renoised(
    world: MixtureWorld, prompts: Sequence[int], latents: torch.Tensor, *, timesteps: int, noises: int = 1, seed: int = 0
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Each re-noised estimate (N,) at evenly spaced timesteps, with `noises` independent noises each."""
    at = renoised_timesteps(len(world.alphas_cumprod), timesteps).repeat(noises)
    noise = torch.randn((len(latents), len(at), *world.latent_shape), generator=noise_generator(seed, "renoised", 0))
    terms = renoised_terms(world, latents, world.encode(prompts), world.null, timesteps=at, noise=noise, batch_size=16_384)
    return {name: estimate(terms[form], at, world.alphas_cumprod, form=form, t_min=t_min).value for name, (form, t_min) in RENOISED.items()}


def over_worlds(
    make: Callable[..., MixtureWorld], measure: Callable[..., pd.DataFrame], *, worlds: int, n: int = 20_000, times: tuple[float, float] | None = None
) -> pd.DataFrame:  # fmt: skip
    """The tables of `measure(world, seed=s)` for the worlds `make(seed=s)`, s from 0; `start` and `exact` by `n` samples of each world.

    `exact` is the MI of z_0 less that of z_T; with `times` (low, high) of a flow, that of z_low less that of z_high.
    """

    def part(seed: int) -> pd.DataFrame:
        world = make(seed=seed)
        start = _information(world, n, seed)
        if times is None:
            exact = start - _information(world, n, seed, timestep=len(world.alphas_cumprod) - 1)
        else:
            exact = _information(world, n, seed, time=times[0]) - _information(world, n, seed, time=times[1])
        return measure(world, seed=seed).assign(world=seed, start=start, exact=exact)

    with side_by_side("cpu") as each:
        table = pd.concat(each(part, range(worlds)), ignore_index=True)
    return table.assign(unit=table["world"].astype(str) + ":" + table["prompt"].astype(str))


def shares(world: MixtureWorld, edges: Sequence[int], *, images: int, timesteps: int, seed: int = 0) -> pd.DataFrame:
    """What the timesteps edges[i] <= t < edges[i + 1] hold of kappa, of the mean of the orthogonal form, and of the variance of the standard one.

    Each column is a share of its sum over t; variances are over noise and exact samples, at each timestep by itself.
    """
    prompts, at = [i % len(world.means) for i in range(images)], renoised_timesteps(len(world.alphas_cumprod), timesteps)
    latents, generator = world.draw(prompts, noise_generator(seed, "drawn", 0)), noise_generator(seed, "renoised", 0)
    noise = torch.randn((images, timesteps, *world.latent_shape), generator=generator)
    terms = renoised_terms(world, latents, world.encode(prompts), world.null, timesteps=at, noise=noise, batch_size=16_384)
    profile = {form: estimate(terms[form], at, world.alphas_cumprod, form=form).profile for form in ("orthogonal", "standard")}
    every = torch.arange(len(world.alphas_cumprod))
    sources = {"kappa": (every, kappa(world.alphas_cumprod, every))}
    sources |= {"orthogonal": (at, profile["orthogonal"].mean(0)), "standard": (at, profile["standard"].var(0))}
    ranges = [f"{low} <= t < {high}" for low, high in pairwise(edges)]
    held = {name: [float(value[(t >= low) & (t < high)].sum() / value.sum()) for low, high in pairwise(edges)] for name, (t, value) in sources.items()}
    return pd.DataFrame(held, index=ranges)


def _information(world: MixtureWorld, n: int, seed: int, **at: float) -> float:
    """MI at a `timestep` or a `time`, by the same `n` samples wherever it is asked."""
    return world.information(n=n, generator=noise_generator(seed, "exact", 0), **at)[0]


def _drawn(world: MixtureWorld, images: int, seed: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Prompts in turn, images drawn for them, and the components that these show."""
    prompts, generator = [i % len(world.means) for i in range(images)], noise_generator(seed, "drawn", 0)
    components = world.captioned(prompts, generator)
    return prompts, world.around(components, generator), components


def _table(world: MixtureWorld, prompts: Sequence[int], latents: torch.Tensor, components: torch.Tensor, values: dict[str, torch.Tensor]) -> pd.DataFrame:
    columns = {"prompt": prompts, "aligned": components.numpy() == np.asarray(prompts), "log_ratio": world.log_ratio(latents, prompts).double()}
    return pd.DataFrame(columns | values)


# ---------------------------------------------------------------- two components


class Prediction(NamedTuple):
    """Of the orthogonal form, its noise averaged out, in a world of two components: means in nats, correlation with the log-ratio, AUC."""

    aligned: float
    misaligned: float
    correlation: float
    auc: float


def evidence(world: MixtureWorld, timestep: int | None = None) -> float:
    """D = abar |mu_1 - mu_0|^2 / v of two components at a timestep, or at z_0."""
    abar = 1.0 if timestep is None else float(world.alphas_cumprod[timestep])
    distance = float((world.means[1] - world.means[0]).double().square().sum())
    return abar * distance / (abar * world.std**2 + 1 - abar)


def at_logits(world: MixtureWorld, logits: torch.Tensor) -> torch.Tensor:
    """Latents z_0 (N, C, H, W) on the line through two means at which log N(z_0; mu_0) / N(z_0; mu_1) takes the values `logits` (N,)."""
    first, second = world.means
    return (first + second) / 2 + (first - second) * (logits / evidence(world)).reshape(-1, 1, 1, 1)


def squared_gap(logit, caption_error: float) -> np.ndarray:
    """g(l) = (sigmoid(l + log((1 - e) / e)) - sigmoid(l))^2: how far the posteriors with and without the prompt lie apart; even about -log((1 - e) / e) / 2."""
    unconditional = 1 / (1 + np.exp(-np.asarray(logit, dtype=float)))
    conditional = (1 - caption_error) * unconditional / ((1 - caption_error) * unconditional + caption_error * (1 - unconditional))
    return (conditional - unconditional) ** 2


def height(logit, caption_error: float) -> np.ndarray:
    """log r(l) = log 2 ((1 - e) sigmoid(l) + e sigmoid(-l)): the log-ratio of an image of logit l, nats."""
    logit = np.asarray(logit, dtype=float)
    return np.log(2 * ((1 - caption_error) / (1 + np.exp(-logit)) + caption_error / (1 + np.exp(logit))))


def expected_standard(logit, caption_error: float, *, low: float, high: float, nodes: int = 40) -> np.ndarray:
    """log r(l_0) - E log r(l_0 low / high + sqrt(low (1 - low / high)) n), nats: the standard form of an image of last logit l_0 (N,), n as below."""
    n, weights = np.polynomial.hermite_e.hermegauss(nodes)
    bridge = np.asarray(logit, dtype=float)[..., None] * low / high + math.sqrt(low * (1 - low / high)) * n
    return height(logit, caption_error) - height(bridge, caption_error) @ weights / math.sqrt(2 * math.pi)


def expected_orthogonal(logit, caption_error: float, *, low: float, high: float, steps: int = 200, nodes: int = 40) -> np.ndarray:
    """f(l_0) = 1/2 int_low^high E g(l_0 D / high + sqrt(D (1 - D / high)) n) dD, nats: the orthogonal form of an image of last logit l_0 (N,).

    Midpoints in D, Gauss-Hermite in n ~ N(0, 1).
    """
    at = low + (np.arange(steps) + 0.5) * (high - low) / steps
    n, weights = np.polynomial.hermite_e.hermegauss(nodes)
    bridge = np.asarray(logit, dtype=float)[..., None, None] * (at / high)[:, None] + np.sqrt(at * (1 - at / high))[:, None] * n
    return (squared_gap(bridge, caption_error) @ weights).mean(-1) / math.sqrt(2 * math.pi) * (high - low) / 2


def predict(caption_error: float, *, low: float, high: float, points: int = 201) -> Prediction:
    """What `expected_orthogonal` implies for images of one prompt: l_0 ~ N(+-high / 2, high), misaligned at rate `caption_error`, 0 to 1/2.

    Without misaligned images their mean and the AUC are those in the limit of a vanishing rate.
    """
    logit = np.linspace(-high / 2 - 5 * math.sqrt(high), high / 2 + 5 * math.sqrt(high), points)
    value = expected_orthogonal(logit, caption_error, low=low, high=high)
    aligned, misaligned = (_normalised(np.exp(-((logit - sign * high / 2) ** 2) / (2 * high))) for sign in (1, -1))
    ratio = height(logit, caption_error)
    both = (1 - caption_error) * aligned + caption_error * misaligned
    centred = [column - both @ column for column in (value, ratio)]
    correlation = both @ (centred[0] * centred[1]) / math.sqrt((both @ centred[0] ** 2) * (both @ centred[1] ** 2))
    above = np.sign(value[:, None] - value[None]) / 2 + 0.5
    return Prediction(float(aligned @ value), float(misaligned @ value), float(correlation), float(aligned @ above @ misaligned))


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()
