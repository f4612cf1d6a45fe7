"""Parameters: `params.yaml` read into frozen dataclasses that refuse unknown keys, missing keys and impossible values by name.

A notebook asks `config.read(parameters)`: with None (by hand) it gets the whole of `params.yaml`; with the mapping that the runner
injected it gets the keys its stage declares in `dvc.yaml`, and no others.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from mitune.checks import check
from mitune.judges import Features, Judge, Similarity
from mitune.recipes import ARMS, Finetune, Studies
from mitune.schema import Count, Index, Positive, Range, Rate, Scale, Several, Size, Steps, build


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model's networks are run (`models.load`)."""

    text_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "math"] = "sdpa"
    tf32: bool = False
    compile: bool = False
    variance: Literal["large", "small", "none"] = "large"


@dataclass(frozen=True)
class Model(Options):
    """Where a model lives: a folder of the project, or a name on the hub; `unet` and `vae` in place of the pipeline's own. `hub` says where the
    pipeline's folder comes from."""

    pipeline: str
    judge: Judge
    similarity: Similarity
    judges: dict[str, Judge] | None = None
    features: Features | None = None
    unet: str | None = None
    vae: str | None = None
    hub: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """Whose prompts (see `mitune.benchmarks.Benchmark`): a file or folder, by default of the project."""

    prompts: str
    column: str = "prompt"
    splits: dict[str, str] | None = None
    holdout: dict[str, Count] | None = None
    seed: Size = 0


@dataclass(frozen=True)
class Base:
    cases: Count
    scenes: Count
    decoded_scenes: Count
    timesteps: Count
    t_min: Index
    batch_size: Count


@dataclass(frozen=True)
class Sampled:
    """What every stage that makes images is told: the steps of the sampler, and how much is done at once."""

    num_inference_steps: Steps
    shard_prompts: Count
    batch_size: Count


@dataclass(frozen=True)
class Pool(Sampled):
    n_prompts: dict[str, Count]
    M: Count
    guidance_scale: Scale


@dataclass(frozen=True)
class Renoise:
    timesteps: Count
    noises: Count


@dataclass(frozen=True)
class Estimator:
    form: Literal["orthogonal", "standard", "path", "inner_product"]
    latents: Literal["trajectory", "renoised"]
    t_min: Index
    kappa: Literal["paper", "authors"] | None = None


@dataclass(frozen=True)
class ValAndTest:
    val: Count
    test: Count


@dataclass(frozen=True)
class Information(Sampled):
    n_prompts: ValAndTest
    M: Annotated[int, Range(3)]
    guidance_scales: tuple[Scale, ...]
    step_grid: tuple[Steps, ...]
    timesteps: Count
    rendered: Several


@dataclass(frozen=True)
class Set:
    k: Count
    random_draws: Count
    paper: str
    best: str


@dataclass(frozen=True)
class Evaluate(Sampled):
    n_prompts: Count
    images: Count
    guidance_scales: tuple[Scale, ...]
    comp_prompts: Size
    grid_prompts: Count


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
    benchmark: str
    prompts: str
    reports: str
    models: dict[str, Model]
    benchmarks: dict[str, Benchmark]
    real_images: str | None
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
        check({field.name: getattr(params, field.name) for field in fields(Params)})
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return params


def embedded(params: Params | Declared) -> bool:
    """Whether the model is the embedded one, whose world can be rendered: there alone the truth about an image is known."""
    return params.model == "shapes"


def check_downloaded(params: Params | Declared) -> None:
    """Raises ValueError if the model has a `hub`, and no folder yet."""
    entry = params.models[params.model]
    if entry.hub and not (root() / entry.pipeline).is_dir():
        raise ValueError(f"there is no folder {entry.pipeline!r}: `make weights MODEL={params.model}` takes it from {entry.hub}")


def read(parameters: Mapping[str, Any] | None = None) -> Params | Declared:
    """What a notebook may use: all of `params.yaml` for None, else only the top-level keys of `parameters`."""
    if parameters is None:
        return load()
    hints = typing.get_type_hints(Params, include_extras=True)
    unknown = sorted(set(parameters) - set(hints))
    if unknown:
        raise ValueError(f"unknown parameter {unknown[0]!r}: the parameters are {', '.join(hints)}")
    values = {name: build(hints[name], value, name) for name, value in parameters.items()}
    check(values)
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
