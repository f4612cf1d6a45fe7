"""Oracles: a plain PEFT and AdamW loop, bit-for-bit invariants of resuming, and the closed form of DoRA's merged weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from mitune import dora, finetuning
from mitune.models import load
from mitune.recipes import Finetune, Timesteps

CONFIG = Finetune(
    adapter="dora", rank=4, lora_alpha=4, target_modules=("attention", "ff"), text_encoder=False, learning_rate=1e-2, betas=(0.9, 0.999), weight_decay=1e-2,
    epsilon=1e-8, max_grad_norm=1.0, steps=6, batch_size=8, micro_batch_size=8, mixed_precision="no", timesteps=Timesteps(500, 1000), checkpoint_every=3,
    save_dtype="float32", seed=0,
)  # fmt: skip

CAPTIONS = ["a red circle", "a blue square", "a green star", "a red moon", "a blue circle"]


@pytest.fixture
def model(tiny_pipeline):
    return load(tiny_pipeline)


@pytest.fixture
def data(model):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return latents, model.encode(CAPTIONS)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.network.state_dict().items()}


def train(model, data, folder, config=CONFIG, **arguments) -> list[dict[str, float]]:
    return finetuning.finetune(model, *data, config, seed=arguments.pop("seed", 0), folder_checkpoints=folder, **arguments)


def loss_of(model, data) -> float:
    batch = finetuning.step_batch(data[0], replace(CONFIG, batch_size=100), seed=99, step=0)
    with torch.no_grad():
        return float(finetuning.objective(model, batch["latents"], batch["noise"], batch["timesteps"], data[1][batch["rows"]]))


def test_loss_falls_and_only_the_adapter_learns(model, data, tmp_path):
    before, start = weights(model), loss_of(model, data)
    rows = train(model, data, tmp_path, replace(CONFIG, steps=40))
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert all(row["grad_norm"] > 0 for row in rows)
    assert loss_of(model, data) < 0.9 * start
    learnt = weights(model)
    assert any("lora_magnitude_vector" in name for name in learnt)
    finetuning.remove_adapter(model)
    after = weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="no adapter to remove"):
        finetuning.remove_adapter(model)


def test_first_steps_agree_with_a_plain_loop(model, data, tmp_path):
    rows = train(model, data, tmp_path, replace(CONFIG, steps=3))
    learnt = weights(model)
    finetuning.remove_adapter(model)
    finetuning.add_adapter(model, CONFIG, seed=0)
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2)
    for step in range(3):
        batch = finetuning.step_batch(data[0], CONFIG, seed=0, step=step)
        scheduler, t = model.pipeline.scheduler, batch["timesteps"]
        prediction = model.predict(scheduler.add_noise(batch["latents"], batch["noise"], t), t, data[1][batch["rows"]])
        loss = torch.nn.functional.mse_loss(prediction, scheduler.get_velocity(batch["latents"], batch["noise"], t))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert_close([rows[step]["loss"], rows[step]["grad_norm"]], [loss.item(), norm.item()])
    for name, value in weights(model).items():
        assert_close(value, learnt[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adapter", ["dora", "lora"])
def test_interrupted_run_ends_with_the_same_bytes(model, data, tmp_path, adapter):
    config = replace(CONFIG, adapter=adapter)
    rows = train(model, data, tmp_path / "whole", config)
    learnt = weights(model)
    finetuning.remove_adapter(model)

    done = []

    def stop(n):
        done.append(n)
        if sum(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, data, tmp_path / "cut", config, progress=stop)
    finetuning.remove_adapter(model)
    done.clear()
    assert train(model, data, tmp_path / "cut", config, progress=done.append) == rows
    assert done == [3, 1, 1, 1]  # three steps were kept
    assert all(torch.equal(value, learnt[name]) for name, value in weights(model).items())


def test_a_checkpoint_of_other_data_or_settings_is_not_taken(model, data, tmp_path):
    short = replace(CONFIG, steps=2)
    shifted, swapped = (data[0] + 1, data[1]), (data[0], data[1][torch.tensor([1, 0, 2, 3, 4])])
    for part, arguments in ((data, {}), (data, {"seed": 1}), (data, {"config": replace(short, rank=2)}), (shifted, {}), (swapped, {})):
        steps = []
        train(model, part, tmp_path, progress=steps.append, **({"config": short} | arguments))
        assert steps == [1] * 2
        finetuning.remove_adapter(model)
    steps = []
    train(model, data, tmp_path, replace(short, checkpoint_every=1), progress=steps.append)
    assert steps == [2]
    assert len(list(tmp_path.glob("*.pt"))) == 5
    assert not list(tmp_path.glob("*.part"))


def test_micro_batches_change_nothing_but_rounding(model, data, tmp_path):
    whole = train(model, data, tmp_path / "whole", replace(CONFIG, learning_rate=1e-3))
    finetuning.remove_adapter(model)
    parts = train(model, data, tmp_path / "parts", replace(CONFIG, learning_rate=1e-3, micro_batch_size=3))
    for a, b in zip(whole, parts, strict=True):
        assert_close([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-3, atol=1e-4)


def test_only_the_chosen_timesteps_and_every_image_equally_often(data):
    config = replace(CONFIG, timesteps=Timesteps(997, 1000), batch_size=8)
    batches = [finetuning.step_batch(data[0], config, seed=0, step=step) for step in range(5)]
    assert set(torch.cat([batch["timesteps"] for batch in batches]).tolist()) == {997, 998, 999}
    rows = torch.cat([batch["rows"] for batch in batches])
    assert rows.bincount().tolist() == [8] * 5
    assert all(set(part.tolist()) == set(range(5)) for part in rows.split(5))
    assert not torch.equal(batches[0]["noise"], batches[1]["noise"])
    again = finetuning.step_batch(data[0], config, seed=0, step=3)
    assert all(torch.equal(again[name], batches[3][name]) for name in again)
    assert torch.equal(again["latents"], data[0][again["rows"]])


def test_adapter_round_trip_through_the_pipelines_own_format(model, data, tiny_pipeline, tmp_path):
    config = replace(CONFIG, lora_alpha=8)  # not the rank: lost metadata would show
    train(model, data, tmp_path / "checkpoints", config)
    with torch.no_grad():  # training hardly moves the magnitude, so that a lost one would not show
        for name, parameter in model.network.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.3)
    model.save_adapter(tmp_path / "adapter")
    timesteps = torch.full((5,), 700)
    with torch.no_grad():
        attached = model.predict(data[0], timesteps, data[1])
        loaded = load(tiny_pipeline, adapter=tmp_path / "adapter")
        assert_close(loaded.predict(data[0], timesteps, data[1]), attached, rtol=1e-3, atol=1e-4)
        finetuning.remove_adapter(model)
        assert (model.predict(data[0], timesteps, data[1]) - attached).abs().max() > 1e-2


@pytest.mark.parametrize("adapter", ["dora", "lora"])
def test_the_text_encoder_is_trained_jointly_saved_and_loaded(model, data, tiny_pipeline, tmp_path, capfd, adapter):
    config = replace(CONFIG, adapter=adapter, text_encoder=True, lora_alpha=8)
    latents, ids, timesteps = data[0], finetuning.read_captions(model, CAPTIONS, config), torch.full((5,), 700)
    before = {name: value.clone() for name, value in model.pipeline.text_encoder.state_dict().items()}
    with torch.no_grad():
        assert_close(model.predict(latents, timesteps, ids), model.predict(latents, timesteps, data[1]), rtol=1e-4, atol=1e-5)
    rows = train(model, (latents, ids), tmp_path / "checkpoints", config)
    assert len(rows) == config.steps
    trained = finetuning.trained_parameters(model)
    assert {name.partition(".")[0] for name in trained} == {"unet", "text_encoder"}
    assert all(parameter.any() for name, parameter in trained.items() if "lora_B" in name)
    with torch.no_grad():  # training hardly moves the magnitudes, so that lost ones would not show
        for name, parameter in trained.items():
            parameter.mul_(1.3 if "lora_magnitude_vector" in name else 1)
        model.save_adapter(tmp_path / "adapter")
        attached, frozen = model.predict(latents, timesteps, ids), model.predict(latents, timesteps, data[1])
        assert (attached - frozen).abs().max() > 1e-3  # the text encoder has moved
        for fuse in (True, False):
            loaded = load(tiny_pipeline, adapter=tmp_path / "adapter", fuse=fuse)
            assert bool(loaded.adapted) is not fuse
            assert_close(loaded.predict(latents, timesteps, loaded.encode(CAPTIONS)), attached, rtol=1e-3, atol=1e-4)
        assert capfd.readouterr().err == ""  # no bar and no report of names that were not found: it would end up in a notebook
        bare = load(tiny_pipeline)
        bare.pipeline.load_lora_weights(tmp_path / "adapter")  # as anyone would
        assert_close(bare.predict(latents, timesteps, bare.encode(CAPTIONS)), attached, rtol=1e-3, atol=1e-4)
    finetuning.remove_adapter(model)
    after = model.pipeline.text_encoder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_merged_weight_is_doras_equation(model, data, tiny_pipeline, tmp_path):
    train(model, data, tmp_path / "checkpoints", replace(CONFIG, lora_alpha=8))
    name = next(name for name, _ in model.network.named_modules() if name.endswith("attn2.to_q"))
    layer = model.network.get_submodule(name)
    a, b, m = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight
    direction = layer.base_layer.weight + 8 / 4 * b @ a
    expected = (m[:, None] * direction / direction.norm(dim=1, keepdim=True)).detach()
    model.save_adapter(tmp_path / "adapter")
    merged = load(tiny_pipeline, adapter=tmp_path / "adapter").network.get_submodule(name).weight
    assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert (merged - layer.base_layer.weight).abs().max() > 1e-3


@pytest.mark.parametrize("adapter", ["dora", "lora"])
def test_merged_forward_is_pefts(model, data, adapter):
    finetuning.add_adapter(model, replace(CONFIG, adapter=adapter, lora_alpha=8), seed=0)
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    with torch.no_grad():  # away from B = 0, where the forms agree trivially
        for parameter in trained:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def run():
        prediction = model.predict(data[0], torch.full((5,), 700), data[1][torch.arange(5)])
        return [prediction.detach(), *torch.autograd.grad(prediction.square().sum(), trained)]

    pefts = run()
    with dora.merged_forward(model.network):
        ours = run()
    for a, b in zip(ours, pefts, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert all(torch.equal(a, b) for a, b in zip(run(), pefts, strict=True))  # PEFT's own forward is back


@pytest.mark.parametrize("adapter", ["dora", "lora"])
def test_weights_merged_once_gather_the_gradients_of_pefts_passes(model, data, adapter):
    """The oracle is PEFT's own forward of each pass, with the gradients added up."""
    finetuning.add_adapter(model, replace(CONFIG, adapter=adapter, lora_alpha=8), seed=0)
    generator, trained, merges = torch.Generator().manual_seed(1), finetuning.trained_parameters(model), []
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def gradients():
        for rows in ([0, 1], [2, 3], [4]):
            model.predict(data[0][rows], torch.full((len(rows),), 700), data[1][rows]).square().sum().backward()
        return {name: parameter.grad for name, parameter in trained.items()}

    pefts = {name: gradient.clone() for name, gradient in gradients().items()}
    model.network.zero_grad()
    merged_weight = dora.merged_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora, "merged_weight", lambda layer: (merges.append(layer), merged_weight(layer))[1])
        with dora.merged_once(model.network):
            gradients()
            assert all(parameter.grad is None for parameter in trained.values())
    assert len(merges) == len(set(merges)) == sum(name.endswith("lora_A.default.weight") for name in trained)  # one norm a layer, whatever the number of passes
    for name, parameter in trained.items():
        assert (parameter.grad - pefts[name]).norm() <= 1e-4 * pefts[name].norm(), name


def test_bfloat16_products_leave_the_adapter_in_float32(model, data, tmp_path):
    before, whole = weights(model), train(model, data, tmp_path / "whole")
    finetuning.remove_adapter(model)
    mixed = train(model, data, tmp_path / "mixed", replace(CONFIG, mixed_precision="bf16", micro_batch_size=4))
    assert {parameter.dtype for parameter in finetuning.trained_parameters(model).values()} == {torch.float32}
    assert [row["loss"] for row in mixed] != [row["loss"] for row in whole]
    assert_close([row["loss"] for row in mixed], [row["loss"] for row in whole], rtol=2e-2, atol=0)
    finetuning.remove_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_change_below_half_a_digit_of_bfloat16_is_not_lost(model, data):
    """It would be, of weights that bfloat16 holds exactly: 1 + 2^-9 is 1 there."""
    finetuning.add_adapter(model, CONFIG, seed=0)
    layer = next(module for module in model.network.modules() if hasattr(module, "lora_A"))
    before = dora.merged_weight(layer).detach()
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(1e-3 * before.abs().mean())
        with dora.bfloat16_around(model.network):
            assert layer.base_layer.weight.dtype == torch.float32 and model.network.conv_in.weight.dtype == torch.bfloat16
            changed = dora.merged_weight(layer)
            rounded = (changed.bfloat16().float() - before.bfloat16().float()).norm()
    assert rounded > 0.5 * (changed - before).norm()


def test_targets_are_attention_and_fully_connected_layers(model):
    assert finetuning.target_modules(model.network, "attention") == ["to_k", "to_out.0", "to_q", "to_v"]
    both = ["ff.net.0.proj", "ff.net.2", "to_k", "to_out.0", "to_q", "to_v"]
    for names in ("attention+ff", ("ff", "attention"), both):
        assert finetuning.target_modules(model.network, names) == both
    finetuning.add_adapter(model, CONFIG, seed=0)
    adapted = {name for name, module in model.network.named_modules() if hasattr(module, "lora_A")}
    linear = {name for name, module in model.network.named_modules() if isinstance(module, torch.nn.Linear) and "lora" not in name}
    assert adapted == {name.removesuffix(".base_layer") for name in linear if "transformer_blocks" in name}
    assert model.network.peft_config["default"].target_modules == both  # a list: a set would be written in another order each run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "finetune.learning_rate is 0.0"),
        ({"adapter": "vera"}, "finetune.adapter is 'vera'; choose dora or lora"),
        ({"timesteps": Timesteps(500, 1001)}, "finetune.timesteps 500..1001"),
        ({"target_modules": ("to_w",)}, "finetune.target_modules: no layer is called 'to_w'"),
    ],
)
def test_bad_settings_are_one_clear_line(model, data, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        train(model, data, tmp_path, replace(CONFIG, **change))
    assert "\n" not in str(error.value)
    assert not hasattr(model.network, "peft_config")


def test_a_batch_that_does_not_split_into_the_processes_is_one_clear_line(model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"finetune\.batch_size is 8: it does not split into 3 processes; choose a multiple"):
        train(model, data, tmp_path)
    assert not hasattr(model.network, "peft_config")


def test_bad_data_is_one_clear_line(model, data, tmp_path):
    latents, conditioning = data
    with pytest.raises(ValueError, match="the fine-tuning set is empty"):
        train(model, (latents[:0], conditioning), tmp_path)
    with pytest.raises(ValueError, match="3 latents and 5 captions"):
        train(model, (latents[:3], conditioning), tmp_path)
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        train(model, (latents * float("nan"), conditioning), tmp_path)
    with pytest.raises(ValueError, match=r"finetune\.text_encoder is True; read the captions with read_captions"):
        train(model, data, tmp_path, replace(CONFIG, text_encoder=True))
    with pytest.raises(ValueError, match="carries an adapter already"):
        train(model, data, tmp_path)
