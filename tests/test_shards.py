"""Oracle: the slices' own order, and what a stopped run has left."""

import time

import pytest
import torch

from mitune import shards


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shards_side_by_side_are_joined_in_order(tmp_path, device):
    """The first is the last to be finished; `cuda` only means one after the other here."""

    def compute(items):
        if items[0] == 0:
            time.sleep(0.2)
        return {"x": torch.tensor([[float(item), float(torch.get_num_threads())] for item in items])}

    threads = torch.get_num_threads()
    result = shards.shards(tmp_path, range(7), 2, compute, device=device)["x"]
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
        shards.shards(tmp_path, range(400), 1, compute, device="cpu")
    assert len(calls) < 200
    assert len(list(tmp_path.glob("*.safetensors"))) == len(calls) - 1  # what had begun was finished and kept


def test_progress_goes_to_the_followed_file_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MITUNE_PROGRESS", str(tmp_path / "bar"))
    with shards.progress(2, "pool") as bar:
        bar.update(2)
    assert "pool" in (tmp_path / "bar").read_text()
    assert capsys.readouterr() == ("", "")
