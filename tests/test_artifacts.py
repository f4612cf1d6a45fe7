"""Oracle: what was written; an uninterrupted run for an interrupted one."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mitune import artifacts, prompts
from mitune.stages import pool


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text("")
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    return tmp_path


def scores(**columns):
    rows = {"category": ["color"], "split": ["train"], "prompt_id": [3], "prompt": ["ü"], "image": [0], "scene": ["s"], "judge": [0.5], "similarity": [0.1]}
    return pd.DataFrame(rows | columns)


def test_a_table_comes_back_as_it_was_written(tmp_path):
    frame = scores(standard=[1.5], standard_se=[0.2])
    artifacts.write_table(frame.iloc[:, ::-1], tmp_path / "a b" / "scores.parquet", "scores")
    back = artifacts.read_table(tmp_path / "a b" / "scores.parquet", "scores")
    assert list(back.columns) == [*artifacts.SCHEMAS["scores"], "standard_se", "standard"]
    pd.testing.assert_frame_equal(back[list(frame.columns)], frame, check_dtype=False)
    assert [file.name for file in (tmp_path / "a b").iterdir()] == ["scores.parquet"]


def test_equal_tables_are_equal_bytes(tmp_path):
    for name in "ab":
        artifacts.write_table(scores(), tmp_path / name, "scores")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_wrong_columns_are_refused_on_writing(tmp_path):
    with pytest.raises(ValueError, match="column 'judge' of 'scores' is missing"):
        artifacts.write_table(scores().drop(columns="judge"), tmp_path / "t", "scores")
    with pytest.raises(ValueError, match="not a table of 'scores'"):
        artifacts.write_table(scores(prompt_id=["three"]), tmp_path / "t", "scores")
    curve = pd.DataFrame({"category": ["color"], "arm": ["random"], "step": [1], "loss": [0.1], "grad_norm": [1.0], "seconds": [2.0]})
    with pytest.raises(ValueError, match="unknown column 'seconds'"):
        artifacts.write_table(curve, tmp_path / "t", "curve")
    with pytest.raises(ValueError, match="unknown schema 'skores'"):
        artifacts.write_table(scores(), tmp_path / "t", "skores")
    assert not list(tmp_path.iterdir())


def test_wrong_columns_are_refused_on_reading(tmp_path):
    pq.write_table(pa.table({**{name: pa.nulls(1, kind) for name, kind in artifacts.SCHEMAS["scores"].items()}, "judge": ["high"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet: column 'judge' is string, not double"):
        artifacts.read_table(tmp_path / "t.parquet", "scores")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match=r"t\.parquet is not a Parquet table"):
        artifacts.read_table(tmp_path / "t.parquet", "scores")
    with pytest.raises(ValueError, match="is missing"):
        artifacts.read_table(tmp_path / "none.parquet", "scores")


def test_tensors_and_json(tmp_path):
    tensors = {"b": torch.arange(6).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.uint8)}
    artifacts.write_tensors(tensors, tmp_path / "t.safetensors", {"format": "pt"})
    back = artifacts.read_tensors(tmp_path / "t.safetensors")
    assert sorted(back) == ["a", "b"]
    torch.testing.assert_close(back["b"], tensors["b"])
    assert list(artifacts.read_tensors(tmp_path / "t.safetensors", ["a"])) == ["a"]
    with pytest.raises(ValueError, match="has no tensor 'c': it has a, b"):
        artifacts.read_tensors(tmp_path / "t.safetensors", ["c"])
    (tmp_path / "t.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"t\.safetensors is not a safetensors file"):
        artifacts.read_tensors(tmp_path / "t.safetensors")
    artifacts.write_json({"é": [1, None]}, tmp_path / "t.json")
    assert artifacts.read_json(tmp_path / "t.json") == {"é": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        artifacts.write_json(float("nan"), tmp_path / "t.json")


def test_an_error_leaves_the_old_file_whole(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(ZeroDivisionError), artifacts.atomic(tmp_path / "f") as part:
        part.write_text("half") / 0
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("f", "old")]


def test_metrics_are_numbers_inside_their_intervals(tmp_path):
    artifacts.write_metrics({"color": {"gain": {"value": torch.tensor(0.5), "low": 0.1, "high": 0.7}, "n": 3}}, tmp_path / "m.json")
    assert artifacts.read_json(tmp_path / "m.json") == {"color": {"gain": {"value": 0.5, "low": 0.1, "high": 0.7}, "n": 3}}
    with pytest.raises(ValueError, match=r"color\.gain is 0.8, outside its interval"):
        artifacts.write_metrics({"color": {"gain": {"value": 0.8, "low": 0.1, "high": 0.7}}}, tmp_path / "m.json")
    for bad in ("high", float("nan")):
        with pytest.raises(ValueError, match="a metric is a finite number"):
            artifacts.write_metrics({"gain": bad}, tmp_path / "m.json")


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
    with artifacts.scratch("pool", 1) as folder:
        expected = artifacts.shards(folder, range(7), 3, whole, device="cpu")
    stopped, resumed = squares(stop_at=4), squares()
    with pytest.raises(KeyboardInterrupt), artifacts.scratch("pool", 1) as folder:
        artifacts.shards(folder, range(7), 3, stopped, device="cpu")
    with artifacts.scratch("pool", 1) as folder:
        result = artifacts.shards(folder, range(7), 3, resumed, device="cpu")
    assert [3, 4, 5] in resumed.calls
    assert [0, 1, 2] not in resumed.calls
    assert torch.equal(result["x"], expected["x"])
    assert not (project / ".scratch" / "pool").exists()


def test_other_parameters_do_not_take_up_old_shards(project):
    with pytest.raises(KeyboardInterrupt), artifacts.scratch("pool", {"M": 16}) as folder:
        artifacts.shards(folder, range(7), 3, squares(stop_at=4), device="cpu")
    other = squares()
    with artifacts.scratch("pool", {"M": 17}) as folder:
        artifacts.shards(folder, range(7), 3, other, device="cpu")
    assert sorted(other.calls) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shards_side_by_side_are_joined_in_order(tmp_path, device):
    """The first is the last to be finished; `cuda` only means one after the other here."""

    def compute(items):
        if items[0] == 0:
            time.sleep(0.2)
        return {"x": torch.tensor([[float(item), float(torch.get_num_threads())] for item in items])}

    threads = torch.get_num_threads()
    result = artifacts.shards(tmp_path, range(7), 2, compute, device=device)["x"]
    assert result[:, 0].tolist() == list(range(7))
    assert set(result[:, 1].tolist()) == {1 if device == "cpu" else threads}
    assert torch.get_num_threads() == threads


def test_after_an_error_no_further_shard_is_begun(tmp_path):
    calls = []

    def compute(items):
        calls.append(items[0])
        if items[0] == 0:
            raise ValueError("no memory left")
        time.sleep(0.05)
        return {"x": torch.zeros(len(items), 1)}

    with pytest.raises(ValueError, match="no memory left"):
        artifacts.shards(tmp_path, range(400), 1, compute, device="cpu")
    assert len(calls) < 200
    assert len(list(tmp_path.glob("*.safetensors"))) == len(calls) - 1  # what had begun was finished and kept


def test_the_digest_sees_every_input(tmp_path):
    (tmp_path / "f").write_text("a")
    before = artifacts.digest({"M": 1}, tmp_path, torch.ones(2), [1, "b"])
    assert before == artifacts.digest({"M": 1}, tmp_path, torch.ones(2), [1, "b"])
    changed = [({"M": 2}, tmp_path, torch.ones(2), [1, "b"]), ({"M": 1}, tmp_path, torch.zeros(2), [1, "b"]), ({"M": 1}, tmp_path, torch.ones(2), [1, "c"])]
    assert before not in {artifacts.digest(*parts) for parts in changed}
    (tmp_path / "f").write_text("b")
    assert before != artifacts.digest({"M": 1}, tmp_path, torch.ones(2), [1, "b"])
    with pytest.raises(ValueError, match="missing or empty"):
        artifacts.digest(tmp_path / "none")


def making(calls, stop=()):
    """A `make` that notes its calls, and stops in those numbered in `stop`."""

    def make(folder):
        calls.append(sorted(file.name for file in folder.iterdir()))
        (folder / "work").mkdir(exist_ok=True)
        (folder / "work" / f"{len(calls)}").touch()
        time.sleep(0.002)
        if len(calls) in stop:
            raise KeyboardInterrupt
        artifacts.write_json(len(calls), folder / "value.json")

    return make


def test_shared_work_is_done_once_and_anew_when_anything_changes(project, monkeypatch):
    (project / "f").write_text("a")
    calls = []

    def value(*key):
        return artifacts.read_json(artifacts.shared("pool", *key, make=making(calls)) / "value.json")

    assert [value(1, project / "f"), value(1, project / "f"), value(2, project / "f"), value(1, project / "f")] == [1, 1, 2, 1]
    (project / "f").write_text("b")
    assert value(1, project / "f") == 3
    monkeypatch.setattr(artifacts, "sources", lambda make: {"pool": "another"})
    assert value(1, project / "f") == 4
    monkeypatch.setattr(artifacts.importlib.metadata, "version", lambda library: "9.9")
    assert value(1, project / "f") == 5
    assert not list((project / ".scratch" / "shared").glob("*.part"))
    assert not list((project / ".scratch" / "shared").glob("*/work"))


def test_shared_work_goes_on_after_an_interruption(project):
    calls = []
    make = making(calls, stop=(1,))
    with pytest.raises(KeyboardInterrupt):
        artifacts.shared("pool", 1, make=make)
    (part,) = (project / ".scratch" / "shared").iterdir()
    spent = artifacts.read_json(part / "seconds.json")["seconds"]
    folder = artifacts.shared("pool", 1, make=make)
    assert calls == [[], ["seconds.json", "work"]]
    assert artifacts.read_json(folder / "seconds.json")["seconds"] > spent > 0
    assert sorted(file.name for file in folder.iterdir()) == ["seconds.json", "value.json"]


def test_of_two_that_need_the_same_one_makes_it_and_one_waits(project):
    calls = []

    def make(folder):
        calls.append(folder)
        time.sleep(0.2)
        artifacts.write_json(1, folder / "value.json")

    with ThreadPoolExecutor(3) as threads:
        folders = list(threads.map(lambda n: artifacts.shared("pool", 1, make=make), range(3)))
    assert len(calls) == 1
    assert len(set(folders)) == 1
    assert artifacts.read_json(folders[0] / "value.json") == 1


def test_what_nobody_uses_is_removed_when_something_is_made(project):
    make = making([])
    old, used = artifacts.shared("pool", 1, make=make), artifacts.shared("pool", 2, make=make)
    long_ago = time.time() - (artifacts.KEPT_DAYS + 1) * 24 * 3600
    for folder in (old, used):
        os.utime(folder, (long_ago, long_ago))
    artifacts.shared("pool", 2, make=make)
    artifacts.shared("pool", 3, make=make)
    assert not old.exists()
    assert used.exists()


def test_the_code_of_shared_work_is_what_its_module_imports():
    assert set(artifacts.sources(prompts.load)) == {"prompts"}
    named = set(artifacts.sources(pool.build))
    assert {"stages.pool", "information", "models", "sampling", "config", "schema", "prompts", "artifacts"} <= named
    assert not {"finetuning", "plots", "selection", "stages.scores"} & named
    assert all(len(sha) == 64 for sha in artifacts.sources(pool.build).values())


def test_progress_goes_to_the_followed_file_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MITUNE_PROGRESS", str(tmp_path / "bar"))
    with artifacts.progress(2, "pool") as bar:
        bar.update(2)
    assert "pool" in (tmp_path / "bar").read_text()
    assert capsys.readouterr() == ("", "")
