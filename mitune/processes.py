"""Several processes at one stage, on one machine or several that share the project's folder: which of them this is, and what they have to agree on.

`accelerate launch` (or torchrun, which it calls) starts them and tells each by environment variables; without these there is one.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(days=2)
"""For so long one process waits for another: the first alone judges images and writes, and a shard may take an hour."""


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def index() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0))


def wanted() -> int:
    """How many a stage is to be given ($MITUNE_PROCESSES, by `make repro PROCESSES=4`); 1 within one that has been given them.

    Raises ValueError for what is not a number of processes.
    """
    asked = os.environ.get("MITUNE_PROCESSES") or "1"
    if not asked.isdecimal() or int(asked) < 1:
        raise ValueError(f"MITUNE_PROCESSES is {asked!r}: it must be a whole number, at least 1; one for each GPU")
    return int(asked) if count() == 1 else 1


def is_first() -> bool:
    """Whether this is the one that writes what all have made."""
    return index() == 0


def wait() -> None:
    """Go on when every process is here."""
    agreed(True)


def agreed(answer: bool) -> bool:
    """The first process's answer, in all of them."""
    if count() == 1:
        return answer
    torch = _meet()
    told = torch.tensor(float(answer and is_first()))
    torch.distributed.all_reduce(told)  # and not a broadcast, after which the first would not wait for the others
    return bool(told)


def average(tensors: Iterable[torch.Tensor]) -> None:
    """Put in the place of each tensor its mean over the processes, the same bytes in each. All tensors are of one dtype and on one device."""
    if count() == 1:
        return
    torch, tensors = _meet(), list(tensors)
    together = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(together)
    for tensor, mean in zip(tensors, (together / count()).split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def own_gpu(environment: dict[str, str]) -> dict[str, str]:
    """The environment in which the GPU of this process is the only one, and `cuda` its name; as it is for one process."""
    if count() == 1:
        return environment
    place = int(environment.get("LOCAL_RANK", 0))
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or [str(place)]
    return environment | {"CUDA_VISIBLE_DEVICES": visible[place % len(visible)]}


@functools.cache
def _meet():
    """torch, once all have met: by Gloo for tensors on the CPU, by NCCL for those on GPUs, where there are any."""
    import torch

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    atexit.register(torch.distributed.destroy_process_group)
    return torch
