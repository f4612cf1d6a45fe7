"""Oracles: values of the paper's schedule, the equations written out, torch.distributions, algebraic identities."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

from mitune.config import Estimator
from mitune.flow import flow_estimate, flow_terms, flow_times, flow_weight, guided_inner_product, inner_product_terms
from mitune.information import (
    Kernel,
    both_branches,
    estimate,
    kappa,
    orthogonal_terms,
    path_terms,
    phrase_terms,
    query,
    renoised_terms,
    renoised_timesteps,
    standard_terms,
)
from mitune.mixture import MixtureWorld, stable_diffusion_schedule
from mitune.models import load
from mitune.pipelines import LatentDiffusion

ABAR = stable_diffusion_schedule()


@pytest.fixture
def world() -> MixtureWorld:
    return MixtureWorld(torch.randn((3, 4, 2, 2), generator=torch.Generator().manual_seed(5)), std=0.7, caption_error=0.2, alphas_cumprod=ABAR)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_kappa_has_the_values_of_stable_diffusions_schedule():
    values = kappa(ABAR, torch.tensor([1, 51, 501, 991])).tolist()
    assert [round(values[0]), *(round(value, 1) for value in values[1:])] == [251, 11.2, 3.3, 6.0]
    assert round(float(kappa(ABAR, torch.tensor(0)))) == 500
    assert float(ABAR[-1]) == pytest.approx(0.00466, abs=5e-6)


def test_kappa_is_equation_2_and_the_authors_leave_out_alpha():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    timesteps = torch.arange(1000)
    expected = torch.stack([betas[t] * 1000 / (2 * (1 - betas[t]) * (1 - (1 - betas[: t + 1]).prod())) for t in range(1000)])
    assert_close(kappa(ABAR, timesteps), expected, rtol=1e-4, atol=0)
    ratio = kappa(ABAR, timesteps) / kappa(ABAR, timesteps, "authors")
    assert_close(ratio, 1 / (1 - betas), rtol=1e-4, atol=0)
    assert float(ratio.max()) == pytest.approx(1.012, abs=5e-4)


@pytest.mark.parametrize(
    ("timesteps", "variant", "message"), [([1000], "paper", "timesteps 1000..1000"), ([-1], "paper", "timesteps -1"), ([1], "mine", "unknown kappa 'mine'")]
)
def test_kappa_refuses(timesteps, variant, message):
    with pytest.raises(ValueError, match=message):
        kappa(ABAR, torch.tensor(timesteps), variant)


def test_terms_are_their_definitions():
    noise, cond, null = normal(3, 5, 4, 8, 8).unbind()
    assert_close(orthogonal_terms(cond, null), (cond - null).flatten(1).norm(dim=1) ** 2)
    assert_close(standard_terms(noise, cond, null), ((noise - null) ** 2).flatten(1).sum(1) - ((noise - cond) ** 2).flatten(1).sum(1), rtol=1e-4, atol=1e-3)


def test_standard_becomes_orthogonal_when_the_noise_is_the_conditional_prediction():
    cond, null = normal(2, 5, 4, 8, 8)
    assert_close(standard_terms(cond, cond, null), orthogonal_terms(cond, null))
    assert_close(standard_terms(null, cond, null), -orthogonal_terms(cond, null))


def test_standard_of_close_predictions_loses_no_digits():
    noise, null = normal(2, 5, 4, 8, 8)
    cond = null + 1e-4 * normal(5, 4, 8, 8, seed=1)
    exact = ((noise.double() - null.double()) ** 2 - (noise.double() - cond.double()) ** 2).flatten(1).sum(1)
    assert_close(standard_terms(noise, cond, null).double(), exact, rtol=1e-4, atol=1e-6)


def test_path_terms_are_the_log_ratio_of_the_kernels_normals():
    z, n, cond, null = normal(4, 5, 4, 4, 4)
    kernel = Kernel(scale=1.02, gain=0.07, sigma=0.2)
    z_prev = kernel.mean(z, cond) + kernel.sigma * n
    expected = sum(sign * Normal(kernel.mean(z, eps), kernel.sigma).log_prob(z_prev).flatten(1).sum(1) for sign, eps in ((1, cond), (-1, null)))
    assert_close(path_terms(z, z_prev, cond, null, kernel), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5, 7.5])
def test_path_along_a_guided_step_is_the_weighted_orthogonal_term_and_a_noise_of_mean_zero(w):
    z, n, cond, null = normal(4, 5, 4, 4, 4)
    kernel = Kernel(scale=1.02, gain=0.07, sigma=0.2)
    z_prev = kernel.mean(z, null + w * (cond - null)) + kernel.sigma * n
    weighted = (2 * w - 1) * kernel.gain**2 / (2 * kernel.sigma**2) * orthogonal_terms(cond, null)
    zero_mean = -kernel.gain / kernel.sigma * ((cond - null) * n).flatten(1).sum(1)
    assert_close(path_terms(z, z_prev, cond, null, kernel), weighted + zero_mean, rtol=1e-4, atol=1e-3)


def test_path_refuses_a_deterministic_step():
    with pytest.raises(ValueError, match=r"sigma = 0; choose another variance"):
        path_terms(*normal(4, 1, 1, 2, 2), Kernel(1.0, 0.1, 0.0))


def test_prediction_types_give_the_same_terms(tiny_pipeline):
    """A v-network and the eps-network that it amounts to; and the factor that forgetting the conversion loses."""
    model = load(tiny_pipeline)
    as_eps = load(tiny_pipeline)
    as_eps.prediction_type = "epsilon"
    predict = model.predict

    def predict_eps(latents, timesteps, conditioning):
        abar = ABAR[timesteps].reshape(-1, 1, 1, 1)
        return abar.sqrt() * predict(latents, timesteps, conditioning) + (1 - abar).sqrt() * latents

    as_eps.predict = predict_eps
    latents, timesteps = normal(2, 4, 8, 8), torch.tensor([3, 600])
    arguments = {"timesteps": timesteps, "noise": normal(2, 2, 4, 8, 8, seed=1)}
    of_v, of_eps = (renoised_terms(m, latents, m.encode(["a red circle", "a star"]), m.null, **arguments) for m in (model, as_eps))
    for form in of_v:
        assert_close(of_v[form], of_eps[form])
    conditioning = model.encode(["a red circle", "a star"])
    difference = (predict(latents, timesteps, conditioning) - predict(latents, timesteps, model.null[[0, 0]])).flatten(1).square().sum(1).detach()
    eps_cond, eps_null = both_branches(model, latents, timesteps, conditioning, model.null)
    assert_close(orthogonal_terms(eps_cond, eps_null), ABAR[timesteps] * difference, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_renoised_terms_are_the_definition_whatever_the_batch(world, batch_size):
    latents, noise, timesteps = normal(4, 4, 2, 2), normal(4, 5, 4, 2, 2, seed=1), torch.tensor([10, 300, 300, 700, 999])
    conditioning, seen = world.encode([0, 1, 2, 1]), []
    terms = renoised_terms(world, latents, conditioning, world.null, timesteps=timesteps, noise=noise, batch_size=batch_size, progress=seen.append)
    assert sum(seen) == 4
    lazy = renoised_terms(world, latents, conditioning, world.null, timesteps=timesteps, noise=lambda row: noise[row], batch_size=batch_size)
    for row in range(4):
        for r, t in enumerate(timesteps.tolist()):
            z_t = ABAR[t].sqrt() * latents[[row]] + (1 - ABAR[t]).sqrt() * noise[[row], r]
            cond, null = world.eps(z_t, t, conditioning[[row]]), world.eps(z_t, t, world.null)
            assert_close(terms["orthogonal"][row, r], orthogonal_terms(cond, null)[0], rtol=1e-4, atol=1e-5)
            assert_close(terms["standard"][row, r], standard_terms(noise[[row], r], cond, null)[0], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(lazy[form], terms[form]) for form in terms)


def test_another_prompt_in_place_of_the_empty_one(world):
    """The difference of two prompts' standard terms: the unconditional prediction cancels."""
    latents, arguments = normal(2, 4, 2, 2), {"timesteps": torch.tensor([100, 800]), "noise": normal(2, 2, 4, 2, 2, seed=1)}
    true, wrong = world.encode([0, 1]), world.encode([2, 2])
    against = renoised_terms(world, latents, true, wrong, **arguments)["standard"]
    apart = [renoised_terms(world, latents, said, world.null, **arguments)["standard"] for said in (true, wrong)]
    assert_close(against, apart[0] - apart[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_phrase_terms_are_the_definition_whatever_the_batch(world, batch_size):
    latents, noise, timesteps = normal(3, 4, 2, 2), normal(3, 4, 4, 2, 2, seed=1), torch.tensor([10, 300, 300, 999])
    conditioning, asked = world.encode([0, 1, 2]), [[1, 0], [2], [0, 1]]
    arguments = {"timesteps": timesteps, "noise": noise, "batch_size": batch_size}
    found = phrase_terms(world, latents, conditioning, world.null, [world.encode(own) for own in asked], **arguments)
    for form, values in renoised_terms(world, latents, conditioning, world.null, **arguments).items():
        assert_close(found[form], values)
    assert found["phrase_standard"].shape == found["phrase_reduced"].shape == (3, 2, 4)
    for row, own in enumerate(asked):
        for r, t in enumerate(timesteps.tolist()):
            z_t = ABAR[t].sqrt() * latents[[row]] + (1 - ABAR[t]).sqrt() * noise[[row], r]
            eps_prompt, eps_null = world.eps(z_t, t, conditioning[[row]]), world.eps(z_t, t, world.null)
            for place, phrase in enumerate(own):
                eps_phrase = world.eps(z_t, t, world.encode([phrase]))
                for form, target in (("standard", noise[[row], r]), ("reduced", eps_prompt)):
                    expected = ((target - eps_null) ** 2).sum() - ((target - eps_phrase) ** 2).sum()
                    assert_close(found[f"phrase_{form}"][row, place, r], expected, rtol=1e-3, atol=1e-3)
    assert found["phrase_standard"][1, 1].isnan().all() and found["phrase_reduced"][1, 1].isnan().all()
    assert sum(values.isnan().sum() for values in found.values()) == 2 * 4


def test_the_whole_prompt_as_its_own_phrase(tiny_pipeline):
    """Its reduced form is the orthogonal term, its standard form the standard one."""
    model, texts = load(tiny_pipeline), ["a red circle", "a star"]
    conditioning = model.encode(texts)
    arguments = {"timesteps": torch.tensor([30, 600]), "noise": normal(2, 2, 4, 8, 8, seed=1)}
    found = phrase_terms(model, normal(2, 4, 8, 8), conditioning, model.null, [conditioning[[0]], conditioning[[1]]], **arguments)
    assert_close(found["phrase_reduced"][:, 0], found["orthogonal"], rtol=1e-4, atol=1e-6)
    assert_close(found["phrase_standard"][:, 0], found["standard"], rtol=1e-4, atol=1e-4)


def test_phrase_terms_refuse_what_does_not_fit(world):
    with pytest.raises(ValueError, match="2 latents, 1 lists of phrases"):
        phrase_terms(world, normal(2, 4, 2, 2), world.encode([0, 1]), world.null, [world.encode([0])], timesteps=torch.tensor([1]), noise=normal(2, 1, 4, 2, 2))


def test_a_query_takes_the_terms_that_the_estimator_names():
    terms = {"orthogonal": normal(3, 2).square(), "renoised_orthogonal": normal(3, 4, seed=1).square(), "timesteps": torch.tensor([900, 100]),
             "renoised_timesteps": torch.tensor([800, 600, 400, 20])}  # fmt: skip
    for latents, prefix in (("trajectory", ""), ("renoised", "renoised_")):
        for variant in ("paper", "authors"):
            found = query(Estimator("orthogonal", latents, 50, variant), terms, ABAR)
            expected = estimate(terms[f"{prefix}orthogonal"], terms[f"{prefix}timesteps"], ABAR, form="orthogonal", t_min=50, variant=variant)
            assert torch.equal(found.value, expected.value)


def test_renoised_timesteps_are_the_middles():
    assert renoised_timesteps(1000, 4).tolist() == [125, 375, 625, 875]
    assert renoised_timesteps(1000, 1000).tolist() == list(range(1000))


def test_renoised_terms_refuse_what_does_not_fit(world):
    with pytest.raises(ValueError, match="2 latents, 3 prompts, 1 null prompts"):
        renoised_terms(world, normal(2, 4, 2, 2), world.encode([0, 1, 2]), world.null, timesteps=torch.tensor([1]), noise=normal(2, 1, 4, 2, 2))


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_estimate_is_the_mean_over_the_kept_timesteps(variant):
    terms, timesteps = normal(2, 3, 4).square(), torch.tensor([900, 500, 51, 50])
    result = estimate(terms, timesteps, ABAR, form="orthogonal", t_min=50, variant=variant)
    weighted = kappa(ABAR, timesteps[:3], variant) * terms[..., :3]
    assert result.timesteps.tolist() == [900, 500, 51]
    assert_close(result.profile, weighted)
    assert_close(result.value, weighted.sum(-1) / 3)
    assert_close(result.standard_error, weighted.std(-1) / 3**0.5)
    assert torch.equal(result.value, estimate(terms, timesteps, ABAR, form="standard", t_min=50, variant=variant).value)


def test_estimate_of_a_path_is_the_sum_over_the_kept_steps():
    terms, timesteps = normal(3, 4), torch.tensor([900, 500, 51, 50])
    result = estimate(terms, timesteps, ABAR, form="path", t_min=50)
    assert_close(result.value, terms[:, :3].double().sum(-1))
    assert_close(result.standard_error, terms[:, :3].double().std(-1) * 3**0.5)


def test_one_timestep_has_no_standard_error():
    result = estimate(normal(3, 1), torch.tensor([500]), ABAR, form="standard")
    assert result.standard_error.isnan().all()
    assert result.value.isfinite().all()


@pytest.mark.parametrize(
    ("terms", "options", "message"),
    [
        (torch.ones(2, 3), {"form": "squared"}, "unknown form 'squared'; choose orthogonal, standard, path"),
        (None, {"form": "path"}, "there are no path terms: a deterministic sampler has none"),
        (torch.ones(2, 4), {"form": "path"}, "do not fit 3 timesteps"),
        (torch.ones(2, 3), {"form": "standard", "t_min": 900}, "no timestep lies above t_min = 900; the largest is 900"),
    ],
)
def test_estimate_refuses(terms, options, message):
    with pytest.raises(ValueError, match=message):
        estimate(terms, torch.tensor([900, 500, 1]), ABAR, **options)


def test_the_models_schedule_is_the_worlds(tiny_pipeline):
    model: LatentDiffusion = load(tiny_pipeline)
    assert_close(model.alphas_cumprod, ABAR, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- rectified flows


def test_the_flows_weight_is_kappa_of_its_own_schedule():
    """By abar = (1 - t)^2 / ((1 - t)^2 + t^2) a flow is a diffusion: kappa / T is 1/2 |d log SNR| of a step, (1 - t)^2 takes eps to v."""
    t = torch.arange(1, 1000).double() / 1000
    abar = (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    middle = slice(200, 800)
    assert_close((kappa(abar, torch.arange(999)) / 999 * 1000 * (1 - t) ** 2)[middle], flow_weight(t)[middle], rtol=0.01, atol=0)
    assert_close(flow_weight(torch.tensor([0.25, 0.5, 1.0])), torch.tensor([3.0, 1.0, 0.0]).double())


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_velocities_have_the_terms_of_their_noise_predictions(t):
    """eps = z_t + (1 - t) v, of prediction and target alike: the terms differ by (1 - t)^2."""
    z_0, noise, v_cond, v_null = normal(4, 5, 4, 8, 8).double().unbind()
    z_t = (1 - t) * z_0 + t * noise
    eps_cond, eps_null = z_t + (1 - t) * v_cond, z_t + (1 - t) * v_null
    assert_close(orthogonal_terms(eps_cond, eps_null), (1 - t) ** 2 * orthogonal_terms(v_cond, v_null), rtol=1e-4, atol=1e-3)
    assert_close(standard_terms(noise, eps_cond, eps_null), (1 - t) ** 2 * standard_terms(noise - z_0, v_cond, v_null), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_the_guided_inner_product_is_a_query_on_stored_terms(w):
    v_cond, v_null = normal(2, 5, 4, 8, 8)
    guided = v_null + w * (v_cond - v_null)
    orthogonal, inner_product = orthogonal_terms(v_cond, v_null), inner_product_terms(v_cond, v_null)
    assert_close(inner_product, (v_cond * v_cond).flatten(1).sum(1) - (v_cond * v_null).flatten(1).sum(1), rtol=1e-4, atol=1e-3)
    assert_close(guided_inner_product(inner_product, orthogonal, w), inner_product_terms(guided, v_null), rtol=1e-4, atol=1e-2)


def test_only_the_inner_product_depends_on_where_the_latents_have_their_origin(world):
    """Moved by a, v_c and v_u both lose a: the inner product changes by -a . (v_c - v_u)."""
    moved = MixtureWorld(world.means + 2.0, world.std, world.caption_error, ABAR)
    latents, prompts, times = normal(3, 4, 2, 2), world.encode([0, 1, 2]), torch.tensor([0.3, 0.7])
    noise = normal(3, 2, 4, 2, 2, seed=1)
    here = flow_terms(world, latents, prompts, world.null, times=times, noise=noise)
    there = flow_terms(moved, latents + 2.0, prompts, world.null, times=times, noise=noise)
    for form in ("orthogonal", "standard"):
        assert_close(there[form], here[form], rtol=1e-3, atol=1e-3)
    for r, t in enumerate(times.tolist()):
        z_t = (1 - t) * latents + t * noise[:, r]
        gap = world.velocity(z_t, t, prompts) - world.velocity(z_t, t, world.null[[0] * 3])
        assert gap.flatten(1).sum(1).abs().max() > 0.1
        assert_close(there["inner_product"][:, r] - here["inner_product"][:, r], -2.0 * gap.flatten(1).sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_flow_terms_are_the_definition_whatever_the_batch(world, batch_size):
    latents, noise, times = normal(4, 4, 2, 2), normal(4, 3, 4, 2, 2, seed=1), torch.tensor([0.1, 0.6, 1.0])
    conditioning = world.encode([0, 1, 2, 1])
    terms = flow_terms(world, latents, conditioning, world.null, times=times, noise=noise, batch_size=batch_size)
    for row in range(4):
        for r, t in enumerate(times.tolist()):
            z_t = (1 - t) * latents[[row]] + t * noise[[row], r]
            cond, null = world.velocity(z_t, t, conditioning[[row]]), world.velocity(z_t, t, world.null)
            assert_close(terms["orthogonal"][row, r], orthogonal_terms(cond, null)[0], rtol=1e-4, atol=1e-4)
            assert_close(terms["standard"][row, r], standard_terms(noise[[row], r] - latents[[row]], cond, null)[0], rtol=1e-4, atol=1e-4)
            assert_close(terms["inner_product"][row, r], inner_product_terms(cond, null)[0], rtol=1e-4, atol=1e-4)


def test_the_estimate_of_a_flow_is_the_integral():
    """int_0.2^0.8 (1 - t) / t t dt = 0.6 - 0.3."""
    times = flow_times(50, 0.2, 0.8)
    assert_close(times[[0, -1]], torch.tensor([0.206, 0.794]).double())
    found = flow_estimate(torch.stack([times, 2 * times]).float(), times, low=0.2, high=0.8)
    assert_close(found.value, torch.tensor([0.3, 0.6]).double(), rtol=1e-6, atol=0)
    assert_close(found.standard_error, found.profile.std(-1) / 50**0.5)


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [([0.0, 0.5], {}, "times 0..0.5 must lie above 0"), ([0.5, 0.9], {"high": 0.8}, "must lie in 0..0.8"), ([0.5], {}, "do not fit 1 times")],
)
def test_the_estimate_of_a_flow_refuses(times, options, message):
    with pytest.raises(ValueError, match=message):
        flow_estimate(torch.ones(3, 2), torch.tensor(times), **options)
