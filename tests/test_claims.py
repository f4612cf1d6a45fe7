"""Oracles: the rule written out, the paper's list of claims, and the articles' own findings: their sources' text, or what a run left."""

import pytest

from mitune import claims, config, reported
from mitune.artifacts import read_json, write_json

ROOT = config.root()
PAPER = reported.load(ROOT / "paper" / "reported.yaml")
ANSWERS = claims.load(ROOT / "paper" / "answers.yaml", PAPER)
NAMED = sorted({finding for answer in ANSWERS.claims.values() for finding in answer.findings})


def test_every_claim_of_the_paper_has_an_answer():
    assert list(ANSWERS.claims)
    assert set(ANSWERS.claims) == set(PAPER.claims)


@pytest.mark.parametrize("finding", NAMED)
def test_an_answer_is_a_finding_of_an_article(finding):
    """Its name stands in the article's source, or, where it is put together there, in what a run of it left."""
    article, _, name = finding.partition(".")
    source, left = ROOT / "notebooks" / f"{article}.ipynb", ROOT / config.load().reports / "claims" / f"{article}.json"
    assert source.is_file(), f"paper/answers.yaml names {finding}: there is no {source.name}"
    there = name in source.read_text(encoding="utf-8") or (left.is_file() and name in {found["name"] for found in read_json(left)})
    assert there, f"paper/answers.yaml names {finding}: {source.name} has no such finding"


def test_readings_tell_of_places_that_the_notes_mark():
    assert len(ANSWERS.readings) >= 18
    assert all(PAPER[entry.where].notes or PAPER[entry.where].uncertain for entry in ANSWERS.readings)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ([], "not tested here"),
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "undecided"], "undecided"),
        (["reproduced", "holds"], "reproduced"),
        (["reproduced", "does not hold"], "not reproduced"),
        (["undecided", "not reproduced", "reproduced"], "not reproduced"),
    ],
)
def test_the_rule(given, verdict):
    assert claims.verdict(given) == verdict


def words(name, verdict):
    return {"name": name, "claim": f"what {name} asks", "paper": "1 | 2", "ours": "0.5 [0.1, 0.9], n = 3", "rule": "above 0", "verdict": verdict}


@pytest.fixture
def reports(tmp_path):
    """An article with an answer and a finding of its own, and none of a second article."""
    write_json([words("gain", "reproduced"), words("speed", "not reproduced")], tmp_path / "claims" / "01_one.json")
    number = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 3, "reproduced": 1, "undecided": 0}
    write_json({"claims": {"gain": number, "speed": number}}, tmp_path / "metrics" / "01_one.json")
    return tmp_path


@pytest.fixture
def paper():
    said = {name: reported.Claim(name, f"It {name}.", "Table 1", 0.5, "gain | loss") for name in ("gains", "lasts", "travels")}
    return reported.Reported({"table_1": reported.Table("table_1", "a table", "percent", "Section 1", {}, notes=("unclear",))}, said)


@pytest.fixture
def answers():
    answered = {
        "gains": claims.Answer(findings=("01_one.gain",)),
        "lasts": claims.Answer(findings=("01_one.gain", "02_two.time")),
        "travels": claims.Answer(needs="a train"),
    }
    return claims.Answers(answered, (claims.Reading("table_1", "1 or 2", "2", ("gains",)),))


def test_the_ledger_has_every_claim_and_every_other_finding(reports, paper, answers):
    ledger = claims.ledger(paper, answers, claims.findings(reports))
    gains, lasts, travels = ledger["paper"]
    assert (gains["verdict"], gains["readings"]) == ("reproduced", ["2"])
    assert gains["findings"][0].items() >= {"article": "01_one", "value": 0.5, "low": 0.1, "high": 0.9, "n": 3}.items()
    assert (lasts["verdict"], lasts["findings"]) == ("not tested here", [])
    assert "02_two" in lasts["needs"]
    assert (travels["verdict"], travels["needs"]) == ("not tested here", "a train")
    assert [(found["name"], found["verdict"]) for found in ledger["ours"]] == [("speed", "does not hold")]
    assert claims.counts(ledger["paper"]) == {"reproduced": 1, "not reproduced": 0, "undecided": 0, "not tested here": 2}


def test_tables_keep_a_row_a_claim(reports, paper, answers):
    ledger = claims.ledger(paper, answers, claims.findings(reports))
    for text, rows in ((claims.paper_table(ledger["paper"], folder="reports/", rules=True), 3), (claims.own_table(ledger["ours"]), 1)):
        lines = text.splitlines()
        assert len(lines) == 2 + rows
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "[01](reports/01_one.ipynb)" in claims.paper_table(ledger["paper"], folder="reports/")
    assert "| 1 or 2 | 2 |" in claims.readings_table(answers.readings, paper)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claims: {gains: {needs: x}, lasts: {needs: x}}\nreadings: []", "no answer to the claim 'travels'"),
        ("claims: {gains: {needs: x}, lasts: {needs: x}, travels: {}}\nreadings: []", "either findings or needs of 'travels'"),
        ("claims: {gains: {needs: x}, lasts: {needs: x}, travels: {needs: x, findings: [a.b]}}\nreadings: []", "either findings or needs of 'travels'"),
        ("claims: {gains: {needs: x}, lasts: {needs: x}, travels: {needs: x}, flies: {needs: x}}\nreadings: []", "does not claim: 'flies'"),
        ("claims: {gains: {because: x}}\nreadings: []", "not a file of answers"),
        ("claims: {}\nreadings: []\nmore: 1", "unknown key 'more'"),
        ("claims: {gains: {needs: x}, lasts: {needs: x}, travels: {needs: x}}\nreadings: [{where: table_2, contradiction: a, taken: b}]", "has not: 'table_2'"),
    ],
)
def test_a_wrong_file_of_answers_is_refused_by_name(tmp_path, paper, text, message):
    (tmp_path / "answers.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        claims.load(tmp_path / "answers.yaml", paper)
    assert "\n" not in str(error.value)


def test_the_committed_ledger_is_that_of_the_committed_reports():
    reports = ROOT / config.load().reports
    assert read_json(reports / "claims.json") == claims.ledger(PAPER, ANSWERS, claims.findings(reports))
