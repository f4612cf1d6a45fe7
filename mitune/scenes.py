"""Rendered scenes of one or two objects, of which given captions are true, and the truth about every image.

`sample_scenes` draws every attribute and place that a caption leaves open, `render` turns scenes into images, `contact` reads off how two
objects meet. Lengths are pixels of a 64 x 64 image, y grows downwards.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from mitune.captions import COLORS, DIRECTIONS, RELATIONS, SHAPES, SIZES, TEXTURES, Caption, Phrase, is_held_out, pick
from mitune.geometry import IMAGE_SIZE, coverage, extent, gaps, overlap_share

RADII = {"big": (11.4, 12.6), "small": (6.5, 7.5)}
RGB = {"red": (0.86, 0.15, 0.15), "green": (0.13, 0.66, 0.24), "blue": (0.16, 0.33, 0.90), "yellow": (0.97, 0.83, 0.12), "purple": (0.62, 0.20, 0.72)}
GAP_APART, GAP_CLEAR, GAP_TOUCHING = 8.0, 3.0, 1.0
OVERLAP = (0.25, 0.65)  # share of the smaller object's area
CLEAR_ANGLE = math.radians(30)  # a direction holds clearly within 30 degrees of its axis
PERIOD = 4  # px of stripes and dots: a divisor of the autoencoder's 8, so that a texture looks the same in every latent cell
PLAIN = 0.9  # probability that a texture that is not said is "solid", a size that is not said "big"


@dataclass(frozen=True)
class Scenes:
    """N scenes as tensors. Object 1 is absent where `shape[:, 1] == -1`; object 0 is drawn on top.

    shape, color, texture, size: (N, 2) int64 indices into SHAPES, COLORS, TEXTURES, SIZES; radius: (N, 2) px; centre: (N, 2, 2) px (x, y).
    """

    shape: torch.Tensor
    color: torch.Tensor
    texture: torch.Tensor
    size: torch.Tensor
    radius: torch.Tensor
    centre: torch.Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index) -> Scenes:
        return Scenes(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def sample_scenes(captions: list[Caption], generator: torch.Generator, *, plain: float = PLAIN) -> Scenes:
    """Scenes of which the captions are true; what a caption does not say is drawn at random, never a held-out pair unless it is said.

    A texture or size that is not said is the plain one, "solid" or "big", with probability `plain`, and else any of them. Two objects
    always differ in shape and colour. Without a relation they stand clearly left, right, above or below one another.
    """
    rows = [_complete(caption, plain, generator) for caption in captions]
    index = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES, "size": SIZES}
    columns = {
        name: torch.tensor([[-1 if p is None else words.index(getattr(p, name)) for p in phrases] for phrases, _ in rows]) for name, words in index.items()
    }
    radius, centre = _place(columns["shape"], columns["size"], [relation for _, relation in rows], generator)
    return Scenes(**columns, radius=radius, centre=centre)


def _complete(caption: Caption, plain: float, generator: torch.Generator) -> tuple[list[Phrase | None], str | None]:
    """Fill in what the caption leaves open: colours that differ, textures, sizes, and a direction where no relation is said."""

    def draw(words: tuple[str, ...]) -> str:  # the plain word stands first
        return words[0] if torch.rand((), generator=generator) < plain else pick(generator, words)

    relation = caption.relation or (pick(generator, tuple(DIRECTIONS)) if len(caption.phrases) == 2 else None)
    while True:
        colors = [COLORS[i] for i in torch.randperm(len(COLORS), generator=generator).tolist()]
        phrases = []
        for n, said in enumerate(caption.phrases):
            size = ("small", "big")[n] if relation == "inside" else draw(SIZES)
            phrases.append(replace(said, color=said.color or colors[n], texture=said.texture or draw(TEXTURES), size=said.size or size))
        allowed = all(is_held_out(said) or not is_held_out(full) for said, full in zip(caption.phrases, phrases, strict=True))
        if allowed and len({p.color for p in phrases}) == len(phrases):
            return phrases + [None] * (2 - len(phrases)), relation


def _place(shape: torch.Tensor, size: torch.Tensor, relations: list[str | None], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Radii (N, 2) and centres (N, 2, 2) with which the relation of object 0 to object 1 holds with its margin and both lie in the image; by rejection."""
    names = (None, *RELATIONS)
    wanted = torch.tensor([names.index(relation) for relation in relations])
    axis = torch.tensor([0.0, 0.0, math.pi, math.pi / 2, -math.pi / 2, 0, 0, 0, 0])[wanted]  # direction from object 0 to object 1
    spread = torch.tensor([math.pi] + [CLEAR_ANGLE] * 4 + [math.pi] * 4)[wanted]
    bounds = torch.tensor([RADII[name] for name in SIZES])[size]  # (N, 2, 2)
    radius, centre = torch.full(shape.shape, math.nan), torch.full((*shape.shape, 2), math.nan)
    todo = torch.arange(len(shape))
    while len(todo):
        n = len(todo)
        radius[todo] = bounds[todo, :, 0] + (bounds[todo, :, 1] - bounds[todo, :, 0]) * torch.rand(n, 2, generator=generator)
        angle = axis[todo] + spread[todo] * (2 * torch.rand(n, generator=generator) - 1)
        offset = _separation(shape[todo], radius[todo], angle, wanted[todo], names, generator)[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
        offset[wanted[todo] == 0] = 0
        reach = radius[todo][..., None] * extent()[shape[todo].clamp(min=0)]  # (n, 2, 2)
        reach[shape[todo] < 0] = 0
        low = torch.maximum(1 + reach[:, 0], 1 + reach[:, 1] - offset)
        high = torch.minimum(IMAGE_SIZE - 1 - reach[:, 0], IMAGE_SIZE - 1 - reach[:, 1] - offset)
        first = low + (high - low) * torch.rand(n, 2, generator=generator)
        proposal = torch.stack([first, first + offset], 1)
        good = (high >= low).all(-1) & torch.isfinite(offset).all(-1)
        overlapping = good & (wanted[todo] == names.index("overlapping"))
        if overlapping.any():
            share = overlap_share(shape[todo][overlapping], radius[todo][overlapping], proposal[overlapping])
            good[overlapping] = (share >= OVERLAP[0]) & (share <= OVERLAP[1])
        centre[todo[good]] = proposal[good]
        todo = todo[~good]
    return radius, centre


def _separation(shape, radius, angle, wanted, names, generator) -> torch.Tensor:
    """Distance (n,) of the centres along `angle` at which the wanted gap is met; nan where this proposal has none."""
    steps = torch.arange(0, IMAGE_SIZE, 0.5)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    gap, depth = gaps(shape, radius, steps[None, :, None] * direction[:, None, :])
    at = {name: (wanted == names.index(name))[:, None] for name in RELATIONS}
    directed = at["left"] | at["right"] | at["above"] | at["below"]
    touching = (gap >= 0.2) & (gap <= GAP_TOUCHING - 0.2)
    outside = gap.flip(-1).cummin(-1).values.flip(-1) > 0  # no deeper overlap further out
    fits = (directed & (gap >= GAP_CLEAR)) | (at["apart"] & (gap >= GAP_APART)) | (at["touching"] & touching & outside)
    fits = fits | (at["overlapping"] & (gap < 0)) | (at["inside"] & (depth >= 0.8))
    longest = torch.where(directed | at["apart"], 44.0, 64.0)
    weight = (fits & (steps <= longest)).double() + 1e-12
    choice = torch.multinomial(weight, 1, generator=generator)
    return torch.where(fits.gather(1, choice), steps[choice], math.nan)[:, 0]


def contact(scenes: Scenes) -> list[str | None]:
    """The contact of object 0 with object 1: a key of CONTACTS, "around" (object 1 inside object 0), or None (one object, or no clear margin)."""
    gap, depth = (x[:, 0] for x in gaps(scenes.shape, scenes.radius, (scenes.centre[:, 1] - scenes.centre[:, 0])[:, None]))
    swapped = Scenes(*(getattr(scenes, name).flip(1) for name in scenes.__dataclass_fields__))
    depth_of_second = gaps(swapped.shape.clamp(min=0), swapped.radius, (swapped.centre[:, 1] - swapped.centre[:, 0])[:, None])[1][:, 0]
    share = overlap_share(scenes.shape, scenes.radius, scenes.centre)
    names = []
    for n in range(len(scenes)):
        if scenes.shape[n, 1] < 0:
            names.append(None)
        elif depth[n] >= 0.5:
            names.append("inside")
        elif depth_of_second[n] >= 0.5:
            names.append("around")
        elif share[n] >= OVERLAP[0] - 0.03:
            names.append("overlapping")
        elif gap[n] >= GAP_APART - 0.5:
            names.append("apart")
        elif -0.2 <= gap[n] <= GAP_TOUCHING:
            names.append("touching")
        else:
            names.append(None)
    return names


def render(scenes: Scenes, generator: torch.Generator, *, chunk: int = 256) -> torch.Tensor:
    """Images (N, 3, 64, 64) in [-1, 1]: textured objects on a light ground whose shade varies a little from image to image."""
    ground = 0.90 + 0.06 * torch.rand(len(scenes), 1, 1, 1, generator=generator)
    parts = [_render_chunk(scenes[i : i + chunk], ground[i : i + chunk]) for i in range(0, len(scenes), chunk)]
    return torch.cat(parts)


def _render_chunk(scenes: Scenes, ground: torch.Tensor) -> torch.Tensor:
    image = ground.expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE).clone()
    palette = torch.tensor([RGB[color] for color in COLORS])
    patterns = _patterns()
    for i in (1, 0):
        here = scenes.shape[:, i] >= 0
        shape, centre = scenes.shape[here, i], scenes.centre[here, i]
        mask = coverage(shape, scenes.radius[here, i], centre)
        pattern = patterns[scenes.texture[here, i]][:, None]
        color = palette[scenes.color[here, i]][:, :, None, None]
        painted = color * (1 - pattern) + 0.25 * color * pattern
        image[here] = image[here] * (1 - mask[:, None]) + painted * mask[:, None]
    return image * 2 - 1


@functools.cache
def _patterns() -> torch.Tensor:
    """Darkening of each texture, (textures, 64, 64) in [0, 1]: fixed to the image, not to the object."""
    axis = torch.arange(IMAGE_SIZE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    from_dot = torch.stack([x, y]).remainder(PERIOD).sub(PERIOD / 2).norm(dim=0)
    patterns = {
        "solid": torch.zeros_like(x),
        "striped": (0.5 + 3 * torch.sin(y * (2 * math.pi / PERIOD))).clamp(0, 1),
        "dotted": (1.6 - from_dot).clamp(0, 1),
    }
    return torch.stack([patterns[texture] for texture in TEXTURES])
