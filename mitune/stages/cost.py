"""Stage `cost`: what each part of the method takes here: seconds and memory at a small size, and what an adapter adds to sampling, merged and attached.

Each part is measured in a process of its own, so that its peak of memory is its own too. Times differ from run to run: they are taken once for one
version of code, parameters and libraries, and kept.
"""

from __future__ import annotations

import multiprocessing
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from mitune import config
from mitune.adapters import ADAPTER_FILE
from mitune.artifacts import Results, read_json, read_table, write_json, write_table
from mitune.finetuning import finetune, read_captions
from mitune.information import renoised_terms, renoised_timesteps
from mitune.memo import shared
from mitune.models import load
from mitune.pipelines import LatentDiffusion
from mitune.sampling import noise_generator, noises, sample
from mitune.shards import progress, shards
from mitune.stages import judging, open_model, read_prompts, weights
from mitune.stages.pool import sampler
from mitune.threads import workers

NETWORKS = ("base", "merged", "attached")
Job = tuple[str, int, int, Callable[[], object]]
"""What is measured: of what, at which size, how many units of work it is, and how it is done."""


def build(params, parameters: Mapping[str, Any] | None) -> pd.DataFrame:
    """Write `cost/timed.parquet`, which is returned, and `cost/facts.json`. `parameters` are what `params` was read from: each process reads them anew.

    A row is one measurement: `part`, `of` and `size` (of growth: what was varied and its value), `units` of work (evaluations of the denoiser; images
    where they are judged; optimizer steps), `seconds`, and `memory`, the peak so far of the part's process (of the accelerator, where there is one) in MiB.
    """
    trained = Results(params.model).adapter(params.categories[0], params.cost.arm)

    def make(folder: Path) -> None:
        rows = []
        with progress(len(PARTS), "cost", unit="part") as bar:
            for part in PARTS:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                    rows += alone.submit(measure, parameters, part).result()
                bar.update(1)
        write_table(pd.DataFrame(rows), folder / "timed.parquet", "timed")
        write_json(networks(params, trained) | {"recorded": recorded(params)}, folder / "facts.json")

    settings = (params.cost, params.seed, params.pool, params.renoise, params.finetune, params.evaluate, params.dtype, params.device)
    model = (*weights(params).values(), trained / ADAPTER_FILE, params.categories[0])
    folder, results = shared("cost", *settings, *model, make=make), Results(params.model)
    table = read_table(folder / "timed.parquet", "timed")
    write_table(table, results.cost("timed.parquet"), "timed")
    write_json(read_json(folder / "facts.json"), results.cost("facts.json"))
    return table


def measure(parameters: Mapping[str, Any] | None, part: str) -> list[dict[str, Any]]:
    """The rows of one part, in this process: its jobs in turn, and again, after a turn that does not count."""
    params, rows = config.read(parameters), []
    jobs = list(PARTS[part](params))
    for repeat in range(-1, params.cost.rounds if part == "inference" else params.cost.repeats):
        for of, size, units, work in jobs:
            started = time.perf_counter()
            work()
            if params.device.startswith("cuda"):
                torch.cuda.synchronize()
            spent = time.perf_counter() - started
            if repeat >= 0:
                row = {"part": part, "of": of, "size": size, "repeat": repeat, "units": units}
                rows.append(row | {"seconds": spent, "memory": peak(params.device)})
    return rows


def peak(device: str) -> float:
    """The most memory that this process has held so far, or the accelerator for it, in MiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # the resource usage of a Linux process counts what its parent held
        return next(int(line.split()[1]) / 2**10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def networks(params, trained: Path) -> dict[str, Any]:
    """Parameters, layers and floating-point operations of one evaluation (a batch of one) of each of `NETWORKS`, and how far their outputs lie apart.

    `difference` is max |merged - attached| / max |attached - base| of the predicted noise at t = 700.
    """
    models, outputs, found = {name: _opened(params, name, trained) for name in NETWORKS}, {}, {}
    text = read_prompts(params, params.categories[0], "test", 1)[0].text
    z_t = torch.randn((1, *models["base"].latent_shape), generator=noise_generator(params.seed, text, 0))
    for name, model in models.items():
        conditioning = model.encode([text])
        with FlopCounterMode(display=False) as counter:
            outputs[name] = model.eps(z_t, 700, conditioning).cpu()
        leaves = [layer for layer in model.network.modules() if not list(layer.children())]
        found[name] = {"parameters": sum(p.numel() for p in model.network.parameters()), "layers": len(leaves), "operations": counter.get_total_flops()}
    apart, effect = ((outputs[name] - outputs["attached"]).abs().max() for name in ("merged", "base"))
    kind = torch.cuda.get_device_name() if params.device.startswith("cuda") else f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    busy = workers(params.device)
    return {"networks": found, "difference": float(apart / effect), "machine": {"kind": kind, "busy": busy, "dtype": params.dtype}}


def recorded(params) -> dict[str, dict[str, float]]:
    """Of the first category's stages what the runner remembers of their last run here: `seconds`, start and end of the process in them, and `workers`."""
    from mitune import runner  # what the processes that measure need not carry

    stages = {name: f"{name}-{params.categories[0]}" for name in ("pool", "scores", "finetune", "evaluate")}
    stages["finetune"] += f"-{params.cost.arm}"
    return {name: noted for name, stage in stages.items() if (noted := runner.recorded(stage))}


# ---------------------------------------------------------------- parts


def _open(params) -> Iterator[Job]:
    """A model and the judges and nothing else: what every part's memory begins with."""
    yield "model", 1, 1, lambda: (open_model(params), judging.open_judges(params, params.categories[0]))


def _pool(params) -> Iterator[Job]:
    yield _sampling(params, open_model(params), "pool", 1)


def _scores(params) -> Iterator[Job]:
    model, texts, m = open_model(params), _texts(params), params.cost.M
    timesteps = renoised_timesteps(len(model.alphas_cumprod), params.cost.timesteps)
    rows, latents = [(text, image) for text in texts for image in range(m)], _latents(params, model)

    def compute(some) -> dict[str, torch.Tensor]:
        own = torch.tensor(list(some))
        noise = noises([(rows[row][0], 0) for row in some], len(timesteps), model.latent_shape, seed=params.seed, stream="renoise")
        conditioning = model.encode([rows[row][0] for row in some])
        return renoised_terms(model, latents[own], conditioning, model.null, timesteps=timesteps, noise=noise, batch_size=params.pool.batch_size)

    yield "terms", len(rows), 2 * len(rows) * len(timesteps), lambda: _side_by_side(params, range(len(rows)), params.pool.shard_prompts * m, compute)


def _judge(params) -> Iterator[Job]:
    model, judges, m = open_model(params), judging.open_judges(params, params.categories[0]), params.cost.M
    latents, texts = _latents(params, model), [text for text in _texts(params) for _ in range(m)]

    def compute(some) -> dict[str, torch.Tensor]:
        return judging.judged(judges, model.decode(latents[list(some)]), [texts[row] for row in some])

    yield "images", len(texts), len(texts), lambda: _side_by_side(params, range(len(texts)), params.pool.shard_prompts * m, compute)


def _finetune(params) -> Iterator[Job]:
    texts, tuning = _texts(params), replace(params.finetune, steps=params.cost.steps, checkpoint_every=params.cost.steps)
    model = open_model(params)
    latents, captions = _latents(params, model)[: len(texts)], read_captions(model, texts, tuning)

    def train() -> None:
        if model.adapted:
            model.pipeline.unload_lora_weights()
        with tempfile.TemporaryDirectory() as folder:
            finetune(model, latents, captions, tuning, seed=tuning.seed, folder_checkpoints=Path(folder))

    yield "steps", tuning.steps, tuning.steps, train


def _inference(params) -> Iterator[Job]:
    trained = Results(params.model).adapter(params.categories[0], params.cost.arm)
    asked, text = params.cost, _texts(params)[0]
    for name in NETWORKS:
        model = _opened(params, name, trained)
        yield name, asked.images, asked.images * asked.num_inference_steps, lambda model=model: sample(
            model, model.encode([text] * asked.images), model.null, guidance_scale=1.0, num_inference_steps=asked.num_inference_steps,
            generators=[noise_generator(params.seed, text, image) for image in range(asked.images)],
        )  # fmt: skip


def _growth(params) -> Iterator[Job]:
    model = open_model(params)
    for of in ("prompts", "M", "num_inference_steps"):
        for multiple in params.cost.multiples:
            yield _sampling(params, model, of, multiple)


PARTS: dict[str, Callable[..., Iterator[Job]]] = {
    "open": _open, "pool": _pool, "scores": _scores, "judge": _judge, "finetune": _finetune, "inference": _inference, "growth": _growth,
}  # fmt: skip


def _sampling(params, model: LatentDiffusion, of: str, multiple: int) -> Job:
    """A pool as stage `pool` makes it, of the small size but for one entry of it, `of`, which is `multiple` of that."""
    size = {name: getattr(params.cost, name) * (multiple if name == of else 1) for name in ("prompts", "M", "num_inference_steps")}
    items = _items(params, size["prompts"])
    compute = sampler(model, replace(params.pool, M=size["M"], num_inference_steps=size["num_inference_steps"]), params.pool.guidance_scale, params.seed)
    units = 2 * size["prompts"] * size["M"] * size["num_inference_steps"]
    return of, size.get(of, size["prompts"]), units, lambda: _side_by_side(params, items, params.pool.shard_prompts, compute)


def _side_by_side(params, items, size: int, compute) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards(Path(folder), items, size, compute, device=params.device)


def _items(params, count: int) -> list:
    """`count` test prompts of the first category, all of them in turn where there are fewer."""
    items = read_prompts(params, params.categories[0], "test")
    return [items[n % len(items)] for n in range(count)]


def _texts(params) -> list[str]:
    return [item.text for item in _items(params, params.cost.prompts)]


def _latents(params, model: LatentDiffusion) -> torch.Tensor:
    """Noise in the place of the small pool's images: what it costs to work on them does not depend on what they show."""
    shape = (params.cost.prompts * params.cost.M, *model.latent_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(params.seed))


def _opened(params, name: str, trained: Path) -> LatentDiffusion:
    """One of `NETWORKS`."""
    adapter = {} if name == "base" else {"adapter": trained, "fuse": name == "merged"}
    return load(**weights(params), device=params.device, dtype=params.dtype, **adapter)
