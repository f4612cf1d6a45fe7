"""Stage `information`: candidates over guidance and steps, their terms by phrase and by kind of noise, and those of rendered scenes, of known truth, which
the embedded model alone has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pandas as pd
import torch
from torch.nn import functional

from mitune import captions as grammar
from mitune import language, scenes
from mitune.artifacts import Results, no_rows, write_table, write_tensors
from mitune.config import embedded
from mitune.information import phrase_terms, renoised_terms, renoised_timesteps
from mitune.memo import scratch
from mitune.prompts import Prompt
from mitune.sampling import noise_generator, noises
from mitune.shards import progress, shards
from mitune.stages import open_model, read_prompts, weights
from mitune.stages.judging import image_rows, judged, judges_key, open_judges, read_sentence
from mitune.stages.pool import TRAJECTORY, sampler

FORMS = ("orthogonal", "standard")
NOISES = ("antithetic", "second", "own")  # beside the common noise n of a prompt: -n, another common one, one of each candidate's own
VARIED = {"candidates": "guidance_scale", "stepped": "num_inference_steps"}  # column of a table
ERRORS = {"swap": "binding", "replace": "binding", "layout": "layout", "object": "object"}


def build(params, category: str) -> dict[str, pd.DataFrame]:
    """Write `information/{category}/`: the tables `candidates`, `stepped` and `rendered`, which are returned, and their terms (`reading.information_terms`)."""
    model, judges, config, results = open_model(params), open_judges(params, category), params.information, Results(params.model)
    items = {split: read_prompts(params, category, split, n) for split, n in vars(config.n_prompts).items()}
    texts = {split: [item.text for item in of_split] for split, of_split in items.items()}
    study = params.pool.guidance_scale
    asked = {("candidates", scale): _candidates(model, judges, params, scale, config.num_inference_steps) for scale in config.guidance_scales}
    asked |= {("stepped", steps): _candidates(model, judges, params, study, steps) for steps in config.step_grid}
    if embedded(params):
        asked["rendered", None] = _rendered(model, params)
    measured = {"val": [("candidates", study)], "test": list(asked)}  # estimators are chosen on val, which needs no more
    total = sum(len(measured[split]) * len(of_split) for split, of_split in items.items())
    key = (config, study, params.seed, params.dtype, texts, *weights(params).values(), *judges_key(params, category))
    with scratch(f"information-{category}", *key) as folder, progress(total, f"information {category}", unit="prompt") as bar:
        cells = {
            (split, *what): shards(folder / "-".join(map(str, (split, *what))), of_split, config.shard_prompts, asked[what], device=params.device, progress=bar)
            for split, of_split in items.items()
            for what in measured[split]
        }
        tables = _tables(params, category, items, cells)
        for kind, table in tables.items():
            write_table(table, getattr(results, kind)(category), kind)
        write_tensors(_terms(cells), results.information(category))
    return tables


def _candidates(model, judges, params, guidance_scale: float, steps: int):
    """For prompts: their candidates' terms (n, M, ...) and alignment scores (n, M); at the study's guidance and steps by phrase and kind of noise too."""
    ours = guidance_scale == params.pool.guidance_scale and steps == params.information.num_inference_steps
    config, timesteps = dataclasses.replace(params.information, num_inference_steps=steps), _timesteps(model, params.information)
    draw = sampler(model, config, guidance_scale, params.seed)

    def compute(items: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        texts, samples = [item.text for item in items], draw(items)
        latents, own = samples["latents"].flatten(0, 1), torch.arange(len(items)).repeat_interleave(config.M)
        conditioning, options = model.encode(texts)[own], {"timesteps": timesteps, "batch_size": config.batch_size}
        common = _common_noise(model, params, texts)[own]
        if not ours:
            found = _named("renoised", renoised_terms(model, latents, conditioning, model.null, noise=common, **options))
        else:
            phrases = [model.encode(_phrases(params, text)) for text in texts]
            found = phrase_terms(model, latents, conditioning, model.null, [phrases[row] for row in own.tolist()], noise=common, **options)
            found |= {name: _padded(params, found[name]) for name in ("phrase_standard", "phrase_reduced")}
            found |= _named("renoised", {form: found.pop(form) for form in FORMS})
            each = noises([(text, image) for text in texts for image in range(config.M)], len(timesteps), model.latent_shape, seed=params.seed, stream="own")
            for kind, noise in zip(NOISES, (-common, _common_noise(model, params, texts, "second")[own], each), strict=True):
                found |= _named(kind, renoised_terms(model, latents, conditioning, model.null, noise=noise, **options))
        found |= judged(judges, model.decode(latents), [texts[row] for row in own.tolist()])
        shaped = {name: values.float().unflatten(0, (len(items), config.M)) for name, values in found.items()}
        return (
            shaped | {name: samples[name] for name in ("timesteps", *TRAJECTORY) if name in samples} | {"renoised_timesteps": timesteps.expand(len(items), -1)}
        )

    return compute


def _phrases(params, text: str) -> list[str]:
    """What a prompt asks for piece by piece, by the embedded world's grammar, or as spaCy reads it."""
    return [str(part) for part in grammar.components(grammar.parse(text))] if embedded(params) else list(language.phrases(read_sentence()(text)))


def _padded(params, terms: torch.Tensor) -> torch.Tensor:
    """Terms of phrases (N, P, R), of spaCy's nan up to the most that a prompt can have; the grammar's prompts of one category have as many."""
    missing = 0 if embedded(params) else language.MOST_PHRASES - terms.shape[1]
    return functional.pad(terms, (0, 0, 0, missing), value=float("nan"))


def _rendered(model, params):
    """For prompts: the terms (n, rendered, R) of rendered scenes, the noise common to a prompt's. What is drawn, `_drawn` says anew."""
    config, timesteps = params.information, _timesteps(model, params.information)

    def compute(items: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        texts, own = [item.text for item in items], torch.arange(len(items)).repeat_interleave(config.rendered)
        pictures = []
        for text in texts:
            drawn, generator = _drawn(text, config.rendered, params.seed)
            pictures.append(scenes.render(scenes.sample_scenes([caption for _, caption in drawn], generator), generator))
        noise = _common_noise(model, params, texts)[own]
        found = renoised_terms(
            model, model.encode_images(torch.cat(pictures)), model.encode(texts)[own], model.null,
            timesteps=timesteps, noise=noise, batch_size=config.batch_size,
        )  # fmt: skip
        return {name: values.unflatten(0, (len(items), config.rendered)) for name, values in _named("rendered", found).items()}

    return compute


def _drawn(text: str, count: int, seed: int) -> tuple[list[tuple[str, grammar.Caption]], torch.Generator]:
    """Of `count` scenes of a prompt its error and the caption that is true of it: half none and the prompt, half one error; and the generator that goes on."""
    caption, generator = grammar.parse(text), noise_generator(seed, text, 0, "scenes")
    drawn = [("none", caption)] * (count // 2)
    while len(drawn) < count:
        kind, wrong = grammar.mistake(caption, generator, kinds=tuple(ERRORS))
        if grammar.is_drawable(wrong) and not any(map(grammar.is_held_out, wrong.phrases)):
            drawn.append((ERRORS[kind], wrong))
    return drawn, generator


def _timesteps(model, config) -> torch.Tensor:
    return renoised_timesteps(len(model.alphas_cumprod), config.timesteps)


def _common_noise(model, params, texts: Sequence[str], stream: str = "renoise") -> torch.Tensor:
    """Of each prompt (n, R, C, H, W), for all of its images."""
    return noises([(text, 0) for text in texts], params.information.timesteps, model.latent_shape, seed=params.seed, stream=stream)


def _named(kind: str, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{kind}_{form}": values for form, values in terms.items()}


def _tables(params, category: str, items: dict[str, list[Prompt]], cells: dict) -> dict[str, pd.DataFrame]:
    """Rows in the order of the terms: by split, then by guidance scale or denoising steps, then by prompt and image."""
    config, tables = params.information, {}
    for (split, kind, value), values in cells.items():
        rows = image_rows(items[split], config.rendered if kind == "rendered" else config.M).assign(category=category, split=split)
        if kind == "rendered":
            errors, drawn = zip(*(row for item in items[split] for row in _drawn(item.text, config.rendered, params.seed)[0]), strict=True)
            own = {"drawn": list(map(str, drawn)), "error": errors, "aligned": [error == "none" for error in errors]}
        else:
            own = {name: values[name].flatten().double().numpy() for name in ("judge", "similarity")} | {VARIED[kind]: value}
        tables.setdefault(kind, []).append(rows.assign(**own))
    return {kind: pd.concat(tables[kind], ignore_index=True) if kind in tables else no_rows(kind) for kind in ("candidates", "stepped", "rendered")}


def _terms(cells: dict) -> dict[str, torch.Tensor]:
    """The terms of all cells, a row an image; timesteps, which are the same for all, once. Those of other numbers of denoising steps by their own names."""
    parts: dict[str, list[torch.Tensor]] = {}
    for (_, kind, value), values in cells.items():
        prefix = f"steps_{value}_" if kind == "stepped" else ""
        for name in values.keys() - {"judge", "similarity"}:
            parts.setdefault(prefix + name, []).append(values[name])
    return {name: found[0][0] if name.endswith("timesteps") else torch.cat(found).flatten(0, 1) for name, found in parts.items()}
