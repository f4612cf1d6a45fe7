"""`dvc repro` that says which stage of how many is running and about how long the rest will take (`make repro`, `make spine`), and notes what made it.

Arguments that it does not know are those of `dvc repro`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

from mitune import benchmarks, config, profiles, provenance, runner, weights
from mitune.recipes import Studies

# on two cores, until a run has been timed:
MINUTES = {"code": 0.1, "base": 3, "pool": 1.2, "scores": 1.2, "information": 3, "sets": 0.1, "finetune": 0.4, "evaluate": 3.8, "cost": 4}
MINUTES |= {"cfg_rounds": 4, "set_size": 3.5, "adapters": 1.3, "merging": 2, "selection": 1.5, "caption_noise": 1.5}  # a cell, the mean of its study's
ARTICLE_MINUTES = 0.4
_BEGINS = re.compile(r"^Running stage '(?P<stage>[^']+)'|^Stage '(?P<same>[^']+)' (?:didn't change|is cached)")


def expected_seconds(stage: str) -> float:
    """How long a stage took when it last ran here, or else what it takes on two cores."""
    return runner.seconds(stage.replace("@", "-")) or 60 * MINUTES.get(stage.split("@")[0], ARTICLE_MINUTES)


def time_left(stages: list[str], seen: set[str]) -> str:
    """The time that the stages not yet seen may take, if all of them run."""
    minutes = sum(expected_seconds(stage) for stage in stages if stage not in seen) / 60
    return f"about {minutes:.0f} min left" if minutes >= 1.5 else "about a minute left"


def spine(stages: list[str]) -> list[str]:
    """Those of the articles 00 to 03 and of what they need: without studies and costs, whose articles are the later ones, and the index."""
    others = {field.name for field in fields(Studies)} | {"cost", "index"}
    return [stage for stage in stages if stage.partition("@")[0] not in others and not re.match(r"0[4-9]|[1-9]", stage)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def environment(root: Path) -> dict[str, str]:
    """This interpreter's folder first on PATH, where the stages find `python`, and the project's own package first on its path."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH")]))
    return env


def note(root: Path, params: config.Params, this_run: dict, running: tuple[str, float] | None) -> None:
    """Record the provenance of the stage that ran until now, if it has written its notebook since it began."""
    if running:
        stage, since = running
        made = provenance.notebook(root, params.reports, params.model, stage)
        if made.is_file() and made.stat().st_mtime >= since:
            provenance.record(root / params.reports / provenance.FILE, this_run, stage, made, runner.seconds(stage.replace("@", "-")))


def repro(arguments: list[str], *, of_spine: bool = False) -> int:
    """Run `dvc repro` with `arguments`, of all stages or of the spine's; its exit status."""
    root = config.root().resolve()
    params = config.load(root / "params.yaml")
    if not (root / params.prompts).exists():
        raise ValueError(benchmarks.absent(root / params.prompts))
    provenance.read(root / params.reports / provenance.FILE)  # a file that cannot be read is told of now, not after the first stage
    env = environment(root)
    listed = subprocess.run(command("stage", "list", "--name-only"), cwd=root, env=env, capture_output=True, text=True)
    if listed.returncode:
        print(listed.stderr, end="", file=sys.stderr)
        return listed.returncode
    stages, seen, started = listed.stdout.split(), set(), time.monotonic()
    if of_spine:
        stages = spine(stages)
        arguments = [*arguments, *(stage for stage in stages if stage[0].isdigit())]  # its articles, and with them what they need
    config.check_downloaded(params)
    weights.make_room(params, params.model)
    this_run, running = provenance.start(root, params.reports, params.device), None
    process = subprocess.Popen(command("repro", *arguments), cwd=root, env=env, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            found = _BEGINS.match(line)
            if found:
                note(root, params, this_run, running)
                running = (found["stage"], time.time()) if found["stage"] else None
            if found and found["stage"]:
                spent = (time.monotonic() - started) / 60
                print(f"[{len(seen) + 1}/{len(stages)}] {found['stage']} · {spent:.1f} min so far · {time_left(stages, seen)}", flush=True)
            elif not found:
                print(line, end="", flush=True)
            if found:
                seen.add(found["stage"] or found["same"])
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        print("interrupted: the same command goes on from the last finished shard or checkpoint", file=sys.stderr)
        return 130
    if status == 0:
        note(root, params, this_run, running)
        print(f"done in {(time.monotonic() - started) / 60:.1f} min: read {os.path.relpath(root / params.reports)}/README.md, or make site")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="mitune.repro", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--spine", action="store_true", help="the articles 00 to 03 and what they need, without the studies")
    parser.add_argument("--profile", choices=profiles.NAMES, help="with mitune/PROFILE.yaml merged into params.yaml, in profiles/PROFILE")
    chosen, rest = parser.parse_known_args()
    try:
        if chosen.profile:
            os.environ["MITUNE_ROOT"] = str(profiles.prepare(chosen.profile))
        return repro(rest, of_spine=chosen.spine)
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
