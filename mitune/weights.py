"""A model's weights from the hub into the folder that `models` in params.yaml names, and its judges' into the hub's cache (`make weights MODEL=sd21-base`):
the one step that asks the network.

An interrupted download goes on where it stopped, and nothing half-loaded is taken for a model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mitune import config
from mitune.loading import check_pipeline, located


def fetch(params: config.Params, name: str) -> Path:
    """The folder of the model's pipeline, downloaded if it is not there. Raises ValueError for a model without a `hub`, and as `located` does."""
    if name not in params.models:
        raise ValueError(f"there is no model {name!r} in params.yaml: `models` has {', '.join(params.models)}; a new one is one line there")
    entry = params.models[name]
    folder = config.root() / entry.pipeline
    if folder.is_dir():
        check_pipeline(folder)
        return folder
    if entry.hub is None:
        raise ValueError(f"models.{name}.pipeline: there is no folder {entry.pipeline!r}, and no models.{name}.hub to take it from")
    part = folder.with_name(f"{folder.name}.part")
    located(entry.hub, folder=part)
    check_pipeline(part)
    shutil.rmtree(part / ".cache", ignore_errors=True)
    part.rename(folder)
    return folder


def read_judges(entry: config.Model) -> None:
    """Read every judge of a model once: what the hub has of their weights is then here, also for a run with HF_HUB_OFFLINE=1, and what cannot be had is told
    of before one. Raises ValueError, one line, for the first that cannot be read."""
    from mitune.stages.judging import opened

    for judge in filter(None, (entry.judge, *(entry.judges or {}).values(), entry.similarity, entry.features)):
        opened(judge, "cpu")


def make_room(params: config.Params, name: str) -> None:
    """The folders that dvc.yaml names of every model, empty where `models` names others, or the hub: those weights are known by their entry alone."""
    entry = params.models[name]
    for role, source in {"pipeline": entry.pipeline, "judge": entry.judge.weights, "similarity": entry.similarity.weights}.items():
        folder = f"data/{name}/{role}"
        if source != folder:
            (config.root() / folder).mkdir(parents=True, exist_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mitune.weights", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="an entry of `models` (default: that of `model`)")
    chosen = parser.parse_args(arguments)
    try:
        params = config.load()
        name = chosen.model or params.model
        print(fetch(params, name))
        make_room(params, name)
        read_judges(params.models[name])
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
