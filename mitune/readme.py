"""Fills the marked blocks of README.md with the true output of their commands (`make readme`); `--check` tells whether they are current.

A block is `<!-- begin:NAME -->` ... `<!-- end:NAME -->`, NAME one of COMMANDS. The commands read only what git tracks, so that a fresh
clone prints what the README shows.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from mitune import config
from mitune.repro import environment

COMMANDS = {
    "claims": "python -m mitune.claims",
    "help": "make help",
    "dag": "dvc dag --md --collapse-foreach-matrix",
    "stages": "dvc stage list --name-only",
    "stage": "dvc repro --dry --force --single-item sets@color",
    "metrics": "dvc metrics show --md reports/headline.json",
    "plots": "dvc plots show",
    "precision": "tail -n +5 bench/precision-shapes-cpu.md",
    "experiment": "dvc exp run --dry --force --single-item --name k2 -S set.k=2 sets@color",
}
PLAIN = {"claims", "dag", "metrics", "precision"}  # Markdown of their own: not fenced
_BLOCK = re.compile(r"<!-- begin:(?P<name>\w+) -->\n.*?<!-- end:(?P=name) -->", re.DOTALL)


def output(name: str, root: Path) -> str:
    """What the command of a block prints, the project's own folder written as `.`. Raises ValueError if it fails."""
    command = shlex.split(COMMANDS[name])
    command[:1] = {"dvc": [sys.executable, "-m", "dvc"], "python": [sys.executable]}.get(command[0], command[:1])
    env = {key: value for key, value in environment(root).items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}} | {"COLUMNS": "120"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{COMMANDS[name]} failed: {' '.join(done.stderr.split())}")
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).replace(root.as_uri(), "file:///...").replace(str(root), ".")
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def block(name: str, root: Path) -> str:
    text = output(name, root)
    body = f"{text}\n" if name in PLAIN else f"```console\n$ {COMMANDS[name]}\n{text}\n```\n"
    return f"<!-- begin:{name} -->\n{body}<!-- end:{name} -->"


def fill(text: str, root: Path) -> str:
    """`text` with every marked block replaced. Raises ValueError for a block of unknown name."""

    def replacement(found: re.Match) -> str:
        if found["name"] not in COMMANDS:
            raise ValueError(f"README.md has a block {found['name']!r}: the blocks are {', '.join(COMMANDS)}")
        return block(found["name"], root)

    return _BLOCK.sub(replacement, text)


def main() -> int:
    root = config.root().resolve()
    readme = root / "README.md"
    try:
        before = readme.read_text(encoding="utf-8")
        after = fill(before, root)
    except (ValueError, FileNotFoundError) as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    if "--check" in sys.argv[1:]:
        stale = [found["name"] for found, new in zip(_BLOCK.finditer(before), _BLOCK.finditer(after), strict=True) if found[0] != new[0]]
        print(f"README.md: not current: {', '.join(stale)}; run `make readme`" if stale else "README.md is current")
        return int(bool(stale))
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
