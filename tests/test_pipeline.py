"""The whole pipeline at toy size in a temporary clone. Oracles: DVC's own account of what changed, and the bytes of the first run."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mitune import claims, config, lanes, provenance, reported, repro, runner, site, smoke
from mitune.artifacts import read_json
from mitune.recipes import Studies

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STUDIES = {field.name for field in dataclasses.fields(Studies)}


def run(project, *command):
    done = subprocess.run(command, cwd=project, env=smoke.environment(project), capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def dvc(project, *arguments):
    return run(project, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A clone, in a folder with a space, in which the pipeline has run once."""
    folder = smoke.clone(tmp_path_factory.mktemp("toy clone"))
    run(folder, sys.executable, "-m", "mitune.repro")
    return folder


def is_of(name, category):
    """Whether a stage belongs to one category's chain (`pool@color`, `finetune@color-random`), or to none, as a study's cell."""
    group, at, cell = name.partition("@")
    return not at or group in STUDIES or cell == category or cell.startswith(f"{category}-")


def notebook(stage):
    """The source that a stage runs."""
    return Path(shlex.split(stage["cmd"])[3])


@pytest.fixture(scope="module")
def lock(project):
    """The first run's lock, its hashes of every output."""
    return config.read_yaml(project / "dvc.lock")["stages"]


def test_every_stage_has_run_and_is_up_to_date(project, lock):
    assert set(lock) == set(dvc(project, "stage", "list", "--name-only").split())
    assert "up to date" in dvc(project, "status")


def test_a_second_run_runs_nothing(project, lock):
    assert "Running stage" not in dvc(project, "repro")


def test_mending_a_module_makes_those_stages_stale_that_use_it(project, lock):
    """Of plots.py, the articles that have figures; with the module as it was, none."""
    module = project / "mitune" / "plots.py"
    before = module.read_bytes()
    users = {name for name in lock if "mitune.plots" in read_json(project / "results" / "shapes" / "code" / f"{notebook(lock[name]).stem}.json")}
    for text, stale in ((before + b"# mended\n", users), (before, set())):
        module.write_bytes(text)
        dvc(project, "repro", "code")
        assert set(json.loads(dvc(project, "status", "--json"))) == stale
    assert users == {name for name in lock if name[0].isdigit()} - {"99_claims"}


def test_reports_are_there(project, lock):
    reports = project / "reports"
    articles = [name for name in lock if name[0].isdigit()]
    index = (reports / "README.md").read_text(encoding="utf-8")
    for article in articles:
        assert (reports / f"{article}.ipynb").is_file()
        assert f"{article}.ipynb" in index
    assert dvc(project, "metrics", "show")


def test_every_stage_has_its_provenance(project, lock):
    noted = provenance.read(project / "reports" / provenance.FILE)
    assert set(noted) == set(lock)
    assert all(entry["clean"] and entry["seconds"] > 0 for entry in noted.values())


def test_answers_are_findings_of_the_run(project, lock):
    """Some of them: the toy size leaves out cells."""
    answers = claims.load(project / "paper" / "answers.yaml", reported.load(project / "paper" / "reported.yaml"))
    named = {finding for answer in answers.claims.values() for finding in answer.findings}
    assert named & set(claims.findings(project / "reports"))
    tested = [row for row in read_json(project / "reports" / "claims.json")["paper"] if row["findings"]]
    assert tested


def test_the_site_is_built_of_the_run(project, lock, tmp_path):
    pages = site.build(project, "reports", tmp_path / "site")
    assert {"index", "stages", *(name for name in lock if name[0].isdigit())} == set(pages)
    assert all("not noted" not in (tmp_path / "site" / f"{page}.html").read_text(encoding="utf-8") for page in pages)


def test_a_forced_run_gives_equal_bytes(project, lock):
    """Of the base, of one category's chain, of the studies' cells from what they share, and of what reads them."""
    category = config.load(project / "params.yaml").categories[0]
    forced = [name for name in lock if is_of(name, category)]

    def work(name):
        dvc(project, "--wait-for-lock", "repro", "--force", "--single-item", name)
        return 0

    assert lanes.run(forced, lanes.needs(project), work, lanes=2, urgent=dict.fromkeys(lock, 0.0), alone=repro.ALONE, began=str, ended=str) == 0
    again = config.read_yaml(project / "dvc.lock")["stages"]
    different = [f"{name}: {out['path']}" for name in forced for out, old in zip(again[name]["outs"], lock[name]["outs"], strict=True) if out != old]
    assert not different


def test_every_notebook_passes_nbval(project, lock, monkeypatch):
    """Prepared with the parameters of their stages; another category's would only repeat the same cells."""
    category = config.load(project / "params.yaml").categories[0]
    prepared = project / "notebooks" / "prepared"
    files = []
    monkeypatch.chdir(project)
    monkeypatch.setenv("MITUNE_ROOT", str(project))
    for name, stage in lock.items():
        if not is_of(name, category):
            continue
        words = shlex.split(stage["cmd"])
        at = words.index("--to") + 1
        words[at] = str(prepared / f"{len(files):02d}-{name.replace('@', '-')}.ipynb")
        assert runner.main([*words[3:], "--prepare-only"]) == 0
        files.append(words[at])
    options = "--quiet -p no:cacheprovider --nbval-lax --nbval-current-env --nbval-cell-timeout=300 --numprocesses 2 --dist loadfile"
    run(project, sys.executable, "-m", "pytest", *options.split(), *files)
