"""What the stages leave for each other: where it lies, what its columns are, and how it is written so that nothing half-written is taken for whole."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from mitune import config

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

    def pool(self, category: str, split: str) -> Path:
        return self.folder / "pools" / category / f"{split}.safetensors"

    def terms(self, category: str, split: str) -> Path:
        return self.folder / "scores" / category / f"{split}_terms.safetensors"

    def scores(self, category: str) -> Path:
        return self.folder / "scores" / category / "scores.parquet"

    def candidates(self, category: str) -> Path:
        return self.folder / "information" / category / "candidates.parquet"

    def rendered(self, category: str) -> Path:
        return self.folder / "information" / category / "rendered.parquet"

    def information(self, category: str) -> Path:
        """The terms of the rows of `candidates` and of `rendered`."""
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
        `{category}-{seed}`, those of later rounds `{category}-{seed}-{round}`; of the study `merging` `images.parquet` and `layers.parquet` alone.

        The features are of unit norm: `images` and `base`, a row a row of `images.parquet`, and `reference/{category}/{split}` and
        `decoded/{category}/{split}`, of rendered scenes of its prompts (`mitune.stages.steps.reference`).
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
    """Write `frame` as the table `schema`, columns in the declared order. Raises ValueError for a column that is missing, unknown or of another type."""
    columns = _columns(schema, list(frame.columns), path)
    try:
        table = pa.Table.from_pandas(frame[list(columns)], schema=pa.schema(list(columns.items())), preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: not a table of {schema!r}: {' '.join(str(error).split())}") from None
    with atomic(path) as part:
        pq.write_table(table, part, compression="zstd")


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


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors."""
    with atomic(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}, part, metadata=dict(metadata) if metadata else None)


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
    """Write JSON with sorted keys; numbers must be finite."""
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


# ---------------------------------------------------------------- going on after an interruption


def digest(*parts: Any) -> str:
    """A hash of values, of the contents of files and folders (paths), of tensors and dataclasses."""
    total = hashlib.sha256()
    for part in parts:
        total.update(_fingerprint(part).encode())
        total.update(b"\0")
    return total.hexdigest()[:16]


def _fingerprint(part: Any) -> str:
    if isinstance(part, Path):
        files = [part] if part.is_file() else sorted(file for file in part.rglob("*") if file.is_file())
        if not files:
            raise ValueError(f"{part} is missing or empty: an input must be there before its hash can be taken")
        return json.dumps([(str(file.relative_to(part)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    if isinstance(part, torch.Tensor):
        raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{part.dtype}{tuple(part.shape)}{hashlib.sha256(raw).hexdigest()}"
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return _fingerprint({field.name: getattr(part, field.name) for field in dataclasses.fields(part)})
    if isinstance(part, Mapping):
        return json.dumps({str(key): _fingerprint(value) for key, value in part.items()}, sort_keys=True)
    if isinstance(part, (list, tuple, range)):
        return json.dumps([_fingerprint(value) for value in part])
    return json.dumps(part)


def _code() -> dict[str, str]:
    """The sources of the package's modules that are in use: shards of another version of the code are not resumed."""
    used = {name: module.__file__ for name, module in sorted(sys.modules.items()) if name.startswith("mitune.") and getattr(module, "__file__", None)}
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in used.items()}


@contextlib.contextmanager
def scratch(name: str, *key: Any) -> Iterator[Path]:
    """An untracked folder `.scratch/{name}/{hash of key and code}` for unfinished work: kept on an error or a kill, removed at the end.

    Work of another key under the same name is stale and is removed at the start.
    """
    home = config.root() / ".scratch" / name
    folder = home / digest(*key, _code())
    if home.is_dir():
        for other in home.iterdir():
            if other != folder:
                shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(home)


# ---------------------------------------------------------------- computed once


KEPT_DAYS = 30
"""For so long something shared that nobody uses is kept."""

LIBRARIES = ("accelerate", "diffusers", "peft", "torch", "transformers")


def shared(name: str, *key: Any, make: Callable[[Path], object]) -> Path:
    """The untracked folder `.scratch/shared/{name}-{hash of key and code}` that `make(folder)` fills, once for all stages and processes.

    The code is that of the module that defines `make` and of all that this imports, and the versions of `LIBRARIES`. What an error or a kill
    leaves lies beside it as `.part` and is given to `make` again; `folder / "work"` is for unfinished work and removed at the end. A second
    process waits for the first. `seconds.json` in it tells how long the making took. When something is made, what has not been asked for in
    `KEPT_DAYS` days is removed.
    """
    home = config.root() / ".scratch" / "shared"
    folder = home / f"{name}-{digest(*key, sources(make), {library: importlib.metadata.version(library) for library in LIBRARIES})}"
    part = folder.with_suffix(".part")
    while not folder.exists():
        part.mkdir(parents=True, exist_ok=True)
        with _locked(part) as mine:
            if mine and not folder.exists():
                _timed(make, part)
                shutil.rmtree(part / "work", ignore_errors=True)
                part.rename(folder)
                _remove_unused(home)
    os.utime(folder)
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Alone among processes with this folder, for which it waits; whether the folder still has its name then."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield folder.exists() and folder.stat().st_ino == os.fstat(held).st_ino
    finally:
        os.close(held)


def _timed(make: Callable[[Path], object], folder: Path) -> None:
    """`make(folder)`; its time is added to that of earlier attempts, in `seconds.json`."""
    file, started = folder / "seconds.json", time.perf_counter()
    before = read_json(file)["seconds"] if file.is_file() else 0.0
    try:
        make(folder)
    finally:
        write_json({"seconds": round(before + time.perf_counter() - started, 3)}, file)


def _remove_unused(home: Path) -> None:
    for other in home.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has finished or removed it
            if time.time() - other.stat().st_mtime > KEPT_DAYS * 24 * 3600:
                shutil.rmtree(other)


def sources(function: Callable) -> dict[str, str]:
    """SHA-256 of the file that defines a function, and of the package's modules that this file imports, and these in their turn."""
    package = Path(__file__).parent
    found, new = {}, {Path(inspect.getsourcefile(function))}
    while new:
        file = new.pop()
        found[file] = hashlib.sha256(file.read_bytes()).hexdigest()
        new |= _imported(file, package) - found.keys()
    return {file.stem if file.parent == package else f"{file.parent.name}.{file.stem}": hashed for file, hashed in sorted(found.items())}


def _imported(file: Path, package: Path) -> set[Path]:
    """The files of the package's modules that a file imports, wherever in it."""
    named = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom):
            named |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    parts = [name.split(".")[1:] for name in named if name.split(".")[0] == package.name]
    files = [file for part in parts for file in (package.joinpath(*part).with_suffix(".py"), package.joinpath(*part, "__init__.py"))]
    return {file for file in files if file.is_file()}


# ---------------------------------------------------------------- side by side


def shards(
    folder: Path, items: Sequence, size: int, compute: Callable[[Sequence], Mapping[str, torch.Tensor]], *, device: str, progress: tqdm | None = None
) -> dict[str, torch.Tensor]:
    """`compute` over consecutive slices of `items`, `size` long, joined along the first axis; finished slices are read from `folder`.

    The bounds depend on `size` alone, so that an interrupted run ends with the same bytes as an uninterrupted one. `compute` returns
    tensors of shape (len(slice), ...). `progress` is advanced by the number of items. On a CPU as many slices are computed side by side
    as torch has threads, each on one of them: faster than one slice on all, and the bytes do not depend on the number of cores.
    """
    if not items:
        raise ValueError("there is nothing to compute: items is empty")
    files = {start: folder / f"{start:06d}.safetensors" for start in range(0, len(items), size)}

    def finish(start: int) -> int:
        part = items[start : start + size]
        if not files[start].exists():
            write_tensors(compute(part), files[start])
        return len(part)

    with _side_by_side(device) as each:
        for done in each(finish, files):
            if progress is not None:
                progress.update(done)
    parts = [read_tensors(file) for file in files.values()]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def workers(device: str) -> int:
    """How many shards are computed at the same time."""
    return torch.get_num_threads() if device == "cpu" else 1


@contextlib.contextmanager
def _side_by_side(device: str) -> Iterator[Callable]:
    """A `map`: on a CPU by as many workers as torch has threads, of one thread each. After an error the work that has begun is still finished."""
    if device != "cpu":
        yield map
        return
    threads = workers(device)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def progress(total: int, desc: str, unit: str = "it") -> tqdm:
    """A progress bar: drawn by the runner on the terminal ($MITUNE_PROGRESS is the file it follows), never in a saved notebook; else below the cell."""
    follow = os.environ.get("MITUNE_PROGRESS")
    if follow:
        return tqdm(total=total, desc=desc, unit=unit, mininterval=0.5, ncols=100, file=open(follow, "a", encoding="utf-8", buffering=1))
    return tqdm(total=total, desc=desc, unit=unit)
