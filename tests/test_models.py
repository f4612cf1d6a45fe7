"""Oracles: diffusers' own pipeline and schedulers, PEFT's attached forward, bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mitune.adapters import ADAPTER_FILE
from mitune.denoisers import Conditioning
from mitune.models import load
from mitune.networks import build_unet
from mitune.pipelines import LatentDiffusion

PROMPTS = ["a red circle", "a blue square and a green star", "a red circle"]


@pytest.fixture
def model(tiny_pipeline) -> LatentDiffusion:
    return load(tiny_pipeline)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((3, 4, 8, 8), generator=generator), torch.randn((3, 4, 8, 8), generator=generator), torch.tensor([1, 500, 999])


def attach(model: LatentDiffusion, *, use_dora: bool = True, seed: int = 0) -> None:
    """An adapter as after training: B not zero, alpha not the rank, magnitudes moved, linear and convolution layers."""
    torch.manual_seed(seed)
    model.network.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "proj_in", "ff.net.2"], use_dora=use_dora))
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.3)


def predict(model: LatentDiffusion, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.predict(batch[0], batch[2], model.encode(PROMPTS))


def test_float16_files_are_used_in_float32(model, tiny_pipeline):
    assert {value.dtype for value in load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    assert model.prediction_type == "v_prediction"
    assert model.latent_shape == (4, 8, 8)
    assert model.alphas_cumprod.shape == (1000,)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_conditioning_takes_rows_and_joins():
    both = Conditioning.cat([Conditioning({"a": torch.arange(3), "b": torch.eye(3)}), Conditioning({"a": torch.tensor([9]), "b": torch.ones(1, 3)})])
    assert len(both) == 4
    for rows in ([3, 0], torch.tensor([3, 0])):
        assert both[rows].tensors["a"].tolist() == [9, 0]
    assert both[1:].tensors["b"].shape == (3, 3)


def test_encode_is_the_pipelines_own(model, pipeline):
    expected = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    assert_close(model.encode(PROMPTS).tensors["encoder_hidden_states"], expected[0])
    assert_close(model.null.tensors["encoder_hidden_states"], expected[1][:1])
    assert_close(model.encode(PROMPTS, batch_size=1).tensors["encoder_hidden_states"], expected[0])
    for nothing in ([], "a red circle"):
        with pytest.raises(ValueError, match="pass a list of at least one prompt"):
            model.encode(nothing)


def test_forward_process_and_target_are_the_schedulers(model, batch):
    latents, noise, timesteps = batch
    scheduler = DDPMScheduler.from_config(model.pipeline.scheduler.config)
    assert_close(model.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps))
    assert_close(model.target(latents, noise, timesteps), scheduler.get_velocity(latents, noise, timesteps))
    model.prediction_type = "epsilon"
    assert model.target(latents, noise, timesteps) is noise


def test_eps_of_v_is_the_ddim_schedulers(model, batch):
    latents, _, timesteps = batch
    conditioning = model.encode(PROMPTS)
    eps = model.eps(latents, timesteps, conditioning)
    scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config)
    scheduler.set_timesteps(1000)
    for row, timestep in enumerate(timesteps.tolist()):
        v = model.network(latents[[row]], timestep, conditioning[[row]].tensors["encoder_hidden_states"]).sample
        x0 = scheduler.step(v, timestep, latents[[row]]).pred_original_sample
        abar = scheduler.alphas_cumprod[timestep]
        assert_close(eps[[row]], (latents[[row]] - abar.sqrt() * x0) / (1 - abar).sqrt(), rtol=1e-3, atol=1e-3 if timestep == 1 else 1e-5)
    assert_close(model.eps(latents, 500, conditioning)[1], eps[1], rtol=1e-4, atol=1e-5)
    model.prediction_type = "epsilon"
    assert_close(model.eps(latents, timesteps, conditioning), model.predict(latents, timesteps, conditioning))


def test_predict_is_differentiable(model, batch):
    latents = batch[0].requires_grad_()
    model.predict(latents, batch[2], Conditioning({"encoder_hidden_states": torch.randn(3, 20, 96)})).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_autoencoder_is_the_pipelines_own(model, pipeline, batch):
    images = torch.rand((3, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode_images(images, batch_size=2)
    scale = pipeline.vae.config.scaling_factor
    with torch.no_grad():
        assert_close(latents, pipeline.vae.encode(images).latent_dist.mean * scale, rtol=1e-4, atol=1e-5)
        assert_close(model.decode(latents, batch_size=2), pipeline.vae.decode(latents / scale).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert model.decode(latents * 1e4).abs().max() <= 1


def test_another_denoiser_takes_the_place_of_the_pipelines_own(model, tiny_pipeline, batch, tmp_path):
    torch.manual_seed(5)
    other = build_unet(64)
    other.half().save_pretrained(tmp_path / "other")
    found = load(tiny_pipeline, unet=tmp_path / "other")
    assert {parameter.dtype for parameter in found.network.parameters()} == {torch.float32}
    states = model.encode(PROMPTS).tensors["encoder_hidden_states"]
    with torch.no_grad():
        assert_close(predict(found, batch), other.float().eval()(batch[0], batch[2], states).sample, rtol=1e-4, atol=1e-5)
    assert_close(found.decode(batch[0]), model.decode(batch[0]))
    attach(found)
    found.save_adapter(tmp_path / "adapter")
    assert_close(predict(load(tiny_pipeline, unet=tmp_path / "other", adapter=tmp_path / "adapter"), batch), predict(found, batch), rtol=1e-3, atol=1e-4)


def test_a_denoiser_that_is_missing_or_does_not_fit_is_named(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"there are no weights in '.*nowhere'"):
        load(tiny_pipeline, unet=tmp_path / "nowhere")
    build_unet(32).save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(ValueError, match=r"pickle/diffusion_pytorch_model.bin' is a pickle"):
        load(tiny_pipeline, unet=tmp_path / "pickle")
    unet = build_unet(32)
    unet.register_to_config(sample_size=16)
    unet.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="its sample_size is 16, not 8"):
        load(tiny_pipeline, unet=tmp_path / "large")


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
def test_fused_adapter_is_the_attached_one_in_a_plain_network(model, tiny_pipeline, batch, tmp_path, use_dora):
    base = predict(model, batch)
    attach(model, use_dora=use_dora)
    attached = predict(model, batch)
    model.save_adapter(tmp_path)
    fused, loose = load(tiny_pipeline, adapter=tmp_path), load(tiny_pipeline, adapter=tmp_path, fuse=False)
    assert (attached - base).abs().max() > 1e-2
    assert_close(predict(fused, batch), attached, rtol=1e-3, atol=1e-4)
    assert_close(predict(loose, batch), attached, rtol=1e-5, atol=1e-6)
    plain = load(tiny_pipeline).network
    assert [(name, type(module)) for name, module in fused.network.named_modules()] == [(name, type(module)) for name, module in plain.named_modules()]
    assert not any(parameter.requires_grad for parameter in fused.network.parameters())
    loose.save_adapter(tmp_path / "again")
    assert (tmp_path / "again" / ADAPTER_FILE).read_bytes() == (tmp_path / ADAPTER_FILE).read_bytes()


def test_adapters_are_fused_in_turn(model, tiny_pipeline, batch, tmp_path):
    """The second was trained on top of the first."""
    attach(model, seed=0)
    model.save_adapter(tmp_path / "first")
    on_top = load(tiny_pipeline, adapter=tmp_path / "first")
    attach(on_top, seed=1)
    on_top.save_adapter(tmp_path / "second")
    both = (tmp_path / "first", tmp_path / "second")
    fused, loose = load(tiny_pipeline, adapter=both), load(tiny_pipeline, adapter=both, fuse=False)
    assert not fused.adapted and loose.adapted
    for loaded in (fused, loose):
        assert_close(predict(loaded, batch), predict(on_top, batch), rtol=1e-4, atol=1e-4)
    assert (predict(fused, batch) - predict(load(tiny_pipeline, adapter=both[1]), batch)).abs().max() > 1e-2
    assert torch.equal(predict(load(tiny_pipeline, adapter=()), batch), predict(load(tiny_pipeline), batch))


def test_saved_adapter_is_what_the_pipeline_reads(model, tiny_pipeline, batch, tmp_path):
    attach(model)
    model.save_adapter(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path)
    (config,) = pipeline.unet.peft_config.values()
    assert (config.r, config.lora_alpha, config.use_dora) == (4, 8, True)
    assert_close(predict(LatentDiffusion(pipeline), batch), predict(model, batch), rtol=1e-4, atol=1e-5)


def test_float16_adapter_is_half_the_size_and_nearly_the_same(model, tiny_pipeline, batch, tmp_path):
    attach(model)
    model.save_adapter(tmp_path / "whole")
    model.save_adapter(tmp_path / "half", dtype="float16")
    sizes = [sum(value.nbytes for value in load_file(tmp_path / name / ADAPTER_FILE).values()) for name in ("whole", "half")]
    assert sizes[0] == 2 * sizes[1]
    loaded = load(tiny_pipeline, adapter=tmp_path / "half", fuse=False)
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {torch.float32}
    assert_close(predict(load(tiny_pipeline, adapter=tmp_path / "half"), batch), predict(model, batch), rtol=1e-2, atol=1e-2)


def test_adapter_file_holds_nothing_in_hash_order(model, tmp_path):
    """safetensors writes several metadata entries, and Python a set, in an order that differs from run to run."""
    attach(model)
    model.save_adapter(tmp_path)
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        ((name, text),) = file.metadata().items()
    settings = json.loads(text)
    assert name == "lora_adapter_metadata"
    assert list(settings) == sorted(settings)
    assert settings["unet.target_modules"] == ["ff.net.2", "proj_in", "to_q", "to_v"]
    assert (settings["unet.r"], settings["unet.lora_alpha"], settings["unet.use_dora"]) == (4, 8, True)


def _corrupt(folder):
    (folder / ADAPTER_FILE).write_bytes(b"not a file of tensors")


def _foreign_names(folder):
    save_file({key.replace("unet.", "base_model.model."): value for key, value in load_file(folder / ADAPTER_FILE).items()}, folder / ADAPTER_FILE)


def _foreign_shapes(folder):
    tensors = load_file(folder / ADAPTER_FILE)
    save_file({key: torch.cat([value, value]) if "lora_B" in key else value for key, value in tensors.items()}, folder / ADAPTER_FILE)


def _foreign_layers(folder):
    tensors = load_file(folder / ADAPTER_FILE)
    save_file({key.replace("mid_block", "mid_blocks"): value for key, value in tensors.items()}, folder / ADAPTER_FILE)


def _untrained(folder):
    tensors = load_file(folder / ADAPTER_FILE)
    save_file({key: value * 0 if "lora_B" in key else value for key, value in tensors.items()}, folder / ADAPTER_FILE)


def _not_finite(folder):
    save_file({key: value * float("nan") for key, value in load_file(folder / ADAPTER_FILE).items()}, folder / ADAPTER_FILE)


def _missing(folder):
    (folder / ADAPTER_FILE).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_corrupt, "does not fit"),
        (_foreign_names, "does not fit"),
        (_foreign_shapes, "does not fit"),
        (_foreign_layers, "does not fit"),
        (_untrained, "changes no weight"),
        (_not_finite, "not finite"),
        (_missing, "there is no adapter"),
    ],
)
def test_a_bad_adapter_is_one_clear_line(model, tiny_pipeline, tmp_path, spoil, message):
    attach(model, use_dora=False)
    model.save_adapter(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(tiny_pipeline, adapter=tmp_path)
    assert "\n" not in str(error.value)
    assert tmp_path.name in str(error.value)


def test_there_is_an_adapter_to_save(model, tmp_path):
    with pytest.raises(ValueError, match="no adapter to save"):
        model.save_adapter(tmp_path)
    attach(model)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        model.save_adapter(tmp_path, dtype="int8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_the_networks_alone(tiny_pipeline, batch, dtype):
    low = load(tiny_pipeline, dtype=dtype)
    assert {parameter.dtype for parameter in low.network.parameters()} == {getattr(torch, dtype)}
    assert low.pipeline.vae.dtype == low.pipeline.text_encoder.dtype == torch.float32
    conditioning = low.encode(PROMPTS)
    eps = low.eps(batch[0], batch[2], conditioning)
    assert eps.dtype == torch.float32
    assert_close(eps, load(tiny_pipeline).eps(batch[0], batch[2], conditioning), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'; choose float32, bfloat16, float16"),
        ({"device": "gpu"}, "unknown device 'gpu'; choose cpu, cuda"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available here"),
        ({"source": "no/such/folder"}, "there is no model in 'no/such/folder'"),
        ({"adapter": "nowhere"}, "there is no adapter in 'nowhere'"),
    ],
)
def test_bad_arguments_are_one_clear_line(tiny_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        load(**{"source": tiny_pipeline, **arguments})
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_pipeline_is_one_clear_line(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="cannot load a diffusers pipeline") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_other_prediction_types_are_refused(tiny_pipeline):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)
    pipeline.scheduler = DDPMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        LatentDiffusion(pipeline)


def test_loading_says_nothing(model, tiny_pipeline, tmp_path):
    """In a fresh process, as in a notebook's: no progress bar, no warning."""
    attach(model)
    model.save_adapter(tmp_path, dtype="float16")
    code = "import sys; from mitune.models import load; load(sys.argv[1], adapter=sys.argv[2], dtype='bfloat16').encode(['a red circle'])"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, tiny_pipeline, tmp_path], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
