"""Oracle: the sources, read as syntax trees. Imports point downwards."""

import ast
import graphlib
import shlex

import nbformat
import pytest

from mitune import config, sources

PACKAGE = config.root() / "mitune"
FLOORS = {
    0: {"schema", "commands", "processes", "sources", "threads", "prompts", "pixels", "language", "statistics", "plots", "captions", "reported"},
    1: {"judges", "recipes", "checks", "config", "benchmarks", "geometry", "images", "scenes", "mixture"}
    | {"denoisers", "loading", "memory", "adapters", "pipelines", "models", "pretrained"},
    2: {
        "information",
        "flow",
        "sampling",
        "selection",
        "dora",
        "finetuning",
        "merging",
        "alignment",
        "vqa",
        "spatial",
        "clip",
        "features",
        "quality",
        "worlds",
    },
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
SOURCES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}
SOURCES = {name.removesuffix(".__init__"): path for name, path in sorted(SOURCES.items())}
MODULES = list(SOURCES)


def siblings(source: str) -> set[str]:
    """The modules of the package that a source imports, at any depth of nesting, and the packages that hold them."""
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    found = {name.removeprefix("mitune.") for name in named if name.startswith("mitune.")}
    found |= {name.split(".")[0] for name in found}
    return found & set(MODULES)


GRAPH = {name: siblings(path.read_text(encoding="utf-8")) - {name} for name, path in SOURCES.items()}


def closure(names: set[str]) -> set[str]:
    """`names` and all that they import in their turn."""
    reached, new = set(), set(names)
    while new:
        reached |= new
        new = set().union(*(GRAPH[name] for name in new)) - reached
    return reached


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    above = {other for other in GRAPH[name] if FLOOR.get(other, 3) > FLOOR.get(name, 3)}
    assert not above, f"{SOURCES[name]} imports upwards: {above}"
    if FLOOR.get(name, 3) == 0:
        assert not GRAPH[name], f"{SOURCES[name]} stands on the ground and imports {GRAPH[name]}"


def test_imports_have_no_circle():
    assert list(graphlib.TopologicalSorter(GRAPH).static_order())


def test_no_module_is_a_drawer():
    assert not {"utils", "util", "helpers", "common", "misc"} & set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_torchvision_is_not_needed(name):
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] == "torchvision"}


def stages():
    for name, stage in config.read_yaml(config.root() / "dvc.yaml")["stages"].items():
        yield name, stage.get("do", stage)


@pytest.mark.parametrize(("name", "stage"), list(stages()), ids=[name for name, _ in stages()])
def test_a_stage_depends_on_the_modules_that_its_notebook_uses(name, stage):
    """Through the file that stage `code` writes of it."""
    path = config.root() / shlex.split(stage["cmd"])[3]
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    used = {"mitune", *(f"mitune.{module}" for module in closure(siblings(code) | {"runner"}))}
    assert set(sources.of_notebooks(config.root() / "notebooks")[path.stem]) == used
    deps = {dep for dep in stage["deps"] if dep.endswith(".py") or dep.startswith("results/${model}/code") or dep == "mitune"}
    wanted = "mitune" if name == "code" else f"results/${{model}}/code/{path.stem}.json"
    assert deps == {wanted}, f"deps of {name} in dvc.yaml: add {wanted}, remove {sorted(deps - {wanted})}"
    assert all((config.root() / dep).exists() for dep in stage["deps"] if dep.startswith(("mitune", "notebooks")))


@pytest.mark.parametrize(("name", "stage"), list(stages()), ids=[name for name, _ in stages()])
def test_a_stage_depends_on_the_parts_of_the_data_that_it_reads(name, stage):
    assert not {"data", "data/${model}"} & set(stage["deps"]), f"deps of {name} in dvc.yaml: name the folders of data/${{model}}"
