"""Shared fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


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
