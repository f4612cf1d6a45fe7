"""Stage `evaluate`: alignment of the base and of every adapter on prompts that no set has seen, from the same noise."""

from __future__ import annotations

import pandas as pd
import torch

from mitune.artifacts import Results, write_table, write_tensors
from mitune.memo import scratch
from mitune.pixels import eight_bit
from mitune.sampling import noise_generator, sample
from mitune.shards import progress, shards
from mitune.stages import has_split, open_model, read_prompts, weights
from mitune.stages.judging import image_rows, judges_key, open_judges


def build(params, category: str) -> pd.DataFrame:
    """Write `evaluation/{category}/images.parquet`, a row an image, and `grids.safetensors`, the first images of the first prompts (uint8)."""
    results, config, judges = Results(params.model), params.evaluate, open_judges(params, category)
    asked = {"test": config.n_prompts, "comp": config.comp_prompts if has_split(params, category, "comp") else 0}
    splits = {split: read_prompts(params, category, split)[:n] for split, n in asked.items() if n}
    arms = ("base", *params.arms)
    total = len(arms) * len(config.guidance_scales) * sum(map(len, splits.values()))
    frames, grids = [], {}
    key = (config, params.seed, params.dtype, *weights(params).values(), *judges_key(params, category), *(results.adapter(category, arm) for arm in arms[1:]))
    with scratch(f"evaluate-{category}", *key) as folder, progress(total, f"evaluate {category}", unit="prompt") as bar:
        for arm in arms:
            model = open_model(params, adapter=None if arm == "base" else results.adapter(category, arm))
            for split, items in splits.items():
                for scale in config.guidance_scales:
                    place = folder / f"{arm}-{split}-{scale}"
                    compute = evaluator(model, judges, config, scale, params.seed)
                    values = shards(place, items, config.shard_prompts, compute, device=params.device, progress=bar)
                    kept = values.pop("picture")
                    if split == "test":
                        grids[f"{arm}/{scale}"] = kept[: config.grid_prompts]
                    frames.append(tabulate(values, items, judges[0]).assign(category=category, arm=arm, split=split, guidance_scale=scale))
        table = pd.concat(frames, ignore_index=True)
        write_tensors(grids, results.grids(category))
        write_table(table, results.images(category), "images")
    return table


def evaluator(model, judges, config, guidance_scale: float, seed: int):
    """For prompts: both alignment scores and the failure (n, images), the similarity model's features (n, images, d), float16, and the first image
    (n, 3, H, W) as uint8."""

    def compute(items) -> dict[str, torch.Tensor]:
        rows = [(item, image) for item in items for image in range(config.images)]
        samples = sample(
            model, model.encode([item.text for item in items])[torch.arange(len(items)).repeat_interleave(config.images)], model.null,
            guidance_scale=guidance_scale, num_inference_steps=config.num_inference_steps, variance=model.variance, batch_size=config.batch_size,
            generators=[noise_generator(seed, item.text, image) for item, image in rows],
        )  # fmt: skip
        images, texts = model.decode(samples.latents), [item.text for item, _ in rows]
        scores, failures = judges[0].assess(images, texts)
        values = {"judge": scores, "similarity": judges[1].score(images, texts)}
        values["failure"] = torch.tensor([judges[0].FAILURES.index(failure) for failure in failures])
        values["features"] = judges[1].features(images).half().cpu()
        shaped = {name: value.unflatten(0, (len(items), config.images)) for name, value in values.items()}
        return shaped | {"picture": eight_bit(images).unflatten(0, (len(items), config.images))[:, 0]}

    return compute


def tabulate(values: dict[str, torch.Tensor], items, judge) -> pd.DataFrame:
    """A row an image of what `evaluator` computes."""
    table = image_rows(items, values["judge"].shape[1])
    failure = [judge.FAILURES[k] for k in values["failure"].flatten().tolist()]
    return table.assign(judge=values["judge"].flatten().double().numpy(), similarity=values["similarity"].flatten().double().numpy(), failure=failure)
