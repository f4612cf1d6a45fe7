"""Stage `merging`: one model for several categories, merged from their adapters or trained on the union of their sets, on the test prompts of each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from mitune import merging
from mitune.adapters import ADAPTER_FILE
from mitune.artifacts import Results, read_table, read_tensors, write_table, write_tensors
from mitune.memo import shared
from mitune.models import load
from mitune.pipelines import DTYPES, LatentDiffusion
from mitune.recipes import Merge, recipes
from mitune.stages import finetune, weights, with_denoiser
from mitune.stages.cell import SAME
from mitune.stages.steps import Prepared, adapter, candidates, evaluation, fitted, keep


def build(params, key: str) -> pd.DataFrame:
    """Write what `Results.cell` lists, and return the table of evaluated images (schema `merged`)."""
    recipe, place = recipes(params, "merging")[key], Results(params.model).cell("merging", key)
    params, images, layers = with_denoiser(params, recipe.unet), [], []
    for seed in recipe.seeds:
        own, latents, captions = zip(*(single(params, recipe, category, seed) for category in recipe.categories), strict=True)
        joint = adapter(params, recipe, torch.cat(latents), list(itertools.chain(*captions)), seed=seed) if recipe.merge == "joint" else None
        folder = merged(params, recipe, own, joint)
        layers.append(read_table(folder / "layers.parquet", "layers").assign(seed=seed))
        deltas = folder / "deltas.safetensors"
        prepared = Prepared(partial(opened, params, deltas), (deltas,))
        for category, trained in zip(recipe.categories, own, strict=True):
            table = evaluation(params, recipe, category, prepared=prepared).assign(seed=seed)
            others = {"base": evaluation(params, recipe, category), "own": evaluation(params, recipe, category, trained)}
            for name, other in others.items():
                scores = other[[*SAME, "judge", "similarity"]].rename(columns={score: f"{name}_{score}" for score in ("judge", "similarity")})
                table = table.merge(scores, on=SAME, validate="one_to_one")
            images.append(table)
    table = pd.concat(images, ignore_index=True)
    write_table(table, place / "images.parquet", "merged")
    write_table(pd.concat(layers, ignore_index=True), place / "layers.parquet", "layers")
    return table


def single(params, recipe: Merge, category: str, seed: int) -> tuple[Path, torch.Tensor, list[str]]:
    """The adapter of one category, and the images (N, C, H, W) and captions that it was trained on: the pipeline's, where the recipe names an arm."""
    if recipe.arm:
        return Results(params.model).adapter(category, recipe.arm), *finetune.kept(params, category, recipe.arm)
    recipe = fitted(params, recipe, category)
    chosen, latents = keep(candidates(params, recipe, category), recipe, seed=params.seed, draw=seed)
    captions = list(chosen["prompt"])
    return adapter(params, recipe, latents, captions, seed=seed), latents, captions


def merged(params, recipe: Merge, adapters: Sequence[Path], joint: Path | None) -> Path:
    """A folder with `deltas.safetensors`, what the merged, or jointly trained, model adds to the base's weights, and `layers.parquet`, as `merging.describe`
    tells it."""

    def make(folder: Path) -> None:
        models = [_attached(params, one) for one in adapters]
        several = [merging.deltas(model) for model in models]
        if joint:
            result = merging.deltas(_attached(params, joint))
        elif recipe.merge == "ties":
            result = merging.ties(several, recipe.density)
        elif recipe.merge == "adapters":
            result = merging.averaged(models, recipe.shares)
        else:
            result = merging.linear(several, recipe.shares)
        base = {name: layer.base_layer.weight.detach() for name, layer in merging.adapted_layers(models[0]).items()}
        write_tensors(result, folder / "deltas.safetensors")
        write_table(pd.DataFrame(merging.describe(base, several, result, recipe.shares)).assign(seed=0), folder / "layers.parquet", "layers")

    files = [one / ADAPTER_FILE for one in (*adapters, *([joint] if joint else []))]
    return shared("merged", *weights(params).values(), params.device, recipe.merge, recipe.shares, recipe.density, files, make=make)


def opened(params, deltas: Path) -> LatentDiffusion:
    """The base with these changes of its weights, in float32 like a fused adapter, before its dtype is applied."""
    model = load(**weights(params), device=params.device)
    merging.add(model, read_tensors(deltas))
    torch.nn.Module.to(model.network, DTYPES[params.dtype])  # diffusers' own `to` warns of a list of exceptions that is empty
    return model


def _attached(params, folder: Path) -> LatentDiffusion:
    return load(**weights(params), device=params.device, adapter=folder, fuse=False)
