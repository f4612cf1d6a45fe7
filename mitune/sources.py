"""Which of the package's modules a piece of code uses, found by following its imports, and the SHA-256 of their files: whether it has changed.

What is imported inside a function counts; what is named in a string, such as a command, does not.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent
_PARSING = threading.Lock()  # on Python 3.11 two threads cannot parse at the same time


def of_notebooks(folder: Path) -> dict[str, dict[str, str]]:
    """By the name of each notebook that a stage of dvc.yaml runs: the articles in `folder`, whose names begin with a digit, and all in `folder/stages`."""
    return {file.stem: of_notebook(file) for file in sorted([*folder.glob("[0-9]*.ipynb"), *folder.glob("stages/*.ipynb")])}


def of_notebook(file: Path) -> dict[str, str]:
    """SHA-256 by name of the modules that a notebook uses: what its code imports, the runner, and what these import in their turn."""
    import nbformat

    cells = (cell.source for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code")
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith(("%", "!")))  # but IPython's own commands
    return _followed({*_imported(code, str(file)), f"{PACKAGE.name}.runner"})


def of_function(function: Callable) -> dict[str, str]:
    """SHA-256 by name of the file that defines a function and of the modules that this file imports, and these in their turn."""
    file = Path(inspect.getsourcefile(function))
    code = file.read_bytes()
    return {file.name: _hashed(code)} | _followed(_imported(code, str(file)))


def loaded() -> dict[str, str]:
    """SHA-256 by name of the modules that this process has imported so far."""
    return {name: _hashed(file.read_bytes()) for name, file in _modules().items() if name in sys.modules}


def _followed(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by name, in order, of those of `names` that are the package's modules, and of those that they import in their turn."""
    files, found, new = _modules(), {}, set(names)
    while new := (new & files.keys()) - found.keys():
        codes = {name: files[name].read_bytes() for name in new}
        found |= {name: _hashed(code) for name, code in codes.items()}
        new = {other for name, code in codes.items() for other in _imported(code, str(files[name]))}
    return dict(sorted(found.items()))


def _modules() -> dict[str, Path]:
    """The files of the package's modules by full name."""
    parts = {file: file.relative_to(PACKAGE.parent).with_suffix("").parts for file in PACKAGE.rglob("*.py")}
    return {".".join(names[:-1] if names[-1] == "__init__" else names): file for file, names in parts.items()}


@functools.cache
def _imported(code: str | bytes, where: str) -> frozenset[str]:
    """The full names that Python code imports, wherever in it, or may import from a module, and of the packages that hold them; `where` names it in errors."""
    with _PARSING:
        tree, named = ast.parse(code, where), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    parts = [name.split(".") for name in named]
    return frozenset(".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1))


def _hashed(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()
