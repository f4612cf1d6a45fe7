"""What the stages leave for each other: where it lies, what its columns are, and how it is written so that nothing half-written is taken for whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mitune import config, processes

TEXT, WHOLE, REAL, TRUTH = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_IMAGE = {"prompt_id": WHOLE, "prompt": TEXT, "image": WHOLE}
_SCENE = {"scene": TEXT}  # what several wordings of a prompt have in common: the unit that is resampled
_ALIGNMENT = {"judge": REAL, "similarity": REAL}  # probability of being right; cosine
_EVALUATED = {"category": TEXT, "split": TEXT, "guidance_scale": REAL, **_IMAGE, **_SCENE, **_ALIGNMENT, "failure": TEXT}

SCHEMAS: dict[str, dict[str, pa.DataType]] = {
    "scores": {
        "category": TEXT,
        "split": TEXT,
        **_IMAGE,
        **_SCENE,
        **_ALIGNMENT,
    },  # and each estimator and its standard error (`_se`), in nats
    "candidates": {"category": TEXT, "split": TEXT, "guidance_scale": REAL, **_IMAGE, **_SCENE, **_ALIGNMENT},
    "stepped": {"category": TEXT, "split": TEXT, "num_inference_steps": WHOLE, **_IMAGE, **_SCENE, **_ALIGNMENT},
    "rendered": {"category": TEXT, "split": TEXT, **_IMAGE, **_SCENE, "drawn": TEXT, "error": TEXT, "aligned": TRUTH},  # drawn: the caption that is true
    "sets": {"category": TEXT, "arm": TEXT, "draw": WHOLE, **_IMAGE, "why": TEXT},
    "curve": {"category": TEXT, "arm": TEXT, "step": WHOLE, "loss": REAL, "grad_norm": REAL},
    "images": {"category": TEXT, "arm": TEXT, "split": TEXT, "guidance_scale": REAL, **_IMAGE, **_SCENE, **_ALIGNMENT, "failure": TEXT},
    "evaluated": _EVALUATED,
    "cell": {"seed": WHOLE, **_EVALUATED, "base_judge": REAL, "base_similarity": REAL, "base_failure": TEXT},  # base: of the same prompt and noise
    "kept": {"category": TEXT, "seed": WHOLE, "round": WHOLE, "source": TEXT, **_IMAGE, "why": TEXT, **_ALIGNMENT},  # source: pool, or real, a pair's number
    "merged": {"seed": WHOLE, **_EVALUATED, **{f"{of}_{name}": REAL for of in ("base", "own") for name in _ALIGNMENT}},  # own: of the category's own adapter
    "layers": {"seed": WHOLE, "layer": TEXT, "norm": REAL, "cosine": REAL, "apart": REAL, "rows": REAL},  # see merging.describe
    "costs": {"category": TEXT, "seed": WHOLE, "parameters": WHOLE, "pool": WHOLE, "scores": WHOLE},  # trained parameters; evaluations of the denoiser
    "timed": {"part": TEXT, "of": TEXT, "size": WHOLE, "repeat": WHOLE, "units": WHOLE, "seconds": REAL, "memory": REAL},  # see stages.cost
    "knows": {"category": TEXT, "kind": TEXT, "case": WHOLE, "prompt": TEXT, "wrong": TEXT, "margin": REAL, "correct": TRUTH},  # margin in nats
    "snapshots": {"step": WHOLE, "category": TEXT, "case": WHOLE, "prompt": TEXT, **_SCENE, "knows": TRUTH},
    "ranking": {"step": WHOLE, "category": TEXT, **_IMAGE, **_SCENE, "judge": REAL},  # and each estimator, in nats
}
OPEN = {"scores": REAL, "ranking": REAL}  # tables that take further columns, all of this type


@dataclass(frozen=True)
class Results:
    """The one home of every value of a model, below `results/{model}`."""

    model: str
    root: Path = dataclasses.field(default_factory=config.root)

    @property
    def folder(self) -> Path:
        return Path(self.root) / "results" / self.model

    def code(self, notebook: str) -> Path:
        """The modules that a notebook uses, with their SHA-256 (`sources.of_notebooks`): what its stages depend on in their place."""
        return self.folder / "code" / f"{notebook}.json"

    def pool(self, category: str, split: str) -> Path:
        return self.folder / "pools" / category / f"{split}.safetensors"

    def terms(self, category: str, split: str) -> Path:
        return self.folder / "scores" / category / f"{split}_terms.safetensors"

    def scores(self, category: str) -> Path:
        return self.folder / "scores" / category / "scores.parquet"

    def candidates(self, category: str) -> Path:
        return self.folder / "information" / category / "candidates.parquet"

    def stepped(self, category: str) -> Path:
        return self.folder / "information" / category / "stepped.parquet"

    def rendered(self, category: str) -> Path:
        return self.folder / "information" / category / "rendered.parquet"

    def information(self, category: str) -> Path:
        """The terms of the rows of `candidates`, `stepped` and `rendered`."""
        return self.folder / "information" / category / "terms.safetensors"

    def sets(self, category: str) -> Path:
        return self.folder / "sets" / f"{category}.parquet"

    def adapter(self, category: str, arm: str) -> Path:
        """The folder that the pipeline's `load_lora_weights` reads."""
        return self.folder / "adapters" / category / arm

    def curve(self, category: str, arm: str) -> Path:
        return self.adapter(category, arm) / "curve.parquet"

    def images(self, category: str) -> Path:
        return self.folder / "evaluation" / category / "images.parquet"

    def grids(self, category: str) -> Path:
        return self.folder / "evaluation" / category / "grids.safetensors"

    def cell(self, study: str, key: str) -> Path:
        """A folder: `images.parquet`, `sets.parquet`, `costs.parquet`, `seconds.json`, `features.safetensors`, and in `adapters` one of each
        `{category}-{seed}`, those of later rounds `{category}-{seed}-{round}`; with `examine_pool` also `pool.parquet`; of the study `merging`
        `images.parquet` and `layers.parquet` alone.

        The features are of unit norm: `images` and `base`, a row a row of `images.parquet`, and `reference/{category}/{split}` and
        `decoded/{category}/{split}`, of images that no model made, where there are any (`mitune.stages.steps.reference`).
        """
        return self.folder / "studies" / study / key

    def cost(self, name: str) -> Path:
        """`timed.parquet` or `facts.json`."""
        return self.folder / "cost" / name

    def base(self, name: str) -> Path:
        """`knows.parquet` or `checks.json`."""
        return self.folder / "base" / name


# ---------------------------------------------------------------- whole files


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`, that takes its place on success and vanishes on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_table(frame: pd.DataFrame, path: Path, schema: str) -> None:
    """Write `frame` as the table `schema`, columns in the declared order; of several processes the first does. Raises ValueError for a column that is
    missing, unknown or of another type."""
    columns = _columns(schema, list(frame.columns), path)
    try:
        table = pa.Table.from_pandas(frame[list(columns)], schema=pa.schema(list(columns.items())), preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: not a table of {schema!r}: {' '.join(str(error).split())}") from None
    if processes.is_first():
        with atomic(path) as part:
            pq.write_table(table, part, compression="zstd")


def no_rows(schema: str) -> pd.DataFrame:
    """The table `schema` without a row: what a stage leaves of what its model does not have."""
    return pa.schema(list(SCHEMAS[schema].items())).empty_table().to_pandas()


def read_table(path: Path, schema: str) -> pd.DataFrame:
    """The table at `path`, its columns checked against `schema`. Raises ValueError naming the file and the column."""
    path = Path(path)
    _must_exist(path)
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet table ({' '.join(str(error).split())}): delete it and run `dvc repro`") from None
    for name, kind in _columns(schema, table.column_names, path).items():
        if table.schema.field(name).type != kind:
            raise ValueError(f"{path}: column {name!r} is {table.schema.field(name).type}, not {kind}: delete the file and run `dvc repro`")
    return table.to_pandas()


def _columns(schema: str, names: list[str], path: Path) -> dict[str, pa.DataType]:
    if schema not in SCHEMAS:
        raise ValueError(f"unknown schema {schema!r}: the schemas are {', '.join(SCHEMAS)}")
    declared, further = SCHEMAS[schema], [name for name in names if name not in SCHEMAS[schema]]
    missing = [name for name in declared if name not in names]
    if missing:
        raise ValueError(f"{path}: column {missing[0]!r} of {schema!r} is missing: it has {', '.join(names)}")
    if further and schema not in OPEN:
        raise ValueError(f"{path}: unknown column {further[0]!r}: {schema!r} has {', '.join(declared)}")
    return declared | {name: OPEN[schema] for name in further}


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None, *, everywhere: bool = False) -> None:
    """Write named tensors as safetensors; of several processes the first does, or `everywhere` the one that calls."""
    if everywhere or processes.is_first():
        with atomic(path) as part:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
            save_file(whole, part, metadata=dict(metadata) if metadata else None)


def read_tensors(path: Path, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors at `path` (those of `names` if given). Raises ValueError naming the file."""
    path = Path(path)
    _must_exist(path)
    try:
        with safe_open(path, framework="pt") as file:
            missing = [name for name in names or () if name not in file.keys()]
            if missing:
                raise ValueError(f"{path} has no tensor {missing[0]!r}: it has {', '.join(sorted(file.keys()))}")
            return {name: file.get_tensor(name) for name in (names or sorted(file.keys()))}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}): delete it and run `dvc repro`") from None


def write_json(value: Any, path: Path) -> None:
    """Write JSON with sorted keys; of several processes the first does. Numbers must be finite."""
    if processes.is_first():
        with atomic(path) as part:
            part.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    path = Path(path)
    _must_exist(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it and run `dvc repro`") from None


def write_metrics(metrics: Mapping[str, Any], path: Path) -> None:
    """Write an article's numbers: nested mappings whose leaves are numbers; a headline number is a mapping of value, low and high (its 95 % interval).

    Raises ValueError naming the entry that is not a finite number, or a value outside its own interval.
    """

    def check(entry: Any, where: str) -> Any:
        if isinstance(entry, Mapping):
            plain = {str(key): check(part, f"{where}.{key}".lstrip(".")) for key, part in entry.items()}
            if set(plain) >= {"value", "low", "high"} and not plain["low"] <= plain["value"] <= plain["high"]:
                raise ValueError(f"{path}: {where} is {plain['value']}, outside its interval {plain['low']} to {plain['high']}")
            return plain
        number = entry.item() if hasattr(entry, "item") else entry
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{path}: {where} is {number!r}: a metric is a finite number")
        return number if isinstance(number, int) else round(number, 6)

    write_json(check(metrics, ""), path)


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: run `dvc repro` to make it; `dvc pull -r results --allow-missing` fetches the committed pools and MI adapters")
