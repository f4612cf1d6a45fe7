"""Oracles: closed forms for Gaussians, a naive double loop, and collections whose variety is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import linalg

from mitune import quality
from mitune.quality import Moments, cmmd, cmmd_of, frechet, frechet_of, gaussian, principal, unit, vendi, vendi_of


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def with_moments(rng, n, mean, covariance):
    """n points whose sample mean and covariance (n - 1) are exactly these."""
    x = rng.normal(size=(n, len(mean)))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


# ---------------------------------------------------------------- Frechet distance


def test_frechet_of_gaussians_with_commuting_covariances(rng):
    """|mu_x - mu_y|^2 + sum_i (s_i - r_i)^2 for standard deviations s and r along common axes."""
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    s, r, shift = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 1.0, 0.5, 0.1]), np.array([0.3, 0.0, -1.0, 2.0])
    x, y = (with_moments(rng, 40, mean, turn @ np.diag(std**2) @ turn.T) for mean, std in ((np.zeros(4), s), (shift, r)))
    assert_allclose(frechet(x, y), (shift**2).sum() + ((s - r) ** 2).sum(), rtol=1e-9)


def test_frechet_is_the_formula_with_scipys_square_root(rng):
    x, y = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), 0.5 + rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert_allclose(frechet(x, y), expected, rtol=1e-8)
    assert_allclose(frechet(y, x), expected, rtol=1e-8)
    assert abs(frechet(x, x)) < 1e-9


def test_frechet_is_refused_below_five_images_a_dimension(rng):
    frechet(rng.normal(size=(20, 4)), rng.normal(size=(20, 4)))
    with pytest.raises(ValueError, match="19 images of 4 features are too few for a Frechet distance, which takes 20") as error:
        frechet(rng.normal(size=(100, 4)), rng.normal(size=(19, 4)))
    assert "\n" not in str(error.value)


def test_moments_are_all_that_frechet_needs(rng):
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(80, 5)) + 0.5
    known = Moments(x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / 59, 60)
    assert_allclose(frechet_of(known, Moments.of(y)), frechet(x, y), rtol=1e-9)
    with pytest.raises(ValueError, match="24 images of 5 features are too few"):
        frechet_of(replace(known, n=24), Moments.of(y))


# ---------------------------------------------------------------- CMMD


def test_cmmd_in_blocks_is_that_of_the_whole_kernels(rng, monkeypatch):
    x, y = unit(rng.normal(size=(7, 3))), unit(rng.normal(size=(9, 3)) + 0.5)
    whole = cmmd_of(gaussian(x, x, 10.0), gaussian(y, y, 10.0), gaussian(x, y, 10.0))
    monkeypatch.setattr(quality, "ROWS", 2)
    assert_allclose(cmmd(x, y), whole, rtol=1e-9)


def test_cmmd_is_a_double_loop(rng):
    x, y = unit(rng.normal(size=(7, 3))), unit(rng.normal(size=(9, 3)) + 0.5)

    def mean(pairs):
        values = [math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * 10**2)) for a, b in pairs]
        return sum(values) / len(values)

    within = [mean([(a, b) for i, a in enumerate(part) for j, b in enumerate(part) if i != j]) for part in (x, y)]
    expected = 1000 * (sum(within) - 2 * mean([(a, b) for a in x for b in y]))
    assert_allclose(cmmd(x, y), expected, rtol=1e-9)
    assert_allclose(cmmd(3 * x, 0.1 * y), expected, rtol=1e-9)  # norms do not matter


def test_cmmd_is_unbiased_and_nearly_ten_times_the_squared_shift_of_the_mean(rng):
    same = [cmmd(rng.normal(size=(8, 4)), rng.normal(size=(8, 4))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20 and min(same) < 0
    x, y = unit(rng.normal(size=(400, 4))), unit(rng.normal(size=(400, 4)) + 1)
    assert_allclose(cmmd(x, y), 10 * ((x.mean(0) - y.mean(0)) ** 2).sum(), rtol=0.03)


def test_cmmd_takes_two_images():
    with pytest.raises(ValueError, match="at least two of each"):
        cmmd(np.ones((1, 3)), np.ones((2, 3)))


# ---------------------------------------------------------------- variety


@pytest.mark.parametrize("n", [1, 2, 7])
def test_vendi_of_equal_and_of_orthogonal_items(n):
    assert_allclose(vendi_of(np.ones((n, n))), 1, rtol=1e-12)
    assert_allclose(vendi_of(np.eye(n)), n, rtol=1e-12)
    assert_allclose(vendi(np.repeat([[3.0, 4.0]], n, axis=0)), 1, rtol=1e-9)
    assert_allclose(vendi(2.5 * np.eye(n)), n, rtol=1e-9)


def test_vendi_of_groups_and_of_two_directions():
    """Groups of equal items count by the entropy of their shares; two vectors of cosine c by the eigenvalues (1 +- c) / 2."""
    shares = np.array([0.5, 0.3, 0.2])
    assert_allclose(vendi(np.repeat(np.eye(3), (5, 3, 2), axis=0)), np.exp(-(shares * np.log(shares)).sum()), rtol=1e-9)
    c, p = 0.6, np.array([0.8, 0.2])
    assert_allclose(vendi(np.array([[1, 0], [c, math.sqrt(1 - c * c)]])), np.exp(-(p * np.log(p)).sum()), rtol=1e-9)


# ---------------------------------------------------------------- parts


def test_principal_directions_are_the_singular_vectors(rng):
    x = rng.normal(size=(50, 6)) @ np.diag([5, 4, 3, 2, 1, 0.1]) @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    ours, theirs = principal(x, 2), np.linalg.svd(x - x.mean(0))[2][:2].T
    assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-9)
    with pytest.raises(ValueError, match="1 to 6"):
        principal(x, 7)


def test_features_that_do_not_fit_are_refused(rng):
    for x, y, named in (
        (np.ones(3), np.ones((3, 1)), "shapes"),
        (np.ones((9, 1)), np.ones((9, 2)), "shapes"),
        (np.full((9, 1), np.nan), np.ones((9, 1)), "finite"),
    ):
        with pytest.raises(ValueError, match=named):
            frechet(x, y)
    assert_allclose(np.diag(gaussian(np.eye(3), np.eye(3), 1.0)), 1)
