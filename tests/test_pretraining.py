"""Oracle: an uninterrupted run, diffusers' own loader, and the shipped files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mitune import artifacts, captions, config, fitting, models, networks, parts, pretraining, schema

SHIPPED = config.root() / "data" / "shapes"


def line(scratch, steps, stop=None):
    """Fit y = 2 x by `fit`; with `stop`, be killed at that step."""
    torch.manual_seed(0)
    module = nn.Linear(1, 1)

    def loss(generator):
        if stop is not None and generator.initial_seed() == stop:
            raise KeyboardInterrupt
        x = torch.rand(8, 1, generator=generator)
        return {"loss": (module(x) - 2 * x).square().mean()}

    fitting.fit("line", nn.ModuleDict({"line": module}), loss, scratch=scratch, steps=steps, learning_rate=1e-2, ema_decay=0.9, checkpoint_every=5)
    return module


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    whole = line(tmp_path / "whole", 20)
    with pytest.raises(KeyboardInterrupt):
        line(tmp_path / "killed", 20, stop=13)
    resumed = line(tmp_path / "killed", 20)
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)


def test_every_word_is_one_token(tmp_path):
    tokenizer = networks.build_tokenizer(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for category in (*captions.CATEGORIES, "single"):
        caption = str(captions.sample_caption(category, generator))
        assert len(tokenizer.tokenize(caption)) == len(caption.split())
    assert tokenizer.get_vocab() == networks.build_tokenizer(tmp_path / "again").get_vocab()


def test_the_shipped_model_is_small_and_loads_in_diffusers():
    from diffusers import StableDiffusionPipeline

    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 20e6
    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle and a blue star", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and image.std() > 0


def test_the_shipped_denoisers_are_stored_in_half_precision():
    folders = [SHIPPED / "pipeline" / "unet", *(SHIPPED / "caption_noise" / name for name in config.load().pretrain["caption_noise"]["wrong"])]
    for folder in folders:
        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in stored.values()} == {torch.float16}
        assert all(value.isfinite().all() for value in stored.values())


def test_the_shipped_files_name_no_folder_of_a_machine():
    assert [file for file in SHIPPED.rglob("*.json") if "_name_or_path" in file.read_text() or "/home/" in file.read_text()] == []


def test_the_shipped_autoencoder_keeps_images():
    from mitune import scenes

    generator = torch.Generator().manual_seed(3)
    images = scenes.render(scenes.sample_scenes([captions.sample_caption("complex", generator) for _ in range(16)], generator), generator)
    model = models.load(SHIPPED / "pipeline")
    mse = (model.decode(model.encode_images(images)) - images).square().mean((1, 2, 3))
    assert (10 * torch.log10(4 / mse)).mean() > 28


def test_whitened_latents_have_one_variance_in_every_direction_and_the_same_images():
    from mitune import scenes

    torch.manual_seed(0)
    vae, generator = networks.build_vae().eval(), torch.Generator().manual_seed(4)
    images = scenes.render(scenes.sample_scenes([captions.sample_caption("color", generator) for _ in range(32)], generator), generator)
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        w = parts.whiten(vae, images, floor=1e-6)
        latents = vae.encode(images).latent_dist.mean
        torch.testing.assert_close(vae.decode(latents).sample, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.cov(latents.transpose(0, 1).flatten(1)), torch.eye(4), rtol=0, atol=1e-3)
    assert (latents * vae.config.scaling_factor).std() == pytest.approx(1, abs=1e-3)
    assert not torch.allclose(w, torch.eye(4), atol=0.1)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_the_whole_pretraining_at_toy_size_resumes_and_ships_a_model(tmp_path, two_threads):
    """First with judges and small denoisers in a process of their own, then all in turn."""
    values, even = config.load().pretrain, dict.fromkeys((*captions.CATEGORIES, "single"), 1 / 7)
    sizes = {"clean_scenes": 24, "web_scenes": 24, "unet_width": 32, "text_steps": 1, "similarity_steps": 1, "snapshots": 1}
    few = {"cases": 2, "prompts": 2, "images": 3, "timesteps": 2, "num_inference_steps": 3, "batch_size": 4}
    probe = values["probe"] | few
    noisy = {"width": 32, "true_steps": 1, "steps": 2, "batch_size": 4, "scenes": 24, "shares": {"color": 1.0}, "wrong": {"no": 0.0, "same": 0.0, "all": 1.0}}
    cycles = {"vae_cycles": [1, 1], "judge_cycles": [1, 1], "unet_cycles": [{"steps": 1, "shares": even}, {"steps": 2, "shares": even}]}
    toy = schema.build(pretraining.Pretraining, values | sizes | cycles | {"shares": even, "probe": probe, "caption_noise": noisy}, "pretrain")
    folder, again, scratch = tmp_path / "model", tmp_path / "again", tmp_path / "scratch"
    pretraining.pretrain(toy, folder=folder, scratch=scratch)
    curve = artifacts.read_table(folder / "snapshots.parquet", "snapshots")
    assert sorted(set(curve["step"])) == [1, 3]  # a snapshot a cycle, counted from the first one's start
    assert len(curve) == 2 * len(captions.CATEGORIES) * 2
    ranking = artifacts.read_table(folder / "ranking.parquet", "ranking")
    assert (ranking.groupby(["step", "category", "prompt"]).size() == 3).all()
    assert len(ranking) == 2 * len(captions.CATEGORIES) * 2 * 3
    lines = (scratch / "log.jsonl").read_text().splitlines()
    parts = [json.loads(line)["part"] for line in lines]
    assert [part for part in parts if part[:3] in ("sim", "jud")] == ["similarity", "judge_1", "judge_2"]
    assert [part for part in parts if part[:3] not in ("sim", "jud")] == ["vae_1", "vae_2", "text_encoder", "unet_1", "unet_2"]
    torch.set_num_threads(1)
    pretraining.pretrain(toy, folder=again, scratch=scratch)
    assert (scratch / "log.jsonl").read_text().splitlines() == lines  # finished parts are not trained again
    weights = "diffusion_pytorch_model.safetensors"
    for file in (f"pipeline/unet/{weights}", "judge/model.safetensors", f"caption_noise/all/{weights}"):
        assert (folder / file).read_bytes() == (again / file).read_bytes()
    none, same, every = ((folder / "caption_noise" / name / weights).read_bytes() for name in noisy["wrong"])
    assert none == same != every  # nothing but the captions differs


def test_an_unknown_entry_of_pretrain_is_named():
    with pytest.raises(ValueError, match=r"unknown key pretrain\.unet_steps"):
        schema.build(pretraining.Pretraining, config.load().pretrain | {"unet_steps": 3}, "pretrain")
