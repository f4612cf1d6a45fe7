"""How a model is fine-tuned, and the recipes of the studies: what a cell of params.yaml leaves unsaid is that of the default recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from mitune.schema import Count, Index, Range, Scale, Several, Share, Size, build

ARMS = ("random", "mi_paper", "mi_best", "judge")  # who picks the fine-tuning set
RULES = ("random", "judge", "similarity")  # by which a study may select, and any estimator
EVALUATED = ("test_prompts", "val_prompts", "test_images", "reference_images", "guidance_scales")  # of a recipe: how its model is evaluated


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
    micro_batch_size: Count
    mixed_precision: Literal["no", "bf16"]
    timesteps: Timesteps
    checkpoint_every: Count
    save_dtype: Literal["float32", "float16"]


@dataclass(frozen=True)
class Finetune(Tuning):
    seed: Size


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
    guidance_scales: tuple[Scale, ...]
    steps: Count


@dataclass(frozen=True)
class Recipe(Common, Tuning):
    """A cell of a study: its own entries, for the rest those of `studies.common` and `finetune`.

    `pool_adapter` is a recipe too: by it the model is fine-tuned that makes the pool, in place of the base. `unet` is a folder
    with a denoiser in place of the base's; with `examine_pool` every estimator scores every candidate.
    """

    pool_adapter: Recipe | None = None
    unet: str | None = None
    examine_pool: bool = False

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
    caption_noise: dict[str, Any] | None = None


def recipes(params: Any, study: str) -> dict[str, Recipe]:
    """The cells of a study by key, in the order of params.yaml, of `params` that have `studies` and `finetune`.

    Raises ValueError naming the entry (`studies.set_size.M30_k1.k`).
    """
    studies, where = params.studies, f"studies.{study}"
    return {key: complete(study, studies.common, params.finetune, cell, f"{where}.{key}") for key, cell in (getattr(studies, study) or {}).items()}


def complete(study: str, common: Common, finetune: Finetune, cell: Any, where: str) -> Recipe:
    """What a cell, at the key `where`, says: its own entries and those of the default recipe. Raises ValueError naming the entry."""
    kind = KINDS.get(study, Recipe)
    default = _default(kind, common, finetune)
    if isinstance(cell, Mapping) and cell.get("arm"):  # trained by stage `finetune`
        default |= {"steps": finetune.steps, "seeds": (finetune.seed,)}
    return _recipe(kind, default, cell, where)


def _default(kind: type[Recipe], common: Common, finetune: Finetune) -> dict[str, Any]:
    """The entries of the default recipe."""
    names = [field.name for field in fields(kind)]
    given = vars(finetune) | vars(common)
    return {name: value for name, value in given.items() if name in names}


def _recipe(kind: type[Recipe], default: Mapping[str, Any], cell: Any, where: str) -> Recipe:
    if not isinstance(cell, Mapping):
        raise ValueError(f"{where} is {cell!r}: it must be a mapping, {{}} for the default recipe")
    own = dict(cell)
    if own.get("pool_adapter") is not None:
        own["pool_adapter"] = _recipe(Recipe, default, own["pool_adapter"], f"{where}.pool_adapter")
        for name in ("categories", "unet", "examine_pool", *EVALUATED):
            if name in cell["pool_adapter"]:
                raise ValueError(
                    f"{where}.pool_adapter.{name} has no meaning: category and denoiser are the cell's, and the model that makes the pool is not evaluated"
                )
    return build(kind, dict(default) | own, where)
