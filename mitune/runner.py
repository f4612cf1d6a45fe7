"""Runs one notebook with the parameters that its stage declares, shows its progress on the terminal, and saves it byte-stable.

    python -m mitune.runner notebooks/stages/pool.ipynb --to results/shapes/notebooks/pool-color.ipynb \
        --params model models.shapes device dtype seed pool --set category=color
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

from mitune import config, processes, threads

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736", "MALLOC_TOP_PAD_": "268435456"}
"""For glibc: the kernel keeps the memory of a freed activation for the next one, instead of handing it back to the system after every layer."""

SHARED = {"cell", "evaluate", "finetune", "information", "merging", "pool", "scores"}
"""The notebooks whose work several processes do together."""


def parameters(keys: list[str], settings: list[str]) -> dict[str, Any]:
    """What is injected: `parameters`, the declared part of the checked `params.yaml`, and one name for each `name=value`.

    Raises ValueError for a key that params.yaml lacks and for a setting without `=`.
    """
    from ruamel.yaml import YAML

    config.load()
    values = config.read_yaml(config.root() / "params.yaml")
    injected: dict[str, Any] = {"parameters": config.declared(keys, values)} if keys else {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting!r} has no value: write --set name=value")
        injected[name] = YAML(typ="safe").load(value)
    return injected


def run(notebook: Path, to: Path, injected: Mapping[str, Any], *, prepare_only: bool = False) -> None:
    """Execute `notebook` from the project's root and save it at `to`, whole or not at all.

    Raises ValueError for a parameter that the notebook's parameters cell lacks, and papermill's PapermillExecutionError.
    """
    known = _known(notebook)
    unknown = sorted(set(injected) - known)
    if unknown:
        raise ValueError(f"{notebook} takes no parameter {unknown[0]!r}: its `parameters` cell has {', '.join(sorted(known)) or 'none'}")
    root = config.root().resolve()
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.stem}.{os.getpid()}.ipynb")
    try:
        with _environment(root), _terminal(to.stem) as follow, _quiet():
            os.environ["MITUNE_PROGRESS"] = str(follow)
            papermill.execute_notebook(
                str(notebook), str(part), parameters=dict(injected), kernel_name="python3", language="python", cwd=str(root), progress_bar=False,
                prepare_only=prepare_only, request_save_on_cell_execute=False, start_timeout=300, extra_arguments=["--log-level=ERROR"],
            )  # fmt: skip
        executed = clean(nbformat.read(part, as_version=4))
        nbformat.write(executed, part)
        if processes.is_first():
            part.replace(to)
    except PapermillExecutionError:
        failed = root / ".scratch" / "failed" / to.name
        failed.parent.mkdir(parents=True, exist_ok=True)
        part.replace(failed)
        raise
    finally:
        part.unlink(missing_ok=True)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what differs from run to run: stamps, random cell ids, the interpreter's version, how streams were cut into pieces; and without what
    follows a cell that ended it (`reading.end`)."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    ended = [n for n, cell in enumerate(notebook.cells) if any(output.get("ename") == "SystemExit" for output in cell.get("outputs", ()))]
    if ended:
        last = notebook.cells[ended[0]]
        last.outputs = [output for output in last.outputs if output.output_type == "display_data"]
        notebook.cells = notebook.cells[: ended[0] + 1]
    for n, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{n:03d}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
            for output in cell.outputs:
                output.pop("transient", None)
    return notebook


def _joined(outputs: list) -> list:
    """All pieces of a stream joined in the place of the first, standard output before standard error."""
    streams: dict[str, nbformat.NotebookNode] = {}
    others = []
    for output in outputs:
        if output.output_type != "stream":
            others.append(output)
        elif output.name in streams:
            streams[output.name].text += output.text
        else:
            streams[output.name] = output
    return [streams[name] for name in sorted(streams, reverse=True)] + others


def _known(notebook: Path) -> set[str]:
    """The names that the cell tagged `parameters` assigns."""
    if not notebook.is_file():
        raise ValueError(f"{notebook} is missing: give the path of a notebook")
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if "parameters" in cell.metadata.get("tags", [])]
    assigned = (statement for cell in cells for statement in ast.parse(cell.source).body if isinstance(statement, ast.Assign))
    return {target.id for statement in assigned for target in statement.targets if isinstance(target, ast.Name)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without nbformat's notice about cell ids, which `clean` renumbers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="nbformat")
        yield


@contextlib.contextmanager
def _environment(root: Path) -> Iterator[None]:
    """The kernel works on this root and imports this root's package; both are as before afterwards."""
    before = dict(os.environ)
    os.environ["MITUNE_ROOT"] = str(root)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), before.get("PYTHONPATH")]))
    os.environ.setdefault("PYTHONHASHSEED", "0")
    os.environ["OMP_NUM_THREADS"] = "1"  # whatever it is outside: bytes do not depend on the number of cores, which share the work by `mitune.threads`
    os.environ.update(processes.own_gpu(dict(os.environ)))
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm asks for widgets, and bars go to the terminal
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _terminal(label: str) -> Iterator[Path]:
    """A file for the kernel's progress bars, whose latest state is drawn on standard error: in place on a terminal, else a line every 30 s.
    Of several processes the first draws its own."""
    done = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "progress"
        file.touch()
        thread = threading.Thread(target=_follow, args=(file, label, done), daemon=True)
        if processes.is_first():
            thread.start()
        try:
            yield file
        finally:
            done.set()
            if processes.is_first():
                thread.join()


def _follow(file: Path, label: str, done: threading.Event) -> None:
    live, shown, at = sys.stderr.isatty(), "", time.monotonic()
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        text = ""
        while True:
            last = done.wait(0.5)
            text = (text + stream.read())[-4000:]
            states = [state for state in text.replace("\n", "\r").split("\r") if state.strip()]
            if states and states[-1] != shown and (live or time.monotonic() - at > 30):
                shown, at = states[-1], time.monotonic()
                print(f"\r\033[K  {label}: {shown}" if live else f"  {label}: {shown}", end="" if live else "\n", file=sys.stderr, flush=True)
            if last:
                break
    if live and shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def record_seconds(name: str, seconds: float) -> None:
    """Remember, untracked, how long a notebook took, and how many computations it could do at once: `make repro` tells the time left from it."""
    from mitune.artifacts import write_json

    write_json({"seconds": round(seconds, 1), "workers": threads.workers("cpu")}, _record(name))


def recorded(name: str) -> dict[str, float] | None:
    """What `record_seconds` noted of a notebook's last run here: `seconds`, `workers`."""
    return json.loads(_record(name).read_text(encoding="utf-8")) if _record(name).is_file() else None


def _record(name: str) -> Path:
    return config.root() / ".scratch" / "seconds" / f"{name}.json"


def together(arguments: list[str], count: int) -> int:
    """This command in `count` processes of this machine, which meet in the kernel of each; its exit status. `accelerate launch` does the same on several."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "mitune.runner", *arguments]
    return subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode  # as in `_environment`; torch would tell that it is so


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mitune.runner", description="Run a notebook with the parameters its stage declares.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="where the executed notebook is saved")
    parser.add_argument("--params", nargs="*", default=[], help="keys of params.yaml; models.shapes takes that entry only")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further parameters of the notebook")
    parser.add_argument("--prepare-only", action="store_true", help="inject the parameters, do not execute")
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        wanted = processes.wanted()
        if wanted > 1 and chosen.notebook.stem in SHARED:
            return together(sys.argv[1:] if arguments is None else arguments, wanted)
        run(chosen.notebook, chosen.to, parameters(chosen.params, chosen.set), prepare_only=chosen.prepare_only)
    except PapermillExecutionError as error:
        failed = config.root() / ".scratch" / "failed" / chosen.to.name
        print(f"{chosen.notebook}: {error.ename}: {error.evalue} (in its cell {error.exec_count}; the whole notebook: {failed})", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    if not chosen.prepare_only:
        record_seconds(chosen.to.stem, time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
