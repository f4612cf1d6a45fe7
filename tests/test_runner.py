"""Oracle: a notebook of three cells, and DVC's own account of what changed."""

import os
import shlex
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from papermill.exceptions import PapermillExecutionError

from mitune import config, runner, smoke


@pytest.fixture
def trivial(tmp_path):
    """A stage notebook that prints what it was given, with a bar and a warning on the way."""
    cells = [
        new_code_cell('category = "color"\nparameters = None', metadata={"tags": ["parameters"]}),
        new_code_cell("from mitune import config, shards\n\nparams = config.read(parameters)"),
        new_code_cell('with shards.progress(2, "work") as bar:\n    bar.update(2)\nprint(category, params.pool.M, params.pool.guidance_scale)'),
    ]
    path = tmp_path / "a stage.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def outputs(path):
    return [output.text for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" for output in cell.outputs]


def test_a_kernel_has_one_thread_whatever_the_shell_says(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    with runner._environment(tmp_path):
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "8"


def test_a_run_is_byte_stable_and_free_of_bars(trivial, tmp_path):
    injected = runner.parameters(["pool"], ["category=spatial"])
    for name in "ab":
        runner.run(trivial, tmp_path / f"{name}.ipynb", injected)
    assert (tmp_path / "a.ipynb").read_bytes() == (tmp_path / "b.ipynb").read_bytes()
    pool = config.load().pool
    assert outputs(tmp_path / "a.ipynb") == [f"spatial {pool.M} {pool.guidance_scale}\n"]
    text = (tmp_path / "a.ipynb").read_text()
    for stamp in ("papermill", "iopub", "duration", "work:"):
        assert stamp not in text
    nbformat.validate(nbformat.read(tmp_path / "a.ipynb", as_version=4))


def test_what_follows_a_cell_that_ends_the_notebook_is_left_out():
    """Outputs as IPython writes them of `raise SystemExit`."""
    said = new_output("display_data", data={"text/markdown": "*Left out*"})
    words = [said, new_output("error", ename="SystemExit", evalue="", traceback=["..."]), new_output("stream", name="stderr", text="UserWarning: To exit: ...")]
    notebook = new_notebook(cells=[new_code_cell("1"), new_code_cell("raise SystemExit", outputs=words), new_code_cell("2")])
    kept = runner.clean(notebook).cells
    assert [cell.source for cell in kept] == ["1", "raise SystemExit"] and kept[1].outputs == [said]


def test_prepare_only_injects_and_does_not_execute(trivial, tmp_path):
    runner.run(trivial, tmp_path / "p.ipynb", runner.parameters(["pool"], ["category=spatial"]), prepare_only=True)
    prepared = nbformat.read(tmp_path / "p.ipynb", as_version=4)
    assert "spatial" in prepared.cells[1].source
    assert not any(cell.get("outputs") for cell in prepared.cells)


def test_reading_an_undeclared_parameter_fails_and_leaves_nothing(trivial, tmp_path, capsys, monkeypatch):
    (tmp_path / "params.yaml").write_bytes((config.root() / "params.yaml").read_bytes())
    monkeypatch.setenv("PYTHONPATH", str(config.root()))
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    assert runner.main([str(trivial), "--to", str(tmp_path / "out" / "x.ipynb"), "--params", "set"]) == 1
    message = capsys.readouterr().err
    assert "parameter 'pool' is not declared by this stage" in message
    assert len(message.strip().splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())
    assert (tmp_path / ".scratch" / "failed" / "x.ipynb").is_file()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--params", "pol"], "unknown parameter 'pol'"),
        (["--set", "kategory=color"], "takes no parameter 'kategory'"),
        (["--set", "category"], "has no value"),
    ],
)
def test_mistakes_are_named_in_one_line_before_anything_runs(trivial, tmp_path, capsys, arguments, named):
    assert runner.main([str(trivial), "--to", str(tmp_path / "x.ipynb"), *arguments]) == 1
    message = capsys.readouterr().err
    assert named in message
    assert len(message.strip().splitlines()) == 1
    assert runner.main([str(tmp_path / "none.ipynb"), "--to", str(tmp_path / "x.ipynb")]) == 1
    assert "none.ipynb is missing" in capsys.readouterr().err


def test_an_error_in_a_notebook_is_raised(tmp_path, monkeypatch):
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path / "n.ipynb")
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        runner.run(tmp_path / "n.ipynb", tmp_path / "x.ipynb", {})
    assert not (tmp_path / "x.ipynb").exists()


def test_pieces_of_a_stream_are_joined():
    cell = new_code_cell("")
    pieces = [("stdout", "a"), ("stderr", "w"), ("stdout", "b")]
    cell.outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in pieces]
    cleaned = runner.clean(new_notebook(cells=[cell]))
    assert [(output.name, output.text) for output in cleaned.cells[0].outputs] == [("stdout", "ab"), ("stderr", "w")]


def stages():
    """(name, definition) of every stage of dvc.yaml, as written."""
    for name, stage in config.read_yaml(config.root() / "dvc.yaml")["stages"].items():
        yield name, stage.get("do", stage)


@pytest.mark.parametrize(("name", "stage"), list(stages()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_stage_declares_what_it_is_given(name, stage):
    words = shlex.split(stage["cmd"])
    assert words[:3] == ["python", "-m", "mitune.runner"]
    after = words[words.index("--params") + 1 :]
    given = after[: next((n for n, word in enumerate(after) if word.startswith("--")), len(after))]
    assert given == stage["params"]
    written = [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"]]
    assert {words[3], words[3].partition("/")[0]} & set(stage["deps"])
    saved = words[words.index("--to") + 1]
    assert saved in written or name == "index"


def test_a_toy_pipeline_in_a_folder_with_a_space(trivial, tmp_path):
    """DVC runs the trivial notebook, then sees nothing to do; forced, it leaves its lock as it was."""
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "params.yaml").write_bytes((config.root() / "params.yaml").read_bytes())
    (folder / "data" / "shapes" / "prompts").mkdir(parents=True)  # without prompts no run begins
    (folder / "stage.ipynb").write_bytes(trivial.read_bytes())
    (folder / "dvc.yaml").write_text(
        "stages:\n  s:\n    foreach: [color, spatial]\n    do:\n"
        "      cmd: python -m mitune.runner stage.ipynb --to out/s-${item}.ipynb --params pool --set category=${item}\n"
        "      deps: [stage.ipynb]\n      params: [pool]\n      outs:\n        - out/s-${item}.ipynb\n"
    )
    env = smoke.environment(folder) | {"PYTHONPATH": str(config.root())}
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["git", "init", "--quiet"], [*dvc, "init", "--quiet"]):
        subprocess.run(command, cwd=folder, env=env, check=True)
    first = subprocess.run([sys.executable, "-m", "mitune.repro", "--at-once", "2"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "[1/2] s@color" in first.stdout
    assert "[2/2] s@spatial" in first.stdout
    lock = (folder / "dvc.lock").read_bytes()
    second = subprocess.run([*dvc, "repro"], cwd=folder, env=env, capture_output=True, text=True, check=True)
    assert "Running" not in second.stdout
    subprocess.run([*dvc, "repro", "--force"], cwd=folder, env=env, capture_output=True, check=True)
    assert (folder / "dvc.lock").read_bytes() == lock
