"""`dvc repro` that says which stage of how many is running and about how long the rest will take (`make repro`, `make spine`), and notes what made it.

On a CPU of several cores two stages run side by side (`mitune.lanes`) before `dvc repro` itself, which then finds all of them up to date. Arguments that it
does not know are those of `dvc repro`, which runs alone then.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from mitune import benchmarks, commands, config, lanes, processes, profiles, provenance, runner, threads, weights
from mitune.recipes import Studies

# on one core, until a run has been timed:
MINUTES = {"code": 0.1, "base": 4, "pool": 1.8, "scores": 3, "information": 5, "sets": 0.1, "finetune": 0.4, "evaluate": 4.5, "cost": 4}
MINUTES |= {"cfg_rounds": 6, "set_size": 4, "adapters": 1.5, "merging": 2.5, "selection": 1.8, "caption_noise": 2.5}  # a cell, the mean of its study's
ARTICLE_MINUTES = 0.5
ALONE = {"cost"}  # what measures the machine has it for itself
FIRST = {"code"}  # all others read what it writes, most of which a mended module leaves as it was
_BEGINS = re.compile(r"^Running stage '(?P<stage>[^']+)'|^Stage '(?P<same>[^']+)' (?:didn't change|is cached)")
_PROGRESS = re.compile(r"^  \S+: ")  # of the runner


def expected_seconds(stage: str) -> float:
    """How long a stage took when it last ran here, or else what it takes on one core."""
    noted = runner.recorded(stage.replace("@", "-"))
    return noted["seconds"] if noted else 60 * MINUTES.get(stage.split("@")[0], ARTICLE_MINUTES)


def time_left(stages: list[str], seen: set[str], side_by_side: int = 1) -> str:
    """The time that the stages not yet seen may take, if all of them run, so many of them side by side."""
    minutes = sum(expected_seconds(stage) for stage in stages if stage not in seen) / 60 / side_by_side
    return f"about {minutes:.0f} min left" if minutes >= 1.5 else "about a minute left"


def spine(stages: list[str]) -> list[str]:
    """Those of the articles 00 to 03 and of what they need: without studies and costs, whose articles are the later ones, and the index."""
    others = {field.name for field in fields(Studies)} | {"cost", "index"}
    return [stage for stage in stages if stage.partition("@")[0] not in others and not re.match(r"0[4-9]|[1-9]", stage)]


def side_by_side(device: str) -> int:
    """How many stages run at once where nothing else is said: two on a CPU of several cores; one where the processes of a stage share its work."""
    return min(2, threads.cores()) if device == "cpu" and processes.wanted() == 1 else 1


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def environment(root: Path, **more: str) -> dict[str, str]:
    """This interpreter's folder first on PATH, where the stages find `python`, the project's own package first on its path, and `more`."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | more
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH")]))
    return env


def note(root: Path, params: config.Params, this_run: dict, stage: str, since: float) -> None:
    """Record the provenance of a stage that began at `since`, if it has written its notebook."""
    made = provenance.notebook(root, params.reports, params.model, stage)
    if made.is_file() and made.stat().st_mtime >= since:
        seconds = (runner.recorded(stage.replace("@", "-")) or {}).get("seconds")
        provenance.record(root / params.reports / provenance.FILE, this_run, stage, made, seconds)


def repro(arguments: list[str], *, of_spine: bool = False, at_once: int | None = None) -> int:
    """Bring all stages or the spine's up to date, `at_once` side by side; with `arguments`, `dvc repro` with these. Its exit status."""
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
    stages, seen, started, since = listed.stdout.split(), set(), time.monotonic(), {}
    at_once = 1 if arguments else at_once or side_by_side(params.device)
    if of_spine:
        stages = spine(stages)
        arguments = [*arguments, *(stage for stage in stages if stage[0].isdigit())]  # its articles, and with them what they need
    config.check_downloaded(params)
    weights.make_room(params, params.model)
    this_run = provenance.start(root, params.reports, params.device)

    def began(stage: str) -> None:
        since[stage] = time.time()
        spent = (time.monotonic() - started) / 60
        print(f"[{len(seen) + 1}/{len(stages)}] {stage} · {spent:.1f} min so far · {time_left(stages, seen, at_once)}", flush=True)
        seen.add(stage)

    def ended(stage: str) -> None:
        note(root, params, this_run, stage, since[stage])

    try:
        status = _side_by_side(root, set(stages), seen, at_once, began, ended) if at_once > 1 else 0
        status = status or _in_turn(root, arguments, env, seen, began, ended)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last finished shard or checkpoint", file=sys.stderr)
        return 130
    if status == 0:
        print(f"done in {(time.monotonic() - started) / 60:.1f} min: read {os.path.relpath(root / params.reports)}/README.md, or make site")
    return status


def _side_by_side(root: Path, stages: set[str], seen: set[str], at_once: int, began: Callable[[str], None], ended: Callable[[str], None]) -> int:
    """Those of `stages` that have changed or depend on one that has, so many at once; `FIRST` before it is asked which these are. What a failed one said last
    is shown, but not of those that an interruption ended."""
    needed, said = lanes.needs(root), dict[str, str]()

    def stale() -> set[str]:
        return stages & lanes.stale(root, command("status", "--json"), environment(root), needed)

    def work(stage: str) -> int:
        env = environment(root, MITUNE_WORKERS=str(threads.cores() if stage in ALONE else max(threads.cores() // at_once, 1)))
        asked = command("--wait-for-lock", "repro", "--single-item", stage)
        process = subprocess.Popen(asked, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        last: deque[str] = deque(maxlen=20)
        for line in process.stdout:
            last.append(line)
            if _PROGRESS.match(line):
                print(line, end="", flush=True)
        if process.wait():
            said[stage] = "".join(last)
        return process.returncode

    def over(stage: str) -> None:
        print(said.get(stage, ""), end="", file=sys.stderr, flush=True)
        ended(stage)

    def run(some: set[str]) -> int:
        return lanes.run(some, needed, work, lanes=at_once, urgent=lanes.urgency(needed, expected_seconds), alone=ALONE, began=began, ended=over)

    changed = stale()
    if changed & FIRST:
        if status := run(changed & FIRST):
            return status
        changed = stale()
    seen |= stages - changed
    return run(changed)


def _in_turn(root: Path, arguments: list[str], env: dict[str, str], seen: set[str], began: Callable[[str], None], ended: Callable[[str], None]) -> int:
    """`dvc repro` with these arguments; what it says of a stage that was seen already is left out."""
    running = None
    process = subprocess.Popen(command("repro", *arguments), cwd=root, env=env, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            found = _BEGINS.match(line)
            if not found:
                print(line, end="", flush=True)
                continue
            if running:
                ended(running)
            running = found["stage"]
            if running:
                began(running)
            seen.add(found["stage"] or found["same"])
        if process.wait() == 0 and running:
            ended(running)
    except KeyboardInterrupt:
        process.wait()
        raise
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="mitune.repro", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--spine", action="store_true", help="the articles 00 to 03 and what they need, without the studies")
    parser.add_argument("--at-once", type=commands.count, metavar="N", help="stages side by side (default: 2 on a CPU of several cores, else 1)")
    parser.add_argument("--profile", choices=profiles.NAMES, help="with mitune/PROFILE.yaml merged into params.yaml, in profiles/PROFILE")
    chosen, rest = parser.parse_known_args()
    try:
        if chosen.profile:
            os.environ["MITUNE_ROOT"] = str(profiles.prepare(chosen.profile))
        return repro(rest, of_spine=chosen.spine, at_once=chosen.at_once)
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
