"""Oracle: what was written."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mitune import artifacts


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
