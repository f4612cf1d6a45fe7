"""Are recomputed headline numbers those of the committed run, within its intervals? (`make verify`, after `make repro`)

Another processor changes last digits, and with them hashes in `dvc.lock`; what must hold is that each headline number, a metric with
value, low and high, lies in the interval that was committed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mitune import config
from mitune.artifacts import read_json


@dataclass(frozen=True)
class Comparison:
    name: str
    committed: float
    low: float
    high: float
    recomputed: float | None

    @property
    def agrees(self) -> bool:
        return self.recomputed is not None and self.low <= self.recomputed <= self.high


def headlines(metrics: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Mapping[str, float]]]:
    """(dotted name, {value, low, high, ...}) of every headline number."""
    if {"value", "low", "high"} <= set(metrics):
        yield where, metrics
        return
    for key, entry in metrics.items():
        if isinstance(entry, Mapping):
            yield from headlines(entry, f"{where}.{key}".lstrip("."))


def compare(committed: Mapping[str, Any], recomputed: Mapping[str, Any]) -> list[Comparison]:
    """Every committed headline number beside the recomputed one of the same name."""
    ours = dict(headlines(recomputed))
    return [Comparison(name, entry["value"], entry["low"], entry["high"], ours.get(name, {}).get("value")) for name, entry in headlines(committed)]


def committed_metrics(root: Path, folder: str) -> dict[str, Any]:
    """The metrics of git's HEAD, by file name. Raises ValueError if it has none."""
    names = _git(root, "ls-tree", "--name-only", "HEAD", f"{folder}/").split("\n")
    files = [name for name in names if name.endswith(".json")]
    if not files:
        raise ValueError(f"the committed revision has no {folder}/*.json: check out one that has a run's reports")
    return {Path(name).stem: json.loads(_git(root, "show", f"HEAD:{name}")) for name in files}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-c", "core.quotepath=off", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {arguments[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def main() -> int:
    try:
        root = config.root()
        folder = f"{config.load().reports}/metrics"
        committed = committed_metrics(root, folder)
        comparisons = compare(committed, {name: read_json(root / folder / f"{name}.json") for name in committed})
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    width = max((len(comparison.name) for comparison in comparisons), default=0)
    for comparison in comparisons:
        recomputed = "missing" if comparison.recomputed is None else f"{comparison.recomputed:.4g}"
        verdict = "ok" if comparison.agrees else "DIFFERS"
        print(f"{comparison.name:<{width}}  {recomputed:>9}  committed {comparison.committed:.4g} [{comparison.low:.4g}, {comparison.high:.4g}]  {verdict}")
    differing = sum(not comparison.agrees for comparison in comparisons)
    print(f"{len(comparisons) - differing} of {len(comparisons)} headline numbers lie in the committed intervals")
    return int(bool(differing) or not comparisons)


if __name__ == "__main__":
    sys.exit(main())
