"""Stages of the pipeline side by side. `dvc repro` runs one at a time, and much of a stage keeps one core busy: imports, fine-tuning, DVC's own bookkeeping.

DVC lets go of its lock while a stage's command runs, so that several `dvc repro --single-item`, each of another stage, work at once.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

Needs = Mapping[str, set[str]]
"""Of each stage those whose outputs it reads."""


def needs(root: Path) -> Needs:
    """As DVC has them, of the stages of dvc.yaml, wherever this process works: `addressing` would have the way to dvc.yaml from there."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        graph = repo.index.graph
        return {stage.name: {other.name for other in graph.successors(stage) if other.cmd} for stage in graph if stage.cmd}


def stale(root: Path, command: list[str], env: Mapping[str, str], needed: Needs) -> set[str]:
    """The stages that have changed, as `dvc status` (the `command`) tells, and all that read what they write. Raises ValueError with DVC's own words."""
    told = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if told.returncode:
        raise ValueError(told.stderr.strip())
    found, new = set(), needed.keys() & json.loads(told.stdout)
    while new:
        found |= new
        new = {stage for stage, others in needed.items() if others & new} - found
    return found


def urgency(needed: Needs, seconds: Callable[[str], float]) -> dict[str, float]:
    """Of each stage how long it takes with the longest chain of stages that wait for it."""
    readers: dict[str, list[str]] = {stage: [] for stage in needed}
    for stage, others in needed.items():
        for other in others:
            readers[other].append(stage)
    found: dict[str, float] = {}

    def of(stage: str) -> float:
        if stage not in found:
            found[stage] = seconds(stage) + max(map(of, readers[stage]), default=0.0)
        return found[stage]

    return {stage: of(stage) for stage in needed}


def run(
    stages: Collection[str], needed: Needs, work: Callable[[str], int], *, lanes: int, urgent: Mapping[str, float],
    alone: Collection[str] = (), began: Callable[[str], object] = print, ended: Callable[[str], object] = print,
) -> int:  # fmt: skip
    """`work(stage)` for each of `stages`, after those that it needs, the most urgent first, up to `lanes` at once in threads of their own; one of `alone` has
    nothing beside it. After a `work` that is not 0 none is begun any more. The first such value, or 0."""
    waiting, running, status = set(stages), dict[Future, str](), 0
    with ThreadPoolExecutor(lanes) as pool:
        while True:
            for stage in sorted(waiting, key=lambda name: (-urgent[name], name)) if not status else ():
                busy = set(running.values())
                fits = not busy if stage in alone else len(busy) < lanes and not busy & set(alone)
                if fits and not needed[stage] & (waiting | busy):
                    waiting.remove(stage)
                    began(stage)
                    running[pool.submit(work, stage)] = stage
            if not running:
                return status
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                ended(running.pop(done))
                status = status or done.result()
