"""Oracle: the rule's three outcomes written out."""

import pytest

from mitune import artifacts, reading
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
    assert reading.Finding("a mean", "-", Interval(1.0, 0.9, 1.1, 12), holds, "a rule").verdict == verdict
