"""Does a lower precision rank as float32 does? (`python -m mitune.precision`) The agreement of MI over the candidates of a prompt, by estimator."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import stats

from mitune import commands, config, probe
from mitune.information import query, renoised_terms, renoised_timesteps
from mitune.pipelines import LatentDiffusion
from mitune.prompts import Prompt
from mitune.sampling import noises
from mitune.stages import open_model, read_prompts
from mitune.stages.pool import sampler

PRECISIONS = ("bfloat16", "float16", "tf32")
HEAD = "| precision | estimator | tau | Spearman's rho | same first image | largest difference, of the spread within a prompt |\n|---|---|--:|--:|--:|--:|"


def scores(model: LatentDiffusion, params, items: Sequence[Prompt], latents: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of n prompts `pool.M` candidates (n, M, C, H, W), and MI (n, M) by each estimator, as the stages `pool` and `scores` have them.

    What is measured along the trajectory is of the model's own candidates, re-noised MI of `latents`, by default of its own too.
    """
    own, texts = sampler(model, params.pool, params.pool.guidance_scale, params.seed)(items), [item.text for item in items]
    z_0 = own["latents"] if latents is None else latents
    row = torch.arange(len(items)).repeat_interleave(params.pool.M)
    timesteps = renoised_timesteps(len(model.alphas_cumprod), params.renoise.timesteps).repeat(params.renoise.noises)
    noise = noises([(text, 0) for text in texts], len(timesteps), model.latent_shape, seed=params.seed, stream="renoise")
    renoised = renoised_terms(
        model, z_0.flatten(0, 1), model.encode(texts)[row], model.null, timesteps=timesteps, noise=lambda image: noise[row[image]],
        inner_product=model.flow, batch_size=params.pool.batch_size,
    )  # fmt: skip
    terms = own | {"timesteps": own["timesteps"][0], "renoised_timesteps": timesteps}
    terms |= {f"renoised_{form}": values.unflatten(0, z_0.shape[:2]) for form, values in renoised.items()}
    return own["latents"], {name: query(estimator, terms, model.alphas_cumprod).value for name, estimator in params.estimators.items()}


def agreement(reference: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Of MI (n, M) by two precisions, means over prompts: Kendall's tau-b, Spearman's rho, the share whose first image is the same; and the largest
    difference over the mean spread within a prompt."""
    pairs = list(zip(reference.double().numpy(), other.double().numpy(), strict=True))
    return {
        "tau": float(np.mean([stats.kendalltau(a, b).statistic for a, b in pairs])),
        "spearman": float(np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])),
        "same_first": float(np.mean([a.argmax() == b.argmax() for a, b in pairs])),
        "difference": float((reference - other).abs().max() / reference.std(1).mean()),
    }


def compare(found: Mapping[str, Mapping[str, torch.Tensor]]) -> list[dict[str, str | float]]:
    """A row a precision and estimator: `agreement` of `found[precision][estimator]` with that of float32."""
    others = {name: values for name, values in found.items() if name != "float32"}
    return [
        {"precision": name, "estimator": estimator, **agreement(found["float32"][estimator], mi)}
        for name, values in others.items()
        for estimator, mi in values.items()
    ]


def measured(params, items: Sequence[Prompt], precisions: Sequence[str]) -> list[dict[str, str | float]]:
    """`compare` for the model of the parameters; every precision re-noises the candidates that float32 has made, from the same noise.

    Raises ValueError for tf32 without an NVIDIA GPU, and for a precision that overflows.
    """
    if "tf32" in precisions and not params.device.startswith("cuda"):
        raise ValueError(f"tf32 is a precision of NVIDIA GPUs, and device is {params.device}; leave it out")
    latents, found = None, {}
    for precision in ("float32", *precisions):
        made, found[precision] = scores(_opened(params, precision), params, items, latents)
        latents = made if latents is None else latents
    return compare(found)


def _opened(params, precision: str) -> LatentDiffusion:
    tf32 = precision == "tf32"
    entry = replace(params.models[params.model], tf32=tf32)
    return open_model(config.Declared(vars(params) | {"dtype": "float32" if tf32 else precision, "models": params.models | {params.model: entry}}))


def table(rows: Sequence[Mapping[str, str | float]]) -> str:
    """In Markdown."""
    shown = (
        f"| {row['precision']} | {row['estimator']} | {row['tau']:.3f} | {row['spearman']:.3f} | {row['same_first']:.0%} | {row['difference']:.1%} |"
        for row in rows
    )
    return "\n".join([HEAD, *shown])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mitune.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=commands.count, default=4, help="prompts of the first category (default: 4)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: all, tf32 on an NVIDIA GPU alone")
    parser.add_argument("--write", action="store_true", help="write the table to bench/, named by the model and the device")
    chosen = parser.parse_args(arguments)
    try:
        params = config.load()
        items = read_prompts(params, params.categories[0], "train", chosen.prompts)
        rows = measured(params, items, chosen.precisions or [name for name in PRECISIONS if name != "tf32" or params.device.startswith("cuda")])
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    device, sizes = probe.device_name(params.device), f"{len(items)} prompts of {params.categories[0]} x {params.pool.M} candidates"
    about = (
        f"{sizes}, {params.renoise.timesteps * params.renoise.noises} noises, torch {torch.__version__}, against float32. Re-noised MI is of the same images, "
    )
    about += "MI along the trajectory of the candidates that each precision makes from the same noise."
    lines = [f"# Precision: {params.model} on {device}", "", about, "", table(rows)]
    print("\n".join(lines))
    if chosen.write:
        probe.keep(f"precision {params.model} {device}", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
