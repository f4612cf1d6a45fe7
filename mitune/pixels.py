"""Images as a pretrained vision network takes them: resized, cut, scaled and normalised as its image processor does, on any device, without torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean and standard deviation, of values in 0..1
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Recipe:
    """What a network was trained to see: a square of `size` px, made by bicubic resizing with antialiasing.

    `fit` is for images that are not square: "stretch" resizes both edges, "crop" the shorter one and keeps the centre, "pad" the longer one and
    puts black around. `norm` is the mean and the standard deviation of each channel.
    """

    size: int
    fit: Literal["stretch", "crop", "pad"] = "crop"
    norm: tuple[tuple[float, ...], tuple[float, ...]] = CLIP


def eight_bit(images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [-1, 1] as the published protocols read them from files: uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def prepared(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Images (N, 3, H, W) in [-1, 1] as a network's input (N, 3, size, size), float32, where they are; rounded to 8 bits before and after resizing."""
    pixels, size = eight_bit(images).float(), recipe.size
    edges = _edges(pixels.shape[-2:], recipe)
    if edges != tuple(pixels.shape[-2:]):
        pixels = F.interpolate(pixels, size=edges, mode="bicubic", antialias=True).round().clamp(0, 255)
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in recipe.norm)
    return (_fitted(pixels, size) / 255 - mean) / std


def _edges(shape: tuple[int, int], recipe: Recipe) -> tuple[int, int]:
    """(H, W) to which images are resized."""
    if recipe.fit == "stretch":
        return recipe.size, recipe.size
    if recipe.fit == "crop":
        return tuple(recipe.size * edge // min(shape) for edge in shape)
    return tuple(round(recipe.size * edge / max(shape)) for edge in shape)


def _fitted(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """The centre (N, 3, size, size), black where the image does not reach."""
    height, width = pixels.shape[-2:]
    top, left = (height - size) // 2, (width - size) // 2
    if min(top, left) >= 0:
        return pixels[..., top : top + size, left : left + size]
    high, wide = size - height, size - width
    return F.pad(pixels, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
