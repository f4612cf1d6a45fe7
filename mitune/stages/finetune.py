"""Stage `finetune`: the adapter of one arm, trained on the images that the arm keeps."""

from __future__ import annotations

import pandas as pd

from mitune.artifacts import Results, progress, read_table, read_tensors, scratch, write_table
from mitune.finetuning import finetune, read_captions
from mitune.stages import open_model


def build(params, category: str, arm: str) -> pd.DataFrame:
    """Write `adapters/{category}/{arm}`: `pytorch_lora_weights.safetensors` and the training curve `curve.parquet`, which is returned."""
    model, results, config = open_model(params), Results(params.model), params.finetune
    sets, pool = read_table(results.sets(category), "sets"), read_tensors(results.pool(category, "train"), ["latents", "prompt_ids"])
    row = {prompt_id: n for n, prompt_id in enumerate(pool["prompt_ids"].tolist())}
    kept = sets[(sets["arm"] == arm) & (sets["draw"] == 0)]
    latents = pool["latents"][[row[prompt_id] for prompt_id in kept["prompt_id"]], kept["image"].to_list()]
    name = f"finetune-{category}-{arm}"
    with scratch(name, config, latents) as folder, progress(config.steps, f"finetune {category} {arm}", unit="step") as bar:
        captions = read_captions(model, list(kept["prompt"]), config)
        steps = finetune(model, latents, captions, config, seed=config.seed, folder_checkpoints=folder, progress=bar.update)
        model.save_adapter(results.adapter(category, arm), dtype=config.save_dtype)
    curve = pd.DataFrame(steps).assign(category=category, arm=arm)
    write_table(curve, results.curve(category, arm), "curve")
    return curve
