"""Does a lower precision rank as float32 does? (`python -m mitune.precision`) The agreement of MI over the candidates of a prompt, by dtype."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import stats

from mitune import config
from mitune.denoisers import Conditioning, Denoiser
from mitune.information import estimate, renoised_terms, renoised_timesteps
from mitune.pipelines import DTYPES
from mitune.prompts import Prompt
from mitune.sampling import noises
from mitune.stages import open_model, read_prompts
from mitune.stages.pool import sampler

FORMS = ("orthogonal", "standard")


def scores(denoiser: Denoiser, latents: torch.Tensor, conditioning: Conditioning, null: Conditioning, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """Re-noised MI (n, M) of each form, of candidates (n, M, C, H, W) of n prompts with the noise (n, R, C, H, W) common to a prompt's."""
    n, m = latents.shape[:2]
    own, timesteps = torch.arange(n).repeat_interleave(m), renoised_timesteps(len(denoiser.alphas_cumprod), noise.shape[1])
    terms = renoised_terms(denoiser, latents.flatten(0, 1), conditioning[own], null, timesteps=timesteps, noise=noise[own], batch_size=16)
    return {form: estimate(terms[form], timesteps, denoiser.alphas_cumprod, form=form).value.unflatten(0, (n, m)) for form in FORMS}


def agreement(reference: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Of MI (n, M) by two precisions, means over prompts: Kendall's tau-b, Spearman's rho, the share whose first image is the same; and the largest
    difference over the mean spread within a prompt.

    Raises:
        ValueError: values that are not finite, as an overflow leaves them.
    """
    if not other.isfinite().all():
        raise ValueError(f"{int((~other.isfinite()).sum())} of {other.numel()} values are not finite: the precision overflows; use bfloat16 or float32")
    pairs = list(zip(reference.double().numpy(), other.double().numpy(), strict=True))
    return {
        "tau": float(np.mean([stats.kendalltau(a, b).statistic for a, b in pairs])),
        "spearman": float(np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])),
        "same_first": float(np.mean([a.argmax() == b.argmax() for a, b in pairs])),
        "difference": float((reference - other).abs().max() / reference.std(1).mean()),
    }


def compare(found: Mapping[str, Mapping[str, torch.Tensor]]) -> list[dict[str, str | float]]:
    """A row a dtype and form: `agreement` of `found[dtype][form]` with that of float32."""
    return [
        {"dtype": dtype, "form": form, **agreement(found["float32"][form], values[form])}
        for dtype, values in found.items()
        if dtype != "float32"
        for form in FORMS
    ]


def measured(params, items: Sequence[Prompt], dtypes: Sequence[str]) -> list[dict[str, str | float]]:
    """`compare` for the project's model: `pool.M` candidates of each prompt, made in float32, at `renoise.timesteps` noises common to all dtypes."""
    found, texts = {}, [item.text for item in items]
    for dtype in ("float32", *dtypes):
        model = open_model(config.Declared(vars(params) | {"dtype": dtype}))
        if dtype == "float32":
            latents = sampler(model, params.pool, params.pool.guidance_scale, params.seed)(items)["latents"]
            noise = noises([(text, 0) for text in texts], params.renoise.timesteps, model.latent_shape, seed=params.seed, stream="renoise")
        found[dtype] = scores(model, latents, model.encode(texts), model.null, noise)
    return compare(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4, help="prompts of the first category (default: 4)")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(set(DTYPES) - {"float32"}), default=["bfloat16", "float16"])
    arguments, params = parser.parse_args(), config.load()
    items = read_prompts(params, params.categories[0], "train", arguments.prompts)
    print(f"{params.model}, {len(items)} prompts x {params.pool.M} candidates x {params.renoise.timesteps} noises on {params.device}, against float32:")
    for row in measured(params, items, arguments.dtypes):
        tau, first = f"tau {row['tau']:.3f}  Spearman {row['spearman']:.3f}", f"same first image {row['same_first']:.0%}"
        print(f"{row['dtype']:9s} {row['form']:11s} {tau}  {first}  largest difference {row['difference']:.1%} of the spread within a prompt")


if __name__ == "__main__":
    main()
