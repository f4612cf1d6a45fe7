"""Shapes as signed distance fields: outlines, antialiased masks, gaps and overlaps. Lengths are pixels of a 64 x 64 image, y grows downwards."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from mitune.captions import SHAPES

IMAGE_SIZE = 64


def _signed_distance(shape: str, points: torch.Tensor) -> torch.Tensor:
    """Signed distance to the outline of a shape of radius 1 at `points` (..., 2); negative inside."""
    length = points.norm(dim=-1)
    if shape == "circle":
        return length - 1.0
    if shape == "moon":
        return torch.maximum(length - 1.1, 0.8 - (points - torch.tensor([0.62, 0.0])).norm(dim=-1))
    return _polygon_distance(points, _vertices(shape))


def _vertices(shape: str) -> torch.Tensor:
    if shape == "cross":
        a, b = 1.08, 0.38
        return torch.tensor([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)])
    corners, radii, start = {"square": (4, (1.24,), 45), "triangle": (3, (1.32,), -90), "star": (10, (1.3, 0.58), -90)}[shape]
    angles = torch.deg2rad(start + torch.arange(corners) * 360 / corners)
    return torch.stack([angles.cos(), angles.sin()], -1) * torch.tensor(radii * (corners // len(radii)))[:, None]


def _polygon_distance(points: torch.Tensor, vertices: torch.Tensor) -> torch.Tensor:
    start, end = vertices, vertices.roll(-1, 0)
    edge, relative = end - start, points[..., None, :] - start
    along = ((relative * edge).sum(-1) / edge.square().sum(-1)).clamp(0, 1)
    distance = (relative - along[..., None] * edge).norm(dim=-1).amin(-1)
    above = points[..., None, 1] < start[:, 1]
    crosses = (above != (points[..., None, 1] < end[:, 1])) & (
        points[..., None, 0] < start[:, 0] + (points[..., None, 1] - start[:, 1]) / (edge[:, 1] + 1e-12) * edge[:, 0]
    )
    return torch.where(crosses.sum(-1) % 2 == 1, -distance, distance)


_REACH, _CELLS = 10.0, 801


@functools.cache
def _distance_table() -> torch.Tensor:
    """Signed distances of all shapes at radius 1 on a grid over [-10, 10]^2: (shapes, 1, 801, 801)."""
    axis = torch.linspace(-_REACH, _REACH, _CELLS)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    return torch.stack([_signed_distance(shape, points) for shape in SHAPES])[:, None]


def _distance(shape: torch.Tensor, radius: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Signed distance, px, of `points` (N, H, W, 2) relative to the centres of N objects, read from the table."""
    scaled = points / (radius[:, None, None, None] * _REACH)
    out = torch.empty(points.shape[:-1])
    for index in shape.unique():  # one table a shape: no copy of it for every object
        here = shape == index
        block = scaled[here].reshape(1, -1, points.shape[2], 2)
        out[here] = F.grid_sample(_distance_table()[index : index + 1], block, mode="bilinear", padding_mode="border", align_corners=True).reshape(
            out[here].shape
        )
    return out * radius[:, None, None]


@functools.cache
def _outlines(points: int = 64) -> torch.Tensor:
    """Points on each shape's outline at radius 1: (shapes, 64, 2)."""
    circle = torch.linspace(0, 2 * math.pi, points + 1)[:-1]
    outlines = []
    for shape in SHAPES:
        if shape in ("circle", "moon"):
            ring = torch.stack([circle.cos(), circle.sin()], -1)
            inner = ring * 0.8 + torch.tensor([0.62, 0.0])
            around = ring if shape == "circle" else torch.cat([ring * 1.1, inner])
            on = around[_signed_distance(shape, around).abs() < 1e-3]
            outlines.append(on[torch.linspace(0, len(on) - 1, points).round().long()])
        else:
            start = _vertices(shape)
            share = torch.arange(points) * len(start) / points
            k = share.long()
            outlines.append(start[k] + (share - k)[:, None] * (start.roll(-1, 0)[k] - start[k]))
    return torch.stack(outlines)


@functools.cache
def extent() -> torch.Tensor:
    return _outlines().abs().amax(1)  # (shapes, 2)


def coverage(shape: torch.Tensor, radius: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Antialiased masks (N, 64, 64) in [0, 1] of N objects."""
    axis = torch.arange(IMAGE_SIZE) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    return (0.5 - _distance(shape, radius, grid - centre[:, None, None, :])).clamp(0, 1)


def overlap_share(shape: torch.Tensor, radius: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Shared area over the area of the smaller object, (N,)."""
    first, second = (coverage(shape[:, i].clamp(min=0), radius[:, i], centre[:, i]) for i in (0, 1))
    return (first * second).sum((1, 2)) / torch.minimum(first.sum((1, 2)), second.sum((1, 2)))


def gaps(shape, radius, offset) -> tuple[torch.Tensor, torch.Tensor]:
    """For offsets (n, S, 2) of object 1 from object 0: the gap between the outlines (negative: overlap), and how deep object 0 lies in object 1, px."""
    second = shape[:, 1].clamp(min=0)
    outline = [radius[:, i, None, None] * _outlines()[s] for i, s in enumerate((shape[:, 0], second))]  # (n, P, 2)
    of_first = _distance(second, radius[:, 1], outline[0][:, None] - offset[:, :, None])
    of_second = _distance(shape[:, 0], radius[:, 0], outline[1][:, None] + offset[:, :, None])
    return torch.minimum(of_first.amin(-1), of_second.amin(-1)), -of_first.amax(-1)
