"""Oracles: scipy on hand-made ranks, and the same network in float32."""

from __future__ import annotations

import pytest
import torch

from mitune.models import load
from mitune.precision import FORMS, agreement, compare, scores

PROMPTS = ["a red circle", "a blue square"]


def test_agreement_counts_pairs_and_first_images():
    reference = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 2.0, 3.0]])
    other = torch.tensor([[1.0, 2.0, 4.0, 3.0], [5.0, 1.0, 2.0, 3.0]])
    found = agreement(reference, other)
    assert found["tau"] == pytest.approx((4 / 6 + 1) / 2)  # one of six pairs turned
    assert found["spearman"] == pytest.approx((1 - 6 * 2 / (4 * 15) + 1) / 2)
    assert found["same_first"] == 0.5
    assert found["difference"] == pytest.approx(1 / float(reference[0].std()))
    with pytest.raises(ValueError, match="1 of 8 values are not finite: the precision overflows"):
        agreement(reference, torch.where(other == 5, torch.inf, other))


@pytest.mark.parametrize("fixture", ["tiny_pipeline", "tiny_sd3"])
def test_lower_precision_is_held_against_float32(request, fixture):
    folder, generator = request.getfixturevalue(fixture), torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 5, 4, 8, 8), generator=generator), torch.randn((2, 6, 4, 8, 8), generator=generator)
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = load(folder, dtype=dtype)
        found[dtype] = scores(model, latents, model.encode(PROMPTS), model.null, noise)
        assert all(found[dtype][form].shape == (2, 5) for form in FORMS)
    rows = compare(found)
    assert [(row["dtype"], row["form"]) for row in rows] == [("bfloat16", form) for form in FORMS]
    assert all(-1 <= row["tau"] <= 1 and row["difference"] > 0 for row in rows)
    assert compare({"float32": found["float32"], "bfloat16": found["float32"]})[0]["tau"] == pytest.approx(1)
