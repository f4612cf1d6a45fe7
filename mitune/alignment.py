"""Alignment scores: images and prompts in, one number each out.

Every one has `score(images, prompts) -> (N,) float32` with images (N, 3, H, W) in [-1, 1] and one prompt an image, higher meaning
better aligned; a judge also has `assess(images, prompts)`: the scores, and what is wrong with each image, one of its `FAILURES`.
`ShapesJudge` plays BLIP-VQA's role in the rendered world, `Similarity` that of HPS or CLIPScore.
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from mitune import captions as grammar
from mitune.geometry import IMAGE_SIZE
from mitune.loading import quiet

CONTACT_CLASSES = ("inside", "around", "touching", "overlapping", "apart")  # of an ordered pair of shapes


class AlignmentScore(Protocol):
    """Images (N, 3, H, W) in [-1, 1] and N prompts to N scores."""

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor: ...


class ShapesJudge(nn.Module):
    """Visual question answering for the rendered world: one query a shape attends to the image and answers about it.

    The score of a prompt is the product of the probabilities of its noun phrases and of its relation, the rule of
    BLIP-VQA (T2I-CompBench, Huang et al. 2023, Section 4.1).
    """

    FAILURES = ("none", "neglect", "binding", "layout")

    def __init__(self, width: int = 64):
        super().__init__()
        channels = (3, 24, 48, width, width)
        self.trunk = nn.Sequential(*(Block(a, b, stride) for a, b, stride in zip(channels, channels[1:], (2, 2, 1, 1), strict=False)))
        self.place = nn.Parameter(torch.randn(width, 16, 16) * 0.1)
        self.query = nn.Parameter(torch.randn(len(grammar.SHAPES), width) * 0.1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(width, n)
                for name, n in {"present": 1, "color": len(grammar.COLORS), "texture": len(grammar.TEXTURES), "size": len(grammar.SIZES), "centre": 2}.items()
            }
        )
        self.pair = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, len(CONTACT_CLASSES)))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits for each shape, (N, shapes, classes), of `present`, `color`, `texture`, `size`; `centre` in px; `feature` (N, shapes, width)."""
        features = (self.trunk(images) + self.place).flatten(2).transpose(1, 2)  # (N, 256, width)
        attended, _ = self.attention(self.query.expand(len(images), -1, -1), features, features, need_weights=False)
        feature = attended + self.mix(attended)
        answers = {name: head(feature) for name, head in self.heads.items()}
        answers["centre"] = answers["centre"] * 16 + IMAGE_SIZE / 2
        return answers | {"feature": feature}

    def contact(self, feature: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Logits (N, contact classes) of shape index `first` against `second`, each (N,)."""
        rows = torch.arange(len(feature), device=feature.device)
        return self.pair(torch.cat([feature[rows, first], feature[rows, second]], -1))

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Probability (N,) that each image shows its prompt: the product over noun phrases and relation. Raises ValueError for a prompt outside the grammar."""
        return self.assess(images, prompts)[0]

    def assess(self, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, list[str]]:
        """The scores, and what is wrong with each image: "neglect" (an object is missing), "binding" (an attribute is wrong), "layout" (the relation is),
        or "none"."""
        found = self.parts(images, prompts)
        scores = torch.tensor([math.prod(value for _, value in parts) for parts in found], dtype=torch.float32)
        doubtful = [{kind for kind, value in parts if value < 0.5} for parts in found]
        return scores, [next((kind for kind in self.FAILURES[1:] if kind in kinds), "none") for kinds in doubtful]

    @torch.inference_mode()
    def parts(self, images: torch.Tensor, prompts: list[str], *, batch_size: int = 512) -> list[list[tuple[str, float]]]:
        """For each image the probabilities whose product is its score, each with the failure that a low one means."""
        device = self.query.device
        return [
            parts
            for start in range(0, len(prompts), batch_size)
            for parts in self._parts(images[start : start + batch_size].to(device), [grammar.parse(p) for p in prompts[start : start + batch_size]])
        ]

    def _parts(self, images: torch.Tensor, captions: list[grammar.Caption]) -> list[list[tuple[str, float]]]:
        answers = self(images)
        options = {"color": grammar.COLORS, "texture": grammar.TEXTURES, "size": grammar.SIZES}
        probability = {name: answers[name].softmax(-1).cpu() for name in options}
        present, centre = answers["present"].sigmoid()[..., 0].cpu(), answers["centre"].cpu()
        index = torch.tensor([[grammar.SHAPES.index(caption.phrases[i].shape) for i in (0, -1)] for caption in captions], device=images.device)
        contact = self.contact(answers["feature"], index[:, 0], index[:, 1]).softmax(-1).cpu()
        result = []
        for n, (caption, shapes) in enumerate(zip(captions, index.tolist(), strict=True)):
            parts = []
            for phrase, s in zip(caption.phrases, shapes, strict=False):  # a single phrase stands twice in `shapes`
                parts.append(("neglect", float(present[n, s])))
                said = {name: getattr(phrase, name) for name in options}
                parts += [("binding", float(probability[name][n, s, options[name].index(word)])) for name, word in said.items() if word]
            if caption.relation in grammar.DIRECTIONS:
                parts.append(("layout", float(direction_probability(centre[n, shapes[0]] - centre[n, shapes[1]], caption.relation))))
            elif caption.relation is not None:
                parts.append(("layout", float(contact[n, CONTACT_CLASSES.index(caption.relation)])))
            result.append(parts)
        return result

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"width": self.query.shape[1]}) + "\n")

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> ShapesJudge:
        judge = cls(**json.loads((folder / "config.json").read_text()))
        judge.load_state_dict(load_file(folder / "model.safetensors"))
        return judge.to(device).eval()


def direction_probability(offset: torch.Tensor, relation: str, *, scale: float = 1.0) -> torch.Tensor:
    """Probability that the first object stands `relation` of the second, from the offset (2,) of their centres in px.

    sigmoid((d - |other axis|) / scale) with d the offset along the relation's axis in its own sense: as in T2I-CompBench's
    spatial score, the relation's axis must dominate with the right sign.
    """
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    return torch.sigmoid((sign * offset[axis] - offset[1 - axis].abs()) / scale)


class Similarity:
    """Cosine similarity of image and text in a CLIPModel's joint space (the role of HPS v2 and CLIPScore)."""

    def __init__(self, model, tokenizer, *, batch_size: int = 512):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self._encoding = threading.Lock()  # tokenizers take one thread at a time

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> Similarity:
        from transformers import CLIPModel, CLIPTokenizer

        with quiet():
            return cls(CLIPModel.from_pretrained(folder, dtype=torch.float32).to(device), CLIPTokenizer.from_pretrained(folder))

    @torch.inference_mode()
    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosine similarities (N,) in [-1, 1]; each distinct prompt is encoded once."""
        distinct = sorted(set(prompts))
        with self._encoding:
            text = F.normalize(text_features(self.model, self.tokenizer, distinct), dim=-1)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return (self.features(images) * text[rows]).sum(-1).float().cpu()

    @torch.inference_mode()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The images' embeddings (N, d), of unit norm."""
        return torch.cat([F.normalize(image_features(self.model, part), dim=-1) for part in images.split(self.batch_size)])


def text_features(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Projected text embeddings (N, d) of a CLIPModel."""
    tokens = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    output = model.text_model(input_ids=tokens.input_ids.to(model.device), attention_mask=tokens.attention_mask.to(model.device))
    return model.text_projection(output.pooler_output)


def image_features(model, images: torch.Tensor) -> torch.Tensor:
    """Projected image embeddings (N, d) of a CLIPModel; images (N, 3, H, W) in [-1, 1]."""
    size = model.config.vision_config.image_size
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return embedded(model, images.to(model.device))


def embedded(model, pixels: torch.Tensor) -> torch.Tensor:
    """Projected embeddings (N, d) of what a CLIPModel's image tower takes."""
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


class Block(nn.Module):
    """A residual convolution block: stride, group normalisation, GELU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(8, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm(self.conv1(x)))
        return x + self.conv2(x)
