"""Oracle: one process. Two and four, which meet by Gloo on the CPU, are forked from a server that has imported torch once."""

import hashlib
import multiprocessing
import os
import socket
from dataclasses import replace

import nbformat
import pytest
import torch
from torch.testing import assert_close

from mitune import config, processes, runner
from mitune.shards import shards

TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}
"""Of an adapter after three steps: sums in another order differ in their last digits, which AdamW's division by a small second moment magnifies."""


def of_several(count, work, *arguments):
    """What `work(*arguments)` returns in each of `count` processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "mitune.finetuning", "peft", "diffusers.training_utils"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers = context.Queue()
    children = [context.Process(target=member, args=(index, count, port, answers, work, arguments), daemon=True) for index in range(count)]
    for child in children:
        child.start()
    given = dict(answers.get(timeout=120) for _ in children)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * count
    return [given[index] for index in range(count)]


def member(index, count, port, answers, work, arguments):
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    answers.put((index, work(*arguments)))


def sampled(folder, pipeline):
    """The bytes of a pool's shards, what joins them, who computed which, and what the first alone has written."""
    from types import SimpleNamespace

    from mitune.artifacts import read_tensors, write_tensors
    from mitune.models import load
    from mitune.prompts import Prompt
    from mitune.stages.pool import sampler

    torch.set_num_threads(1)
    model, mine = load(pipeline), []
    draw = sampler(model, SimpleNamespace(M=2, num_inference_steps=2, batch_size=64), 2.0, 0)

    def compute(items):
        mine.extend(item.prompt_id for item in items)
        return draw(items)

    items = [Prompt(n, text) for n, text in enumerate(["a red circle", "a blue square", "a green star", "a red moon", "a blue circle"])]
    joined = shards(folder, items, 1, compute, device="cpu")
    write_tensors({"index": torch.tensor(processes.index())}, folder / "joined" / "who.safetensors")
    processes.wait()
    who = int(read_tensors(folder / "joined" / "who.safetensors")["index"])
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}, joined["latents"].tolist(), mine, who


def tuned(folder, pipeline, config):
    """The losses and the adapter's values after a few steps."""
    from mitune import finetuning
    from mitune.models import load

    torch.set_num_threads(1)
    model, generator = load(pipeline), torch.Generator().manual_seed(0)
    latents = torch.randn(5, 4, 8, 8, generator=generator)
    captions = ["a red circle", "a blue square", "a green star", "a red moon", "a red star"]
    rows = finetuning.finetune(model, latents, model.encode(captions), config, seed=0, folder_checkpoints=folder)
    trained = finetuning.trained_parameters(model).values()
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows], torch.cat([parameter.detach().flatten() for parameter in trained]).numpy()


def made(root):
    """What `shared` and `scratch` leave, and how often this process has made it."""
    from mitune import memo
    from mitune.artifacts import read_json, write_json

    os.environ["MITUNE_ROOT"] = str(root)
    calls = []

    def make(folder):
        calls.append(folder.name)
        joined = shards(folder / "work", range(4), 1, lambda items: {"x": torch.tensor([float(item) for item in items])}, device="cpu")
        write_json({"sum": float(joined["x"].sum())}, folder / "sum.json")

    for _ in range(2):
        folder = memo.shared("thing", 1, make=make)
    with memo.scratch("pool", 2) as place:
        shards(place, range(3), 1, lambda items: {"x": torch.zeros(len(items))}, device="cpu")
    processes.wait()
    return len(calls), read_json(folder / "sum.json")["sum"], sorted(path.name for path in folder.iterdir()), place.exists()


@pytest.mark.parametrize("count", [2, 4])
def test_shards_of_several_processes_have_the_bytes_of_ones(tiny_pipeline, tmp_path, count):
    one = sampled(tmp_path / "one", tiny_pipeline)
    several = of_several(count, sampled, tmp_path / "several", tiny_pipeline)
    assert all(files == one[0] and latents == one[1] and who == 0 for files, latents, _, who in several)
    assert [mine for _, _, mine, _ in several] == [list(range(index, 5, count)) for index in range(count)]


@pytest.mark.parametrize(("count", "micro_batch_size"), [(2, 8), (4, 1)])
def test_fine_tuning_by_several_processes_is_that_of_one(tiny_pipeline, tmp_path, count, micro_batch_size):
    from test_finetuning import CONFIG

    config = replace(CONFIG, steps=3, learning_rate=1e-3, micro_batch_size=micro_batch_size)
    one = tuned(tmp_path / "one", tiny_pipeline, config)
    several = of_several(count, tuned, tmp_path / "several", tiny_pipeline, config)
    for losses, norms, adapter in several:
        assert adapter.tobytes() == several[0][2].tobytes()  # each other's, to the last bit
        assert_close(losses, one[0], rtol=1e-5, atol=0)
        assert_close(norms, one[1], rtol=1e-3, atol=0)
        assert_close(torch.tensor(adapter), torch.tensor(one[2]), **TOLERANCE)


def test_what_is_shared_is_made_once_by_all_together(tmp_path):
    (tmp_path / "params.yaml").touch()
    for calls, total, names, left in of_several(2, made, tmp_path):
        assert (calls, total, left) == (1, 6.0, False)
        assert names == ["seconds.json", "sum.json"]


def test_one_process_is_alone(monkeypatch):
    assert (processes.count(), processes.index(), processes.is_first(), processes.agreed(False)) == (1, 0, True, False)
    gradient = torch.ones(2)
    processes.average([gradient])
    assert gradient.tolist() == [1.0, 1.0]
    assert processes.own_gpu({"A": "b"}) == {"A": "b"}
    monkeypatch.setenv("MITUNE_PROCESSES", "four")
    with pytest.raises(ValueError, match="MITUNE_PROCESSES is 'four': it must be a whole number"):
        processes.wanted()
    monkeypatch.setenv("MITUNE_PROCESSES", "4")
    assert processes.wanted() == 4
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.wanted() == 1
    for visible, place, own in (("", "2", "2"), ("4,5,6", "1", "5"), ("7", "3", "7")):
        assert processes.own_gpu({"CUDA_VISIBLE_DEVICES": visible, "LOCAL_RANK": place})["CUDA_VISIBLE_DEVICES"] == own


def test_a_stage_is_run_by_as_many_processes_as_are_wanted(tmp_path, capfd, monkeypatch):
    """Really started, by the runner itself, each with a kernel of its own; one notebook is saved."""
    code = "from mitune import processes\nprocesses.wait()\nprint(processes.index(), processes.count())"
    cells = [nbformat.v4.new_code_cell("parameters = None", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "scores.ipynb")
    monkeypatch.setenv("MITUNE_PROCESSES", "2")
    monkeypatch.setenv("PYTHONPATH", str(config.root()))
    assert runner.main([str(tmp_path / "scores.ipynb"), "--to", str(tmp_path / "made" / "scores.ipynb")]) == 0, capfd.readouterr().err
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["scores.ipynb"]
    assert nbformat.read(tmp_path / "made" / "scores.ipynb", as_version=4).cells[1].outputs[0].text == "0 2\n"


def test_what_several_processes_would_only_repeat_is_run_by_one(monkeypatch):
    started = []
    monkeypatch.setattr(runner, "together", lambda arguments, count: started.append((arguments[0], count)) or 0)
    monkeypatch.setattr(runner, "run", lambda *_, **__: None)
    monkeypatch.setattr(runner, "record_seconds", lambda *_: None)
    monkeypatch.setenv("MITUNE_PROCESSES", "3")
    for name in ("pool", "sets", "00_base_model"):
        assert runner.main([f"notebooks/{name}.ipynb", "--to", f"{name}.ipynb"]) == 0
    assert started == [("notebooks/pool.ipynb", 3)]
    assert {path.stem for path in (config.root() / "notebooks" / "stages").glob("*.ipynb")} - runner.SHARED == {"base", "code", "cost", "index", "sets"}
