"""Oracle: copies of the package in which one file was changed, and what each notebook is seen to import."""

import ast
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mitune import config, prompts, sources
from mitune.stages import pool

NOTEBOOKS = config.root() / "notebooks"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's sources, which `sources` takes for the package."""
    copy = shutil.copytree(sources.PACKAGE, tmp_path / "mitune", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "PACKAGE", copy)
    return copy


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_a_change_changes_the_notebooks_that_use_the_module_and_no_others(package):
    before = sources.of_notebooks(NOTEBOOKS)
    for module in ("plots", "stages/evaluate"):
        name = f"mitune.{module}".replace("/", ".")
        users = {notebook for notebook, used in before.items() if name in used}
        with (package / f"{module}.py").open("a") as file:
            file.write("# a comment\n")
        after = sources.of_notebooks(NOTEBOOKS)
        assert changed(before, after) == users
        assert all(changed(before[notebook], after[notebook]) == {name} for notebook in users)
        before = after
    assert users == {"evaluate", "cell", "merging"}


def test_plots_are_the_articles_alone():
    users = {notebook for notebook, used in sources.of_notebooks(NOTEBOOKS).items() if "mitune.plots" in used}
    assert {"00_base_model", "03_finetuning", "10_caption_noise"} <= users and all(name[0].isdigit() for name in users)


def test_a_new_import_is_followed(package):
    before = sources.of_notebooks(NOTEBOOKS)
    assert not {"mitune.worlds", "mitune.mixture"} & set(before["sets"])
    with (package / "stages" / "sets.py").open("a") as file:
        file.write("\n\ndef later():\n    from mitune import worlds\n\n    return worlds\n")
    assert {"mitune.worlds", "mitune.mixture"} <= set(sources.of_notebooks(NOTEBOOKS)["sets"])


def test_text_and_ipythons_commands_are_no_code(tmp_path):
    cells = [new_markdown_cell("import mitune.flow"), new_code_cell("%matplotlib inline\nimport mitune.stages.sets"), new_code_cell("!ls\n1")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "n.ipynb")
    used = sources.of_notebook(tmp_path / "n.ipynb")
    assert {"mitune", "mitune.stages", "mitune.stages.sets", "mitune.selection", "mitune.runner"} <= set(used)
    assert "mitune.flow" not in used


def test_notebooks_that_no_stage_runs_are_left_out(tmp_path):
    (tmp_path / "stages").mkdir()
    for name in ("01_one", "stages/two", "Untitled", "prepared"):
        nbformat.write(new_notebook(cells=[new_code_cell("not Python" if name == "Untitled" else "1")]), tmp_path / f"{name}.ipynb")
    assert set(sources.of_notebooks(tmp_path)) == {"01_one", "two"}


def test_a_notebook_that_is_not_python_is_named(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("for")]), tmp_path / "n.ipynb")
    with pytest.raises(SyntaxError, match=r"n\.ipynb"):
        sources.of_notebook(tmp_path / "n.ipynb")


def test_the_code_of_a_function_is_what_its_module_imports():
    assert set(sources.of_function(prompts.read_prompts)) == {"prompts.py"}
    used = sources.of_function(pool.build)
    assert {"pool.py", "mitune.information", "mitune.models", "mitune.sampling", "mitune.config", "mitune.checks", "mitune.memo", "mitune.shards"} <= set(used)
    assert not {"mitune.finetuning", "mitune.plots", "mitune.selection", "mitune.stages.scores"} & set(used)
    assert all(len(sha) == 64 for sha in used.values())


def test_what_is_loaded_is_of_this_process():
    assert {"mitune", "mitune.stages.pool", "mitune.sources"} <= set(sources.loaded()) <= set(sys.modules)


def test_of_several_threads_one_parses_at_a_time(monkeypatch):
    """On Python 3.11 two at the same time may fail: `AST constructor recursion depth mismatch`."""
    now, most = [], []

    def slow(code, where):
        now.append(where)
        most.append(len(now))
        time.sleep(0.002)
        now.pop()
        return ast.parse(code, where)

    monkeypatch.setattr(sources, "ast", SimpleNamespace(**vars(ast) | {"parse": slow}))
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(lambda n: sources._imported(f"import a.b{n}", "here"), range(20)))) == 20
    assert most == [1] * 20
