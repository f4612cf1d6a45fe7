"""Image quality and variety from features (N, d) of images: how far their distribution is from that of reference images, and how much they differ.

All in float64. What the features mean is the caller's choice: of a model's own image tower, a distance to images of the same prompts also falls
where the images fit their prompts better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIGMA = 10.0  # of CMMD's kernel, as published
ROWS = 1024  # of a kernel computed at once
IMAGES_A_DIMENSION = 5  # below it the sample covariance is too poor for a Frechet distance


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The squared Frechet distance of Gaussians fitted to features (N, d) and (M, d) (FID: Heusel et al. 2017):

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x^(1/2) S_y S_x^(1/2))^(1/2)), S the covariances with N - 1. A finite sample lies too high, a smaller one more
    so: only samples of one size may be compared.

    Raises:
        ValueError: fewer than `IMAGES_A_DIMENSION` d images.
    """
    return frechet_of(*map(Moments.of, _features(x, y)))


@dataclass(frozen=True)
class Moments:
    """What a Frechet distance knows of features: the mean (d,), the covariance (d, d) with N - 1, and N."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int

    @classmethod
    def of(cls, x: np.ndarray) -> Moments:
        (x,) = _features(x)
        return cls(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)), len(x))


def frechet_of(x: Moments, y: Moments) -> float:
    """`frechet` from the moments."""
    fewest, d = min(x.n, y.n), len(x.mean)
    if fewest < IMAGES_A_DIMENSION * d:
        raise ValueError(f"{fewest} images of {d} features are too few for a Frechet distance, which takes {IMAGES_A_DIMENSION * d}; project them, or use cmmd")
    root = _root(x.covariance)
    apart = ((x.mean - y.mean) ** 2).sum()
    return float(apart + np.trace(x.covariance) + np.trace(y.covariance) - 2 * np.trace(_root(root @ y.covariance @ root)))


def cmmd(x: np.ndarray, y: np.ndarray, sigma: float = SIGMA) -> float:
    """1000 MMD^2 of unit-norm features (N, d) and (M, d) with the kernel exp(-|a - b|^2 / (2 sigma^2)) (CMMD: Jayasumana et al. 2024, sigma = 10).

    MMD^2 = mean_(i != j) k(x_i, x_j) + mean_(i != j) k(y_i, y_j) - 2 mean k(x_i, y_j), the unbiased estimate (Gretton et al. 2012, Eq. 3), which may be
    below 0; the published code keeps the pairs i = j and lies above it by about 1000 (1 - mean k) (1/N + 1/M). At sigma = 10 the kernel of unit
    vectors is nearly linear: CMMD is nearly 10 |mu_x - mu_y|^2.

    Raises:
        ValueError: fewer than two images.
    """
    x, y = map(unit, _features(x, y))
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} images: an unbiased MMD takes at least two of each")
    of_x, of_y, between = (sum(gaussian(a[n : n + ROWS], b, sigma).sum() for n in range(0, len(a), ROWS)) for a, b in ((x, x), (y, y), (x, y)))
    return _cmmd((of_x, len(x)), (of_y, len(y)), between / (len(x) * len(y)))


def cmmd_of(of_x: np.ndarray, of_y: np.ndarray, between: np.ndarray) -> float:
    """`cmmd` from the kernel's values of the features among themselves, (N, N) and (M, M), 1 on the diagonal, and of each with each (N, M)."""
    return _cmmd((of_x.sum(), len(of_x)), (of_y.sum(), len(of_y)), between.mean())


def _cmmd(of_x: tuple[float, int], of_y: tuple[float, int], between: float) -> float:
    """From the sum of the kernel's values and the number of images of each, and the mean between them."""
    within = [(total - n) / (n * (n - 1)) for total, n in (of_x, of_y)]
    return float(1000 * (sum(within) - 2 * between))


def gaussian(x: np.ndarray, y: np.ndarray, sigma: float) -> np.ndarray:
    """exp(-|x_i - y_j|^2 / (2 sigma^2)), (N, M)."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.exp(-np.maximum(squares, 0) / (2 * sigma**2))


def vendi(x: np.ndarray) -> float:
    """The Vendi score of features (N, d) by their cosine similarities (Friedman & Dieng 2023): between 1, all alike, and min(N, d), all orthogonal."""
    (x,) = _features(x)
    return vendi_of(unit(x) @ unit(x).T)


def vendi_of(kernel: np.ndarray) -> float:
    """exp(-sum_i l_i log l_i), l the eigenvalues of kernel / N: the effective number of different items.

    Args:
        kernel: similarities (N, N), positive semidefinite, 1 on the diagonal.
    """
    eigenvalues = np.linalg.eigvalsh(np.asarray(kernel, dtype=np.float64) / len(kernel))
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def principal(reference: np.ndarray, d: int) -> np.ndarray:
    """The d directions (D, d) in which reference features (M, D) vary most: `x @ principal(reference, d)` are few enough for `frechet`.

    Raises:
        ValueError: d outside 1..D.
    """
    (reference,) = _features(reference)
    if not 1 <= d <= reference.shape[1]:
        raise ValueError(f"{d} directions were asked for; features of {reference.shape[1]} entries have 1 to {reference.shape[1]}")
    return np.linalg.eigh(np.atleast_2d(np.cov(reference, rowvar=False)))[1][:, ::-1][:, :d]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to norm 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _root(matrix: np.ndarray) -> np.ndarray:
    """The positive semidefinite square root of a symmetric matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _features(*parts: np.ndarray) -> list[np.ndarray]:
    """The arguments as float64. Raises ValueError where they are not finite features (N, d) of one d."""
    arrays = [np.asarray(part, dtype=np.float64) for part in parts]
    shapes = [array.shape for array in arrays]
    if any(array.ndim != 2 or not array.size for array in arrays) or len({shape[1] for shape in shapes}) > 1:
        raise ValueError(f"features have the shapes {shapes}; expected (N, d), the same d in all")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("features are not finite; look at the images first")
    return arrays
