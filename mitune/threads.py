"""A CPU's cores: several small computations side by side, one thread each, are faster than one after the other on all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers(device: str) -> int:
    """How many computations run at the same time: on a CPU one a core, or as many as $MITUNE_WORKERS says."""
    return int(os.environ.get("MITUNE_WORKERS") or cores()) if device == "cpu" else 1


@contextlib.contextmanager
def side_by_side(device: str) -> Iterator[Callable]:
    """A `map` by as many workers; on a CPU of one thread each, so that the bytes do not depend on the number of cores. After an error the work that has begun
    is still finished."""
    if device != "cpu":
        yield map
        return
    import torch

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers(device), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
