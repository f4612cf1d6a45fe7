"""The pipeline's hands: each stage reads artifacts, calls the method, and leaves artifacts whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mitune import config, models, prompts


def path(entry: str) -> Path | str:
    """A `models` entry as a folder of the project where there is one, else as it stands (a name on the hub)."""
    folder = config.root() / entry
    return folder if folder.exists() else entry


def open_model(params, *, adapter: Path | Sequence[Path] | None = None) -> models.LatentDiffusion:
    """The base, or with the adapters of these folders fused into it in turn."""
    return models.load(path(params.models[params.model].pipeline), device=params.device, dtype=params.dtype, adapter=adapter)


def read_prompts(params, category: str, split: str, n: int | None = None) -> list[prompts.Prompt]:
    """The first n prompts of a split, all by default. Raises ValueError where it has fewer."""
    return prompts.load(path(params.models[params.model].prompts), category, split, n)


def has_split(params, category: str, split: str) -> bool:
    """Whether the benchmark has prompts of this split: compositional prompts, for one, are not everywhere."""
    return (Path(path(params.models[params.model].prompts)) / f"{category}_{split}.txt").is_file()
