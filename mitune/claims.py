"""The claims ledger: each claim of the paper beside the findings that answer it, with a verdict, and after them the findings that are ours alone.

`python -m mitune.claims` prints the paper's claims as a Markdown table, from the ledger of the last run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mitune import config, reported
from mitune.artifacts import read_json

VERDICTS = ("reproduced", "not reproduced", "undecided", "not tested here")
OWN = {"reproduced": "holds", "not reproduced": "does not hold", "undecided": "undecided"}  # what the verdict of a finding says where the paper says nothing
RULE = "every finding that answers the claim is reproduced; one is not: not reproduced; else undecided; none in this run: not tested here"


@dataclass(frozen=True)
class Answer:
    """What answers a claim: findings, `article.name`, of which all must hold, or, where there is none, what a test needs."""

    findings: tuple[str, ...] = ()
    needs: str = ""


@dataclass(frozen=True)
class Reading:
    """A place where the paper contradicts itself or is unclear: the table or passage of `reported.yaml` that notes it, what was taken, and for which claims."""

    where: str
    contradiction: str
    taken: str
    claims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answers:
    claims: Mapping[str, Answer]
    readings: tuple[Reading, ...]


def load(path: Path, paper: reported.Reported) -> Answers:
    """Read `paper/answers.yaml`.

    Raises:
        ValueError: an unknown key, a claim of the paper without an answer, an answer or a reading of what the paper has not.
    """
    data = config.read_yaml(path)
    try:
        answers = {name: Answer(**_tuples(entry)) for name, entry in data.pop("claims").items()}
        readings = tuple(Reading(**_tuples(entry)) for entry in data.pop("readings"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of answers: {error}") from None
    named = {*answers, *(claim for entry in readings for claim in entry.claims)}
    for wrong, what in (
        (sorted(data), "has the unknown key"),
        (sorted(set(paper.claims) - set(answers)), "has no answer to the claim"),
        (sorted(named - set(paper.claims)), "names what reported.yaml does not claim:"),
        (sorted({entry.where for entry in readings} - set(paper.tables)), "reads what reported.yaml has not:"),
        ([name for name, answer in answers.items() if bool(answer.findings) == bool(answer.needs)], "must give either findings or needs of"),
    ):
        if wrong:
            raise ValueError(f"{path} {what} {wrong[0]!r}")
    return Answers(answers, readings)


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def findings(reports: Path) -> dict[str, dict[str, Any]]:
    """All findings of a run by `article.name`: article, claim, ours, rule, verdict, and value, low, high and n."""
    found = {}
    for file in sorted((reports / "claims").glob("*.json")):
        numbers = read_json(reports / "metrics" / file.name)["claims"]
        for words in read_json(file):
            own = {key: words[key] for key in ("claim", "paper", "ours", "rule", "verdict")}
            measured = {key: numbers[words["name"]][key] for key in ("value", "low", "high", "n")}
            found[f"{file.stem}.{words['name']}"] = {"article": file.stem, "name": words["name"]} | own | measured
    return found


def verdict(verdicts: Iterable[str]) -> str:
    """RULE, of the verdicts of a claim's findings."""
    paper = {own: word for word, own in OWN.items()}
    given = {paper.get(word, word) for word in verdicts}
    if not given:
        return "not tested here"
    return "not reproduced" if "not reproduced" in given else "undecided" if "undecided" in given else "reproduced"


def ledger(paper: reported.Reported, answers: Answers, found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """`paper`: every claim with its findings, verdict, needs and readings; `ours`: every other finding. A claim is tested if this run has all its findings."""
    rows = []
    for name, claim in paper.claims.items():
        answer = answers.claims[name]
        absent = sorted({finding.partition(".")[0] for finding in answer.findings if finding not in found})
        tested = [] if absent else [dict(found[finding]) for finding in answer.findings]
        said = {"id": name, "claim": claim.claim, "evidence": claim.evidence, "reported": str(claim.reported)}
        needs = f"{' and '.join(absent)}, of which this run has no finding" if absent else answer.needs
        readings = [entry.taken for entry in answers.readings if name in entry.claims]
        rows.append(said | {"findings": tested, "verdict": verdict(row["verdict"] for row in tested), "needs": needs, "readings": readings})
    answering = {finding for answer in answers.claims.values() for finding in answer.findings}
    ours = [dict(row) | {"verdict": OWN.get(row["verdict"], row["verdict"])} for name, row in found.items() if name not in answering]
    return {"paper": rows, "ours": ours}


def counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many of the paper's claims have each verdict."""
    given = Counter(row["verdict"] for row in rows)
    return {name: given[name] for name in VERDICTS}


# ---------------------------------------------------------------- as Markdown


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells])


def paper_table(rows: Iterable[Mapping[str, Any]], *, folder: str = "", rules: bool = False) -> str:
    """The paper's claims; an article is linked from where it lies below `folder`, and `rules` adds the rule of each finding."""
    return table(
        ["the paper's claim", "where, and what it reports", "ours [95 % interval]", *(["rule"] if rules else []), "verdict"],
        (
            [
                row["claim"],
                f"{row['evidence']}: {row['reported']}",
                "<br>".join(f"{_link(found, folder)}: {found['claim']}: {found['ours']}" for found in row["findings"]) or f"needs {row['needs']}",
                *(["<br>".join(found["rule"] for found in row["findings"])] if rules else []),
                f"**{row['verdict']}**",
            ]
            for row in rows
        ),
    )


def own_table(rows: Iterable[Mapping[str, Any]], *, folder: str = "") -> str:
    """The findings that are ours alone."""
    head = ["article", "what was asked", "found [95 % interval]", "rule", "verdict"]
    return table(head, ([_link(row, folder), row["claim"], row["ours"], row["rule"], f"**{row['verdict']}**"] for row in rows))


def readings_table(readings: Iterable[Reading], paper: reported.Reported) -> str:
    """Where the paper contradicts itself, and what was taken."""
    return table(["where", "the contradiction", "taken here"], ([paper[entry.where].where, entry.contradiction, entry.taken] for entry in readings))


def _link(found: Mapping[str, Any], folder: str) -> str:
    return f"[{found['article'].partition('_')[0]}]({folder}{found['article']}.ipynb)"


def main() -> int:
    try:
        reports = config.load().reports
        print(paper_table(read_json(config.root() / reports / "claims.json")["paper"], folder=f"{reports}/"))
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
