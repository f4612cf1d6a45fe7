"""T2I-CompBench's 2D-spatial score (Huang et al. 2023, Section 4.2): do two objects stand in the relation that a prompt states?

The formula is that of its public code (UniDet_eval/2D_spatial_eval.py, commit 1b70949). UniDet, its detector, is of detectron2; here an open-vocabulary
detector of transformers finds the objects, OWLv2 (Minderer et al. 2023): its confidences are others, and the scores not to be mixed with published ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mitune import language
from mitune.pixels import eight_bit
from mitune.pretrained import companion, pretrained

OVERLAP = 0.1  # IoU from which a position counts less
NEAR = 150 / 480  # of the longer edge: 150 px of the 480 to which the benchmark resizes images
CONFIDENCE = 0.1  # from which an object counts as found, OWLv2's own
LEAST = 0.5  # a smaller score is 0
TOWARD = {  # axis, and sign of the second centre minus the first
    "on the left of": (0, 1),
    "on the right of": (0, -1),
    "on the top of": (1, 1),
    "on the bottom of": (1, -1),
}


@dataclass(frozen=True)
class Found:
    """An object: how sure the detector is, 0 to 1, and its box (x0, y0, x1, y1), in units of the image's longer edge."""

    confidence: float
    box: tuple[float, float, float, float]


Detector = Callable[[torch.Tensor, Sequence[tuple[str, str]]], list[tuple[Found | None, Found | None]]]
"""Images (N, 3, H, W) in [-1, 1] and two names an image to the best box of each, None where there is none."""


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two boxes share over the area that they cover."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def position(relation: str | None, first: Sequence[float], second: Sequence[float]) -> float:
    """How far box `first` stands in a relation to box `second`, 0 to 1, with d the second centre minus the first:

    left, right, top, bottom: where d has the right sign and is longer on the relation's axis than on the other, min(1, 0.1 / IoU), else 0;
    on side of, next to, near: 1 where d is below 150 / 480 on one axis, else 150 / 480 over its longer side. Of any other relation 0 ("on top of", for
    which the benchmark has no rule, too).
    """
    d = [(second[i] + second[i + 2] - first[i] - first[i + 2]) / 2 for i in (0, 1)]
    if relation in ("on side of", "next to", "near"):
        return 1.0 if min(map(abs, d)) < NEAR else NEAR / max(map(abs, d))
    if relation not in TOWARD:
        return 0.0
    axis, sign = TOWARD[relation]
    if sign * d[axis] <= abs(d[1 - axis]):
        return 0.0
    overlap = iou(first, second)
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def spatial_score(relation: str | None, first: Found | None, second: Found | None) -> float:
    """0.25 (c_1 + c_2) + 0.5 position, c the confidences; without one of the objects only 0.25 c of the other; 0 where that is below 0.5."""
    score = 0.25 * sum(found.confidence for found in (first, second) if found)
    if first and second:
        score += 0.5 * position(relation, first.box, second.box)
    return score if score >= LEAST else 0.0


class Spatial:
    """The 2D-spatial score of images; `objects` says which two a prompt names: `language.objects` or, of complex prompts, `language.related_objects`."""

    FAILURES = ("none", "neglect", "layout", "unread")

    def __init__(self, detect: Detector, read: language.Reader, *, objects: Callable = language.objects):
        self.detect, self.read, self.objects = detect, read, objects

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (N,), each 0 or 0.5 to 1; 0 where a prompt names no two objects."""
        return self.assess(images, prompts)[0]

    def assess(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
        """The scores, and what is wrong with each image: "neglect" (an object is not found), "layout" (the position is below 0.5), "unread" (no two
        objects in the prompt), or "none"."""
        found = [(language.relation(prompt), pair) for prompt, pair in zip(prompts, self._found(images, prompts), strict=True)]
        return torch.tensor([spatial_score(relation, *pair) if pair else 0.0 for relation, pair in found]), [_failure(*one) for one in found]

    def _found(self, images: torch.Tensor, prompts: Sequence[str]) -> list[tuple[Found | None, Found | None] | None]:
        named = [self.objects(self.read(prompt)) for prompt in prompts]
        rows = [row for row, pair in enumerate(named) if pair]
        seen = dict(zip(rows, self.detect(images[rows], [named[row] for row in rows]), strict=True)) if rows else {}
        return [seen.get(row) for row in range(len(named))]


def _failure(relation: str | None, pair: tuple[Found | None, Found | None] | None) -> str:
    if pair is None:
        return "unread"
    first, second = pair
    if not (first and second):
        return "neglect"
    return "layout" if position(relation, first.box, second.box) < 0.5 else "none"


class Owl:
    """OWLv2 as a `Detector`: asked for "a photo of a {name}", each box goes to the name that fits it best, and each name has its surest box."""

    def __init__(self, model, processor, *, batch_size: int = 16):
        self.model, self.processor, self.batch_size, self._encoding = model, processor, batch_size, threading.Lock()  # tokenizers take one thread at a time

    @classmethod
    def load(cls, source: str | Path, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 16) -> Owl:
        """Raises ValueError for weights of another detector."""
        if str(source).endswith((".pth", ".pkl")):
            raise ValueError(f"{str(source)!r} holds weights of detectron2, such as UniDet's, which cannot be run here: name OWLv2's")
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        return cls(pretrained(Owlv2ForObjectDetection, source, device=device, dtype=dtype), companion(Owlv2Processor, source), batch_size=batch_size)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, names: Sequence[tuple[str, str]]) -> list[tuple[Found | None, Found | None]]:
        starts = range(0, len(names), self.batch_size)
        return [pair for n in starts for pair in self._part(images[n : n + self.batch_size], names[n : n + self.batch_size])]

    def _part(self, images: torch.Tensor, names: Sequence[tuple[str, str]]) -> list[tuple[Found | None, Found | None]]:
        texts = [[f"a photo of a {name}" for name in pair] for pair in names]
        with self._encoding:
            inputs = self.processor(images=list(eight_bit(images).cpu().numpy()), text=texts, return_tensors="pt")
        output = self.model(**inputs.to(self.model.device, self.model.dtype))
        parts = self.processor.post_process_grounded_object_detection(output, threshold=CONFIDENCE)
        return [tuple(_surest(part, label) for label in (0, 1)) for part in parts]


def _surest(part: dict[str, torch.Tensor], label: int) -> Found | None:
    rows = (part["labels"] == label).nonzero()[:, 0]
    if not len(rows):
        return None
    row = rows[part["scores"][rows].argmax()]
    return Found(float(part["scores"][row]), tuple(part["boxes"][row].float().tolist()))
