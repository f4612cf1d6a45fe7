"""Shared fixtures, and how two processes share the tests: one thread each, the whole pipeline begun first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ["MITUNE_WORKERS"] = "1"  # of the processes that tests start, too

import torch

from mitune import config


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """A small Stable Diffusion pipeline of random weights, v-prediction, 4 x 8 x 8 latents, stored in float16, to be loaded in float32."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    from mitune import networks

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = networks.build_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "vae": networks.build_vae(),
            "text_encoder": CLIPTextModel(networks.text_config(tokenizer, 96, 1)),
            "unet": networks.build_unet(32),
        }
    pipeline = StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=networks.build_scheduler("v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory) -> Path:
    """A small SDXL pipeline of random weights: two text encoders, pooled embeddings, time ids; epsilon, 4 x 8 x 8 latents."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from mitune import networks

    folder = tmp_path_factory.mktemp("xl")
    tokenizer = networks.build_tokenizer(folder / "tokenizer")
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (networks.text_config(tokenizer, width, 2) for width in (32, 64))
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16, use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2), cross_attention_dim=32 + 64,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64 + 6 * 8,
        )  # fmt: skip
        texts = {"text_encoder": CLIPTextModel(first), "text_encoder_2": CLIPTextModelWithProjection(second)}
        pipeline = StableDiffusionXLPipeline(
            vae=networks.build_vae(), unet=unet, **texts, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, add_watermarker=False
        )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory) -> Path:
    """A small Stable Diffusion 3 pipeline of random weights without T5: a rectified flow with shift 3 by a transformer, 4 x 8 x 8 latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    from mitune import networks

    folder = tmp_path_factory.mktemp("sd3")
    tokenizer = networks.build_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts = [CLIPTextModelWithProjection(networks.text_config(tokenizer, 32, 2)) for _ in range(2)]
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
            joint_attention_dim=64, pooled_projection_dim=64, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
        )  # fmt: skip
        vae = networks.build_vae()
        vae.register_to_config(shift_factor=0.1)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=texts[0], tokenizer=tokenizer,
            text_encoder_2=texts[1], tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def toy_model(tiny_pipeline) -> dict:
    """The entry of the model `shapes` with that pipeline, its judges wherever the project's folder is."""
    root = config.root()
    entry = config.read_yaml(root / "params.yaml")["models"]["shapes"]
    judges = {role: entry[role] | {"weights": str(root / entry[role]["weights"])} for role in ("judge", "similarity")}
    return judges | {"pipeline": str(tiny_pipeline)}


@pytest.fixture
def toy_values() -> dict:
    """The project's parameters at toy size, as plain values."""
    root = config.root()
    return config.merge(config.read_yaml(root / "params.yaml"), config.read_yaml(root / "mitune" / "smoke.yaml"))


@pytest.fixture
def in_toy_project(toy_model, tmp_path, monkeypatch):
    """Reads such values, made those of the tiny pipeline, as the parameters of a project folder of their own with the shipped prompts and judges; entries of
    the model take the place of its own."""
    root = config.root()

    def read(values: dict, **model):
        values["models"]["shapes"] = toy_model | model
        values["prompts"] = values["benchmarks"]["shapes"]["prompts"] = str(root / values["prompts"])
        monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
        return config.read(values)

    return read
