"""Oracle: an uninterrupted run for an interrupted one; the calls that were made."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from mitune import memo, shards
from mitune.artifacts import read_json, write_json


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text("")
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    return tmp_path


def squares(stop_at=None):
    def compute(items):
        compute.calls.append(list(items))
        if stop_at in items:
            raise KeyboardInterrupt
        return {"x": torch.tensor([[float(item) ** 2] for item in items])}

    compute.calls = []
    return compute


def test_an_interrupted_run_goes_on_from_its_last_shard(project):
    whole = squares()
    with memo.scratch("pool", 1) as folder:
        expected = shards.shards(folder, range(7), 3, whole, device="cpu")
    stopped, resumed = squares(stop_at=4), squares()
    with pytest.raises(KeyboardInterrupt), memo.scratch("pool", 1) as folder:
        shards.shards(folder, range(7), 3, stopped, device="cpu")
    with memo.scratch("pool", 1) as folder:
        result = shards.shards(folder, range(7), 3, resumed, device="cpu")
    assert [3, 4, 5] in resumed.calls
    assert [0, 1, 2] not in resumed.calls
    assert torch.equal(result["x"], expected["x"])
    assert not (project / ".scratch" / "pool").exists()


def test_other_parameters_do_not_take_up_old_shards(project):
    with pytest.raises(KeyboardInterrupt), memo.scratch("pool", {"M": 16}) as folder:
        shards.shards(folder, range(7), 3, squares(stop_at=4), device="cpu")
    other = squares()
    with memo.scratch("pool", {"M": 17}) as folder:
        shards.shards(folder, range(7), 3, other, device="cpu")
    assert sorted(other.calls) == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_digest_sees_every_input(tmp_path):
    (tmp_path / "f").write_text("a")
    before = memo.digest({"M": 1}, tmp_path, torch.ones(2), [1, "b"])
    assert before == memo.digest({"M": 1}, tmp_path, torch.ones(2), [1, "b"])
    changed = [({"M": 2}, tmp_path, torch.ones(2), [1, "b"]), ({"M": 1}, tmp_path, torch.zeros(2), [1, "b"]), ({"M": 1}, tmp_path, torch.ones(2), [1, "c"])]
    assert before not in {memo.digest(*parts) for parts in changed}
    (tmp_path / "f").write_text("b")
    assert before != memo.digest({"M": 1}, tmp_path, torch.ones(2), [1, "b"])
    with pytest.raises(ValueError, match="missing or empty"):
        memo.digest(tmp_path / "none")


def making(calls, stop=()):
    """A `make` that notes its calls, and stops in those numbered in `stop`."""

    def make(folder):
        calls.append(sorted(file.name for file in folder.iterdir()))
        (folder / "work").mkdir(exist_ok=True)
        (folder / "work" / f"{len(calls)}").touch()
        time.sleep(0.002)
        if len(calls) in stop:
            raise KeyboardInterrupt
        write_json(len(calls), folder / "value.json")

    return make


def test_shared_work_is_done_once_and_anew_when_anything_changes(project, monkeypatch):
    (project / "f").write_text("a")
    calls = []

    def value(*key):
        return read_json(memo.shared("pool", *key, make=making(calls)) / "value.json")

    assert [value(1, project / "f"), value(1, project / "f"), value(2, project / "f"), value(1, project / "f")] == [1, 1, 2, 1]
    (project / "f").write_text("b")
    assert value(1, project / "f") == 3
    monkeypatch.setattr(memo.sources, "of_function", lambda make: {"pool": "another"})
    assert value(1, project / "f") == 4
    monkeypatch.setattr(memo.importlib.metadata, "version", lambda library: "9.9")
    assert value(1, project / "f") == 5
    assert not list((project / ".scratch" / "shared").glob("*.part"))
    assert not list((project / ".scratch" / "shared").glob("*/work"))


def test_shared_work_goes_on_after_an_interruption(project):
    calls = []
    make = making(calls, stop=(1,))
    with pytest.raises(KeyboardInterrupt):
        memo.shared("pool", 1, make=make)
    (part,) = (project / ".scratch" / "shared").iterdir()
    spent = read_json(part / "seconds.json")["seconds"]
    folder = memo.shared("pool", 1, make=make)
    assert calls == [[], ["seconds.json", "work"]]
    assert read_json(folder / "seconds.json")["seconds"] > spent > 0
    assert sorted(file.name for file in folder.iterdir()) == ["seconds.json", "value.json"]


def make_slowly(folder):
    (folder / f"made-{os.getpid()}").touch()
    time.sleep(0.2)
    write_json(1, folder / "value.json")


def shared_slowly(n):
    return memo.shared("pool", 1, make=make_slowly)


def test_of_two_that_need_the_same_one_makes_it_and_one_waits(project):
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as others:
        folders = set(others.map(shared_slowly, range(3)))
    (folder,) = folders
    assert sorted(file.name for file in folder.iterdir() if not file.name.startswith("made-")) == ["seconds.json", "value.json"]
    assert len(list(folder.glob("made-*"))) == 1


def test_what_nobody_uses_is_removed_when_something_is_made(project):
    make = making([])
    old, used = memo.shared("pool", 1, make=make), memo.shared("pool", 2, make=make)
    long_ago = time.time() - (memo.KEPT_DAYS + 1) * 24 * 3600
    for folder in (old, used):
        os.utime(folder, (long_ago, long_ago))
    memo.shared("pool", 2, make=make)
    memo.shared("pool", 3, make=make)
    assert not old.exists()
    assert used.exists()
