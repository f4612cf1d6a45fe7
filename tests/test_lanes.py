"""Oracle: a graph of stages worked by hand, and the order in which they were begun and ended."""

import os
import sys
import threading
import time

import pytest

from mitune import config, lanes, repro

NEEDED = {"code": set(), "pool": {"code"}, "scores": {"pool"}, "base": {"code"}, "cost": {"scores"}, "article": {"base", "scores", "cost"}}
SECONDS = {"code": 1, "pool": 5, "scores": 4, "base": 6, "cost": 2, "article": 1}


def begun(stages, *, at_once, alone=(), work=lambda stage: 0, **others):
    """The status, the order in which stages began, and for each those that were running when it did."""
    order, running, beside = [], set(), {}

    def began(stage):
        beside[stage] = set(running)
        running.add(stage)
        order.append(stage)

    urgent = lanes.urgency(NEEDED, SECONDS.__getitem__)
    status = lanes.run(stages, NEEDED, work, lanes=at_once, urgent=urgent, alone=alone, began=began, ended=running.remove, **others)
    assert not running
    return status, order, beside


def test_urgency_is_the_longest_chain_that_waits():
    assert lanes.urgency(NEEDED, SECONDS.__getitem__) == {"article": 1, "cost": 3, "scores": 7, "pool": 12, "base": 7, "code": 13}


def test_one_at_a_time_the_most_urgent_first():
    status, order, beside = begun(NEEDED, at_once=1)
    assert (status, order) == (0, ["code", "pool", "base", "scores", "cost", "article"])
    assert not any(beside.values())


def test_two_work_at_the_same_time_and_none_before_what_it_needs():
    meet = threading.Barrier(2, timeout=20)
    status, order, beside = begun(NEEDED, at_once=2, work=lambda stage: meet.wait() and 0 if stage in ("pool", "base") else 0)
    assert status == 0 and set(order) == set(NEEDED)
    assert beside["base"] == {"pool"}
    assert all(order.index(other) < order.index(stage) for stage, others in NEEDED.items() for other in others)


def test_what_measures_the_machine_has_it_for_itself():
    needed = {"a": set(), "b": set(), "cost": set(), "c": set()}
    log, lock = [], threading.Lock()

    def work(stage):
        with lock:
            log.append((stage, "begins"))
        time.sleep(0.01)
        with lock:
            log.append((stage, "ends"))
        return 0

    urgent = {"a": 1, "b": 1, "cost": 9, "c": 1}
    assert lanes.run(needed, needed, work, lanes=2, urgent=urgent, alone={"cost"}, began=str, ended=str) == 0
    at = log.index(("cost", "begins"))
    assert log[at + 1] == ("cost", "ends")


def test_only_what_is_asked_for_runs():
    assert begun({"scores", "article"}, at_once=2)[1] == ["scores", "article"]


@pytest.mark.parametrize(("at_once", "expected"), [(1, ["code", "pool"]), (2, ["code", "pool", "base"])])
def test_after_a_failure_nothing_is_begun(at_once, expected):
    status, order, _ = begun(NEEDED, at_once=at_once, work=lambda stage: 3 if stage == "pool" else 0)
    assert (status, order) == (3, expected)


def test_a_mended_module_makes_the_stages_that_use_it_alone(tmp_path, monkeypatch):
    """What reads the hashes of the code is asked for anew when they are there."""
    told, ran, seen = [set(NEEDED), {"article"}], [], set()
    monkeypatch.setattr(lanes, "needs", lambda root: NEEDED)
    monkeypatch.setattr(lanes, "stale", lambda *_: told.pop(0))
    monkeypatch.setattr(lanes, "run", lambda stages, *_, **__: ran.append(set(stages)) or 0)
    assert repro._side_by_side(tmp_path, set(NEEDED), seen, 2, print, print) == 0
    assert ran == [{"code"}, {"article"}] and seen == NEEDED.keys() - {"article"}


def test_needs_are_those_of_dvc_from_any_folder(tmp_path, monkeypatch):
    root = config.root()
    monkeypatch.chdir(tmp_path)
    needed = lanes.needs(root)
    assert needed["sets@color"] == {"code", "scores@color"} and needed["code"] == set()
    assert "99_claims" in needed["index"] and "index" not in needed["99_claims"]


def test_what_reads_from_a_stale_stage_is_stale(tmp_path):
    status = [sys.executable, "-c", 'print(\'{"scores": ["changed"], "data.dvc": ["changed"]}\')']
    assert lanes.stale(tmp_path, status, dict(os.environ), NEEDED) == {"scores", "cost", "article"}
    with pytest.raises(ValueError, match="no lock"):
        lanes.stale(tmp_path, [sys.executable, "-c", "import sys; sys.exit('no lock')"], dict(os.environ), NEEDED)
