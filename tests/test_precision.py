"""Oracles: scipy's definitions on hand-made ranks, and the stages' own tables."""

from __future__ import annotations

import pytest
import torch

from mitune import config, precision
from mitune.precision import agreement, measured, table
from mitune.stages import open_model, pool, read_prompts
from mitune.stages import scores as stage


def test_agreement_counts_pairs_and_first_images():
    reference = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 2.0, 3.0]])
    other = torch.tensor([[1.0, 2.0, 4.0, 3.0], [5.0, 1.0, 2.0, 3.0]])
    found = agreement(reference, other)
    assert found["tau"] == pytest.approx((4 / 6 + 1) / 2)  # one of six pairs turned
    assert found["spearman"] == pytest.approx((1 - 6 * 2 / (4 * 15) + 1) / 2)
    assert found["same_first"] == 0.5
    assert found["difference"] == pytest.approx(1 / float(reference[0].std()))


@pytest.fixture(params=["tiny_pipeline", "tiny_sd3"])
def params(request, toy_values, in_toy_project):
    cut = {"pool": {"n_prompts": {"val": None}}, "renoise": {"timesteps": 3}, "estimators": {"rfmi": RFMI if request.param == "tiny_sd3" else None}}
    return in_toy_project(config.merge(toy_values, cut), pipeline=str(request.getfixturevalue(request.param)))


RFMI = {"form": "inner_product", "latents": "renoised", "t_min": 50, "kappa": "paper"}


def test_what_is_compared_is_the_stages_own(params):
    pool.build(params, "color")
    expected = stage.build(params, "color")
    items = read_prompts(params, "color", "train", params.pool.n_prompts["train"])
    _, found = precision.scores(open_model(params), params, items)
    assert found.keys() == params.estimators.keys()
    for name, values in found.items():
        torch.testing.assert_close(values.flatten(), torch.tensor(expected[name].to_numpy()), rtol=1e-3, atol=1e-5)


def test_a_lower_precision_is_held_against_float32(params):
    items = read_prompts(params, "color", "train", 2)
    rows = measured(params, items, ["bfloat16"])
    assert [(row["precision"], row["estimator"]) for row in rows] == [("bfloat16", name) for name in params.estimators]
    assert all(-1 <= row["tau"] <= 1 and row["difference"] > 0 for row in rows)
    assert len(table(rows).splitlines()) == 2 + len(rows)
    latents, found = precision.scores(open_model(params), params, items)
    _, again = precision.scores(open_model(params), params, items, latents)
    assert all(row["tau"] == 1 and row["difference"] == 0 for row in precision.compare({"float32": found, "again": again}))
    with pytest.raises(ValueError, match="tf32 is a precision of NVIDIA GPUs, and device is cpu; leave it out"):
        measured(params, items, ["tf32"])


def test_the_table_is_kept_and_what_cannot_be_is_one_line(params, monkeypatch, capsys):
    assert precision.main([]) == 1  # this folder has no params.yaml
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(config, "load", lambda: params)
    assert precision.main(["--prompts", "2", "--precisions", "bfloat16", "--write"]) == 0
    assert (config.root() / "bench" / "precision-shapes-cpu.md").read_text(encoding="utf-8") == capsys.readouterr().out
