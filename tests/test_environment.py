"""Oracle: the files that describe the environment, compared with each other and with what is installed."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mitune import config, readme, verify

ROOT = config.root()


def lock() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def dependencies() -> list[Requirement]:
    return [Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]


def test_the_lock_is_plain_pins():
    text = (ROOT / "requirements.lock").read_text()
    for line in text.splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
    assert "+cpu" not in text
    assert "--hash" not in text
    assert "://" not in text
    assert lock()["torch"] == "2.13.0"


@pytest.mark.parametrize("requirement", dependencies(), ids=str)
def test_every_dependency_is_pinned_within_its_range_and_installed(requirement):
    pinned = lock()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)
    assert importlib.metadata.version(requirement.name).split("+")[0] == pinned


def test_the_lock_is_complete():
    """Every requirement of a pinned package, under this platform's markers, is pinned too."""
    missing = {}
    for name in lock():
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and canonicalize_name(requirement.name) not in lock():
                missing[requirement.name] = name
    assert not missing


def test_conda_takes_the_same_lock():
    environment = config.read_yaml(ROOT / "environment.yml")
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip[0] == "-r requirements.lock"
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python"))
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{wanted}").specifier.contains(python.split("=")[1])


def test_no_file_names_a_package_index():
    for name in ("pyproject.toml", "requirements.lock", "environment.yml", "Makefile", ".ci/run"):
        assert not re.search(r"index-url|https?://", (ROOT / name).read_text()), name


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make repro" in (ROOT / "README.md").read_text()


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for target in phony:
        assert f"make {target}" in listed


def test_the_slurm_example_is_bash_and_runs_a_stage_as_dvc_does():
    script = ROOT / "examples" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = re.sub(r"[#\\\s]+", " ", script.read_text(encoding="utf-8"))
    stage = config.read_yaml(ROOT / "dvc.yaml")["stages"]["pool"]["do"]["cmd"]
    for name, value in {"model": "sd21-base", "benchmark": "t2i-compbench", "item": "color"}.items():
        stage = stage.replace(f"${{{name}}}", value)
    assert " ".join(stage.split()).removeprefix("python ") in text


def test_dvc_tells_nobody_and_keeps_results_apart():
    """No analytics, and a remote that plain `dvc pull` does not use."""
    import configparser

    settings = configparser.ConfigParser()
    settings.read(ROOT / ".dvc" / "config")
    assert settings["core"]["analytics"] == "false"
    assert "remote" not in settings["core"]
    assert settings["'remote \"results\"'"]["url"] == "../dvcstore"


def test_dvc_has_one_file_of_metrics():
    """The headline: with all numbers of all articles, `dvc metrics show` and `dvc exp show` have thousands of columns."""
    stages = config.read_yaml(ROOT / "dvc.yaml")["stages"]
    metrics = {name: path for name, stage in stages.items() for entry in stage.get("do", stage).get("metrics", ()) for path in entry}
    assert metrics == {"index": "${reports}/headline.json"}, "list an article's reports/metrics/ file under `outs` in dvc.yaml"


def test_the_readmes_generated_parts_are_current():
    done = subprocess.run([sys.executable, "-m", "mitune.readme", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_blocks_are_filled_and_unknown_ones_refused():
    text = "a\n<!-- begin:help -->\nof yesterday\n<!-- end:help -->\nb\n"
    filled = readme.fill(text, ROOT)
    assert "of yesterday" not in filled
    assert "$ make help" in filled
    assert filled.endswith("b\n")
    assert readme.fill(filled, ROOT) == filled
    with pytest.raises(ValueError, match="block 'halp'"):
        readme.fill("<!-- begin:halp -->\n<!-- end:halp -->", ROOT)


def test_verify_compares_within_the_committed_intervals(tmp_path, monkeypatch, capsys):
    def put(value):
        (tmp_path / "reports" / "metrics").mkdir(parents=True, exist_ok=True)
        metrics = {"color": {"gain": {"value": value, "low": 0.1, "high": 0.5}, "n": 60}}
        (tmp_path / "reports" / "metrics" / "03_finetuning.json").write_text(json.dumps(metrics))

    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "--quiet"], cwd=tmp_path, check=True)
    assert verify.main() == 1  # nothing committed
    put(0.3)
    subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "--quiet", "--no-verify", "-m", "run"], cwd=tmp_path, check=True)
    put(0.4)
    assert verify.main() == 0
    put(0.6)
    capsys.readouterr()
    assert verify.main() == 1
    assert "03_finetuning.color.gain" in capsys.readouterr().out
    (tmp_path / "reports" / "metrics" / "03_finetuning.json").write_text("{}")
    assert verify.main() == 1
    assert "missing" in capsys.readouterr().out


def test_the_repository_holds_the_pools_and_mi_adapters_of_the_committed_run():
    stages, store = config.read_yaml(ROOT / "dvc.lock")["stages"], ROOT / "dvcstore" / "files" / "md5"
    stored = [out for name, stage in stages.items() if name.startswith("pool@") or re.fullmatch("finetune@.*-mi_.*", name) for out in stage["outs"]]
    folders = [out["md5"] for out in stored if out["md5"].endswith(".dir")]
    assert len(folders) == 3 * len(config.load().categories)
    for md5 in folders:
        entries = json.loads((store / md5[:2] / md5[2:]).read_text())
        assert entries and all((store / entry["md5"][:2] / entry["md5"][2:]).is_file() for entry in entries)
    assert sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) <= 20e6
