"""Long computations: in slices that are kept, on a CPU side by side, under a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mitune import processes
from mitune.artifacts import read_tensors, write_tensors
from mitune.threads import side_by_side


def shards(
    folder: Path, items: Sequence, size: int, compute: Callable[[Sequence], Mapping[str, torch.Tensor]], *, device: str, progress: tqdm | None = None
) -> dict[str, torch.Tensor]:
    """`compute` over consecutive slices of `items`, `size` long, joined along the first axis; finished slices are read from `folder`.

    The bounds depend on `size` alone, so that an interrupted run ends with the same bytes as an uninterrupted one. `compute` returns
    tensors of shape (len(slice), ...). `progress` is advanced by the number of items. On a CPU as many slices are computed side by side
    as there are workers (`mitune.threads`), each on one core: faster than one slice on all, and the bytes do not depend on the number of cores. Of several
    processes (`mitune.processes`) each computes every n-th slice and reads the others', so that all return the same.
    """
    if not items:
        raise ValueError("there is nothing to compute: items is empty")
    starts, count = range(0, len(items), size), processes.count()
    files = {start: folder / f"{start:06d}.safetensors" for start in starts}

    def finish(start: int) -> int:
        if not files[start].exists():
            write_tensors(compute(items[start : start + size]), files[start], everywhere=True)
        return min(count * size, len(items) - start + processes.index() * size)  # the others finish theirs meanwhile

    with side_by_side(device) as each:
        for done in each(finish, starts[processes.index() :: count]):
            if progress is not None:
                progress.update(done)
    processes.wait()
    parts = [read_tensors(file) for file in files.values()]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def progress(total: int, desc: str, unit: str = "it") -> tqdm:
    """A progress bar: drawn by the runner on the terminal ($MITUNE_PROGRESS is the file it follows), never in a saved notebook; else below the cell."""
    follow = os.environ.get("MITUNE_PROGRESS")
    if follow:
        return tqdm(total=total, desc=desc, unit=unit, mininterval=0.5, ncols=100, file=open(follow, "a", encoding="utf-8", buffering=1))
    return tqdm(total=total, desc=desc, unit=unit)
