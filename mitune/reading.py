"""What an article does with tables: read all categories at once, put the paper's number beside ours, and judge a claim by a rule written there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from torch.nn import functional

from mitune import config
from mitune.artifacts import Results, read_json, read_table, read_tensors, write_json, write_metrics
from mitune.models import load
from mitune.pipelines import LatentDiffusion
from mitune.recipes import Recipe, recipes
from mitune.statistics import Interval, mean_interval

pd.set_option("display.max_colwidth", None)  # a rule is shown whole


def tables(params, kind: str) -> pd.DataFrame:
    """One table over all categories; `kind` is scores, candidates, stepped, rendered, sets or images, or curve, which every arm has one of."""
    results = Results(params.model)
    cells = itertools.product(params.categories, params.arms) if kind == "curve" else zip(params.categories)
    return pd.concat([read_table(getattr(results, kind)(*cell), kind) for cell in cells], ignore_index=True)


CELLS = {
    "cell": "images.parquet", "kept": "sets.parquet", "costs": "costs.parquet", "merged": "images.parquet", "layers": "layers.parquet",
    "scores": "pool.parquet",
}  # fmt: skip


def made(params, study: str) -> dict[str, Recipe]:
    """The cells of a study that params.yaml has, but those that take what the model lacks: they left tables without rows."""
    results, schema = Results(params.model), "merged" if study == "merging" else "cell"
    return {key: recipe for key, recipe in recipes(params, study).items() if len(read_table(results.cell(study, key) / "images.parquet", schema))}


def study(params, name: str) -> dict[str, Recipe]:
    """The cells of a study that were `made`; it is shown which were not, if any, and why."""
    cells = made(params, name)
    if missing := [key for key in recipes(params, name) if key not in cells]:
        why = "lacks what they take: rendered images or a denoiser of the embedded model, images in `real_images`, or a single text encoder"
        display(Markdown(f"*Left out*: {', '.join(missing)}, for `{params.model}` {why}."))
    return cells


def about(params, missing: str = "") -> None:
    """Of a model that is not the embedded one, show that it is, and what the article leaves out."""
    if not config.embedded(params):
        display(
            Markdown(
                f"*A run of `{params.model}`*: what the text says of the embedded model and its rendered scenes does not hold for it, and its judges are "
                f"those that `models` in `params.yaml` names.{f' *Left out*: {missing}.' if missing else ''}"
            )
        )


def end(params, name: str, why: str) -> None:
    """End the article `name` here, with no finding, where the model lacks what all of it is about; what follows this cell is not run."""
    report({}, config.root() / params.reports / f"metrics/{name}.json")
    (config.root() / params.reports / "figures" / name).mkdir(parents=True, exist_ok=True)
    display(Markdown(f"*Left out on `{params.model}`*: {why}."))
    raise SystemExit


def cells(params, study: str, kind: str, split: str = "test") -> pd.DataFrame:
    """One table over the cells of a study that params.yaml has and that were `made`, and no others, with a column `cell`; `kind` is a key of `CELLS`, images
    are of one split."""
    results, keys = Results(params.model), made(params, study)
    table = pd.concat([read_table(results.cell(study, key) / CELLS[kind], kind).assign(cell=key) for key in keys], ignore_index=True)
    return table[table["split"] == split].reset_index(drop=True) if "split" in table else table


def scales(some: Iterable[Recipe]) -> list[float]:
    """The guidance scales, ascending, at which the models of all these cells are evaluated. Raises ValueError where there is none."""
    common = sorted(set.intersection(*(set(cell.guidance_scales) for cell in some)))
    if not common:
        raise ValueError("these cells have no guidance scale in common: give them one in their `guidance_scales`")
    return common


def cell_features(params, study: str, key: str) -> dict[str, np.ndarray]:
    """The stored features (N, d) of a cell, float64: `images` and `base` of the rows of its table, both splits in it, and those of the reference."""
    found = read_tensors(Results(params.model).cell(study, key) / "features.safetensors")
    return {name: values.double().numpy() for name, values in found.items()}


def differences(images: pd.DataFrame, reference: str, value: str = "judge") -> pd.DataFrame:
    """The rows of `cells` with `difference`, in percentage points: `value` minus that of the cell `reference` for the same prompt, noise and seed."""
    same = ["category", "seed", "guidance_scale", "prompt_id", "image"]
    both = images.merge(images.loc[images["cell"] == reference, [*same, value]], on=same, suffixes=("", "_reference"), validate="many_to_one")
    return both.assign(difference=100 * (both[value] - both[f"{value}_reference"]))


def over_scenes_and_seeds(rows: pd.DataFrame, value: str) -> Interval:
    """The mean of a column of `cells`; its interval resamples scenes crossed with fine-tuning seeds."""
    return mean_interval(rows[value], rows["category"] + " " + rows["scene"], rows["seed"])


def cell_seconds(params, study: str) -> pd.DataFrame:
    """How long the parts of each cell took where they were made, a column a cell: pool and scores in all, finetune the mean of its fine-tunings."""
    results, rows = Results(params.model), {}
    for key in made(params, study):
        parts = read_json(results.cell(study, key) / "seconds.json")
        rows[key] = {name: sum(times.values()) / (len(times) if name == "finetune" else 1) for name, times in parts.items()}
    return pd.DataFrame(rows)


def terms(params, scores: pd.DataFrame) -> dict[str, torch.Tensor]:
    """The stored MI terms of the candidates of `scores`, which holds whole splits as `tables` gives them: no kappa, a row a row.

    `orthogonal` and `path` (N, S) at `timesteps` (S,) along the trajectory; `renoised_orthogonal` and `renoised_standard` (N, R) at
    `renoised_timesteps` (R,).
    """
    results, parts = Results(params.model), []
    for category, split in scores[["category", "split"]].drop_duplicates().itertuples(index=False):
        pool = read_tensors(results.pool(category, split), ["orthogonal", "path", "timesteps"])
        parts.append(pool | read_tensors(results.terms(category, split)))
    shared = ("timesteps", "renoised_timesteps")
    return {name: value if name in shared else torch.cat([part[name].flatten(0, 1) for part in parts]) for name, value in parts[0].items()}


def information_terms(params) -> dict[str, torch.Tensor]:
    """What stage `information` stored, over all categories as `tables` joins them, no kappa. Of the rows of `candidates`: `orthogonal`, `path`
    (N, S) and `renoised_{form}` (N, R). Of those at the study's guidance: `{kind}_{form}` (N', R) by kind of noise, and `phrase_{form}` (N', P, R),
    nan where a prompt has fewer phrases than P. Of the rows of `stepped` with S' denoising steps: what candidates have, as `steps_{S'}_{name}`
    (`of_steps`). Of the rows of `rendered`: `rendered_{form}` (N'', R). `timesteps` (S,), `renoised_timesteps` (R,).
    """
    parts = [read_tensors(Results(params.model).information(category)) for category in params.categories]

    def joined(name: str) -> torch.Tensor:
        values = [part[name] for part in parts]
        most = max(value.shape[-2] for value in values) if name.startswith("phrase_") else 0
        return torch.cat([functional.pad(value, (0, 0, 0, most - value.shape[-2]), value=float("nan")) if most else value for value in values])

    return {name: value if name.endswith("timesteps") else joined(name) for name, value in parts[0].items()}


def of_steps(stored: dict[str, torch.Tensor], steps: int) -> dict[str, torch.Tensor]:
    """Of `information_terms` those of candidates made with so many denoising steps, by the names that `information.query` knows."""
    prefix = f"steps_{steps}_"
    return {name.removeprefix(prefix): values for name, values in stored.items() if name.startswith(prefix)}


def pictures(params, category: str, split: str, rows: list[int]):
    """Images (len(rows), M, 3, H, W) of the candidates of some prompts of a pool, by their place in it."""
    latents = read_tensors(Results(params.model).pool(category, split), ["latents"])["latents"][rows]
    return base(params).decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])


def base(params) -> LatentDiffusion:
    """The base model, in float32 on the CPU."""
    entry = params.models[params.model]
    folder = config.root() / entry.pipeline
    return load(folder if folder.exists() else entry.pipeline)


ABOVE = "interval above {}; not if it lies below, else undecided"  # the rule of `Interval.above`
NOTHING = ("-", "no such control")  # what a finding has in place of the paper's number where the paper has none


@dataclass(frozen=True)
class Finding:
    """A claim, the paper's number, ours with its interval, and whether the rule that was written beside it holds; None if that is undecided."""

    claim: str
    reported: str
    ours: Interval
    holds: bool | None
    rule: str
    unit: str = ""
    digits: int = 2

    @property
    def shown(self) -> str:
        body, _, n = f"{self.ours:.{self.digits}f}".partition(", n = ")
        return f"{body} {self.unit}".strip() + f", n = {n}"

    @property
    def verdict(self) -> str:
        """In the words of `claims`: what the paper says is reproduced or not, what it says nothing about holds or does not."""
        if self.holds is None:
            return "undecided"
        yes, no = ("holds", "does not hold") if self.reported in NOTHING else ("reproduced", "not reproduced")
        return yes if self.holds else no


def ledger(findings: dict[str, Finding]) -> pd.DataFrame:
    """The findings as a table to show."""
    rows = [(f.claim, f.reported, f.shown, f.rule, f.verdict) for f in findings.values()]
    return pd.DataFrame(rows, columns=["claim", "paper", "ours (95 % interval)", "rule", "verdict"]).set_index("claim")


def resolution(width: float, printed: Iterable[float], what: str) -> Markdown:
    """Whether a study whose widest interval has this half width (points) can see differences of the printed size, and how much larger it must be if not.

    A difference as large as the half width h is told from 0 in half of all runs, one of (1 + 0.84 / 1.96) h in four of five; h falls with the root of the
    number of scenes and seeds. The judges differ: this tells the order of magnitude only.
    """
    largest = max(map(abs, printed))
    times = ((1 + 0.84 / 1.96) * width / largest) ** 2
    takes = f"about {times:.1f} times as many scenes and seeds" if times > 1 else "no more scenes and seeds than were run"
    return Markdown(f"{what}: at most {largest:.1f} points. To tell a difference of that size from 0 in four runs of five takes {takes}.")


def report(findings: dict[str, Finding], path: Path, **numbers) -> None:
    """Write an article's metrics: `claims`, each with value, low, high, n, reproduced and undecided (1 or 0), and further numbers.

    What the claims say, and by which rule, goes beside them: `../claims/` has a file of the same name.
    """
    claims = {name: entry(f.ours) | {"reproduced": int(bool(f.holds)), "undecided": int(f.holds is None)} for name, f in findings.items()}
    write_metrics({"claims": claims} | numbers, path)
    words = [{"name": name, "claim": f.claim, "paper": f.reported, "ours": f.shown, "rule": f.rule, "verdict": f.verdict} for name, f in findings.items()]
    write_json(words, path.parents[1] / "claims" / path.name)


def entry(interval: Interval) -> dict[str, float]:
    """An interval as a metric; without two clusters it has no width."""
    low, high = (interval.mean if bound != bound else bound for bound in (interval.low, interval.high))
    return {"value": interval.mean, "low": low, "high": high, "n": interval.n}
