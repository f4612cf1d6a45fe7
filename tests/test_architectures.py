"""Oracles: the published models' numbers of parameters and of operations, counted by others, and a small UNet that is really run on the CPU."""

import pytest
import torch

from mitune import architectures, probe

SMALL = architectures.COMMON | {
    "sample_size": 8, "block_out_channels": (32, 64), "attention_head_dim": (2, 4), "cross_attention_dim": 16, "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24,
}  # fmt: skip


@pytest.mark.parametrize(("name", "parameters", "multiplications"), [("sd21-base", 865_910_724, 402e9), ("sdxl", 2_567_463_684, 3381e9)])
def test_the_architectures_are_the_published_ones(name, parameters, multiplications):
    settings = architectures.CONFIGS[name]
    assert sum(parameter.numel() for parameter in architectures.Bare(settings).network.parameters()) == parameters
    assert architectures.operations(settings) == pytest.approx(2 * multiplications, rel=0.01)


def test_a_table_has_a_row_for_each_measurement(monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 1e-3)
    monkeypatch.setattr(architectures, "TUNING", architectures.replace(architectures.TUNING, rank=2))
    made = list(architectures.rows("small", SMALL, torch.device("cpu"), 1e9))
    columns = architectures.HEAD.splitlines()[0].count("|")
    assert [tuple(row.split(" | ")[1:3]) for row in made] == [
        *(("set construction", precision) for precision in ("float32", "tf32", "bfloat16", "float16")),
        *((f"fine-tuning, {adapter}", "bfloat16 products") for adapter in ("dora", "lora", "PEFT's own dora")),
    ]
    assert all(row.count("|") == columns for row in made)
    rate, seconds = float(made[0].split(" | ")[3].split()[0]), float(made[0].split(" | ")[4])
    assert seconds == pytest.approx(5000 / rate, rel=0.1)


def test_what_does_not_fit_says_so_and_the_rest_goes_on(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("_sampling", "_training", "_plain"):
        monkeypatch.setattr(architectures, name, full)
    made = list(architectures.rows("small", SMALL, torch.device("cpu"), 1e9))
    assert len(made) == 7 and all("does not fit: 2 images, micro-batches of 2" in row for row in made)


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:99"])
def test_a_machine_without_a_gpu_is_one_clear_line(device, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mitune.architectures", "--device", device])
    assert architectures.main() == 1
    assert capsys.readouterr().err.startswith(f"mitune: device '{device}' is no GPU that torch sees here; ")
