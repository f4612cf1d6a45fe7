"""What the stages that judge images share."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from mitune import alignment, captions
from mitune.prompts import Prompt
from mitune.stages import path


def open_judges(params) -> tuple[alignment.ShapesJudge, alignment.Similarity]:
    """The alignment score and the independent second one."""
    entry = params.models[params.model]
    return alignment.ShapesJudge.load(path(entry.judge), device=params.device), alignment.Similarity.load(path(entry.similarity), device=params.device)


def judged(judges, images: torch.Tensor, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Both alignment scores (N,) of images with their prompts."""
    return {name: judge.score(images, texts) for name, judge in zip(("judge", "similarity"), judges, strict=True)}


def scene(prompt: str) -> str:
    """What several wordings of a prompt have in common: the unit that is resampled."""
    try:
        return captions.scene_key(captions.parse(prompt))
    except ValueError:
        return prompt


def image_rows(items: Sequence[Prompt], count: int) -> pd.DataFrame:
    """A row an image, `count` of each prompt: prompt_id, prompt, scene, image."""
    rows = [(item.prompt_id, item.text, scene(item.text), image) for item in items for image in range(count)]
    return pd.DataFrame(rows, columns=["prompt_id", "prompt", "scene", "image"])
