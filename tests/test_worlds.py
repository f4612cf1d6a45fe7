"""Oracles: the mixture's own closed forms, Monte Carlo of the bridge, automatic differentiation of the log-ratio, and symmetry."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mitune import worlds
from mitune.information import kappa

SIZES = {"dimensions": 4, "modes": 2, "caption_error": 0.2, "separation": 4.0, "std": 0.5}


@pytest.fixture(scope="module")
def world():
    return worlds.random_world(**SIZES, seed=0)


def test_means_lie_at_the_set_distance():
    many = worlds.random_world(**SIZES | {"modes": 7}, seed=3).means.flatten(1)
    assert float(torch.pdist(many).square().mean().sqrt()) == pytest.approx(4.0 * 0.5, rel=1e-5)


def test_latents_at_a_logit_have_it(world):
    logits = torch.tensor([-5.0, 0.0, 7.0])
    assert_close(world.posterior(worlds.at_logits(world, logits), world.null)[:, 0].logit(), logits, rtol=1e-3, atol=1e-4)


def test_the_gap_is_the_slope_of_the_log_ratio(world):
    """kappa sigma^2 |grad log r|^2 = kappa |eps_c - eps_u|^2 = kappa sigma^2 (abar / v^2) |Delta mu|^2 g(l)."""
    t, z = 400, torch.randn((6, 4, 1, 1), generator=torch.Generator().manual_seed(1)).requires_grad_()
    slope = torch.autograd.grad(world.log_ratio(z, [0] * 6, t).sum(), z)[0]
    gap = world.eps(z, t, world.encode([0] * 6)) - world.eps(z, t, world.null[[0] * 6])
    abar = world.alphas_cumprod[t]
    assert_close(gap, -(1 - abar).sqrt() * slope, rtol=1e-3, atol=1e-5)
    variance = abar * world.std**2 + 1 - abar
    difference = (world.means[0] - world.means[1]).flatten()
    logit = abar.sqrt() * ((z.detach() - abar.sqrt() * world.means.mean(0)).flatten(1) @ difference) / variance
    expected = abar / variance**2 * difference.square().sum() * torch.from_numpy(worlds.squared_gap(logit.numpy(), 0.2)).float()
    assert_close(slope.square().flatten(1).sum(1), expected, rtol=1e-3, atol=1e-5)


def test_the_gap_is_even_about_half_the_log_odds_of_a_wrong_caption():
    centre, x = -np.log(0.9 / 0.1) / 2, np.linspace(0, 8, 9)
    np.testing.assert_allclose(worlds.squared_gap(centre + x, 0.1), worlds.squared_gap(centre - x, 0.1), rtol=1e-9)
    np.testing.assert_allclose(worlds.squared_gap(x, 0.0), 1 / (1 + np.exp(x)) ** 2, rtol=1e-9)


def test_evidence_falls_as_the_integral_says(world):
    """dD = -(beta / alpha) abar |Delta mu|^2 / v^2 a step, so that kappa_t (1 - abar) / T weighs the gap by dD / 2."""
    t = torch.arange(300, 700)
    abar = world.alphas_cumprod[t].double()
    rate = kappa(world.alphas_cumprod, t) * (1 - abar) / 1000 * abar / (abar * world.std**2 + 1 - abar) ** 2
    total = float(rate.sum() * (world.means[0] - world.means[1]).square().sum())
    assert 2 * total == pytest.approx(worlds.evidence(world, 300) - worlds.evidence(world, 700), rel=0.01)


@pytest.mark.parametrize("error", [0.0, 0.2])
def test_each_form_is_the_predicted_function_of_the_last_logit(error):
    world = worlds.random_world(**SIZES | {"caption_error": error}, seed=0)
    low, high, logits = worlds.evidence(world, 999), worlds.evidence(world), torch.tensor([-8.0, -2.0, 4.0, 12.0])
    latents = worlds.at_logits(world, logits).repeat_interleave(400, 0)
    measured = worlds.renoised(world, [0] * 1600, latents, timesteps=100)
    orthogonal, standard = (measured[form].reshape(4, 400).mean(1) for form in ("orthogonal_renoised", "standard"))
    np.testing.assert_allclose(orthogonal, worlds.expected_orthogonal(logits, error, low=low, high=high), rtol=0.06)
    np.testing.assert_allclose(standard, worlds.expected_standard(logits, error, low=low, high=high), rtol=0.03, atol=0.1)


def test_predicted_means_average_to_the_information(world):
    """(1 - e) aligned + e misaligned is the MI at z_0 less that at z_T, the mean over images of Eq. 2."""
    found = worlds.predict(0.2, low=worlds.evidence(world, 999), high=worlds.evidence(world))
    start, end = (world.information(n=100_000, generator=torch.Generator().manual_seed(0), timestep=t)[0] for t in (None, 999))
    assert 0.8 * found.aligned + 0.2 * found.misaligned == pytest.approx(start - end, rel=0.02)
    assert found.misaligned > found.aligned and found.auc < 0.5 and found.correlation < 0


def test_a_table_holds_the_exact_numbers_and_is_the_same_again():
    make = partial(worlds.random_world, **SIZES)
    draw = partial(worlds.drawn, images=400, timesteps=30)
    table = worlds.over_worlds(make, draw, worlds=3, n=20_000)
    assert table["unit"].nunique() == 6 and abs(table["aligned"].mean() - 0.8) < 0.06
    assert (table["standard"] - table["log_ratio"] + table["start"]).mean() == pytest.approx(table["exact"].mean(), rel=0.2)
    assert table["orthogonal_renoised"].mean() == pytest.approx(table["exact"].mean(), rel=0.1)
    assert table.equals(worlds.over_worlds(make, draw, worlds=3, n=20_000))


def test_a_flow_takes_the_same_images_and_its_own_ends():
    make, options = partial(worlds.random_world, **SIZES), {"worlds": 2, "n": 20_000}
    table = worlds.over_worlds(make, partial(worlds.flowed, images=600, times=30, low=0.2, high=0.7), times=(0.2, 0.7), **options)
    whole = worlds.over_worlds(make, partial(worlds.drawn, images=600, timesteps=2), **options)
    assert table["log_ratio"].equals(whole["log_ratio"]) and table["aligned"].equals(whole["aligned"]) and table["start"].equals(whole["start"])
    assert (table["exact"] < 0.9 * whole["exact"]).all()
    assert table["flow_orthogonal"].mean() == pytest.approx(table["exact"].mean(), rel=0.1)
    signed = np.corrcoef(table[["log_ratio", "flow_standard", "flow_orthogonal"]].to_numpy().T)[0]
    assert signed[1] > 0.8 > 0 > signed[2]


def test_the_paths_noise_has_mean_zero_under_guidance(world):
    options = {"images": 3000, "num_inference_steps": 30, "timesteps": 5}
    for w in (1.0, 2.5):
        table = worlds.sampled(world, guidance_scale=w, **options)
        noise = table["path"] - table["path_drift"]
        assert abs(noise.mean()) < 4 * noise.std() / 3000**0.5
        assert table["path_drift"].min() > 0


def test_shares_sum_to_one(world):
    found = worlds.shares(world, (0, 100, 1000), images=50, timesteps=20)
    np.testing.assert_allclose(found.sum(), 1.0)
    assert list(found.index) == ["0 <= t < 100", "100 <= t < 1000"]
