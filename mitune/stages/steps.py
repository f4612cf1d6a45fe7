"""The steps from a recipe to a fine-tuned and evaluated model, each computed once, whichever cell of whichever study needs it first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from mitune.artifacts import progress, read_json, read_table, read_tensors, shards, shared, write_json, write_table, write_tensors
from mitune.config import Recipe
from mitune.finetuning import finetune, read_captions, trained_parameters
from mitune.information import estimate, renoised_terms, renoised_timesteps
from mitune.models import ADAPTER_FILE
from mitune.prompts import Prompt
from mitune.sampling import noises
from mitune.selection import select, select_random
from mitune.stages import judging, open_model, path, read_prompts
from mitune.stages.evaluate import evaluator, tabulate
from mitune.stages.pool import sampler


@dataclass(frozen=True)
class Candidates:
    """The pool of a recipe: of n prompts, latents (n, M, C, H, W), the score (n, M) by which images are kept (None for random), and their cost."""

    prompts: list[Prompt]
    latents: torch.Tensor
    score: torch.Tensor | None
    evaluations: dict[str, int]
    seconds: dict[str, float]


def candidates(params, recipe: Recipe, category: str) -> Candidates:
    """The first M images of each training prompt, from the blocks of a pool without end, and their scores."""
    items = read_prompts(params, category, "train", recipe.n_prompts)
    blocks = [_pool_block(params, recipe, category, items, first) for first in range(0, recipe.M, recipe.block)]
    scored = [] if recipe.select == "random" else [_score_block(params, recipe, items, block) for block in blocks]
    latents, score = ([read_tensors(folder / "block.safetensors")[name] for folder in of] for name, of in (("latents", blocks), ("score", scored)))
    return Candidates(
        items, torch.cat(latents, 1)[:, : recipe.M], torch.cat(score, 1)[:, : recipe.M] if score else None,
        evaluations={"pool": 2 * len(items) * recipe.M * params.pool.num_inference_steps, "scores": 2 * len(items) * recipe.M * _times(params, recipe.select)},
        seconds={"pool": sum(map(seconds, blocks)), "scores": sum(map(seconds, scored))},
    )  # fmt: skip


def keep(pool: Candidates, recipe: Recipe, *, seed: int, draw: int) -> tuple[pd.DataFrame, torch.Tensor]:
    """The set (prompt_id, prompt, image, why) and its latents (n k, C, H, W), by the recipe's rule; `seed` and `draw` matter to a random one alone."""
    n, m = pool.latents.shape[:2]
    columns = {"row": range(n), "prompt_id": [item.prompt_id for item in pool.prompts], "prompt": [item.text for item in pool.prompts]}
    table = pd.DataFrame({name: [value for value in values for _ in range(m)] for name, values in columns.items()}).assign(image=list(range(m)) * n)
    if pool.score is None:
        chosen = select_random(table, recipe.k, seed, draw)
    else:
        chosen = select(table.assign(**{recipe.select: pool.score.flatten().double().numpy()}), recipe.select, recipe.k)
    first = table.drop_duplicates("prompt_id").set_index("prompt_id")
    rows = first["row"].loc[chosen["prompt_id"]].to_list()
    return chosen.assign(prompt=first["prompt"].loc[chosen["prompt_id"]].to_numpy()), pool.latents[rows, chosen["image"].to_list()]


def adapter(params, recipe: Recipe, latents: torch.Tensor, captions: Sequence[str], *, seed: int) -> Path:
    """A folder with the adapter trained on these images (N, C, H, W) and captions, and `size.json`, how many `parameters` were trained."""

    def make(folder: Path) -> None:
        model = open_model(params)
        with progress(recipe.steps, f"finetune seed {seed}", unit="step") as bar:
            conditioning = read_captions(model, captions, recipe)
            finetune(model, latents, conditioning, recipe.tuning, seed=seed, folder_checkpoints=folder / "work", progress=bar.update)
        model.save_adapter(folder, dtype=recipe.save_dtype)
        write_json({"parameters": sum(parameter.numel() for parameter in trained_parameters(model).values())}, folder / "size.json")

    return shared("adapter", *_base(params), recipe.tuning, seed, latents, list(captions), make=make)


def evaluation(params, recipe: Recipe, category: str, trained: Path | None = None) -> pd.DataFrame:
    """Alignment of the model with an adapter, or of the base, on the test prompts (schema `evaluated`), at every guidance scale from the same noise."""
    items = read_prompts(params, category, "test")[: recipe.test_prompts]
    config = replace(params.evaluate, images=recipe.test_images)

    def make(folder: Path) -> None:
        model, judges, frames = open_model(params, adapter=trained), judging.open_judges(params), []
        with progress(len(items) * len(config.guidance_scales), f"evaluate {category}", unit="prompt") as bar:
            for scale in config.guidance_scales:
                compute = evaluator(model, judges, config, scale, params.seed)
                values = shards(folder / "work" / str(scale), items, config.shard_prompts, compute, device=params.device, progress=bar)
                frames.append(tabulate(values, items, judges[0]).assign(category=category, guidance_scale=scale))
        write_table(pd.concat(frames, ignore_index=True), folder / "images.parquet", "evaluated")

    weights = trained / ADAPTER_FILE if trained else None
    key = (*_base(params), *_judges(params), params.seed, config, category, [(item.prompt_id, item.text) for item in items], weights)
    return read_table(shared("evaluation", *key, make=make) / "images.parquet", "evaluated")


def judged(params, latents: torch.Tensor, captions: Sequence[str]) -> Path:
    """A folder whose `block.safetensors` has both alignment scores (N,) of images (N, C, H, W)."""

    def make(folder: Path) -> None:
        write_tensors(judging.judged(judging.open_judges(params), open_model(params).decode(latents), list(captions)), folder / "block.safetensors")

    return shared("judged", *_base(params), *_judges(params), latents, list(captions), make=make)


def seconds(folder: Path) -> float:
    """How long it took to make something shared."""
    return read_json(folder / "seconds.json")["seconds"]


# ---------------------------------------------------------------- blocks of a pool


def _pool_block(params, recipe: Recipe, category: str, items: list[Prompt], first: int) -> Path:
    """`block` images of each prompt from image `first` on, as stage `pool` makes them."""
    pool = replace(params.pool, M=recipe.block, guidance_scale=recipe.pool_guidance_scale)

    def make(folder: Path) -> None:
        compute = sampler(open_model(params), pool, pool.guidance_scale, params.seed, first)
        with progress(len(items), f"pool {category} from image {first}", unit="prompt") as bar:
            tensors = shards(folder / "work", items, pool.shard_prompts, compute, device=params.device, progress=bar)
        write_tensors(tensors | {"timesteps": tensors["timesteps"][0]}, folder / "block.safetensors")

    settings = (pool.M, pool.guidance_scale, pool.num_inference_steps, pool.shard_prompts, pool.batch_size)
    return shared("pool", *_base(params), params.seed, *settings, first, [(item.prompt_id, item.text) for item in items], make=make)


def _score_block(params, recipe: Recipe, items: list[Prompt], block: Path) -> Path:
    """`score` (n, block) of a block by the recipe's rule, and by no other. The block's name stands for all that its images depend on, the seed too."""
    rule, estimator = recipe.select, params.estimators.get(recipe.select)

    def make(folder: Path) -> None:
        tensors = read_tensors(block / "block.safetensors")
        latents = tensors["latents"]
        if estimator is None:
            captions = [item.text for item in items for _ in range(latents.shape[1])]
            score = read_tensors(judged(params, latents.flatten(0, 1), captions) / "block.safetensors")[rule].unflatten(0, latents.shape[:2])
        else:
            model = open_model(params)
            terms, timesteps = tensors.get(estimator.form), tensors["timesteps"]
            if estimator.latents == "renoised":
                timesteps = renoised_timesteps(len(model.alphas_cumprod), params.renoise.timesteps).repeat(params.renoise.noises)
                terms = _renoised(params, model, items, latents, timesteps, estimator, folder / "work")
                timesteps = timesteps[timesteps > estimator.t_min]
            options = {"form": estimator.form, "t_min": estimator.t_min, "variant": estimator.kappa or "paper"}
            score = estimate(terms.flatten(0, 1), timesteps, model.alphas_cumprod, **options).value.unflatten(0, latents.shape[:2])
        write_tensors({"score": score.float()}, folder / "block.safetensors")

    used = (params.renoise, params.pool.shard_prompts, params.pool.batch_size) if estimator and estimator.latents == "renoised" else ()
    judges = _judges(params) if estimator is None else ()
    return shared("scores", rule if estimator is None else estimator, *used, *judges, block.name, make=make)


def _renoised(params, model, items, latents, timesteps, estimator, work: Path) -> torch.Tensor:
    """The form's terms (n, block, R) at the timesteps that count, with the noise that stage `scores` draws for them."""
    counted = timesteps > estimator.t_min

    def compute(rows) -> dict[str, torch.Tensor]:
        texts, m = [items[row].text for row in rows], latents.shape[1]
        own = torch.arange(len(rows)).repeat_interleave(m)
        noise = noises([(text, 0) for text in texts], len(timesteps), model.latent_shape, seed=params.seed, stream="renoise")
        terms = renoised_terms(
            model, latents[list(rows)].flatten(0, 1), model.encode(texts)[own], model.null, timesteps=timesteps[counted], noise=noise[:, counted][own],
            batch_size=params.pool.batch_size,
        )[estimator.form]  # fmt: skip
        return {"terms": terms.unflatten(0, (len(rows), m))}

    with progress(len(items), f"scores by {estimator.form}", unit="prompt") as bar:
        return shards(work, range(len(items)), params.pool.shard_prompts, compute, device=params.device, progress=bar)["terms"]


def _times(params, rule: str) -> int:
    """How many noises the rule evaluates an image at: of T = 1000 timesteps those above t_min."""
    estimator = params.estimators.get(rule)
    if estimator is None or estimator.latents != "renoised":
        return 0
    return int((renoised_timesteps(1000, params.renoise.timesteps) > estimator.t_min).sum()) * params.renoise.noises


def _base(params) -> tuple:
    """What everything that the base model makes depends on."""
    return path(params.models[params.model].pipeline), params.dtype, params.device


def _judges(params) -> tuple:
    entry = params.models[params.model]
    return path(entry.judge), path(entry.similarity)
