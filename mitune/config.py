"""Parameters: `params.yaml` read into frozen dataclasses that refuse unknown keys, missing keys and impossible values by name.

A notebook asks `config.read(parameters)`: with None (by hand) it gets the whole of `params.yaml`; with the mapping that the runner
injected it gets the keys its stage declares in `dvc.yaml`, and no others.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from mitune.schema import Range, build

CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")  # T2I-CompBench's names
ARMS = ("random", "mi_paper", "mi_best", "judge")  # who picks the fine-tuning set
RULES = ("random", "judge", "similarity")  # by which a study may select, and any estimator
EVALUATED = ("test_prompts", "val_prompts", "test_images", "reference_images", "guidance_scales")  # of a recipe: how its model is evaluated
OF_AN_ARM = {"categories", "test_prompts", "test_images", "guidance_scales", "merge", "weights", "density", "arm"}  # for a merge of the pipeline's adapters

Count = Annotated[int, Range(1)]
Size = Annotated[int, Range(0)]
Index = Annotated[int, Range(0, 1000)]  # of a diffusion timestep
Steps = Annotated[int, Range(2, 1000)]
Scale = Annotated[float, Range(0.0)]
Rate = Annotated[float, Range(0.0, 0.99)]
Share = Annotated[float, Range(0.0, 1.0)]
Several = Annotated[int, Range(2)]
Positive = Annotated[float, Range(1e-6)]


@dataclass(frozen=True)
class Model:
    """Where a model lives: a folder of the project, or a name on the hub."""

    pipeline: str
    judge: str
    similarity: str
    prompts: str


@dataclass(frozen=True)
class Base:
    cases: Count
    scenes: Count
    decoded_scenes: Count
    timesteps: Count
    t_min: Index
    batch_size: Count


@dataclass(frozen=True)
class Pool:
    n_prompts: dict[str, Count]
    M: Count
    num_inference_steps: Steps
    guidance_scale: Scale
    shard_prompts: Count
    batch_size: Count


@dataclass(frozen=True)
class Renoise:
    timesteps: Count
    noises: Count


@dataclass(frozen=True)
class Estimator:
    form: Literal["orthogonal", "standard", "path"]
    latents: Literal["trajectory", "renoised"]
    t_min: Index
    kappa: Literal["paper", "authors"] | None = None


@dataclass(frozen=True)
class ValAndTest:
    val: Count
    test: Count


@dataclass(frozen=True)
class Information:
    n_prompts: ValAndTest
    M: Annotated[int, Range(3)]
    guidance_scales: tuple[Scale, ...]
    num_inference_steps: Steps
    timesteps: Count
    rendered: Several
    shard_prompts: Count
    batch_size: Count


@dataclass(frozen=True)
class Set:
    k: Count
    random_draws: Count
    paper: str
    best: str


@dataclass(frozen=True)
class Timesteps:
    low: Index
    high: Index


@dataclass(frozen=True)
class Tuning:
    adapter: Literal["dora", "lora"]
    rank: Count
    lora_alpha: Count
    target_modules: tuple[str, ...]
    text_encoder: bool
    learning_rate: Scale
    betas: tuple[Annotated[float, Range(0.0, 1.0)], ...]
    weight_decay: Scale
    epsilon: Scale
    max_grad_norm: Scale
    steps: Count
    batch_size: Count
    timesteps: Timesteps
    checkpoint_every: Count
    save_dtype: Literal["float32", "float16"]


@dataclass(frozen=True)
class Finetune(Tuning):
    seed: Size


@dataclass(frozen=True)
class Evaluate:
    n_prompts: Count
    images: Count
    guidance_scales: tuple[Scale, ...]
    num_inference_steps: Steps
    comp_prompts: Size
    grid_prompts: Count
    shard_prompts: Count
    batch_size: Count


@dataclass(frozen=True)
class Common:
    categories: tuple[str, ...]
    seeds: tuple[Size, ...]
    n_prompts: Count
    M: Count
    block: Count
    k: Count
    select: str
    pool_guidance_scale: Scale
    rounds: Count
    real: Share
    real_captions: Literal["web", "clean"]
    real_from: Literal["pretraining", "category"]
    real_pairs: Count
    test_prompts: Count
    val_prompts: Size
    test_images: Count
    reference_images: Several
    steps: Count


@dataclass(frozen=True)
class Recipe(Common, Tuning):
    """A cell of a study: its own entries, for the rest those of `studies.common`, `finetune` and, of guidance scales, `evaluate`.

    `pool_adapter` is a recipe too: by it the model is fine-tuned that makes the pool, in place of the base.
    """

    guidance_scales: tuple[Scale, ...]
    pool_adapter: Recipe | None = None

    @property
    def tuning(self) -> Tuning:
        return Tuning(**{field.name: getattr(self, field.name) for field in fields(Tuning)})

    @property
    def real_images(self) -> int:
        """How many of the set's n_prompts k images are real."""
        return round(self.real * self.n_prompts * self.k)


@dataclass(frozen=True, kw_only=True)
class Merge(Recipe):
    """A cell of the study `merging`: one model for all of its `categories`, merged from their adapters or trained on the union of their sets."""

    merge: Literal["weights", "adapters", "ties", "joint"]
    weights: tuple[Scale, ...] | None = None
    density: Annotated[float, Range(0.001, 0.999)] | None = None
    arm: Literal[ARMS] | None = None

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each category's adapter."""
        return self.weights or (1 / len(self.categories),) * len(self.categories)


KINDS = {"merging": Merge}  # what a cell is, by study; of every other study a Recipe


@dataclass(frozen=True)
class Studies:
    """The default recipe, and each study's cells: what each has of its own (see `recipes`). A stage declares those that it needs."""

    common: Common
    cfg_rounds: dict[str, Any] | None = None
    set_size: dict[str, Any] | None = None
    adapters: dict[str, Any] | None = None
    merging: dict[str, Any] | None = None
    selection: dict[str, Any] | None = None


@dataclass(frozen=True)
class Cost:
    arm: Literal[ARMS]
    prompts: Count
    M: Count
    num_inference_steps: Steps
    multiples: tuple[Count, ...]
    repeats: Count
    timesteps: Count
    steps: Count
    images: Count
    rounds: Several
    watts: Positive


@dataclass(frozen=True)
class World:
    dimensions: Count
    modes: Several
    caption_error: Rate
    separation: Positive
    std: Positive


@dataclass(frozen=True)
class FlowTimes:
    times: Several
    low: Annotated[float, Range(0.0, 1.0)]
    high: Annotated[float, Range(0.0, 1.0)]


@dataclass(frozen=True)
class ExactWorlds:
    world: World
    dimensions: tuple[Count, ...]
    modes: tuple[Several, ...]
    caption_errors: tuple[Rate, ...]
    guided_errors: tuple[Rate, ...]
    error_multiples: tuple[Positive, ...]
    separations: tuple[Positive, ...]
    two_component_errors: tuple[Annotated[float, Range(0.001, 0.499)], ...]
    worlds: Several
    images: Several
    timesteps: Several
    timestep_grid: tuple[Several, ...]
    flow: FlowTimes
    noises: Count
    num_inference_steps: Steps
    step_grid: tuple[Steps, ...]
    guidance_scales: tuple[Scale, ...]


@dataclass(frozen=True)
class Params:
    """All of `params.yaml`; what each key means, its unit and its range stand beside it there."""

    model: str
    reports: str
    models: dict[str, Model]
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    seed: Size
    categories: tuple[str, ...]
    base: Base
    pool: Pool
    renoise: Renoise
    estimators: dict[str, Estimator]
    set: Set
    arms: tuple[str, ...]
    finetune: Finetune
    evaluate: Evaluate
    information: Information
    studies: Studies
    cost: Cost
    exact_worlds: ExactWorlds
    pretrain: dict[str, Any]  # checked by mitune.pretraining, which alone reads it


class Declared:
    """The parameters that one stage declares; asking for another raises AttributeError naming it."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)

    def __getattr__(self, name: str):
        raise AttributeError(f"parameter {name!r} is not declared by this stage: add it to its `params` and to `--params` in dvc.yaml")

    def __setattr__(self, name: str, value):
        raise AttributeError(f"parameter {name!r} cannot be set: change params.yaml")


def root() -> Path:
    """The project's folder: $MITUNE_ROOT, or the nearest folder upwards that holds `params.yaml`."""
    if "MITUNE_ROOT" in os.environ:
        return Path(os.environ["MITUNE_ROOT"])
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "params.yaml").is_file():
            return folder
    raise ValueError(f"no params.yaml in {Path.cwd()} or above: work inside the project's folder, or set MITUNE_ROOT to it")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML 1.2 mapping (so that 1e-4 is a number)."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: restore it with `git checkout -- {Path(path).name}`") from None
    except YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys: restore it with `git checkout -- {Path(path).name}`")
    return values


def load(path: Path | None = None) -> Params:
    """The checked parameters of a `params.yaml` (by default the project's). Raises ValueError, one line, naming the key."""
    path = Path(path) if path else root() / "params.yaml"
    try:
        params = build(Params, read_yaml(path), "")
        _check({field.name: getattr(params, field.name) for field in fields(Params)})
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return params


def read(parameters: Mapping[str, Any] | None = None) -> Params | Declared:
    """What a notebook may use: all of `params.yaml` for None, else only the top-level keys of `parameters`."""
    if parameters is None:
        return load()
    hints = typing.get_type_hints(Params, include_extras=True)
    unknown = sorted(set(parameters) - set(hints))
    if unknown:
        raise ValueError(f"unknown parameter {unknown[0]!r}: the parameters are {', '.join(hints)}")
    values = {name: build(hints[name], value, name) for name, value in parameters.items()}
    _check(values)
    return Declared(values)


def declared(keys: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `values` that `keys` name; a dotted key (`models.shapes`) takes only that entry of its mapping."""
    chosen: dict[str, Any] = {}
    for key in keys:
        source, target = values, chosen
        *folders, last = key.split(".")
        for folder in folders:
            source, target = source.get(folder, {}), target.setdefault(folder, {})
        if last not in source:
            raise ValueError(f"unknown parameter {key!r}: params.yaml has {', '.join(values)}")
        target[last] = source[last]
    return chosen


def recipes(params: Params | Declared, study: str) -> dict[str, Recipe]:
    """The cells of a study by key, in the order of params.yaml. Raises ValueError naming the entry (`studies.set_size.M30_k1.k`)."""
    studies, where = params.studies, f"studies.{study}"
    cells = (getattr(studies, study) or {}).items()
    return {key: _cell(study, studies.common, params.finetune, params.evaluate, cell, f"{where}.{key}") for key, cell in cells}


def _cell(study: str, common: Common, finetune: Finetune, evaluate: Evaluate, cell: Any, where: str) -> Recipe:
    kind = KINDS.get(study, Recipe)
    default = _default(kind, common, finetune, evaluate)
    if isinstance(cell, Mapping) and cell.get("arm"):  # trained by stage `finetune`
        default |= {"steps": finetune.steps, "seeds": (finetune.seed,)}
    return _recipe(kind, default, cell, where)


def _default(kind: type[Recipe], common: Common, finetune: Finetune, evaluate: Evaluate) -> dict[str, Any]:
    """The entries of the default recipe."""
    names = [field.name for field in fields(kind)]
    given = vars(finetune) | vars(common) | {"guidance_scales": evaluate.guidance_scales}
    return {name: value for name, value in given.items() if name in names}


def _recipe(kind: type[Recipe], default: Mapping[str, Any], cell: Any, where: str) -> Recipe:
    if not isinstance(cell, Mapping):
        raise ValueError(f"{where} is {cell!r}: it must be a mapping, {{}} for the default recipe")
    own = dict(cell)
    if own.get("pool_adapter") is not None:
        own["pool_adapter"] = _recipe(Recipe, default, own["pool_adapter"], f"{where}.pool_adapter")
        for name in ("categories", *EVALUATED):
            if name in cell["pool_adapter"]:
                raise ValueError(f"{where}.pool_adapter.{name} has no meaning: the category is the cell's, and the model that makes the pool is not evaluated")
    return build(kind, dict(default) | own, where)


def merge(values: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the entries of `overlay` in their place (RFC 7396): mappings merge key by key, null removes, everything else is replaced."""
    merged = dict(values)
    for key, value in overlay.items():
        if value is None:
            merged.pop(key, None)
            continue
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _check(given: Mapping[str, Any]) -> None:
    """Conditions between values, of those keys that are given."""
    for condition in (_check_names, _check_estimators, _check_sizes, _check_studies):
        condition(given)


def _check_names(given: Mapping[str, Any]) -> None:
    if "model" in given and given["model"] not in given.get("models", {given["model"]: None}):
        raise ValueError(f"model is {given['model']!r}: `models` has {', '.join(given['models'])}")
    if "model" in given and "reports" in given:
        wanted = "reports" if given["model"] == "shapes" else f"reports/{given['model']}"
        if given["reports"] != wanted:
            raise ValueError(f"reports is {given['reports']!r}: for model {given['model']!r} it must be {wanted!r}")
    for key, known in {"categories": CATEGORIES, "arms": ARMS}.items():
        _check_list(key, given.get(key, ()), known)
    if "cost" in given and given["cost"].arm not in given.get("arms", ARMS):
        raise ValueError(f"cost.arm is {given['cost'].arm!r}: `arms` has {', '.join(given['arms'])}")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", given.get("device", "cpu")):
        raise ValueError(f"device is {given['device']!r}: it must be cpu, cuda, cuda:<number> or mps")


def _check_estimators(given: Mapping[str, Any]) -> None:
    for name, estimator in given.get("estimators", {}).items():
        where = f"estimators.{name}"
        if (estimator.form == "path") == (estimator.kappa is not None):
            raise ValueError(f"{where}.kappa is {estimator.kappa!r}: a path estimator has none, every other is 'paper' or 'authors'")
        if estimator.form == "path" and estimator.latents != "trajectory":
            raise ValueError(f"{where}.latents is {estimator.latents!r}: the path is known only along the trajectory")
        if estimator.form == "standard" and estimator.latents != "renoised":
            raise ValueError(f"{where}.latents is {estimator.latents!r}: the standard form needs the noise of re-noised latents")
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
    if information and len(set(information.guidance_scales)) < len(information.guidance_scales):
        raise ValueError(f"information.guidance_scales has an entry twice: {', '.join(f'{scale:g}' for scale in information.guidance_scales)}")
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
    for study in (field.name for field in fields(Studies) if field.name != "common"):
        for key, cell in (getattr(studies, study) or {}).items():
            where = f"studies.{study}.{key}"
            if not re.fullmatch(r"\w+", key):
                raise ValueError(f"{where}: a key names a stage and a folder; it takes letters, digits and _")
            if given.keys() >= {"finetune", "evaluate"}:
                recipe = _cell(study, studies.common, given["finetune"], given["evaluate"], cell, where)
                _check_recipe(recipe, where, given.get("estimators"))
                if isinstance(recipe, Merge):
                    _check_merge(recipe, set(cell), where, given)


def _check_recipe(recipe: Recipe, where: str, estimators: Mapping[str, Estimator] | None) -> None:
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


def _check_common(recipe: Common, where: str, estimators: Mapping[str, Estimator] | None) -> None:
    _check_list(f"{where}.categories", recipe.categories, CATEGORIES)
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
        return
    if own - OF_AN_ARM:
        raise ValueError(f"{where}.{min(own - OF_AN_ARM)}: adapters of an arm are those of the pipeline; `finetune` and `pool` say how they are made")
    for key, known in (("arms", {recipe.arm}), ("categories", set(recipe.categories))):
        if missing := sorted(known - set(given.get(key, known))):
            raise ValueError(f"{where}: the pipeline has no adapter of {missing[0]!r}: `{key}` has {', '.join(given[key])}")


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
