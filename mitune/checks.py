"""Conditions between the values of params.yaml. Each raises ValueError, one line, naming the key and what it may be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mitune.judges import check_judge
from mitune.recipes import ARMS, RULES, Common, Merge, Recipe, Studies, Tuning, complete

CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")  # T2I-CompBench's names
OF_THESE = ("shapes", "t2i-compbench")  # benchmarks with these categories; a user's own has others
SPLITS = ("train", "val", "test", "comp")  # comp: test prompts with attribute pairs that pretraining never saw
OF_AN_ARM = {"categories", "test_prompts", "test_images", "guidance_scales", "merge", "weights", "density", "arm"}  # for a merge of the pipeline's adapters
OF_ONE_ROUND = {"rounds": 1, "real": 0.0, "pool_adapter": None, "val_prompts": 0}  # what a merge can have: the base's own images, on test prompts


def check(given: Mapping[str, Any]) -> None:
    """Conditions between values, of those keys that are given."""
    for condition in (_check_names, _check_benchmarks, _check_judges, _check_estimators, _check_sizes, _check_studies):
        condition(given)


def _check_names(given: Mapping[str, Any]) -> None:
    if "model" in given and given["model"] not in given.get("models", {given["model"]: None}):
        raise ValueError(f"model is {given['model']!r}: `models` has {', '.join(given['models'])}; a new one is a line there, with a folder or a hub name")
    if "model" in given and "reports" in given:
        wanted = "reports" if given["model"] == "shapes" else f"reports/{given['model']}"
        if given["reports"] != wanted:
            raise ValueError(f"reports is {given['reports']!r}: for model {given['model']!r} it must be {wanted!r}")
    _check_list("arms", given.get("arms", ()), ARMS)
    _check_categories("categories", given.get("categories", ()), given)
    if "cost" in given and given["cost"].arm not in given.get("arms", ARMS):
        raise ValueError(f"cost.arm is {given['cost'].arm!r}: `arms` has {', '.join(given['arms'])}")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", given.get("device", "cpu")):
        raise ValueError(f"device is {given['device']!r}: it must be cpu, cuda, cuda:<number> or mps")


def _check_benchmarks(given: Mapping[str, Any]) -> None:
    benchmarks, name = given.get("benchmarks", {}), given.get("benchmark")
    if "benchmarks" in given and name is not None:
        if name not in benchmarks:
            raise ValueError(f"benchmark is {name!r}: `benchmarks` has {', '.join(benchmarks)}")
        if given.get("prompts", benchmarks[name].prompts) != benchmarks[name].prompts:
            raise ValueError(f"prompts is {given['prompts']!r}: for benchmark {name!r} it must be {benchmarks[name].prompts!r}")
    if name == "shapes" and given.get("model", "shapes") != "shapes":
        raise ValueError(
            f"benchmark is 'shapes' and model {given['model']!r}: its captions are of drawn shapes, and only the embedded judge reads them; "
            "set another benchmark, such as t2i-compbench, and its prompts"
        )
    for key, benchmark in benchmarks.items():
        for entry in ("splits", "holdout"):
            if unknown := sorted(set(getattr(benchmark, entry) or ()) - set(SPLITS)):
                raise ValueError(f"unknown key benchmarks.{key}.{entry}.{unknown[0]}: the splits are {', '.join(SPLITS)}")
        if benchmark.splits:
            _check_list(f"benchmarks.{key}.splits", tuple(benchmark.splits.values()))
        if both := sorted(set(benchmark.holdout or ()) & {"train", *(benchmark.splits or ())}):
            raise ValueError(f"benchmarks.{key}.holdout has {both[0]!r}: it makes splits that the benchmark lacks, out of its train; remove it")


def _check_categories(where: str, entries: tuple, given: Mapping[str, Any]) -> None:
    """Each names stages and folders, and is one of T2I-CompBench's where the benchmark is known to have no other."""
    _check_list(where, entries, CATEGORIES if given.get("benchmark") in OF_THESE else None)
    for entry in entries:
        if not re.fullmatch(r"\w[\w-]*", entry):
            raise ValueError(f"{where} has {entry!r}: a category names a stage and a folder; it takes letters, digits, _ and -")


def _check_judges(given: Mapping[str, Any]) -> None:
    for name, model in given.get("models", {}).items():
        _check_categories(f"models.{name}.judges", tuple(model.judges or ()), given)
        judges = {"judge": model.judge, "similarity": model.similarity, "features": model.features}
        judges |= {f"judges.{category}": judge for category, judge in (model.judges or {}).items()}
        for role, judge in judges.items():
            if judge:
                check_judge(judge, f"models.{name}.{role}")


def _check_estimators(given: Mapping[str, Any]) -> None:
    model = given.get("models", {}).get(given.get("model"))
    for name, estimator in given.get("estimators", {}).items():
        where = f"estimators.{name}"
        if (estimator.form == "path") == (estimator.kappa is not None):
            raise ValueError(f"{where}.kappa is {estimator.kappa!r}: a path estimator has none, every other is 'paper' or 'authors'")
        if estimator.form == "path" and estimator.latents != "trajectory":
            raise ValueError(f"{where}.latents is {estimator.latents!r}: the path is known only along the trajectory")
        if estimator.form == "standard" and estimator.latents != "renoised":
            raise ValueError(f"{where}.latents is {estimator.latents!r}: the standard form needs the noise of re-noised latents")
        if estimator.form == "path" and model and model.variance == "none":
            raise ValueError(f"{where}.form is path: no step has noise; remove the entry, or set models.{given['model']}.variance: small")
        if estimator.t_min >= 999:
            raise ValueError(f"{where}.t_min is {estimator.t_min}: no timestep lies above it; it must be below 999")
    if "set" in given and "estimators" in given:
        for role in ("paper", "best"):
            if getattr(given["set"], role) not in given["estimators"]:
                raise ValueError(f"set.{role} is {getattr(given['set'], role)!r}: `estimators` has {', '.join(given['estimators'])}")


def _check_sizes(given: Mapping[str, Any]) -> None:
    pool, chosen, finetune, information, exact_worlds = (given.get(name) for name in ("pool", "set", "finetune", "information", "exact_worlds"))
    if pool and (unknown := sorted(set(pool.n_prompts) - {"train", "val", "test"})):
        raise ValueError(f"unknown key pool.n_prompts.{unknown[0]}: the splits are train, val, test")
    if pool and chosen and chosen.k > pool.M:
        raise ValueError(f"set.k is {chosen.k} and pool.M is {pool.M}: no more images can be selected than were made; lower set.k or raise pool.M")
    if pool and information and pool.guidance_scale not in information.guidance_scales:
        scales = ", ".join(f"{scale:g}" for scale in information.guidance_scales)
        raise ValueError(f"information.guidance_scales is {scales}: it must have pool.guidance_scale ({pool.guidance_scale:g}), where phrases are measured")
    if information:
        _check_list("information.guidance_scales", information.guidance_scales)
        _check_list("information.step_grid", information.step_grid)
        if information.num_inference_steps in information.step_grid:
            raise ValueError(f"information.step_grid has {information.num_inference_steps}, which information.num_inference_steps is already; remove it")
    if exact_worlds and exact_worlds.flow.low >= exact_worlds.flow.high:
        raise ValueError(f"exact_worlds.flow is {exact_worlds.flow.low} to {exact_worlds.flow.high}: low must be below high")
    if finetune:
        _check_tuning(finetune, "finetune")


def _check_studies(given: Mapping[str, Any]) -> None:
    """Of the default recipe and, where `finetune` is given too, of every cell."""
    if "studies" not in given:
        return
    studies = given["studies"]
    _check_common(studies.common, "studies.common", given.get("estimators"))
    _check_categories("studies.common.categories", studies.common.categories, given)
    for study in (field.name for field in fields(Studies) if field.name != "common"):
        for key, cell in (getattr(studies, study) or {}).items():
            where = f"studies.{study}.{key}"
            if not re.fullmatch(r"\w+", key):
                raise ValueError(f"{where}: a key names a stage and a folder; it takes letters, digits and _")
            if "finetune" in given:
                recipe = complete(study, studies.common, given["finetune"], cell, where)
                _check_recipe(recipe, where, given.get("estimators"))
                _check_categories(f"{where}.categories", recipe.categories, given)
                if isinstance(recipe, Merge):
                    _check_merge(recipe, set(cell), where, given)


def _check_recipe(recipe: Recipe, where: str, estimators: Mapping[str, Any] | None) -> None:
    _check_common(recipe, where, estimators)
    _check_tuning(recipe, where)
    _check_list(f"{where}.guidance_scales", recipe.guidance_scales)
    if recipe.real_images > recipe.real_pairs:
        raise ValueError(f"{where}.real is {recipe.real}: that is {recipe.real_images} images, and real_pairs is {recipe.real_pairs}; raise real_pairs")
    estimator = (estimators or {}).get(recipe.select)
    if recipe.real and estimator and estimator.latents == "trajectory":
        raise ValueError(f"{where}.real is {recipe.real} and select {recipe.select}: it has no trajectory; select by an estimator of renoised latents")
    if recipe.pool_adapter:
        if recipe.rounds > 1:
            raise ValueError(f"{where}.rounds is {recipe.rounds}: the pool of a later round is the fine-tuned model's own; remove pool_adapter")
        _check_recipe(recipe.pool_adapter, f"{where}.pool_adapter", estimators)


def _check_common(recipe: Common, where: str, estimators: Mapping[str, Any] | None) -> None:
    _check_list(f"{where}.seeds", recipe.seeds)
    if recipe.k > recipe.M:
        raise ValueError(f"{where}.k is {recipe.k} and M is {recipe.M}: no more images can be selected than were made; lower k or raise M")
    rules = (*RULES, *(estimators or ()))
    if estimators is not None and recipe.select not in rules:
        raise ValueError(f"{where}.select is {recipe.select!r}: it must be one of {', '.join(rules)}")


def _check_merge(recipe: Merge, own: set[str], where: str, given: Mapping[str, Any]) -> None:
    if len(recipe.categories) < 2:
        raise ValueError(f"{where}.categories has {len(recipe.categories)} entry: merging takes at least two")
    if recipe.weights is not None and recipe.merge not in ("weights", "adapters"):
        raise ValueError(f"{where}.weights: {recipe.merge} has none")
    if len(recipe.shares) != len(recipe.categories):
        raise ValueError(f"{where}.weights has {len(recipe.shares)} entries: it must have one for each of {len(recipe.categories)} categories")
    if recipe.merge == "adapters" and abs(sum(recipe.shares) - 1) > 1e-6:
        raise ValueError(f"{where}.weights sum to {sum(recipe.shares):g}: those of adapters must sum to 1")
    if (recipe.density is None) == (recipe.merge == "ties"):
        raise ValueError(f"{where}.density is {recipe.density}: ties has one, weights, adapters and joint have none")
    if recipe.arm is None:
        for name, only in OF_ONE_ROUND.items():
            value = getattr(recipe, name)
            if value != only:
                shown, wanted = (value, f"it must be {only}") if only is not None else ("set", "remove it")
                raise ValueError(f"{where}.{name} is {shown}: merging takes one round of the base's own images, evaluated on test prompts; {wanted}")
        return
    if own - OF_AN_ARM:
        raise ValueError(f"{where}.{min(own - OF_AN_ARM)}: adapters of an arm are those of the pipeline; `finetune` and `pool` say how they are made")
    for key, known in (("arms", {recipe.arm}), ("categories", set(recipe.categories))):
        if missing := sorted(known - set(given.get(key, known))):
            raise ValueError(f"{where}: the pipeline has no adapter of {missing[0]!r}: `{key}` has {', '.join(given[key])}; remove the cell or add it there")


def _check_tuning(tuning: Tuning, where: str) -> None:
    if tuning.timesteps.low >= tuning.timesteps.high:
        raise ValueError(f"{where}.timesteps is {tuning.timesteps.low} to {tuning.timesteps.high}: low must be below high")
    if len(tuning.betas) != 2:
        raise ValueError(f"{where}.betas has {len(tuning.betas)} entries: AdamW takes two")


def _check_list(where: str, entries: tuple, known: tuple | None = None) -> None:
    for entry in entries:
        if known and entry not in known:
            raise ValueError(f"{where} has {entry!r}: it must be one of {', '.join(known)}")
    if len(set(entries)) < len(entries):
        raise ValueError(f"{where} has an entry twice: {', '.join(map(str, entries))}")
