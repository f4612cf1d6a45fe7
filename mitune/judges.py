"""Who judges images: the entries of `models` that name a judge, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mitune.schema import Count

PARTS = {"3-in-1": ("blip-vqa", "2d-spatial", "clipscore", "lists"), "hps-v2.1": ("base",)}  # what a judge is made of besides its weights
OF_THE_PROJECT = ("shapes", "cosine")  # trained by `make pretrain`


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a judge is read from: a folder of the project, or a name on the hub; without any, what it was published with."""

    weights: str | None = None
    parts: dict[str, str] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: Count = 32


@dataclass(frozen=True, kw_only=True)
class Judge(Weights):
    """An alignment score."""

    kind: Literal["shapes", "blip-vqa", "2d-spatial", "3-in-1", "clipscore", "hps-v2.1", "vqascore"]


@dataclass(frozen=True, kw_only=True)
class Similarity(Weights):
    """An alignment score whose images have features."""

    kind: Literal["cosine", "clipscore", "hps-v2.1"]


@dataclass(frozen=True, kw_only=True)
class Features(Weights):
    """Features of images."""

    kind: Literal["inception", "dinov2", "clip"]


def check_judge(judge: Weights, where: str) -> None:
    """Raises ValueError, one line, for a setting that the kind does not have."""
    for part in judge.parts or ():
        if part not in PARTS.get(judge.kind, ()):
            remedy = f"has {', '.join(PARTS[judge.kind])}" if judge.kind in PARTS else "has none; remove it"
            raise ValueError(f"unknown key {where}.parts.{part}: {judge.kind} {remedy}")
    if judge.kind in OF_THE_PROJECT and judge != type(judge)(kind=judge.kind, weights=judge.weights):
        raise ValueError(f"{where} has more than kind and weights: {judge.kind} takes no other setting")
    if judge.kind == "inception" and judge.dtype != "float32":
        raise ValueError(f"{where}.dtype is {judge.dtype}: FID's network is as its file has it, in float32; remove it")
