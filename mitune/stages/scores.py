"""Stage `scores`: each estimator's point-wise MI and the alignment scores of every candidate of the pools."""

from __future__ import annotations

import pandas as pd
import torch

from mitune.artifacts import Results, read_tensors, write_table, write_tensors
from mitune.information import FORMS, query, renoised_terms, renoised_timesteps
from mitune.memo import scratch
from mitune.sampling import noises
from mitune.shards import progress, shards
from mitune.stages import open_model, read_prompts, weights
from mitune.stages.judging import image_rows, judged, judges_key, open_judges


def build(params, category: str) -> pd.DataFrame:
    """Write the re-noised terms of each split and the table `scores.parquet`, which is returned."""
    model, judges, results = open_model(params), open_judges(params, category), Results(params.model)
    timesteps = renoised_timesteps(len(model.alphas_cumprod), params.renoise.timesteps).repeat(params.renoise.noises)
    frames = []
    for split, n in params.pool.n_prompts.items():
        items = read_prompts(params, category, split)[:n]
        pool = read_tensors(results.pool(category, split))
        compute = _scorer(model, judges, items, pool["latents"], timesteps, params)
        key = (params.renoise, params.seed, params.dtype, pool["latents"], *weights(params).values(), *judges_key(params, category))
        with scratch(f"scores-{category}-{split}", *key) as folder, progress(len(items), f"scores {category} {split}", unit="prompt") as bar:
            terms = shards(folder, range(len(items)), params.pool.shard_prompts, compute, device=params.device, progress=bar)
            renoised = {f"renoised_{name}": terms[name] for name in FORMS if name in terms} | {"renoised_timesteps": timesteps}
            write_tensors(renoised, results.terms(category, split))
        frames.append(_table(params, category, split, items, pool | renoised, terms, model.alphas_cumprod))
    table = pd.concat(frames, ignore_index=True)
    write_table(table, results.scores(category), "scores")
    return table


def _scorer(model, judges, items, latents, timesteps, params):
    """For rows of prompts: the re-noised terms (n, M, R), the noise common to a prompt's candidates, and the alignment scores (n, M)."""

    def compute(rows) -> dict[str, torch.Tensor]:
        texts, m = [items[row].text for row in rows], latents.shape[1]
        own = torch.arange(len(rows)).repeat_interleave(m)
        candidates = latents[list(rows)].flatten(0, 1)
        noise = noises([(text, 0) for text in texts], len(timesteps), model.latent_shape, seed=params.seed, stream="renoise")
        terms = renoised_terms(
            model, candidates, model.encode(texts)[own], model.null,
            timesteps=timesteps, noise=noise[own], inner_product=model.flow, batch_size=params.pool.batch_size,
        )  # fmt: skip
        scores = judged(judges, model.decode(candidates), [texts[i] for i in own])
        return {name: values.float().unflatten(0, (len(rows), m)) for name, values in (terms | scores).items()}

    return compute


def _table(params, category, split, items, terms, scores, alphas_cumprod) -> pd.DataFrame:
    columns = {name: scores[name].double() for name in ("judge", "similarity")}
    for name, estimator in params.estimators.items():
        result = query(estimator, terms, alphas_cumprod)
        columns |= {name: result.value, f"{name}_se": result.standard_error}
    table = image_rows(items, scores["judge"].shape[1]).assign(category=category, split=split)
    return table.assign(**{name: values.flatten().numpy() for name, values in columns.items()})
