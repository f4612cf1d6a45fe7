"""The learning curve of the embedded model's pretraining: what copies of the denoiser, kept on the way, know and rank (01d_learning_to_rank)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from mitune import captions as grammar
from mitune.alignment import ShapesJudge
from mitune.artifacts import read_table, write_table
from mitune.benchmarks import Benchmark
from mitune.config import Estimator
from mitune.information import query, renoised_terms, renoised_timesteps
from mitune.memo import digest
from mitune.models import load
from mitune.pipelines import LatentDiffusion
from mitune.prompts import Prompt
from mitune.sampling import noise_generator, noises, sample
from mitune.stages.base import knows
from mitune.stages.judging import image_rows, scene


@dataclass(frozen=True)
class Probe:
    """Of the learning curve, for each snapshot and category; images in one call of the network."""

    cases: int  # rendered scenes, true against wrong caption
    prompts: int  # validation prompts whose candidates are ranked
    images: int  # candidates a prompt
    timesteps: int  # of the re-noised terms, of cases and candidates
    t_min: int  # in the cases only timesteps above it count
    guidance_scale: float
    num_inference_steps: int
    batch_size: int
    estimators: dict[str, Estimator]  # the columns of MI


def learning_curve(probe: Probe, cycles: Sequence[int], *, seed: int, device: str, folder: Path, scratch: Path) -> dict[str, pd.DataFrame]:
    """Write what each snapshot of the denoiser knows and ranks: `snapshots.parquet`, a row a case, and `ranking.parquet`, a row a candidate; return both.

    Snapshots are `scratch/unet_{cycle}-{step of it}.pt`; `step` counts through all `cycles`, given by their steps. A finished one lies in
    `scratch/curve`, and is asked again only if its weights, the probe, the prompts, the judge or another part of the pipeline have changed.
    """
    judge, model = ShapesJudge.load(folder / "judge", device=device), load(folder / "pipeline", device=device)
    others = digest(probe, seed, *(folder / part for part in ("prompts", "judge", "pipeline/vae", "pipeline/text_encoder")))
    starts = [sum(cycles[:n]) for n in range(len(cycles))]
    files = {start + int(file.stem.split("-")[1]): file for n, start in enumerate(starts) for file in sorted(scratch.glob(f"unet_{n + 1}-*.pt"))}
    found: dict[str, list[pd.DataFrame]] = {"snapshots": [], "ranking": []}
    for step, file in tqdm(files.items(), desc="learning curve"):
        home = scratch / "curve" / f"{step:06d}-{digest(file, others)}"
        if not all((home / f"{name}.parquet").exists() for name in found):
            weights = torch.load(file, map_location=device, weights_only=True)
            model.network.load_state_dict({name.removeprefix("unet."): value.float() for name, value in weights.items()})
            for name, table in _examined(model, judge, folder / "prompts", probe, seed).items():
                write_table(table.assign(step=step), home / f"{name}.parquet", name)
        for name, tables in found.items():
            tables.append(read_table(home / f"{name}.parquet", name))
    curve = {name: pd.concat(tables, ignore_index=True) for name, tables in found.items()}
    for name, table in curve.items():
        write_table(table, folder / f"{name}.parquet", name)
    return curve


def _examined(model: LatentDiffusion, judge: ShapesJudge, folder: Path, probe: Probe, seed: int) -> dict[str, pd.DataFrame]:
    """The tables of one state of the model, over all categories: `snapshots` and `ranking` but for their `step`."""
    cases, candidates = [], []
    for category in grammar.CATEGORIES:
        items = Benchmark(folder).load(category, "val")
        cases.append(knows(model, category, [item.text for item in items], probe, seed=seed).rename(columns={"correct": "knows"}))
        candidates.append(_candidates(model, judge, items[: probe.prompts], probe, seed).assign(category=category))
    known = pd.concat(cases, ignore_index=True)
    known = known.assign(scene=known["prompt"].map(scene))[["category", "case", "prompt", "scene", "knows"]]
    return {"snapshots": known, "ranking": pd.concat(candidates, ignore_index=True)}


def _candidates(model: LatentDiffusion, judge: ShapesJudge, items: list[Prompt], probe: Probe, seed: int) -> pd.DataFrame:
    """A row a candidate of each prompt: the judge's score and each estimator's MI in nats; re-noising noise is common to a prompt's candidates."""
    rows = image_rows(items, probe.images)
    texts, own = list(rows["prompt"]), torch.arange(len(items)).repeat_interleave(probe.images)
    said, at = model.encode(texts), renoised_timesteps(len(model.alphas_cumprod), probe.timesteps)
    samples = sample(
        model, said, model.null, guidance_scale=probe.guidance_scale, num_inference_steps=probe.num_inference_steps,
        generators=[noise_generator(seed, text, image) for text, image in zip(texts, rows["image"], strict=True)], terms=True, batch_size=probe.batch_size,
    )  # fmt: skip
    noise = noises([(item.text, 0) for item in items], len(at), model.latent_shape, seed=seed, stream="renoise")[own]
    renoised = renoised_terms(model, samples.latents, said, model.null, timesteps=at, noise=noise, batch_size=probe.batch_size)
    terms = {f"renoised_{form}": values for form, values in renoised.items()} | {"renoised_timesteps": at}
    terms |= {name: getattr(samples, name) for name in ("orthogonal", "path", "timesteps")}
    mi = {name: query(estimator, terms, model.alphas_cumprod).value.numpy() for name, estimator in probe.estimators.items()}
    return rows.assign(judge=judge.score(model.decode(samples.latents), texts).double().numpy(), **mi)
