"""Oracles: git's own account of a small repository, and the bytes of files."""

import subprocess

import pytest

from mitune import provenance, repro
from mitune.artifacts import read_json
from mitune.config import Params, load

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "commit.gpgsign=false"]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "reports").mkdir()
    for name in ("source.py", "dvc.lock", "reports/README.md"):
        (tmp_path / name).write_text("one")
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--no-verify", "-m", "one"]):
        subprocess.run([*GIT, *arguments], cwd=tmp_path, check=True)
    return tmp_path


def test_a_tree_is_clean_but_for_what_a_run_writes(root):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    for name in ("dvc.lock", "reports/README.md"):
        (root / name).write_text("two")
    run = provenance.start(root, "reports", "cpu")
    assert (run["commit"], run["clean"]) == (head, True)
    assert {"python", "torch", "diffusers"} <= set(run["packages"])
    (root / "source.py").write_text("two")
    assert provenance.start(root, "reports", "cpu")["clean"] is False


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    run = provenance.start(tmp_path, "reports", "cpu")
    assert (run["commit"], run["clean"]) == (None, None)


def test_a_run_is_kept_while_a_stage_of_it_is(tmp_path):
    file, made = tmp_path / "provenance.json", tmp_path / "a.ipynb"
    made.write_text("a")
    runs = [{"started": f"2026-01-0{day}", "commit": str(day)} for day in (1, 2)]
    provenance.record(file, runs[0], "one", made, 1.0)
    provenance.record(file, runs[0], "two", made, None)
    provenance.record(file, runs[1], "one", made, 3.0)
    assert {name: (entry["commit"], entry["seconds"]) for name, entry in provenance.read(file).items()} == {"one": ("2", 3.0), "two": ("1", None)}
    provenance.record(file, runs[1], "two", made, 2.0)
    assert list(read_json(file)["runs"]) == ["2026-01-02"]
    assert provenance.read(tmp_path / "none.json") == {}


def test_make_repro_notes_a_stage_only_if_it_wrote_its_notebook(root):
    params: Params = load()
    made = root / params.reports / "03_finetuning.ipynb"
    made.write_text("executed")
    since, run = made.stat().st_mtime, {"started": "now", "commit": "1"}
    file = root / params.reports / provenance.FILE
    for stage, began in (("03_finetuning", since + 1), ("02_set_construction", since)):
        repro.note(root, params, run, stage, began)
        assert not file.exists()
    repro.note(root, params, run, "03_finetuning", since)
    assert provenance.read(file)["03_finetuning"]["md5"] == provenance.digest(made)
