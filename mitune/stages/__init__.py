"""The pipeline's hands: each stage reads artifacts, calls the method, and leaves artifacts whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mitune import captions, config, models, pipelines
from mitune.benchmarks import Benchmark
from mitune.loading import check_pipeline, located
from mitune.prompts import Prompt
from mitune.recipes import Recipe


def path(entry: str) -> Path | str:
    """A `models` entry as a folder of the project where there is one, else as it stands (a name on the hub)."""
    folder = config.root() / entry
    return folder if folder.exists() else entry


def lacks(params, recipe: Recipe) -> bool:
    """Whether a cell, which then leaves tables without rows, takes what the model does not have: a denoiser of the embedded model, images with captions of
    the rendered world, or real images where `real_images` names none."""
    mixed = [one for one in (recipe, recipe.pool_adapter) if one and one.real]
    captioned = any(one.real_captions != "web" or one.real_from != "pretraining" for one in mixed)
    denoiser = recipe.unet is not None and recipe.unet.startswith("data/shapes/")
    return not config.embedded(params) and (denoiser or captioned or (bool(mixed) and params.real_images is None))


def several_text_encoders(params) -> bool:
    """Whether the model's pipeline has more than one, as SDXL: they are not trained."""
    return "text_encoder_2" in check_pipeline(located(str(weights(params)["source"])))[1]


def weights(params) -> dict[str, Path | str | bool | None]:
    """What the base is read from and run by, as `models.load` takes it: the pipeline, the networks that take the place of its own, if any, their options.

    Raises:
        ValueError: weights that have not been downloaded.
    """
    entry = params.models[params.model]
    config.check_downloaded(params)
    replaced = {name: getattr(entry, name) and path(getattr(entry, name)) for name in ("unet", "vae")}
    options = {field.name: getattr(entry, field.name) for field in dataclasses.fields(config.Options)}
    return {"source": path(entry.pipeline), **replaced, **options}


def with_denoiser(params, unet: str | None):
    """The parameters of the same model with the denoiser in the folder `unet`; as they are for None."""
    if unet is None:
        return params
    entry = dataclasses.replace(params.models[params.model], unet=unet)
    return config.Declared(vars(params) | {"models": {**params.models, params.model: entry}})


def open_model(params, *, adapter: Path | Sequence[Path] | None = None, dtype: str | None = None) -> pipelines.LatentDiffusion:
    """The base, or with the adapters of these folders fused into it in turn; in `dtype`, by default that of the parameters, of which alone memory is
    asked for the images that are sampled at once."""
    images = None if dtype else max((part.batch_size for part in vars(params).values() if isinstance(part, (config.Base, config.Sampled))), default=None)
    return models.load(**weights(params), device=params.device, dtype=dtype or params.dtype, adapter=adapter, images=images)


def open_benchmark(params) -> Benchmark:
    """The benchmark that the parameters name."""
    entry = vars(params.benchmarks[params.benchmark])
    return Benchmark(config.root() / entry["prompts"], **{name: value for name, value in entry.items() if name != "prompts"})


def read_prompts(params, category: str, split: str, n: int | None = None) -> list[Prompt]:
    """The first n prompts of a split, all by default. Raises ValueError where it has fewer, and for a prompt that the embedded model cannot be asked for."""
    items = open_benchmark(params).load(category, split, n)
    if config.embedded(params):
        for item in items:
            try:
                captions.parse(item.text)
            except ValueError as error:
                where = f"benchmark {params.benchmark!r}, {category} {split}, prompt {item.prompt_id}"
                raise ValueError(f"{where}: {error}: the embedded judge reads only its grammar; set another model, or benchmark: shapes") from None
    return items


def has_split(params, category: str, split: str) -> bool:
    """Whether the benchmark has prompts of this split: compositional prompts, for one, are not everywhere."""
    return split in open_benchmark(params).prompts(category)
