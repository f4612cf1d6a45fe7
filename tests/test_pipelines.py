"""Oracles: diffusers' own pipelines of the same weights (prompts, network calls, samples, autoencoder, adapters), plain loops, RFMI's equation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from torch.testing import assert_close

from mitune import finetuning
from mitune.denoisers import flow_schedule
from mitune.flow import flow_terms
from mitune.information import estimate, renoised_terms, renoised_timesteps
from mitune.models import load
from mitune.recipes import Timesteps, Tuning
from mitune.sampling import Sampler, noise_generator, sample

PROMPTS = ["a red circle", "a blue square and a green star"]
CAPTIONS = ["a red circle", "a blue square", "a green star", "a red moon", "a blue circle"]
CONFIG = Tuning(
    adapter="dora", rank=4, lora_alpha=8, target_modules=("attention", "ff"), text_encoder=False, learning_rate=1e-2, betas=(0.9, 0.999), weight_decay=1e-2,
    epsilon=1e-8, max_grad_norm=1.0, steps=3, batch_size=8, micro_batch_size=8, mixed_precision="no", timesteps=Timesteps(200, 900), checkpoint_every=3,
    save_dtype="float32",
)  # fmt: skip


@pytest.fixture(params=["tiny_xl", "tiny_sd3"])
def folder(request):
    return request.getfixturevalue(request.param)


def opened(folder):
    """The pipeline by diffusers alone; that of Stable Diffusion 3 is told that it has no T5."""
    if "transformer" in {part.name for part in folder.iterdir()}:
        found = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    else:
        found = StableDiffusionXLPipeline.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def pipeline(folder):
    return opened(folder)


@pytest.fixture
def model(folder):
    return load(folder)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, 4, 8, 8), generator=generator), torch.randn((2, 4, 8, 8), generator=generator)


def generators() -> list[torch.Generator]:
    return [noise_generator(0, prompt, 0) for prompt in PROMPTS]


def velocity(pipeline, x_t: torch.Tensor, t: float, prompt: str) -> torch.Tensor:
    """One call of the transformer, as the pipeline makes it."""
    states, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
    with torch.no_grad():
        return pipeline.transformer(x_t[None], timestep=torch.tensor([1000.0 * t]), encoder_hidden_states=states, pooled_projections=pooled).sample[0]


def test_eps_of_xl_is_the_networks_own(tiny_xl, batch):
    model, pipeline = load(tiny_xl), opened(tiny_xl)
    states, nothing, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    sizes = pipeline._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 64).repeat(2, 1)
    with torch.no_grad():
        expected = pipeline.unet(batch[0], 300, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
        empty = pipeline.unet(batch[0], 300, nothing, added_cond_kwargs={"text_embeds": no_pooled, "time_ids": sizes}).sample
    assert model.prediction_type == "epsilon" and model.latent_shape == (4, 8, 8)
    assert_close(model.eps(batch[0], 300, model.encode(PROMPTS)), expected, rtol=1e-4, atol=1e-5)
    assert_close(model.eps(batch[0], 300, model.null[[0, 0]]), empty, rtol=1e-4, atol=1e-5)  # zeros, as the pipeline has them
    assert (expected - empty).abs().max() > 1e-3


def test_eps_of_a_flow_is_its_velocity_in_other_words(tiny_sd3, batch):
    """x_t = (1 - t) z_0 + t noise; eps = x_t + (1 - t) v."""
    model, pipeline = load(tiny_sd3), opened(tiny_sd3)
    z_0, noise = batch
    for timestep in (1, 400, 998):
        u = (timestep + 0.5) / 1000
        t = 3 * u / (1 + 2 * u)
        x_t = (1 - t) * z_0 + t * noise
        scale = (t**2 + (1 - t) ** 2) ** 0.5
        assert_close(model.add_noise(z_0, noise, timestep), x_t / scale, rtol=1e-3, atol=1e-4)
        v = torch.stack([velocity(pipeline, x, t, prompt) for x, prompt in zip(x_t, PROMPTS, strict=True)])
        eps = model.eps(x_t / scale, timestep, model.encode(PROMPTS))
        assert_close(eps, x_t + (1 - t) * v, rtol=1e-3, atol=1e-4)
        assert_close(model.velocity(x_t, t, model.encode(PROMPTS)), v, rtol=1e-3, atol=1e-4)
        assert_close(model.velocity(x_t, torch.full((2,), t), model.encode(PROMPTS)), v, rtol=1e-3, atol=1e-4)
    assert_close(model.target(z_0, noise, torch.tensor([3, 900])), noise - z_0)
    assert model.flow and model.latent_shape == (4, 8, 8)


def test_sampling_xl_is_the_pipelines_own(tiny_xl):
    model, pipeline = load(tiny_xl), opened(tiny_xl)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True, clip_sample=False)
    start = torch.stack([torch.randn(model.latent_shape, generator=generator) for generator in generators()])
    expected = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=3.0, latents=start, height=64, width=64, output_type="latent").images
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "variance": "none", "generators": generators()}
    assert_close(sample(model, model.encode(PROMPTS), model.null, **options).latents, expected, rtol=1e-3, atol=1e-3)


def test_sampling_a_flow_is_the_pipelines_own_euler(tiny_sd3):
    """At the same times: the chain without variance is Euler's of the flow."""
    model, pipeline = load(tiny_sd3), opened(tiny_sd3)
    chain = Sampler.of(model.alphas_cumprod, 4, variance="none")
    abar = model.alphas_cumprod[chain.timesteps[0]]
    start = torch.stack([torch.randn(model.latent_shape, generator=generator) for generator in generators()]) / (abar.sqrt() + (1 - abar).sqrt())
    before_shift = ((chain.timesteps + 0.5) / 1000).tolist()
    sizes = {"height": 64, "width": 64, "output_type": "latent"}
    expected = pipeline(PROMPTS, num_inference_steps=4, sigmas=before_shift, guidance_scale=3.0, latents=start, **sizes).images
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "generators": generators(), "terms": True, "inner_product": True}
    samples = sample(model, model.encode(PROMPTS), model.null, variance="none", **options)
    assert_close(samples.latents, expected, rtol=1e-3, atol=1e-3)
    assert samples.path is None and samples.orthogonal.shape == samples.inner_product.shape == (2, 4)
    noisy = sample(model, model.encode(PROMPTS), model.null, variance="small", **options)
    assert noisy.path.isfinite().all() and noisy.path[:, :-1].abs().min() > 0


def test_autoencoder_is_the_pipelines_own(model, pipeline, batch):
    vae = pipeline.vae
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0
    images = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert_close(model.decode(batch[0]), vae.decode(batch[0] / scale + shift).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)
        assert_close(model.encode_images(images), (vae.encode(images).latent_dist.mean - shift) * scale, rtol=1e-4, atol=1e-5)


def test_terms_are_those_of_a_plain_loop(model, batch):
    """Every image, timestep and branch by itself; RFMI's form by velocities that eps implies: v = eps - z_0 predicted."""
    timesteps = renoised_timesteps(1000, 3)
    noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    found = renoised_terms(model, batch[0], model.encode(PROMPTS), model.null, timesteps=timesteps, noise=noise, inner_product=True, batch_size=4)
    for row, prompt in enumerate(PROMPTS):
        for i, timestep in enumerate(timesteps.tolist()):
            abar, n = model.alphas_cumprod[timestep].double(), noise[row, i]
            z_t = (abar.sqrt() * batch[0][row] + (1 - abar).sqrt() * n).float()[None]
            cond, null = (model.eps(z_t, timestep, told).double() for told in (model.encode([prompt]), model.null))
            t = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
            v_cond, v_null = (eps - (z_t - (1 - abar).sqrt() * eps) / abar.sqrt() for eps in (cond, null))
            expected = {
                "orthogonal": ((cond - null) ** 2).sum(),
                "standard": ((n - null) ** 2).sum() - ((n - cond) ** 2).sum(),
                "inner_product": (1 - t) ** 2 * (v_cond * (v_cond - v_null)).sum(),
            }
            for form, value in expected.items():
                assert_close(found[form][row, i].double(), value, rtol=2e-2, atol=2e-3)
    for form in found:
        values = estimate(found[form], timesteps, model.alphas_cumprod, form=form).value
        assert values.isfinite().all() and values.abs().min() > 0


def test_a_flow_holds_the_same_terms_in_its_own_times(tiny_sd3, batch):
    """`mitune.flow` asks for velocities at times, `mitune.information` for eps at timesteps: eps differs by (1 - t) v."""
    model, timesteps = load(tiny_sd3), torch.tensor([100, 500, 900])
    u = (timesteps + 0.5) / 1000
    times, noise = 3 * u / (1 + 2 * u), torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    prompts = (model.encode(PROMPTS), model.null)
    by_flow = flow_terms(model, batch[0], *prompts, times=times, noise=noise)
    by_eps = renoised_terms(model, batch[0], *prompts, timesteps=timesteps, noise=noise, inner_product=True)
    for form in ("orthogonal", "standard", "inner_product"):
        assert_close(by_eps[form], (1 - times) ** 2 * by_flow[form], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("adapter", ["dora", "lora"])
def test_fine_tuning_learns_and_saves_what_load_lora_weights_reads(folder, pipeline, tmp_path, adapter):
    model, config = load(folder), replace(CONFIG, adapter=adapter)
    latents = torch.randn((5, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    said, at = finetuning.read_captions(model, CAPTIONS, config), torch.full((5,), 700)
    rows = finetuning.finetune(model, latents, said, config, seed=0, folder_checkpoints=tmp_path / "checkpoints")
    assert all(row["loss"] < float("inf") and row["grad_norm"] > 0 for row in rows)
    trained = finetuning.trained_parameters(model)
    assert {name.partition(".")[0] for name in trained} == {model.network_name}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.mul_(1.3 if "lora_magnitude_vector" in name else 1)
        model.save_adapter(tmp_path / "adapter")
        attached = model.predict(latents, at, said)
        loaded = load(folder, adapter=tmp_path / "adapter")
        assert not loaded.adapted
        assert_close(loaded.predict(latents, at, said), attached, rtol=1e-3, atol=1e-3)
        pipeline.load_lora_weights(tmp_path / "adapter")  # as anyone would
        assert_close(type(model)(pipeline).predict(latents, at, said), attached, rtol=1e-3, atol=1e-3)
        assert (load(folder).predict(latents, at, said) - attached).abs().max() > 1e-3


def test_the_loss_of_a_flow_is_that_of_its_velocity(tiny_sd3, tmp_path):
    """mean (noise - z_0 - v)^2 at x_t = (1 - t) z_0 + t noise, by the pipeline's own network."""
    model, pipeline = load(tiny_sd3), opened(tiny_sd3)
    latents = torch.randn((5, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    config = replace(CONFIG, steps=1)
    rows = finetuning.finetune(model, latents, model.encode(CAPTIONS), config, seed=0, folder_checkpoints=tmp_path)
    drawn, losses = finetuning.step_batch(latents, config, seed=0, step=0), []
    for row, z_0, noise, timestep in zip(*(drawn[name] for name in ("rows", "latents", "noise", "timesteps")), strict=True):
        u = (float(timestep) + 0.5) / 1000
        t = 3 * u / (1 + 2 * u)
        losses.append((noise - z_0 - velocity(pipeline, (1 - t) * z_0 + t * noise, t, CAPTIONS[row])).square().mean())
    assert rows[0]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)


def test_several_text_encoders_are_not_trained(model):
    with pytest.raises(ValueError, match=r"finetune\.text_encoder: a StableDiffusion.*Pipeline has several"):
        finetuning.read_captions(model, CAPTIONS, replace(CONFIG, text_encoder=True))


def test_the_schedule_of_a_flow_is_its_schedulers():
    """abar = (1 - t)^2 / ((1 - t)^2 + t^2) between the scheduler's own sigmas, of which it takes the middles."""
    abar = flow_schedule(3.0).double()
    t = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
    edges = torch.cat([torch.zeros(1), FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0)]).double()
    assert len(edges) == 1001
    assert ((edges[:-1] < t + 1e-4) & (t < edges[1:] + 1e-4)).all()
    u = t / (3 - 2 * t)
    assert_close(u[20:], ((torch.arange(1000) + 0.5) / 1000).double()[20:], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_part_has_its_own_dtype(folder, batch, dtype):
    low = load(folder, dtype=dtype, text_dtype="bfloat16", vae_dtype="bfloat16", attention="math")
    try:
        assert low.network.dtype == getattr(torch, dtype)
        assert low.pipeline.vae.dtype == low.pipeline.text_encoder.dtype == low.pipeline.text_encoder_2.dtype == torch.bfloat16
        said = low.encode(PROMPTS)
        assert {tensor.dtype for tensor in said.tensors.values()} == {torch.float32}
        assert_close(low.eps(batch[0], 500, said), load(folder).eps(batch[0], 500, said), rtol=0.1, atol=0.1)
        assert low.decode(batch[0]).dtype == torch.float32
    finally:
        load(folder)  # the process's own attention again
