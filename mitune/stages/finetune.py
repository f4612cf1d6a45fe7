"""Stage `finetune`: one adapter for each arm, trained on the images that the arm keeps."""

from __future__ import annotations

import pandas as pd

from mitune.artifacts import Results, progress, read_table, read_tensors, scratch, write_table
from mitune.finetuning import finetune, remove_adapter
from mitune.stages import open_model


def build(params, category: str) -> pd.DataFrame:
    """Write `adapters/{category}/{arm}/pytorch_lora_weights.safetensors` for each arm, and all training curves, which are returned."""
    model, results, config = open_model(params), Results(params.model), params.finetune
    sets, pool = read_table(results.sets(category), "sets"), read_tensors(results.pool(category, "train"), ["latents", "prompt_ids"])
    row = {prompt_id: n for n, prompt_id in enumerate(pool["prompt_ids"].tolist())}
    curves = []
    total = len(config.arms) * config.steps
    with scratch(f"finetune-{category}", config, pool["latents"]) as folder, progress(total, f"finetune {category}", unit="step") as bar:
        for arm in config.arms:
            kept = sets[(sets["arm"] == arm) & (sets["draw"] == 0)]
            latents = pool["latents"][[row[prompt_id] for prompt_id in kept["prompt_id"]], kept["image"].to_list()]
            steps = finetune(model, latents, model.encode(list(kept["prompt"])), config, seed=config.seed, folder_checkpoints=folder, progress=bar.update)
            model.save_adapter(results.adapter(category, arm), dtype=config.save_dtype)
            remove_adapter(model)
            curves.append(pd.DataFrame(steps).assign(category=category, arm=arm))
    table = pd.concat(curves, ignore_index=True)
    write_table(table, results.curves(category), "curves")
    return table
