"""A profile: the pipeline with `mitune/{name}.yaml` merged into `params.yaml`, in a clone of its own (`make repro PROFILE=full`).

Its parameters, lock and reports are those of `profiles/{name}`, untracked: the project's stay as they are. DVC's cache, downloaded data and what cells have in
common are the project's, so that a profile takes over what the project has computed.
"""

from __future__ import annotations

from pathlib import Path

from mitune import config
from mitune.smoke import clone

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def prepare(name: str) -> Path:
    """The clone of a profile, one of `NAMES`: the project's files as they stand, beside what earlier runs there have left."""
    root = config.root().resolve()
    folder = root / "profiles" / name
    clone(folder, overlay=FOLDER / f"{name}.yaml")
    for data in (root / "data").iterdir():  # what was downloaded
        if not (folder / "data" / data.name).exists():
            (folder / "data" / data.name).symlink_to(data)
    (folder / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {root / '.dvc' / 'cache'}\n", encoding="utf-8")
    common, own = (place / ".scratch" / "shared" for place in (root, folder))
    common.mkdir(parents=True, exist_ok=True)
    if not own.is_symlink():
        own.parent.mkdir(exist_ok=True)
        own.symlink_to(common, target_is_directory=True)
    return folder
