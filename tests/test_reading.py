"""Oracle: the rule's three outcomes written out; recipes as params.yaml could have them."""

import dataclasses

import pytest

from mitune import artifacts, config, reading
from mitune.recipes import recipes
from mitune.statistics import Interval


@pytest.mark.parametrize(("holds", "verdict", "counts"), [(True, "reproduced", (1, 0)), (False, "not reproduced", (0, 0)), (None, "undecided", (0, 1))])
def test_a_finding_holds_does_not_or_is_undecided(tmp_path, holds, verdict, counts):
    findings = {"mean": reading.Finding("a mean", "1", Interval(1.0, 0.9, 1.1, 12), holds, "a rule")}
    assert reading.ledger(findings).loc["a mean", "verdict"] == verdict
    reading.report(findings, tmp_path / "metrics.json")
    claim = artifacts.read_json(tmp_path / "metrics.json")["claims"]["mean"]
    assert (claim["reproduced"], claim["undecided"]) == counts


@pytest.mark.parametrize(("holds", "verdict"), [(True, "holds"), (False, "does not hold"), (None, "undecided")])
def test_what_the_paper_does_not_say_is_not_reproduced_but_holds(holds, verdict):
    assert {reading.Finding("a mean", said, Interval(1.0, 0.9, 1.1, 12), holds, "a rule").verdict for said in reading.NOTHING} == {verdict}


def test_cells_are_compared_at_the_guidance_that_all_have():
    recipe = recipes(config.load(), "set_size")["M50_k1"]
    several = [dataclasses.replace(recipe, guidance_scales=scales) for scales in ((7.5, 1.0, 2.5), (2.5, 1.5, 1.0))]
    assert reading.scales(several) == [1.0, 2.5]
    with pytest.raises(ValueError, match="no guidance scale in common"):
        reading.scales([*several, dataclasses.replace(recipe, guidance_scales=(5.0,))])


@pytest.mark.parametrize(("width", "said"), [(2.8, "about 4.0 times as many"), (0.7, "no more scenes and seeds than were run")])
def test_what_a_study_would_need_to_see_the_printed_differences(width, said):
    """A half width is 1.96 standard errors, and 80 % of runs see 1.96 + 0.84 of them: 2 points need one of 2 / 2.8, a half width of 1.4."""
    text = reading.resolution(width, [-2.0, 0.5], "Differences").data
    assert "at most 2.0 points" in text and said in text
