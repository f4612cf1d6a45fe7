"""Shared fixtures, and how two processes share the tests: one thread each, the whole pipeline begun first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too

import torch


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


@pytest.fixture
def toy_values() -> dict:
    """The project's parameters at toy size, as plain values."""
    from mitune import config

    root = config.root()
    return config.merge(config.read_yaml(root / "params.yaml"), config.read_yaml(root / "mitune" / "smoke.yaml"))


@pytest.fixture
def in_toy_project(tiny_pipeline, tmp_path, monkeypatch):
    """Reads such values as the parameters of a project folder of their own, with the tiny pipeline and the shipped prompts and judges."""
    from mitune import config

    def read(values: dict):
        shipped = {name: str(config.root() / entry) for name, entry in values["models"]["shapes"].items()}
        values["models"]["shapes"] = shipped | {"pipeline": str(tiny_pipeline)}
        monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
        return config.read(values)

    return read
