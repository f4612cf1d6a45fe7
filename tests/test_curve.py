"""Oracles: an uninterrupted run, and the stages."""

import itertools
import shutil

import pandas as pd
import pytest
import torch

from mitune import artifacts, config, curve, models, schema
from mitune.stages import pool, scores

SHIPPED = config.root() / "data" / "shapes"


@pytest.fixture
def asked(tiny_pipeline, tmp_path):
    """How a learning curve is asked for of a pipeline of random weights, with the shipped prompts and judge, and two snapshots."""
    folder, scratch = tmp_path / "model", tmp_path / "scratch"
    for part in ("judge", "prompts"):
        shutil.copytree(SHIPPED / part, folder / part)
    shutil.copytree(tiny_pipeline, folder / "pipeline")
    scratch.mkdir()
    weights = models.load(folder / "pipeline").network.state_dict()
    for step in (1, 2):
        torch.save({f"unet.{name}": (step * value).half() for name, value in weights.items()}, scratch / f"unet_1-{step:06d}.pt")
    few = {"cases": 2, "prompts": 2, "images": 3, "timesteps": 4, "num_inference_steps": 4}
    probe = schema.build(curve.Probe, config.load().pretrain["probe"] | few, "pretrain.probe")
    return {"probe": probe, "cycles": [2], "seed": 0, "device": "cpu", "folder": folder, "scratch": scratch}


def test_a_killed_learning_curve_goes_on_from_the_last_snapshot(asked, monkeypatch):
    whole = curve.learning_curve(**asked)
    shutil.rmtree(asked["scratch"] / "curve")
    calls, examined = itertools.count(1), curve._examined

    def killed(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return examined(*arguments)

    monkeypatch.setattr(curve, "_examined", killed)
    with pytest.raises(KeyboardInterrupt):
        curve.learning_curve(**asked)
    again = curve.learning_curve(**asked)
    assert next(calls) == 4  # the first snapshot was asked once
    for name, table in whole.items():
        pd.testing.assert_frame_equal(again[name], table)
        pd.testing.assert_frame_equal(artifacts.read_table(asked["folder"] / f"{name}.parquet", name), table)


def test_the_learning_curve_asks_as_the_stages_do(asked, toy_values, in_toy_project):
    """Oracle: the stages `pool` and `scores` with the same network and sizes."""
    (asked["scratch"] / "unet_1-000002.pt").unlink()
    probe = asked["probe"]
    pool_sizes = {name: getattr(probe, name) for name in ("guidance_scale", "num_inference_steps")} | {"n_prompts": {"val": probe.prompts}, "M": probe.images}
    toy_values |= {"pool": toy_values["pool"] | pool_sizes, "renoise": {"timesteps": probe.timesteps, "noises": 1}, "seed": asked["seed"]}
    toy_values["estimators"] = toy_values["pretrain"]["probe"]["estimators"]
    toy_values["set"] |= {"paper": "orthogonal", "best": "standard"}
    for key in ("studies", "information"):  # they have estimators and scales of their own
        del toy_values[key]
    ranking = curve.learning_curve(**asked)["ranking"].query("category == 'color'")
    params = in_toy_project(toy_values)
    pool.build(params, "color")
    expected = scores.build(params, "color")
    assert list(ranking["prompt"]) == list(expected["prompt"])
    for name in ("judge", *probe.estimators):
        assert ranking[name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-3, abs=1e-4), name
