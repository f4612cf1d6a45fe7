"""Stage `finetune`: the adapter of one arm, trained on the images that the arm keeps."""

from __future__ import annotations

import pandas as pd
import torch

from mitune import processes
from mitune.artifacts import Results, read_table, read_tensors, write_table
from mitune.finetuning import finetune, read_captions
from mitune.memo import scratch
from mitune.shards import progress
from mitune.stages import open_model


def build(params, category: str, arm: str) -> pd.DataFrame:
    """Write `adapters/{category}/{arm}`: `pytorch_lora_weights.safetensors` and the training curve `curve.parquet`, which is returned."""
    model, results, config = open_model(params, dtype="float32"), Results(params.model), params.finetune
    latents, captions = kept(params, category, arm)
    name = f"finetune-{category}-{arm}"
    with scratch(name, config, latents) as folder, progress(config.steps, f"finetune {category} {arm}", unit="step") as bar:
        steps = finetune(model, latents, read_captions(model, captions, config), config, seed=config.seed, folder_checkpoints=folder, progress=bar.update)
        if processes.is_first():
            model.save_adapter(results.adapter(category, arm), dtype=config.save_dtype)
    curve = pd.DataFrame(steps).assign(category=category, arm=arm)
    write_table(curve, results.curve(category, arm), "curve")
    return curve


def kept(params, category: str, arm: str) -> tuple[torch.Tensor, list[str]]:
    """The images (N, C, H, W) that an arm keeps, of a random one the first draw, and their captions."""
    results = Results(params.model)
    sets, pool = read_table(results.sets(category), "sets"), read_tensors(results.pool(category, "train"), ["latents", "prompt_ids"])
    row = {prompt_id: n for n, prompt_id in enumerate(pool["prompt_ids"].tolist())}
    chosen = sets[(sets["arm"] == arm) & (sets["draw"] == 0)]
    return pool["latents"][[row[prompt_id] for prompt_id in chosen["prompt_id"]], chosen["image"].to_list()], list(chosen["prompt"])
