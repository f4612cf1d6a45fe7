"""The steps from a recipe to a fine-tuned and evaluated model, each computed once, whichever cell of whichever study needs it first."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from mitune import processes
from mitune.adapters import ADAPTER_FILE
from mitune.artifacts import read_json, read_table, read_tensors, write_json, write_table, write_tensors
from mitune.config import embedded
from mitune.finetuning import finetune, read_captions, trained_parameters
from mitune.information import estimate, renoised_terms, renoised_timesteps
from mitune.memo import shared
from mitune.pipelines import LatentDiffusion
from mitune.prompts import Prompt
from mitune.recipes import Recipe
from mitune.sampling import noise_generator, noises
from mitune.selection import select, select_random
from mitune.shards import progress, shards
from mitune.stages import judging, open_model, pairs, read_prompts, weights
from mitune.stages.evaluate import evaluator, tabulate
from mitune.stages.pool import sampler


@dataclass(frozen=True)
class Candidates:
    """The pool of a recipe: of n prompts, latents (n, M, C, H, W), the score (n, M) by which images are kept (None for random), and their cost:
    evaluations of the denoiser and seconds of `pool` and `scores`."""

    prompts: list[Prompt]
    latents: torch.Tensor
    score: torch.Tensor | None
    evaluations: dict[str, int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Tuned:
    """A model fine-tuned by a recipe: its adapters in the order in which they are fused, the set of each round, and what they cost.

    `kept` has a row an image: round, source ("pool" or "real"), prompt_id, prompt, image, why, judge, similarity. `seconds` are by part, `pool`,
    `scores` or `finetune`, and by name: the category, and for what a seed has of its own in later rounds "{category}-{seed}-{round}".
    """

    adapters: tuple[Path, ...]
    kept: pd.DataFrame
    evaluations: dict[str, int]
    seconds: dict[str, dict[str, float]]


def tuned(params, recipe: Recipe, category: str, *, seed: int) -> Tuned:
    """`rounds` times: candidates of the model with the adapters so far, the set kept of them, and a further adapter trained on top on that set.

    The pool of the first round is the base's, or that of the model fine-tuned by `pool_adapter`; the adapter is trained on the base in either case.
    No two rounds draw the same noise.
    """
    recipe = fitted(params, recipe, category)
    source = tuned(params, recipe.pool_adapter, category, seed=recipe.pool_adapter.seeds[0]) if recipe.pool_adapter else None
    adapters, sets, evaluations = (), [], Counter(source.evaluations if source else {"pool": 0, "scores": 0})
    times = {"pool": {}, "scores": {}, "finetune": {}}
    width = math.ceil(recipe.M / recipe.block) * recipe.block
    for number in range(1, recipe.rounds + 1):
        makers = source.adapters if source else adapters
        chosen, latents, pools = fine_tuning_set(params, recipe, category, *makers, seed=seed, first=(number - 1) * width)
        trained = adapter(params, recipe, latents, list(chosen["prompt"]), *adapters, seed=seed)
        adapters = (*adapters, trained)
        alignment = read_tensors(judged(params, category, latents, list(chosen["prompt"])) / "block.safetensors")
        sets.append(chosen.assign(round=number, **{name: values.double().numpy() for name, values in alignment.items()}))
        later = f"-{number}" if number > 1 else ""
        times["finetune"][f"{category}-{seed}{later}"] = seconds(trained)
        for part in ("pool", "scores"):
            times[part][f"{category}-{seed}{later}" if later else category] = sum(pool.seconds[part] for pool in pools)
            evaluations[part] += sum(pool.evaluations[part] for pool in pools)
    return Tuned(adapters, pd.concat(sets, ignore_index=True), dict(evaluations), times)


def fitted(params, recipe: Recipe, category: str) -> Recipe:
    """The recipe with as many training prompts as the category has, where it asks for more."""
    return replace(recipe, n_prompts=min(recipe.n_prompts, len(read_prompts(params, category, "train"))))


def fine_tuning_set(params, recipe: Recipe, category: str, *on: Path, seed: int, first: int = 0) -> tuple[pd.DataFrame, torch.Tensor, list[Candidates]]:
    """The n k images that one round trains on, a row each with its latents (n k, C, H, W), and the candidates that they come from.

    `real_images` of them are the best of `real_pairs` pairs, each held against all others; the rest is what the recipe keeps of the pool's prompts, as many
    of its images as there is room for, drawn by `seed`.
    """
    total, tables, latents, pools = recipe.n_prompts * recipe.k, [], [], []
    if recipe.real_images < total:
        pools.append(candidates(params, recipe, category, *on, first=first))
        chosen, of_pool = keep(pools[-1], recipe, seed=params.seed, draw=seed)
        room = torch.randperm(total, generator=noise_generator(params.seed, category, seed, "room"))[: total - recipe.real_images].sort().values
        tables.append(chosen.iloc[room.tolist()].assign(source="pool"))
        latents.append(of_pool[room])
    if recipe.real_images:
        pools.append(real_candidates(params, recipe, category, *on))
        chosen, of_pairs = keep_real(pools[-1], recipe, seed=params.seed, draw=seed)
        tables.append(chosen.assign(source="real"))
        latents.append(of_pairs)
    return pd.concat(tables, ignore_index=True), torch.cat(latents), pools


def candidates(params, recipe: Recipe, category: str, *on: Path, first: int = 0) -> Candidates:
    """M images of each training prompt from image `first` on, by the model with the adapters `on`, from the blocks of a pool without end, and their scores
    by the same model."""
    items = read_prompts(params, category, "train", recipe.n_prompts)
    blocks = [_pool_block(params, recipe, category, items, start, *on) for start in range(first, first + recipe.M, recipe.block)]
    scored = [] if recipe.select == "random" else [_score_block(params, recipe, category, items, block, *on) for block in blocks]
    latents, score = ([read_tensors(folder / "block.safetensors")[name] for folder in of] for name, of in (("latents", blocks), ("score", scored)))
    return Candidates(
        items, torch.cat(latents, 1)[:, : recipe.M], torch.cat(score, 1)[:, : recipe.M] if score else None,
        evaluations={"pool": 2 * len(items) * recipe.M * params.pool.num_inference_steps, "scores": 2 * len(items) * recipe.M * times(params, recipe.select)},
        seconds={"pool": sum(map(seconds, blocks)), "scores": sum(map(seconds, scored))},
    )  # fmt: skip


def examined(params, recipe: Recipe, category: str) -> pd.DataFrame:
    """The M candidates of each training prompt by the base, a row each, with both alignment scores and every estimator's MI (schema `scores`)."""
    recipe = fitted(params, recipe, category)
    pools = {rule: candidates(params, replace(recipe, select=rule), category) for rule in ("judge", "similarity", *params.estimators)}
    table = judging.image_rows(pools["judge"].prompts, recipe.M).assign(category=category, split="train")
    return table.assign(**{rule: pool.score.flatten().double().numpy() for rule, pool in pools.items()})


def real_candidates(params, recipe: Recipe, category: str, *on: Path) -> Candidates:
    """`real_pairs` captioned images that no model made, each the one candidate of its caption, and their scores by the model with the adapters `on`."""

    def make(folder: Path) -> None:
        latents, texts = pairs.encoded(params, recipe, category, open_model(params))
        write_tensors({"latents": latents[:, None]}, folder / "block.safetensors")
        write_json(texts, folder / "captions.json")

    block = shared("real", *_base(params), *pairs.key(params, recipe, category), make=make)
    items = [Prompt(n, text) for n, text in enumerate(read_json(block / "captions.json"))]
    scored = None if recipe.select == "random" else _score_block(params, recipe, category, items, block, *on)
    return Candidates(
        items, read_tensors(block / "block.safetensors")["latents"], read_tensors(scored / "block.safetensors")["score"] if scored else None,
        evaluations={"pool": 0, "scores": 2 * len(items) * times(params, recipe.select)},
        seconds={"pool": seconds(block), "scores": seconds(scored) if scored else 0.0},
    )  # fmt: skip


def keep_real(pool: Candidates, recipe: Recipe, *, seed: int, draw: int) -> tuple[pd.DataFrame, torch.Tensor]:
    """The `real_images` pairs with the highest scores, in the form of `keep`: as if all were candidates of one prompt."""
    table = pd.DataFrame({"prompt_id": 0, "image": range(len(pool.prompts))})
    if pool.score is None:
        chosen = select_random(table, recipe.real_images, seed, draw)
    else:
        chosen = select(table.assign(**{recipe.select: pool.score.flatten().double().numpy()}), recipe.select, recipe.real_images)
    rows = chosen["image"].to_list()
    return chosen.assign(prompt_id=rows, image=0, prompt=[pool.prompts[row].text for row in rows]), pool.latents[rows, 0]


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


def adapter(params, recipe: Recipe, latents: torch.Tensor, captions: Sequence[str], *on: Path, seed: int) -> Path:
    """A folder with the adapter trained on these images (N, C, H, W) and captions, on top of the adapters `on`, and `size.json`, how many `parameters`
    were trained."""

    def make(folder: Path) -> None:
        model = open_model(params, adapter=on, dtype="float32")
        with progress(recipe.steps, f"finetune seed {seed}", unit="step") as bar:
            conditioning = read_captions(model, captions, recipe)
            finetune(model, latents, conditioning, recipe.tuning, seed=seed, folder_checkpoints=folder / "work", progress=bar.update)
        if processes.is_first():
            model.save_adapter(folder, dtype=recipe.save_dtype)
        write_json({"parameters": sum(parameter.numel() for parameter in trained_parameters(model).values())}, folder / "size.json")

    return shared("adapter", *_base(params, *on), recipe.tuning, seed, latents, list(captions), make=make)


@dataclass(frozen=True)
class Prepared:
    """A model that is not the base with an adapter: how it is opened, and all that it depends on beside the base (as `memo.digest` takes it)."""

    open: Callable[[], LatentDiffusion]
    key: tuple


def evaluation(params, recipe: Recipe, category: str, *trained: Path, split: str = "test", prepared: Prepared | None = None) -> pd.DataFrame:
    """Alignment of the model with these adapters, of a prepared model, or of the base, on the prompts of a split (schema `evaluated`), at every guidance
    scale from the same noise."""
    folders = _evaluated(params, recipe, category, split, trained, prepared)
    return pd.concat([read_table(folder / "images.parquet", "evaluated") for folder in folders], ignore_index=True)


def features(params, recipe: Recipe, category: str, *trained: Path, split: str = "test") -> torch.Tensor:
    """The similarity model's features (N, d), of unit norm and float16, of the images of `evaluation`, a row a row."""
    folders = _evaluated(params, recipe, category, split, trained)
    return torch.cat([read_tensors(folder / "features.safetensors")["features"] for folder in folders])


def reference(params, recipe: Recipe, category: str, *, split: str = "test") -> dict[str, torch.Tensor]:
    """Features as in `features` of images that no model made, for the prompts of a split: `reference`, `reference_images` a prompt, and `decoded`, as many
    others as `evaluation` has images of a prompt, through the autoencoder: the best that the model could show. Rendered scenes of which the prompts are
    true; of a model that is not the embedded one `real_images`, whatever they show, and nothing where there are none or too few."""
    texts = [item.text for item in evaluated_prompts(params, recipe, category, split)]
    counts = {"reference": recipe.reference_images, "decoded": recipe.test_images}
    real = None if embedded(params) else pairs.apart(params, recipe, category, {name: count * len(texts) for name, count in counts.items()})
    if real is None and not embedded(params):
        return {}

    def make(folder: Path) -> None:
        model, (_, similarity) = open_model(params), judging.open_judges(params, category)

        def parts(name: str):
            return pairs.opened(params, real[name], model) if real else [pairs.rendered(texts, counts[name], params.seed, name).flatten(0, 1)]

        found = {"reference": [similarity.features(part) for part in parts("reference")]}
        found["decoded"] = [similarity.features(model.decode(model.encode_images(part))) for part in parts("decoded")]
        write_tensors({name: torch.cat(values).half().cpu() for name, values in found.items()}, folder / "features.safetensors")

    key = (*_base(params), *judging.judges_key(params, category), params.seed, recipe.reference_images, recipe.test_images, texts)
    key += ({name: [(item.name, item.caption) for item in items] for name, items in real.items()},) if real else ()
    return read_tensors(shared("reference", *key, make=make) / "features.safetensors")


def evaluated_prompts(params, recipe: Recipe, category: str, split: str) -> list[Prompt]:
    """The prompts of a split ("test" or "val") on which the recipe's model is evaluated."""
    return read_prompts(params, category, split)[: {"test": recipe.test_prompts, "val": recipe.val_prompts}[split]]


def judged(params, category: str, latents: torch.Tensor, captions: Sequence[str]) -> Path:
    """A folder whose `block.safetensors` has both alignment scores (N,) of images (N, C, H, W)."""

    def make(folder: Path) -> None:
        judges = judging.open_judges(params, category)
        write_tensors(judging.judged(judges, open_model(params).decode(latents), list(captions)), folder / "block.safetensors")

    return shared("judged", *_base(params), *judging.judges_key(params, category), latents, list(captions), make=make)


def seconds(folder: Path) -> float:
    """How long it took to make something shared."""
    return read_json(folder / "seconds.json")["seconds"]


# ---------------------------------------------------------------- blocks of a pool


def _pool_block(params, recipe: Recipe, category: str, items: list[Prompt], first: int, *on: Path) -> Path:
    """`block` images of each prompt from image `first` on, as stage `pool` makes them, by the model with the adapters `on`."""
    pool = replace(params.pool, M=recipe.block, guidance_scale=recipe.pool_guidance_scale)

    def make(folder: Path) -> None:
        compute = sampler(open_model(params, adapter=on), pool, pool.guidance_scale, params.seed, first)
        with progress(len(items), f"pool {category} from image {first}", unit="prompt") as bar:
            tensors = shards(folder / "work", items, pool.shard_prompts, compute, device=params.device, progress=bar)
        write_tensors(tensors | {"timesteps": tensors["timesteps"][0]}, folder / "block.safetensors")

    settings = (pool.M, pool.guidance_scale, pool.num_inference_steps, pool.shard_prompts, pool.batch_size)
    return shared("pool", *_base(params, *on), params.seed, *settings, first, [(item.prompt_id, item.text) for item in items], make=make)


def _score_block(params, recipe: Recipe, category: str, items: list[Prompt], block: Path, *on: Path) -> Path:
    """`score` (n, block) of a block by the recipe's rule, and by no other, and by the model with the adapters `on`. The block's name stands for all that
    its images depend on, the seed too."""
    rule, estimator = recipe.select, params.estimators.get(recipe.select)

    def make(folder: Path) -> None:
        tensors = read_tensors(block / "block.safetensors")
        latents = tensors["latents"]
        if estimator is None:
            captions = [item.text for item in items for _ in range(latents.shape[1])]
            score = read_tensors(judged(params, category, latents.flatten(0, 1), captions) / "block.safetensors")[rule].unflatten(0, latents.shape[:2])
        else:
            model = open_model(params, adapter=on)
            terms, timesteps = tensors.get(estimator.form), tensors.get("timesteps")
            if estimator.latents == "renoised":
                timesteps = renoised_timesteps(len(model.alphas_cumprod), params.renoise.timesteps).repeat(params.renoise.noises)
                terms = _renoised(params, model, items, latents, timesteps, estimator, folder / "work")
                timesteps = timesteps[timesteps > estimator.t_min]
            options = {"form": estimator.form, "t_min": estimator.t_min, "variant": estimator.kappa or "paper"}
            flat = None if terms is None else terms.flatten(0, 1)
            score = estimate(flat, timesteps, model.alphas_cumprod, **options).value.unflatten(0, latents.shape[:2])
        write_tensors({"score": score.float()}, folder / "block.safetensors")

    used = (params.renoise, params.pool.shard_prompts, params.pool.batch_size) if estimator and estimator.latents == "renoised" else ()
    judges = judging.judges_key(params, category) if estimator is None else ()
    return shared("scores", *_base(params, *on), rule if estimator is None else estimator, *used, *judges, block.name, make=make)


def _renoised(params, model, items, latents, timesteps, estimator, work: Path) -> torch.Tensor:
    """The form's terms (n, block, R) at the timesteps that count, with the noise that stage `scores` draws for them."""
    counted = timesteps > estimator.t_min

    def compute(rows) -> dict[str, torch.Tensor]:
        texts, m = [items[row].text for row in rows], latents.shape[1]
        own = torch.arange(len(rows)).repeat_interleave(m)
        noise = noises([(text, 0) for text in texts], len(timesteps), model.latent_shape, seed=params.seed, stream="renoise")
        terms = renoised_terms(
            model, latents[list(rows)].flatten(0, 1), model.encode(texts)[own], model.null, timesteps=timesteps[counted], noise=noise[:, counted][own],
            inner_product=estimator.form == "inner_product", batch_size=params.pool.batch_size,
        )[estimator.form]  # fmt: skip
        return {"terms": terms.unflatten(0, (len(rows), m))}

    with progress(len(items), f"scores by {estimator.form}", unit="prompt") as bar:
        return shards(work, range(len(items)), params.pool.shard_prompts, compute, device=params.device, progress=bar)["terms"]


def times(params, rule: str) -> int:
    """How many noises the rule evaluates an image at: of T = 1000 timesteps those above t_min."""
    estimator = params.estimators.get(rule)
    if estimator is None or estimator.latents != "renoised":
        return 0
    return int((renoised_timesteps(1000, params.renoise.timesteps) > estimator.t_min).sum()) * params.renoise.noises


def _evaluated(params, recipe: Recipe, category: str, split: str, trained: Sequence[Path], prepared: Prepared | None = None) -> list[Path]:
    """A folder a guidance scale: `images.parquet` (schema `evaluated`) and the images' features."""
    items, judges = evaluated_prompts(params, recipe, category, split), judging.judges_key(params, category)
    opened = functools.cache(lambda: (prepared.open() if prepared else open_model(params, adapter=trained), judging.open_judges(params, category)))

    def at(scale: float) -> Path:
        shard = max(params.evaluate.shard_prompts * params.evaluate.images // recipe.test_images, 1)
        config = replace(params.evaluate, images=recipe.test_images, guidance_scales=(scale,), shard_prompts=shard)

        def make(folder: Path) -> None:
            model, scores = opened()
            with progress(len(items), f"evaluate {category} {split} at {scale}", unit="prompt") as bar:
                compute = evaluator(model, scores, config, scale, params.seed)
                values = shards(folder / "work", items, config.shard_prompts, compute, device=params.device, progress=bar)
            write_tensors({"features": values["features"].flatten(0, 1)}, folder / "features.safetensors")
            write_table(tabulate(values, items, scores[0]).assign(category=category, split=split, guidance_scale=scale), folder / "images.parquet", "evaluated")

        key = (*_base(params, *trained), *judges, params.seed, config, category, split, [(item.prompt_id, item.text) for item in items])
        key += (prepared.key,) if prepared else ()
        return shared("evaluation", *key, make=make)

    return [at(scale) for scale in recipe.guidance_scales]


def _base(params, *on: Path) -> tuple:
    """What everything that the base model makes depends on, or that the model with the adapters `on` makes."""
    return *weights(params).values(), params.dtype, params.device, [folder / ADAPTER_FILE for folder in on]
