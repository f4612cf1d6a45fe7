"""What a run will take, before it starts (`make plan`): denoiser evaluations, training, disk, memory and hours, a row a stage.

Counts are a function of the parameters alone; what cells of the studies share is counted once, for the first that needs it. Hours are counts over two rates,
measured in seconds on this device with the model itself, or given. Articles, judging and decoding are not in them.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace

from mitune import architectures, commands, config, probe, profiles
from mitune.probe import Rates
from mitune.recipes import Merge, Recipe, Studies, Tuning, recipes
from mitune.stages import lacks, open_benchmark, weights
from mitune.stages.steps import times

PASSES = 3
"""Evaluations that a training sample takes where only their rate is given: one forward, and a backward of about two."""

PHRASES = 2  # of a prompt of the embedded world, which the stage `information` asks one by one
BYTES = {"float32": 4, "float16": 2}


@dataclass(frozen=True)
class Sizes:
    """Of a model: entries of a latent, and parameters of the adapter that `finetune` asks for."""

    latent: int
    adapter: int


@dataclass
class Work:
    """Of one stage, or of all cells of a study. `largest` are the bytes of the largest file, which is joined from its shards in memory."""

    evaluations: int = 0
    steps: int = 0
    samples: int = 0
    disk: int = 0
    largest: int = 0

    def hours(self, rates: Rates) -> float:
        return (self.evaluations / rates.evaluations + self.samples / rates.samples) / 3600


@dataclass
class Plan:
    """The work of a run, by stage; `available(category, split)` tells how many prompts there are (None: enough)."""

    params: config.Params
    sizes: Sizes
    available: Callable[[str, str], int | None] = lambda category, split: None
    stages: dict[str, Work] = field(default_factory=dict)
    done: set[Hashable] = field(default_factory=set)

    def add(self, stage: str, key: Hashable, *, evaluations: int = 0, steps: int = 0, batch: int = 0, disk: int = 0) -> Hashable:
        """Count a piece of work, unless one with this key has been."""
        work = self.stages.setdefault(stage, Work())
        if key not in self.done:
            self.done.add(key)
            work.evaluations += evaluations
            work.steps, work.samples = work.steps + steps, work.samples + steps * batch
            work.disk, work.largest = work.disk + disk, max(work.largest, disk)
        return key

    def prompts(self, category: str, split: str, asked: int) -> int:
        there = self.available(category, split)
        return asked if there is None else min(asked, there)


def plan(params: config.Params, sizes: Sizes, available: Callable[[str, str], int | None] = lambda category, split: None) -> dict[str, Work]:
    """The work of every stage and study, by name, in the order of the pipeline."""
    made = Plan(params, sizes, available)
    cases = params.base.cases if config.embedded(params) else 0
    for category in params.categories:
        made.add("base", ("base", category), evaluations=2 * cases * params.base.timesteps)
        _spine(made, category)
        _information(made, category)
    for study in (entry.name for entry in fields(Studies) if entry.name != "common"):
        for recipe in recipes(params, study).values():
            if not lacks(params, recipe):
                (_merging if isinstance(recipe, Merge) else _cell)(made, study, recipe)
    return made.stages


def _spine(made: Plan, category: str) -> None:
    """Stages pool, scores, finetune and evaluate."""
    params = made.params
    pool, asked, timesteps = params.pool, params.evaluate, params.renoise.timesteps * params.renoise.noises
    for split, n in pool.n_prompts.items():
        images = made.prompts(category, split, n) * pool.M
        evaluations = 2 * images * pool.num_inference_steps
        made.add("pool", ("pool", category, split), evaluations=evaluations, disk=images * 4 * (made.sizes.latent + 2 * pool.num_inference_steps))
        made.add("scores", ("scores", category, split), evaluations=2 * images * timesteps, disk=images * 4 * 2 * timesteps)
    for arm in params.arms:
        _adapter(made, "finetune", ("arm", category, arm), params.finetune)
    images = asked.images * (made.prompts(category, "test", asked.n_prompts) + made.prompts(category, "comp", asked.comp_prompts))
    for arm in ("base", *params.arms):
        for scale in asked.guidance_scales:
            made.add("evaluate", ("evaluate", category, arm, scale), evaluations=images * asked.num_inference_steps * _branches(scale))


def _information(made: Plan, category: str) -> None:
    asked = made.params.information
    val, test = (made.prompts(category, split, getattr(asked.n_prompts, split)) for split in ("val", "test"))
    plain, study = 2 * asked.timesteps, (2 + PHRASES + 2 * 3) * asked.timesteps  # of an image; the study's has phrases and three further kinds of noise
    chains = (len(asked.guidance_scales) * test + val) * asked.num_inference_steps + sum(asked.step_grid) * test
    terms = (len(asked.guidance_scales) + len(asked.step_grid) - 1) * test * plain + (test + val) * study
    rendered = test * asked.rendered if config.embedded(made.params) else 0
    made.add("information", ("information", category), evaluations=asked.M * (2 * chains + terms) + rendered * plain)


def _cell(made: Plan, study: str, recipe: Recipe) -> None:
    """A cell of a study, as `stages.cell` makes it."""
    for category in recipe.categories:
        for seed in recipe.seeds:
            adapters = _tuned(made, study, recipe, category, seed)
            for split in ("test", "val") if recipe.val_prompts else ("test",):
                for on in ((), adapters):
                    _evaluation(made, study, recipe, category, split, on)
        for rule in ("judge", "similarity", *made.params.estimators) if recipe.examine_pool else ():
            _candidates(made, study, replace(recipe, select=rule), category, (), 0)


def _tuned(made: Plan, study: str, recipe: Recipe, category: str, seed: int) -> tuple[Hashable, ...]:
    """The adapters of `steps.tuned`, by the keys of all that they depend on."""
    source = _tuned(made, study, recipe.pool_adapter, category, recipe.pool_adapter.seeds[0]) if recipe.pool_adapter else None
    adapters: tuple[Hashable, ...] = ()
    for number in range(recipe.rounds):
        kept = _kept(made, study, recipe, category, seed, adapters if source is None else source, number * math.ceil(recipe.M / recipe.block) * recipe.block)
        adapters += (_adapter(made, study, ("adapter", recipe.unet, kept, recipe.tuning, seed, adapters), recipe),)
    return adapters


def _kept(made: Plan, study: str, recipe: Recipe, category: str, seed: int, on: tuple[Hashable, ...], first: int) -> Hashable:
    """The set of one round: a seed has its own where it is drawn, or where real images take part."""
    blocks = _candidates(made, study, recipe, category, on, first) if recipe.real_images < recipe.n_prompts * recipe.k else ()
    real = (recipe.real, recipe.real_captions, recipe.real_from, recipe.real_pairs) if recipe.real_images else None
    rule = made.params.estimators.get(recipe.select, recipe.select)
    if real:
        made.add(study, ("real", recipe.unet, category, real[1:], rule, on), evaluations=2 * recipe.real_pairs * times(made.params, recipe.select))
    return blocks, recipe.M, recipe.k, rule, real, seed if real or recipe.select == "random" else None


def _candidates(made: Plan, study: str, recipe: Recipe, category: str, on: tuple[Hashable, ...], first: int) -> tuple[Hashable, ...]:
    """The blocks of a pool and their scores."""
    params, n = made.params, made.prompts(category, "train", recipe.n_prompts)
    images, steps = n * recipe.block, params.pool.num_inference_steps
    rule, blocks = params.estimators.get(recipe.select, recipe.select), []
    for start in range(first, first + recipe.M, recipe.block):
        key = ("block", recipe.unet, category, n, recipe.block, recipe.pool_guidance_scale, start, on)
        blocks.append(made.add(study, key, evaluations=2 * images * steps, disk=images * 4 * (made.sizes.latent + 2 * steps)))
        if recipe.select != "random":
            made.add(study, ("scored", key, rule), evaluations=2 * images * times(params, recipe.select), disk=images * 4)
    return tuple(blocks)


def _adapter(made: Plan, stage: str, key: Hashable, tuning: Tuning) -> Hashable:
    return made.add(stage, key, steps=tuning.steps, batch=tuning.batch_size, disk=made.sizes.adapter * BYTES[tuning.save_dtype])


def _evaluation(made: Plan, study: str, recipe: Recipe, category: str, split: str, on: Hashable) -> None:
    n = made.prompts(category, split, recipe.test_prompts if split == "test" else recipe.val_prompts)
    for scale in recipe.guidance_scales:
        key = ("evaluation", recipe.unet, category, split, n, recipe.test_images, scale, on)
        made.add(study, key, evaluations=n * recipe.test_images * made.params.evaluate.num_inference_steps * _branches(scale))


def _merging(made: Plan, study: str, recipe: Merge) -> None:
    """A cell of the study `merging`, as `stages.merging` makes it."""
    for seed in recipe.seeds:
        if recipe.arm:
            kept, own = (), tuple(("arm", category, recipe.arm) for category in recipe.categories)
        else:
            kept = tuple(_kept(made, study, recipe, category, seed, (), 0) for category in recipe.categories)
            own = tuple(_adapter(made, study, ("adapter", recipe.unet, one, recipe.tuning, seed, ()), recipe) for one in kept)
        joint = _adapter(made, study, ("joint", recipe.unet, kept or own, recipe.tuning, seed), recipe) if recipe.merge == "joint" else None
        merged = ("merged", recipe.merge, recipe.shares, recipe.density, own, joint)
        for category, adapter in zip(recipe.categories, own, strict=True):
            for on in (merged, (), (adapter,)):
                _evaluation(made, study, recipe, category, "test", on)


def _branches(guidance_scale: float) -> int:
    return 1 if guidance_scale == 1 else 2


# ---------------------------------------------------------------- printed


COLUMNS = ("stage", "denoiser evaluations", "optimizer steps", "training samples", "disk", "host memory", "device memory", "hours")


def table(stages: dict[str, Work], rates: Rates) -> str:
    """A row a stage, in Markdown. Host memory: a file's shards and what is joined of them, both at once; device memory: its peak in the measurement."""
    every = stages.values()
    counts = {entry.name: sum(getattr(work, entry.name) for work in every) for entry in fields(Work)}
    total = Work(**counts | {"largest": max(work.largest for work in every)})
    rows = [" | ".join(COLUMNS), " | ".join(["---", *["--:"] * (len(COLUMNS) - 1)])]
    for name, work in (stages | {"all": total}).items():
        used = [memory for memory, count in zip(rates.memory or (), (work.evaluations, work.samples), strict=False) if count]
        sizes = map(readable, (work.disk, 2 * work.largest, max(used, default=None)))
        rows.append(" | ".join([name, f"{work.evaluations:,}", f"{work.steps:,}", f"{work.samples:,}", *sizes, f"{work.hours(rates):.2f}"]))
    return "\n".join(f"| {row} |" for row in rows)


def readable(size: int | None) -> str:
    """Bytes as MiB, or GiB from one on."""
    if size is None:
        return "-"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def available(params: config.Params) -> Callable[[str, str], int | None]:
    """How many prompts a split of a category has, or None where the benchmark is not there; of compositional prompts then none."""
    benchmark = open_benchmark(params)

    @functools.cache
    def count(category: str, split: str) -> int | None:
        if benchmark.source.exists():
            return len(benchmark.prompts(category).get(split, ()))
        return 0 if split == "comp" else None

    return count


def sizes(params: config.Params) -> Sizes:
    """Of the model's folder or, where its weights are not here yet, of the published architecture, if it is one of `architectures.CONFIGS`; no weight is read.

    Raises ValueError where neither is known.
    """
    try:
        found = weights(params)
    except ValueError:
        if params.model not in architectures.CONFIGS:
            raise
        network = architectures.Bare(architectures.CONFIGS[params.model]).network
    else:
        network = probe.blank(found["source"], found["unet"])
    return Sizes(*probe.sizes(network, params.finetune))


def parameters(profile: str | None) -> config.Params:
    """Those of `params.yaml`, with a profile merged into them."""
    values = config.read_yaml(config.root() / "params.yaml")
    return config.read(config.merge(values, config.read_yaml(profiles.FOLDER / f"{profile}.yaml")) if profile else values)


def main() -> int:
    parser = argparse.ArgumentParser(prog="mitune.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=profiles.NAMES, help="with mitune/PROFILE.yaml merged into params.yaml")
    parser.add_argument("--evaluations-per-second", type=commands.rate, help="of the denoiser; without it both rates are measured, which opens the model")
    parser.add_argument("--samples-per-second", type=commands.rate, help=f"of training, beside it (without: evaluations a second / {PASSES})")
    parser.add_argument("--processes", type=commands.count, default=1, help="among which the work is split (default: 1); the rates are of one")
    chosen = parser.parse_args()
    if chosen.samples_per_second and not chosen.evaluations_per_second:
        parser.error("argument --samples-per-second: give --evaluations-per-second too; without both the two rates are measured")
    try:
        params = parameters(chosen.profile)
        if chosen.evaluations_per_second:
            rate = chosen.evaluations_per_second
            rates, said = Rates(rate, chosen.samples_per_second or rate / PASSES), "given"
        else:
            rates, said = probe.rates(params), f"measured on {params.device}, {params.dtype}"
        stages = plan(params, sizes(params), available(params))
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    print(f"{params.model}: {rates.evaluations:,.1f} evaluations and {rates.samples:,.1f} training samples a second ({said}), processes: {chosen.processes}\n")
    print(table(stages, replace(rates, evaluations=rates.evaluations * chosen.processes, samples=rates.samples * chosen.processes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
