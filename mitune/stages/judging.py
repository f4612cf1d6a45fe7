"""What the stages that judge images share."""

from __future__ import annotations

from mitune import alignment, captions
from mitune.stages import path


def open_judges(params) -> tuple[alignment.ShapesJudge, alignment.Similarity]:
    """The alignment score and the independent second one."""
    entry = params.models[params.model]
    return alignment.ShapesJudge.load(path(entry.judge), device=params.device), alignment.Similarity.load(path(entry.similarity), device=params.device)


def scene(prompt: str) -> str:
    """What several wordings of a prompt have in common: the unit that is resampled."""
    try:
        return captions.scene_key(captions.parse(prompt))
    except ValueError:
        return prompt
