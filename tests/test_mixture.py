"""Oracles: torch.distributions' mixtures, automatic differentiation, and the closed-form MI that every estimator must meet."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close

from mitune.denoisers import eps_of, flow_schedule, signal_and_noise, target_of, to_flow
from mitune.flow import flow_estimate, flow_terms, flow_times, guided_inner_product
from mitune.information import estimate, renoised_terms, renoised_timesteps
from mitune.mixture import MixtureWorld, stable_diffusion_schedule
from mitune.sampling import Sampler, sample

ABAR = stable_diffusion_schedule()
T = len(ABAR)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world() -> MixtureWorld:
    return MixtureWorld(torch.randn((3, 4, 2, 2), generator=seeded(5)) * 0.8, std=0.7, caption_error=0.15, alphas_cumprod=ABAR)


@pytest.fixture(scope="module")
def exact(world) -> float:
    """What the sum over t estimates: the MI at t = 0 minus the MI at T."""
    (start, error), (end, _) = (world.information(n=100_000, generator=seeded(), timestep=t) for t in (None, T - 1))
    assert error < 0.0005 * (start - end)
    assert 0 < end < 0.03 * start
    return start - end


def mixture(world: MixtureWorld, weights: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> MixtureSameFamily:
    scale = ((signal * world.std) ** 2 + sigma**2).sqrt().expand(3, 16)
    return MixtureSameFamily(Categorical(weights.double()), Independent(Normal(signal * world.means.double().flatten(1), scale), 1))


def score(density: MixtureSameFamily, z: torch.Tensor) -> torch.Tensor:
    z = z.double().flatten(1).requires_grad_()
    return torch.autograd.grad(density.log_prob(z).sum(), z)[0].reshape(-1, 4, 2, 2)


@pytest.mark.parametrize("timestep", [0, 300, 999])
def test_eps_is_the_score_and_log_ratio_the_densities(world, timestep):
    z = torch.randn((5, 4, 2, 2), generator=seeded(1))
    signal, sigma = ABAR[timestep].double().sqrt(), (1 - ABAR[timestep].double()).sqrt()
    conditional, marginal = (mixture(world, weights, signal, sigma) for weights in (torch.tensor([0.075, 0.85, 0.075]), torch.ones(3) / 3))
    assert_close(world.eps(z, timestep, world.encode([1] * 5)).double(), -sigma * score(conditional, z), rtol=1e-4, atol=1e-5)
    assert_close(world.eps(z, torch.full((5,), timestep), world.null[[0] * 5]).double(), -sigma * score(marginal, z), rtol=1e-4, atol=1e-5)
    ratio = conditional.log_prob(z.double().flatten(1)) - marginal.log_prob(z.double().flatten(1))
    assert_close(world.log_ratio(z, [1] * 5, timestep).double(), ratio, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("time", [0.02, 0.4, 0.98])
def test_velocity_is_the_score_in_other_words(world, time):
    """eps = -t score = z_t + (1 - t) v, the score by automatic differentiation."""
    z, t = torch.randn((5, 4, 2, 2), generator=seeded(1)), torch.tensor(time).double()
    density = mixture(world, torch.tensor([0.075, 0.85, 0.075]), 1 - t, t)
    assert_close(z + (1 - time) * world.velocity(z, time, world.encode([1] * 5)), (-t * score(density, z)).float(), rtol=1e-4, atol=1e-5)
    assert_close(world.velocity(z, torch.full((5,), time), world.null[[0] * 5]), world.velocity(z, time, world.null[[0] * 5]))


@pytest.mark.parametrize("timestep", [0, 300, 999])
def test_one_mixture_holds_the_same_information_by_diffusion_and_by_flow(world, timestep):
    """MI depends on t by the signal-to-noise ratio alone."""
    spread = float((1 / ABAR[timestep] - 1).sqrt())
    by_diffusion, by_flow = (world.information(n=5000, generator=seeded(), **at)[0] for at in ({"timestep": timestep}, {"time": spread / (1 + spread)}))
    assert by_flow == pytest.approx(by_diffusion, rel=1e-3)


def test_the_ends_of_a_flow_are_the_image_and_nothing(world):
    assert world.information(n=5000, generator=seeded(), time=0.0) == world.information(n=5000, generator=seeded())
    assert world.information(n=5000, generator=seeded(), time=1.0)[0] == pytest.approx(0, abs=1e-6)


def test_captions_are_wrong_at_their_rate(world):
    far = MixtureWorld(torch.eye(3).reshape(3, 3, 1, 1) * 20, std=1.0, caption_error=0.3, alphas_cumprod=ABAR)
    assert_close(far.encode([2]).tensors["weights"], torch.tensor([[0.15, 0.15, 0.7]]))
    found = far.draw([2] * 4000, seeded()).flatten(1).argmax(1).bincount(minlength=3) / 4000
    assert_close(found, torch.tensor([0.15, 0.15, 0.7]), atol=0.03, rtol=0)
    value, _ = far.information(n=100, generator=seeded())  # components that never overlap: log K - H(pi)
    assert value == pytest.approx(float(torch.tensor(3.0).log() - Categorical(torch.tensor([0.7, 0.15, 0.15])).entropy()), rel=1e-4)


def test_posterior_is_bayes_rule(world):
    z = world.draw([0, 1, 2, 2], seeded(4))
    weights = world.encode([1] * 4)
    spread = torch.full((3, 16), world.std, dtype=torch.float64)
    densities = Independent(Normal(world.means.double().flatten(1), spread), 1).log_prob(z.double().flatten(1)[:, None])
    expected = (densities + weights.tensors["weights"].double().log()).softmax(-1)
    assert_close(world.posterior(z, weights).double(), expected, rtol=1e-3, atol=1e-5)


def test_renoised_estimators_meet_the_exact_information(world, exact):
    n, timesteps = 9000, renoised_timesteps(T, 100)
    prompts = [i % 3 for i in range(n)]
    z, noise = world.draw(prompts, seeded(2)), torch.randn((n, 100, *world.latent_shape), generator=seeded(3))
    terms = renoised_terms(world, z, world.encode(prompts), world.null, timesteps=timesteps, noise=noise, batch_size=50_000)
    orthogonal, standard = (estimate(terms[form], timesteps, ABAR, form=form).value for form in ("orthogonal", "standard"))
    assert float(orthogonal.mean()) == pytest.approx(exact, rel=0.02)
    start = world.information(n=100_000, generator=seeded())[0]
    ratio = world.log_ratio(z, prompts).double()  # of mean `start`; subtracting it image by image leaves the estimator's own noise
    assert float((standard - ratio).mean()) + start == pytest.approx(exact, rel=0.02)
    correlation = torch.corrcoef(torch.stack([ratio, standard, orthogonal]))[0]
    assert correlation[1] > 0.9 > 0 > correlation[2]  # one mean, but within a prompt only the standard form is the log-ratio


LOW, HIGH = 0.1, 0.8  # of a flow, so that both ends count in the exact number


@pytest.fixture(scope="module")
def flow(world) -> tuple[list[int], torch.Tensor, dict[str, torch.Tensor]]:
    """Prompts, exact images, and each form's estimate."""
    n, times = 51_000, flow_times(25, LOW, HIGH)
    prompts = [i % 3 for i in range(n)]
    z, noise = world.draw(prompts, seeded(2)), torch.randn((n, 25, *world.latent_shape), generator=seeded(3))
    terms = flow_terms(world, z, world.encode(prompts), world.null, times=times, noise=noise, batch_size=50_000)
    return prompts, z, {form: flow_estimate(values, times, low=LOW, high=HIGH).value for form, values in terms.items()}


@pytest.fixture(scope="module")
def flow_exact(world) -> float:
    (low, error), (high, _) = (world.information(n=100_000, generator=seeded(), time=t) for t in (LOW, HIGH))
    assert error < 0.002 * (low - high)
    assert high > 0.02 * low
    return low - high


@pytest.mark.parametrize("form", ["orthogonal", "standard", "inner_product"])
def test_flow_estimators_meet_the_exact_information(world, flow, flow_exact, form):
    prompts, z, values = flow
    value = values[form]
    if form == "standard":  # less the exact ratio of the image, whose mean is the MI of z_0
        value = value - world.log_ratio(z, prompts).double() + world.information(n=100_000, generator=seeded())[0]
    assert float(value.std()) / len(value) ** 0.5 < 0.005 * flow_exact
    assert float(value.mean()) == pytest.approx(flow_exact, rel=0.02)


def test_a_guided_inner_product_is_off_by_the_square_of_the_guidance(flow, flow_exact):
    guided = guided_inner_product(flow[2]["inner_product"], flow[2]["orthogonal"], 2.5)
    assert float(guided.mean()) == pytest.approx(2.5**2 * flow_exact, rel=0.02)


def test_the_inner_product_of_one_prompt_by_itself_is_not_its_divergence(world, flow):
    """KL(q(z|p) || q(z)) by samples of that prompt: the orthogonal form meets it, the inner product only on average over prompts."""
    prompts, z, values = flow
    of_prompt, differences = torch.tensor(prompts), []
    for p in range(3):
        chosen, n = of_prompt == p, int((of_prompt == p).sum())
        gap = (values["inner_product"] - values["orthogonal"])[chosen]
        differences.append(float(gap.mean() / (gap.std() / n**0.5)))
        at_low, at_high = (_divergence(world, z[chosen], p, t) for t in (LOW, HIGH))
        assert float(values["orthogonal"][chosen].mean()) == pytest.approx(at_low - at_high, rel=0.03)
    assert max(map(abs, differences)) > 6


def _divergence(world: MixtureWorld, z: torch.Tensor, prompt: int, time: float) -> float:
    z_t = (1 - time) * z + time * torch.randn(z.shape, generator=seeded(7))
    return float(world.log_ratio(z_t, [prompt] * len(z), time=time).double().mean())


@pytest.fixture(scope="module")
def as_diffusion(world) -> MixtureWorld:
    """The same mixture on the timesteps of a rectified flow with shift 3."""
    return MixtureWorld(world.means, world.std, world.caption_error, flow_schedule(3.0))


@pytest.fixture(scope="module")
def as_diffusion_exact(as_diffusion) -> dict[int, float]:
    """MI of z_t, by timestep; of z_0 by -1."""
    at = {-1: None, 0: 0, 100: 100, T - 1: T - 1}
    return {t: as_diffusion.information(n=100_000, generator=seeded(), timestep=timestep)[0] for t, timestep in at.items()}


@pytest.mark.parametrize("timestep", [3, 300, 998])
def test_a_flow_as_a_diffusion_is_the_same_mixture(as_diffusion, timestep):
    """Its velocity, in its own times, says the same eps; and the noise - z_0 that it learns says the noise."""
    z, noise, said = torch.randn((5, 4, 2, 2), generator=seeded(1)), torch.randn((5, 4, 2, 2), generator=seeded(2)), as_diffusion.encode([1] * 5)
    signal, sigma = signal_and_noise(as_diffusion.alphas_cumprod, timestep, z)
    x_t, t = to_flow(z, signal, sigma)
    v = as_diffusion.velocity(x_t, t.flatten().expand(5), said)
    assert_close(eps_of("flow", v, z, signal, sigma), as_diffusion.eps(z, timestep, said), rtol=1e-3, atol=1e-4)
    assert_close(eps_of("flow", target_of("flow", z, noise, signal, sigma), signal * z + sigma * noise, signal, sigma), noise, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["orthogonal", "standard", "inner_product"])
def test_the_estimators_meet_the_exact_information_of_a_flow_as_a_diffusion(as_diffusion, as_diffusion_exact, form):
    n, timesteps = 9000, renoised_timesteps(T, 100)
    prompts = [i % 3 for i in range(n)]
    z, noise = as_diffusion.draw(prompts, seeded(2)), torch.randn((n, 100, *as_diffusion.latent_shape), generator=seeded(3))
    prompted = (as_diffusion.encode(prompts), as_diffusion.null)
    terms = renoised_terms(as_diffusion, z, *prompted, timesteps=timesteps, noise=noise, inner_product=True, batch_size=50_000)[form]
    value = estimate(terms, timesteps, as_diffusion.alphas_cumprod, form=form).value
    exact = as_diffusion_exact[-1] - as_diffusion_exact[T - 1]
    if form == "standard":  # less the exact ratio of the image, whose mean is the MI of z_0
        value = value - as_diffusion.log_ratio(z, prompts).double() + as_diffusion_exact[-1]
    assert float(value.std()) / n**0.5 < 0.01 * exact
    assert float(value.mean()) == pytest.approx(exact, rel=0.03)


def test_trajectories_of_a_flow_meet_the_exact_information(as_diffusion, as_diffusion_exact):
    """The path form along an SDE with the flow's marginals, the others along the same; by the variance of the posterior."""
    n, prompts = 6000, [i % 3 for i in range(6000)]
    options = {"guidance_scale": 1, "num_inference_steps": 250, "terms": True, "inner_product": True, "batch_size": n, "variance": "small"}
    samples = sample(as_diffusion, as_diffusion.encode(prompts), as_diffusion.null, generators=[seeded(i) for i in range(n)], **options)
    exact = as_diffusion_exact[-1] - as_diffusion_exact[T - 1]
    for form in ("orthogonal", "inner_product"):
        value = estimate(getattr(samples, form), samples.timesteps, as_diffusion.alphas_cumprod, form=form).value
        assert float(value.mean()) == pytest.approx(exact, rel=0.05)
    path = estimate(samples.path, samples.timesteps, as_diffusion.alphas_cumprod, form="path").value
    assert torch.corrcoef(torch.stack([path, as_diffusion.log_ratio(samples.latents, prompts).double()]))[0, 1] > 0.97
    assert float(path.mean()) == pytest.approx(exact, rel=0.08)


def trajectories(world, n: int, steps: int):
    prompts = [i % 3 for i in range(n)]
    generators = [seeded(i) for i in range(n)]
    options = {"guidance_scale": 1, "num_inference_steps": steps, "generators": generators, "terms": True, "batch_size": n}
    return prompts, sample(world, world.encode(prompts), world.null, **options)


def test_trajectory_estimators_meet_the_exact_information(world, exact):
    prompts, samples = trajectories(world, 6000, 500)
    orthogonal, path = (estimate(getattr(samples, form), samples.timesteps, ABAR, form=form).value for form in ("orthogonal", "path"))
    assert float(orthogonal.mean()) == pytest.approx(exact, rel=0.02)
    start = torch.stack([torch.randn(world.latent_shape, generator=seeded(i)) for i in range(6000)])
    ratio = (world.log_ratio(samples.latents, prompts) - world.log_ratio(start, prompts, int(samples.timesteps[0]))).double()
    assert abs(float((path - ratio).mean())) < 0.02 * exact
    assert torch.corrcoef(torch.stack([path, ratio]))[0, 1] > 0.98


def test_path_information_bounds_that_of_the_image_and_tightens(world, exact):
    values = []
    for steps in (10, 25, 100):
        samples = trajectories(world, 3000, steps)[1]
        gain, _, sigma = torch.tensor([(kernel.gain, kernel.scale, kernel.sigma) for kernel in Sampler.of(ABAR, steps).kernels]).double().T
        expected = (gain**2 / (2 * sigma**2) * samples.orthogonal)[:, :-1].sum(1)  # the path's terms without their noise of mean zero
        assert abs((expected - samples.path.double().sum(1)).mean()) < 4 * (expected - samples.path.double().sum(1)).std() / 3000**0.5
        values.append(float(expected.mean()))
    assert values[0] > values[1] > values[2] > exact


@pytest.mark.parametrize(("change", "message"), [({"means": torch.zeros(1, 1, 1, 1)}, "K of 2 or more"), ({"caption_error": 1.2}, "caption_error is 1.2")])
def test_impossible_worlds_are_refused(change, message):
    arguments = {"means": torch.zeros(2, 1, 1, 1), "std": 1.0, "caption_error": 0.0, "alphas_cumprod": ABAR} | change
    with pytest.raises(ValueError, match=message):
        MixtureWorld(**arguments)
