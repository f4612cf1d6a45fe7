"""One training loop for every part of the embedded model: checkpoints, averaged weights, a log, snapshots."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm


def fit(
    name: str,
    modules: nn.ModuleDict,
    loss: Callable[[torch.Generator], dict[str, torch.Tensor]],
    *,
    scratch: Path,
    steps: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 1e-2,
    warmup: int = 100,
    ema_decay: float | None = None,
    seed: int = 0,
    checkpoint_every: int = 200,
    snapshots: int = 0,
) -> nn.ModuleDict:
    """Minimise `loss(generator)["loss"]` by AdamW, warm-up then linear decay to 0; resumes from `scratch/name.pt`, byte-equal.

    Step i draws from a generator seeded by (seed, i). With `ema_decay` the averaged weights are returned, and with `snapshots`
    that many evenly spaced copies of them are kept in `scratch` for the learning curves.
    """
    device = next(modules.parameters()).device
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1.0) * max(1 - i / steps, 0.0))
    average = {k: v.detach().clone() for k, v in modules.state_dict().items()}
    first, file = 0, scratch / f"{name}.pt"
    if file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        modules.load_state_dict(state["modules"]), optimizer.load_state_dict(state["optimizer"]), schedule.load_state_dict(state["schedule"])
        average, first = state["average"], state["step"]
    modules.train()
    started, seen = time.time(), []
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5):
        terms = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (1 + step) / (10 + step)) if ema_decay else 0.0
        with torch.no_grad():
            for key, value in modules.state_dict().items():
                average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
        seen.append({k: float(v.detach()) for k, v in terms.items()})
        done = step + 1
        if done % 50 == 0 or done == steps:
            mean = {k: sum(row[k] for row in seen) / len(seen) for k in seen[0]}
            with (scratch / "log.jsonl").open("a") as log:
                log.write(json.dumps({"part": name, "step": done, **mean, "seconds": time.time() - started}) + "\n")
            seen = []
        if done % checkpoint_every == 0 or done == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "average": average, "step": done}
            _save(state, file)
        if snapshots and (done * snapshots) // steps > (step * snapshots) // steps:
            _save({k: v.half() if v.is_floating_point() else v for k, v in average.items()}, scratch / f"{name}-{done:06d}.pt")
    modules.load_state_dict(average)
    return modules.eval()


def _save(state: dict, file: Path) -> None:
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)
