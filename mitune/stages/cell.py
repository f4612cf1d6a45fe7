"""Stage `cell`: one cell of a study, from the pool to the evaluation, for each category and fine-tuning seed."""

from __future__ import annotations

import shutil

import pandas as pd

from mitune.artifacts import Results, read_json, read_tensors, write_json, write_table
from mitune.config import recipes
from mitune.models import ADAPTER_FILE
from mitune.stages.steps import adapter, candidates, evaluation, judged, keep, seconds

SAME = ["category", "guidance_scale", "prompt_id", "prompt", "image", "scene"]


def build(params, study: str, key: str) -> pd.DataFrame:
    """Write what `Results.cell` lists, and return the table of evaluated images (schema `cell`).

    `seconds.json` is apart from the rest: times differ from run to run, everything else does not.
    """
    recipe, place = recipes(params, study)[key], Results(params.model).cell(study, key)
    images, sets, costs, times = [], [], [], {"pool": {}, "scores": {}, "finetune": {}}
    for category in recipe.categories:
        base = evaluation(params, recipe, category)
        base = base.rename(columns={name: f"base_{name}" for name in base.columns.difference(SAME)})
        pool = candidates(params, recipe, category)
        times["pool"][category], times["scores"][category] = pool.seconds["pool"], pool.seconds["scores"]
        for seed in recipe.seeds:
            chosen, latents = keep(pool, recipe, seed=params.seed, draw=seed)
            alignment = read_tensors(judged(params, latents, list(chosen["prompt"])) / "block.safetensors")
            sets.append(chosen.assign(category=category, seed=seed, **{name: values.double().numpy() for name, values in alignment.items()}))
            trained = adapter(params, recipe, latents, list(chosen["prompt"]), seed=seed)
            size = read_json(trained / "size.json")["parameters"]
            costs.append({"category": category, "seed": seed, "parameters": size} | pool.evaluations)
            times["finetune"][f"{category}-{seed}"] = seconds(trained)
            to = place / "adapters" / f"{category}-{seed}"
            to.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(trained / ADAPTER_FILE, to / ADAPTER_FILE)
            images.append(evaluation(params, recipe, category, trained).merge(base, on=SAME, validate="one_to_one").assign(seed=seed))
    table = pd.concat(images, ignore_index=True)
    write_table(table, place / "images.parquet", "cell")
    write_table(pd.concat(sets, ignore_index=True), place / "sets.parquet", "kept")
    write_table(pd.DataFrame(costs), place / "costs.parquet", "costs")
    write_json(times, place / "seconds.json")
    return table
