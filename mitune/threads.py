"""A CPU's cores: several small computations side by side, one thread each, are faster than one after the other on all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def workers(device: str) -> int:
    """How many computations run at the same time: on a CPU as many as torch has threads."""
    return torch.get_num_threads() if device == "cpu" else 1


@contextlib.contextmanager
def side_by_side(device: str) -> Iterator[Callable]:
    """A `map` by as many workers; on a CPU of one thread each, so that the bytes do not depend on the number of cores. After an error the work that has begun
    is still finished."""
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
