"""Stage `cell`: one cell of a study, from the pool to the evaluation, for each category and fine-tuning seed."""

from __future__ import annotations

import shutil

import pandas as pd
import torch

from mitune import processes
from mitune.adapters import ADAPTER_FILE
from mitune.artifacts import Results, no_rows, read_json, write_json, write_table, write_tensors
from mitune.recipes import recipes
from mitune.stages import lacks, several_text_encoders, with_denoiser
from mitune.stages.steps import evaluation, examined, features, reference, tuned

PARTS = ("pool", "scores", "finetune")  # whose seconds are kept
SAME = ["category", "split", "guidance_scale", "prompt_id", "prompt", "image", "scene"]


def build(params, study: str, key: str) -> pd.DataFrame:
    """Write what `Results.cell` lists, and return the table of evaluated images (schema `cell`).

    `seconds.json` is apart from the rest: times differ from run to run, everything else does not. A cell that takes what the model lacks leaves tables without
    rows.
    """
    recipe, place = recipes(params, study)[key], Results(params.model).cell(study, key)
    if lacks(params, recipe) or (recipe.text_encoder and several_text_encoders(params)):
        return _left_out(recipe, place)
    params = with_denoiser(params, recipe.unet)
    images, seen, sets, costs, times = [], [], [], [], {part: {} for part in PARTS}
    references: dict[str, torch.Tensor] = {}
    splits = ("test", "val") if recipe.val_prompts else ("test",)
    for category in recipe.categories:
        for split in splits:
            references |= {f"{name}/{category}/{split}": values for name, values in reference(params, recipe, category, split=split).items()}
        for seed in recipe.seeds:
            model = tuned(params, recipe, category, seed=seed)
            sets.append(model.kept.assign(category=category, seed=seed))
            size = read_json(model.adapters[-1] / "size.json")["parameters"]
            costs.append({"category": category, "seed": seed, "parameters": size} | model.evaluations)
            for part, named in model.seconds.items():
                times[part] |= named
            for number, trained in enumerate(model.adapters, start=1):
                _copy(trained / ADAPTER_FILE, place / "adapters" / (f"{category}-{seed}-{number}" if number > 1 else f"{category}-{seed}"))
            for split in splits:
                images.append(_paired(params, recipe, category, split, model.adapters).assign(seed=seed))
                base = features(params, recipe, category, split=split)
                seen.append({"images": features(params, recipe, category, *model.adapters, split=split), "base": base})
    table = pd.concat(images, ignore_index=True)
    write_table(table, place / "images.parquet", "cell")
    write_tensors({name: torch.cat([part[name] for part in seen]) for name in ("images", "base")} | references, place / "features.safetensors")
    write_table(pd.concat(sets, ignore_index=True), place / "sets.parquet", "kept")
    write_table(pd.DataFrame(costs), place / "costs.parquet", "costs")
    if recipe.examine_pool:
        pools = [examined(params, recipe, category) for category in recipe.categories]
        write_table(pd.concat(pools, ignore_index=True), place / "pool.parquet", "scores")
    write_json(times, place / "seconds.json")
    return table


def _left_out(recipe, place) -> pd.DataFrame:
    tables = {"images": "cell", "sets": "kept", "costs": "costs"} | ({"pool": "scores"} if recipe.examine_pool else {})
    for name, schema in tables.items():
        write_table(no_rows(schema), place / f"{name}.parquet", schema)
    write_tensors({}, place / "features.safetensors")
    write_json({part: {} for part in PARTS}, place / "seconds.json")
    (place / "adapters").mkdir(parents=True, exist_ok=True)
    return no_rows("cell")


def _paired(params, recipe, category: str, split: str, adapters) -> pd.DataFrame:
    """The images of the fine-tuned model, each beside the base's of the same prompt and noise."""
    base = evaluation(params, recipe, category, split=split)
    base = base.rename(columns={name: f"base_{name}" for name in base.columns.difference(SAME)})
    return evaluation(params, recipe, category, *adapters, split=split).merge(base, on=SAME, validate="one_to_one")


def _copy(file, folder) -> None:
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / file.name)
