"""Work that is not done twice: what goes on after an interruption, what all stages compute once, and the hashes that tell whether anything has changed."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mitune import config, processes, sources
from mitune.artifacts import read_json, write_json


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
        return json.dumps([(str(file.relative_to(part)), _hashed(file, file.stat().st_size, file.stat().st_mtime_ns)) for file in files])
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


@functools.cache
def _hashed(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file of this size and time; a model's weights are read once."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def scratch(name: str, *key: Any) -> Iterator[Path]:
    """An untracked folder `.scratch/{name}/{hash of key and code}` for unfinished work: kept on an error or a kill, removed at the end.

    Work of another key under the same name is stale and is removed at the start. Several processes work in it together.
    """
    home = config.root() / ".scratch" / name
    folder = home / digest(*key, sources.loaded())
    if home.is_dir() and processes.is_first():
        for other in home.iterdir():
            if other != folder:
                shutil.rmtree(other)
    processes.wait()
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    processes.wait()
    if processes.is_first():
        shutil.rmtree(home)


# ---------------------------------------------------------------- computed once


KEPT_DAYS = 30
"""For so long something shared that nobody uses is kept."""

LIBRARIES = ("accelerate", "diffusers", "peft", "torch", "transformers")


def shared(name: str, *key: Any, make: Callable[[Path], object]) -> Path:
    """The untracked folder `.scratch/shared/{name}-{hash of key and code}` that `make(folder)` fills, once for all stages and processes.

    The code is that of the module that defines `make` and of all that this imports, and the versions of `LIBRARIES`. What an error or a kill
    leaves lies beside it as `.part` and is given to `make` again; `folder / "work"` is for unfinished work and removed at the end. A second
    process waits for the first, unless they were started to work together (`mitune.processes`): then all make it. `seconds.json` in it tells how long the
    making took. When something is made, what has not been asked for in `KEPT_DAYS` days is removed.
    """
    home = config.root() / ".scratch" / "shared"
    folder = home / f"{name}-{digest(*key, sources.of_function(make), {library: importlib.metadata.version(library) for library in LIBRARIES})}"
    part = folder.with_suffix(".part")
    while not processes.agreed(folder.exists()):
        part.mkdir(parents=True, exist_ok=True)
        with _locked(part) if processes.is_first() else contextlib.nullcontext(True) as mine:
            if processes.agreed(mine and not folder.exists()):
                _timed(make, part)
                processes.wait()
                if processes.is_first():
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
