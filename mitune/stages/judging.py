"""What the stages that judge images share: the judges that params.yaml names, by kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from mitune import alignment, captions, clip, config, features, judges, language, prompts, spatial, vqa
from mitune.stages import path

PUBLISHED = {
    "blip-vqa": "Salesforce/blip-vqa-capfilt-large",
    "2d-spatial": "google/owlv2-base-patch16-ensemble",
    "clipscore": "openai/clip-vit-base-patch32",
    "hps-v2.1": "xswu/HPSv2",
    "vqascore": "llava-hf/llava-1.5-7b-hf",
    "dinov2": "facebook/dinov2-large",
    "clip": "openai/clip-vit-large-patch14-336",
}
"""The weights of a kind where none are named."""

read_sentence = functools.cache(language.spacy_reader)


def open_judges(params, category: str | None = None) -> tuple:
    """The alignment score, of a category its own where it has one, and the independent second one, whose images have features."""
    entry = params.models[params.model]
    judge, similarity = (opened(wanted, params.device) for wanted in (_judge(entry, category), entry.similarity))
    return judge, WithFeatures(similarity, opened(entry.features, params.device)) if entry.features else similarity


def judges_key(params, category: str | None = None) -> tuple:
    """What everything that `open_judges` says depends on: kinds, settings and, of folders, contents."""
    entry = params.models[params.model]
    used = [judge for judge in (_judge(entry, category), entry.similarity, entry.features) if judge]
    return *used, *(path(source) for judge in used for source in (judge.weights, *(judge.parts or {}).values()) if source)


def _judge(entry: config.Model, category: str | None) -> judges.Judge:
    return (entry.judges or {}).get(category, entry.judge)


@dataclass(frozen=True)
class WithFeatures:
    """One model's scores and another's features."""

    scores: alignment.AlignmentScore
    extractor: features.Features

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.scores.score(images, prompts)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.extractor.features(images)


def opened(wanted: judges.Weights, device: str):
    """The judge of an entry of params.yaml. Raises ValueError, one line, where its weights or a package is missing."""
    kind = wanted.kind
    source = path(wanted.weights) if wanted.weights else PUBLISHED.get(kind)
    if source is None and kind != "3-in-1":
        raise ValueError(f"a judge of kind {kind} was named without weights, and has none of its own: add `weights` to it in params.yaml")
    settings = {"device": device} if kind in judges.OF_THE_PROJECT else {"device": device, "dtype": wanted.dtype, "batch_size": wanted.batch_size}
    return KINDS[kind](source, {name: path(part) for name, part in (wanted.parts or {}).items()}, settings)


def _three_in_one(_, parts: dict[str, Path | str], settings: dict) -> vqa.ThreeInOne:
    read = read_sentence()
    of = {name: parts.get(name, PUBLISHED[name]) for name in ("blip-vqa", "2d-spatial", "clipscore")}
    lists = {f"of_{name}": _listed(Path(parts["lists"]), name) for name in ("spatial", "action")} if "lists" in parts else {}
    blip = vqa.BlipVqa.load(of["blip-vqa"], read, **settings)
    detect = spatial.Spatial(spatial.Owl.load(of["2d-spatial"], **settings), read, objects=language.related_objects)
    return vqa.ThreeInOne(blip, detect, clip.ClipScore.load(of["clipscore"], **settings), read, **lists)


def _listed(folder: Path, name: str) -> frozenset[str]:
    """The benchmark's complex prompts of a relation but no action, or the reverse, as it compares them."""
    files = sorted(folder.glob(f"complex_*_{name}.txt"))
    if not files:
        raise ValueError(f"{folder} has no complex_*_{name}.txt: download T2I-CompBench's examples/dataset there, or remove parts.lists")
    return frozenset(vqa.listed(item.text) for file in files for item in prompts.read_prompts(file))


KINDS: dict[str, Callable] = {  # of weights, parts and settings
    "shapes": lambda source, parts, settings: alignment.ShapesJudge.load(source, **settings),
    "cosine": lambda source, parts, settings: alignment.Similarity.load(source, **settings),
    "blip-vqa": lambda source, parts, settings: vqa.BlipVqa.load(source, read_sentence(), **settings),
    "2d-spatial": lambda source, parts, settings: spatial.Spatial(spatial.Owl.load(source, **settings), read_sentence()),
    "3-in-1": _three_in_one,
    "clipscore": lambda source, parts, settings: clip.ClipScore.load(source, **settings),
    "hps-v2.1": lambda source, parts, settings: clip.load_hps(source, parts.get("base", clip.HPS_BASE), **settings),
    "vqascore": lambda source, parts, settings: vqa.VqaScore.load(source, **settings),
    "inception": lambda source, parts, settings: features.inception(source, **settings),
    "dinov2": lambda source, parts, settings: features.dinov2(source, **settings),
    "clip": lambda source, parts, settings: features.clip(source, **settings),
}


def judged(pair, images: torch.Tensor, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Both alignment scores (N,) of images with their prompts."""
    return {name: judge.score(images, texts) for name, judge in zip(("judge", "similarity"), pair, strict=True)}


def scene(prompt: str) -> str:
    """What several wordings of a prompt have in common: the unit that is resampled."""
    try:
        return captions.scene_key(captions.parse(prompt))
    except ValueError:
        return prompt


def image_rows(items: Sequence[prompts.Prompt], count: int) -> pd.DataFrame:
    """A row an image, `count` of each prompt: prompt_id, prompt, scene, image."""
    rows = [(item.prompt_id, item.text, scene(item.text), image) for item in items for image in range(count)]
    return pd.DataFrame(rows, columns=["prompt_id", "prompt", "scene", "image"])
