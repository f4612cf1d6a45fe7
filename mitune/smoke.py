"""The whole pipeline at toy size in a temporary clone: `params.yaml` with `smoke.yaml` merged into it (`make smoke`, and the tests)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

from mitune import config

OVERLAY = Path(__file__).with_name("smoke.yaml")


def clone(folder: Path, *, overlay: Path | None = OVERLAY) -> Path:
    """A git and DVC repository in `folder`, new or brought up to date, of the project's files as they stand, without its lock and results; `overlay` merged
    into its parameters."""
    root = config.root().resolve()
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file() and name != "dvc.lock" and not name.startswith(("reports/", "dvcstore/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
    if overlay:
        merge_into(folder / "params.yaml", overlay)
    git = ["git", "-c", "user.name=mitune", "-c", "user.email=mitune@localhost", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--no-verify", "--allow-empty", "--message", "clone"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


def merge_into(params: Path, overlay: Path) -> None:
    """Rewrite `params` with `overlay` merged into it, and check the result."""
    merged = config.merge(config.read_yaml(params), config.read_yaml(overlay))
    with params.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(merged, file)
    config.load(params)


def environment(folder: Path) -> dict[str, str]:
    """An environment in which `folder` is the project: its root, its package, this interpreter as `python`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MITUNE_")}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    return env | {"PYTHONPATH": str(folder), "MITUNE_ROOT": str(folder)}


def main() -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mitune smoke ") as name:
        folder = clone(Path(name))
        status = subprocess.run([sys.executable, "-m", "mitune.repro"], cwd=folder, env=environment(folder)).returncode
    print(f"smoke {'passed' if status == 0 else 'FAILED'} in {time.monotonic() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
