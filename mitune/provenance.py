"""Where a report comes from: the commit, the machine and the versions of the run that made it, kept by `make repro` in `provenance.json` of the reports.

The file is committed with the reports and is no output of a stage, so that equal results stay equal bytes. An entry counts only for
the notebook whose bytes it names: a stage that ran in another way leaves none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mitune.artifacts import read_json, write_json

FILE = "provenance.json"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy", "pandas", "pyarrow", "matplotlib", "dvc", "papermill")


def start(root: Path, reports: str, device: str) -> dict[str, Any]:
    """The run that begins now. `clean`: the working tree is the commit's, but for what a run itself writes; both are None without git."""
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", ".", f":(exclude){reports}", ":(exclude)dvc.lock")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "clean": None if changed is None else not changed,
        "machine": machine(device),
        "packages": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def machine(device: str) -> str:
    """What computes, in words; its name only for a GPU."""
    cores = f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return f"{torch.cuda.get_device_name(device)} ({cores})" if device.startswith("cuda") else cores


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def notebook(root: Path, reports: str, model: str, stage: str) -> Path:
    """The executed notebook of a stage: an article's lies in the reports, any other in the results."""
    article = root / reports / f"{stage}.ipynb"
    return article if article.is_file() else root / "results" / model / "notebooks" / f"{stage.replace('@', '-')}.ipynb"


def record(file: Path, run: Mapping[str, Any], stage: str, made: Path, seconds: float | None) -> None:
    """Note in `file` that `run` made the notebook `made` of a stage, and forget runs of which nothing is left."""
    known = read_json(file) if file.is_file() else {"runs": {}, "stages": {}}
    stages = known["stages"] | {stage: {"run": run["started"], "seconds": seconds, "md5": digest(made)}}
    runs = known["runs"] | {run["started"]: dict(run)}
    write_json({"runs": {key: runs[key] for key in sorted({entry["run"] for entry in stages.values()})}, "stages": stages}, file)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """By stage: the run that made it, with the stage's own seconds and md5; nothing without the file."""
    if not file.is_file():
        return {}
    known = read_json(file)
    return {stage: known["runs"][entry["run"]] | {key: entry[key] for key in ("seconds", "md5")} for stage, entry in known["stages"].items()}


def digest(path: Path) -> str:
    """Of a file's bytes, as DVC has it."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
