"""Oracles: diffusers' DDPMScheduler and DDIMScheduler from the same noise, their closed-form kernels, invariance of the batch."""

from __future__ import annotations

import hashlib

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.distributions import Normal
from torch.testing import assert_close

from mitune.information import estimate
from mitune.mixture import MixtureWorld, stable_diffusion_schedule
from mitune.models import load
from mitune.sampling import Sampler, noise_generator, sample

PROMPTS = ["a red circle", "a blue square", "a green star"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "timestep_spacing": "leading", "steps_offset": 1}


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    return load(tiny_pipeline)


@pytest.fixture
def world() -> MixtureWorld:
    means = torch.randn((3, 4, 2, 2), generator=torch.Generator().manual_seed(5))
    return MixtureWorld(means, std=0.7, caption_error=0.2, alphas_cumprod=stable_diffusion_schedule())


class Counting:
    """A denoiser that remembers how many latents each call had."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, []
        self.alphas_cumprod, self.latent_shape, self.device = denoiser.alphas_cumprod, denoiser.latent_shape, denoiser.device

    def eps(self, latents, timesteps, conditioning):
        self.calls.append(len(latents))
        return self.denoiser.eps(latents, timesteps, conditioning)


def generators(n: int = 3, seed: int = 0) -> list[torch.Generator]:
    return [noise_generator(seed, PROMPTS[i % 3], i) for i in range(n)]


def draw(model, prompts=tuple(PROMPTS), **options):
    given = {"guidance_scale": 2.5, "num_inference_steps": 5, "generators": generators(len(prompts)), "terms": True}
    return sample(model, model.encode(list(prompts)), model.null, **{**given, **options})


def by_scheduler(model, scheduler, *, guidance_scale: float, num_inference_steps: int, noise: bool) -> torch.Tensor:
    """A plain diffusers loop on the network's raw v output, one image at a time, the noise from the image's generator."""
    scheduler.set_timesteps(num_inference_steps)
    latents = []
    for prompt, generator in zip(PROMPTS, generators(), strict=True):
        z = torch.randn(model.latent_shape, generator=generator)[None]
        noises = iter(torch.randn((num_inference_steps, *model.latent_shape), generator=generator)[:, None] if noise else ())
        for t in scheduler.timesteps:
            with torch.no_grad():
                cond, null = (model.predict(z, t, c) for c in (model.encode([prompt]), model.null))
            v = null + guidance_scale * (cond - null)
            z = _ddpm_step(scheduler, v, t, z, next(noises)) if noise else scheduler.step(v, t, z, eta=0.0).prev_sample
        latents.append(z)
    return torch.cat(latents)


def _ddpm_step(scheduler, v, t, z, noise):
    import diffusers.schedulers.scheduling_ddpm as module

    original, module.randn_tensor = module.randn_tensor, lambda *_, **__: noise
    try:
        return scheduler.step(v, int(t), z).prev_sample
    finally:
        module.randn_tensor = original


@pytest.mark.parametrize(("steps", "guidance_scale"), [(4, 1.0), (7, 2.5)])
def test_ancestral_sampling_is_diffusers_ddpm(model, steps, guidance_scale):
    scheduler = DDPMScheduler(**SD, variance_type="fixed_large", prediction_type="v_prediction")
    expected = by_scheduler(model, scheduler, guidance_scale=guidance_scale, num_inference_steps=steps, noise=True)
    samples = draw(model, num_inference_steps=steps, guidance_scale=guidance_scale)
    assert_close(samples.latents, expected, rtol=1e-3, atol=1e-3)
    assert samples.timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize(("steps", "guidance_scale"), [(4, 1.0), (7, 2.5)])
def test_deterministic_sampling_is_diffusers_ddim(model, steps, guidance_scale):
    scheduler = DDIMScheduler(**SD, prediction_type="v_prediction", set_alpha_to_one=True)
    expected = by_scheduler(model, scheduler, guidance_scale=guidance_scale, num_inference_steps=steps, noise=False)
    samples = draw(model, num_inference_steps=steps, guidance_scale=guidance_scale, variance="none")
    assert_close(samples.latents, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 25, 30, 50, 333, 999, 1000])
def test_every_kernel_is_the_schedulers_step(steps):
    """One step of each scheduler on given tensors; S = 1000 has no offset, which diffusers would let run out of the schedule."""
    abar = stable_diffusion_schedule()
    sampler = Sampler.of(abar, steps)
    scheduler = DDPMScheduler(**{**SD, "steps_offset": int(steps < 1000)}, variance_type="fixed_large")
    scheduler.set_timesteps(steps)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    z, eps, noise = torch.randn((3, 1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    deterministic, ddim = Sampler.of(abar, steps, variance="none"), DDIMScheduler(**{**SD, "steps_offset": int(steps < 1000)})
    ddim.set_timesteps(steps)
    for i in {0, steps // 2, steps - 1}:
        t, kernel = int(sampler.timesteps[i]), sampler.kernels[i]
        assert_close(kernel.mean(z, eps) + kernel.sigma * noise, _ddpm_step(scheduler, eps, t, z, noise), rtol=1e-3, atol=1e-3)
        if (steps, t) != (999, 1):  # whose last step leads diffusers' DDIM to t = 0, but its DDPM to the image
            assert_close(deterministic.kernels[i].mean(z, eps), ddim.step(eps, t, z).prev_sample, rtol=1e-3, atol=1e-3)
        assert deterministic.kernels[i].sigma == 0


@pytest.mark.parametrize("steps", [2, 25, 50])
def test_a_small_variance_is_ddpms_fixed_small(steps):
    sampler, scheduler = Sampler.of(stable_diffusion_schedule(), steps, variance="small"), DDPMScheduler(**SD, variance_type="fixed_small")
    scheduler.set_timesteps(steps)
    z, eps, noise = torch.randn((3, 1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    for t, kernel in zip(sampler.timesteps.tolist(), sampler.kernels, strict=True):
        assert_close(kernel.mean(z, eps) + kernel.sigma * noise, _ddpm_step(scheduler, eps, t, z, noise), rtol=1e-3, atol=1e-3)
    assert sampler.kernels[-1].sigma == 0


def test_unknown_variances_are_refused():
    with pytest.raises(ValueError, match="unknown variance 'fixed'; choose large, small, none"):
        Sampler.of(stable_diffusion_schedule(), 5, variance="fixed")


def test_terms_are_those_of_the_trajectory(world):
    """The chain walked again step by step, the increments by torch's normal densities."""
    samples = sample(world, world.encode([0, 1]), world.null, guidance_scale=2.0, num_inference_steps=10, generators=generators(2), terms=True)
    sampler = Sampler.of(world.alphas_cumprod, 10)
    for row, generator in enumerate(generators(2)):
        z, noises = torch.randn((1, *world.latent_shape), generator=generator), torch.randn((10, *world.latent_shape), generator=generator)
        for i, (t, kernel) in enumerate(zip(sampler.timesteps.tolist(), sampler.kernels, strict=True)):
            cond, null = world.eps(z, t, world.encode([row])), world.eps(z, t, world.null)
            z_prev = kernel.mean(z, null + 2.0 * (cond - null)) + kernel.sigma * noises[[i]]
            ratio = sum(sign * Normal(kernel.mean(z, eps), kernel.sigma).log_prob(z_prev).sum() for sign, eps in ((1, cond), (-1, null)))
            assert_close(samples.orthogonal[row, i], (cond - null).square().sum(), rtol=1e-4, atol=1e-5)
            assert_close(samples.path[row, i], ratio if i < 9 else torch.tensor(0.0), rtol=1e-3, atol=1e-3)
            z = z_prev
        assert_close(samples.latents[[row]], z, rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch(model):
    whole, parts, alone = draw(model), draw(model, batch_size=2), draw(model, PROMPTS[2:], generators=generators()[2:])
    for name in ("latents", "orthogonal", "path"):
        assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-3, atol=1e-4)
        assert_close(getattr(whole, name)[2:], getattr(alone, name), rtol=1e-3, atol=1e-4)


def test_equal_generators_give_equal_samples_and_terms_change_nothing(model):
    assert torch.equal(draw(model).latents, draw(model).latents)
    assert torch.equal(draw(model).latents, draw(model, terms=False).latents)
    assert not torch.equal(draw(model).latents, draw(model, generators=generators(seed=1)).latents)


@pytest.mark.parametrize(("guidance_scale", "terms", "branches"), [(1.0, False, 1), (1.0, True, 2), (2.0, False, 2), (2.0, True, 2)])
def test_the_unconditional_branch_runs_only_where_it_is_needed(world, guidance_scale, terms, branches):
    counting, seen = Counting(world), []
    samples = sample(
        counting, world.encode([0, 1, 2]), world.null, guidance_scale=guidance_scale, num_inference_steps=4, generators=generators(), terms=terms,
        batch_size=2, progress=seen.append,
    )  # fmt: skip
    assert counting.calls == [2 * branches] * 4 + [1 * branches] * 4
    assert sum(seen) == 12
    assert (samples.orthogonal is None) == (samples.path is None) == (not terms)


def test_a_deterministic_sampler_has_no_path(world):
    samples = sample(world, world.encode([0]), world.null, guidance_scale=1.0, num_inference_steps=4, generators=generators(1), terms=True, variance="none")
    assert samples.path is None
    assert samples.orthogonal.shape == (1, 4)
    with pytest.raises(ValueError, match="no path terms: a deterministic sampler"):
        estimate(samples.path, samples.timesteps, world.alphas_cumprod, form="path")


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_a_path_is_its_drift_and_the_noise_of_its_steps(world, w):
    """path_i - drift_i = -sqrt(2 k_i) (eps_c - eps_u) . n_i, at the first step, whose z_T and noise are known."""
    sampler = Sampler.of(world.alphas_cumprod, 5)
    samples = draw(world, [0, 1, 2], guidance_scale=w, generators=generators())
    drift = sampler.path_drift(samples.orthogonal, w)
    noises = [(torch.randn((4, 2, 2), generator=g), torch.randn((5, 4, 2, 2), generator=g)[0]) for g in generators()]
    z, n = (torch.stack(part) for part in zip(*noises, strict=True))
    gap = world.eps(z, int(sampler.timesteps[0]), world.encode([0, 1, 2])) - world.eps(z, int(sampler.timesteps[0]), world.null)
    noise = -sampler.kernels[0].gain / sampler.kernels[0].sigma * (gap * n).flatten(1).sum(1)
    assert_close(samples.path[:, 0] - drift[:, 0].float(), noise, rtol=1e-3, atol=1e-4)
    assert (drift[:, -1] == 0).all()
    with pytest.raises(ValueError, match="no path"):
        Sampler.of(world.alphas_cumprod, 5, variance="none").path_drift(samples.orthogonal, w)


def test_samples_follow_the_worlds_law(world):
    """Unguided, many steps: mean and variance of q(z|p)."""
    latents = sample(
        world, world.encode([0] * 2000), world.null, guidance_scale=1.0, num_inference_steps=200, generators=generators(2000), batch_size=2000
    ).latents
    exact = world.draw([0] * 200_000, torch.Generator().manual_seed(0))
    assert_close(latents.mean(0), exact.mean(0), rtol=0, atol=0.08)
    assert_close(latents.var(0), exact.var(0), rtol=0.15, atol=0.05)


def test_noise_is_of_the_seed_the_prompt_and_the_image():
    def first(*key):
        return torch.randn(4, generator=noise_generator(*key)).tolist()

    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 0, "renoise"), (0, "é", 0)]
    assert first(0, "a", 0) == first(0, "a", 0)
    assert len({tuple(first(*key)) for key in keys}) == len(keys)
    digest = hashlib.sha256(b"(0, 'a', 0, 'sample')").digest()
    assert noise_generator(0, "a", 0).initial_seed() == int.from_bytes(digest[:8], "big")


def test_the_first_noise_does_not_depend_on_the_number_of_steps(world):
    firsts = []
    for steps in (3, 8):
        counting = Counting(world)
        counting.eps = lambda latents, *_: firsts.append(latents) or torch.zeros_like(latents)
        sample(counting, world.encode([0]), world.null, guidance_scale=1.0, num_inference_steps=steps, generators=generators(1))
    assert torch.equal(firsts[0], firsts[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generators": generators(2)}, "3 prompts, 2 generators, 1 null prompts"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must lie in 1..1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
    ],
)
def test_bad_arguments_are_one_clear_line(world, change, message):
    arguments = {"guidance_scale": 1.0, "num_inference_steps": 2, "generators": generators()} | change
    with pytest.raises(ValueError, match=message) as error:
        sample(world, world.encode([0, 1, 2]), world.null, **arguments)
    assert "\n" not in str(error.value)
