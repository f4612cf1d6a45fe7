"""Oracles: naive loops over matrices, the library's own fused adapter, and a TIES merge worked by hand."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from test_finetuning import CONFIG
from torch.testing import assert_close

from mitune import finetuning, merging
from mitune.models import load


@pytest.fixture
def attach(tiny_pipeline):
    """A model with an adapter attached, its parameters drawn, B and the magnitudes too."""

    def attached(seed, **changes):
        model, generator = load(tiny_pipeline), torch.Generator().manual_seed(seed)
        finetuning.add_adapter(model, replace(CONFIG, lora_alpha=8, **changes), seed=0)
        with torch.no_grad():
            for parameter in finetuning.trained_parameters(model).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return attached


@pytest.fixture(params=["dora", "lora"])
def pair(request, attach):
    return attach(1, adapter=request.param), attach(2, adapter=request.param)


def layer_of(model, name):
    layer = merging.adapted_layers(model)[name]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer.weight, a, b, layer.lora_magnitude_vector["default"].weight if layer.use_dora["default"] else None


def naive(weight, a, b, m):
    """W' by its equation, row by row; the scale lora_alpha / rank is 2."""
    changed = weight + 2 * b @ a
    return changed if m is None else torch.stack([m[i] * row / row.norm() for i, row in enumerate(changed)])


def test_linear_is_the_sum_of_weight_changes(pair):
    both = [merging.deltas(model) for model in pair]
    merged = merging.linear(both, [0.25, 0.75])
    for name in merged:
        weight = layer_of(pair[0], name)[0]
        expected = sum(w * (naive(*layer_of(model, name)) - weight) for w, model in zip((0.25, 0.75), pair, strict=True))
        assert_close(merged[name], expected.detach(), rtol=1e-4, atol=1e-5)
    mean = merging.linear([both[0]] * 3, [1 / 3] * 3)
    assert all(torch.allclose(mean[name], both[0][name], atol=1e-6) for name in mean)


def test_averaged_adapters_are_the_adapter_of_the_means(pair):
    before = [merging.deltas(model) for model in pair]
    merged = merging.averaged(pair, [0.25, 0.75])
    for name in merged:
        (weight, *first), (_, *second) = (layer_of(model, name) for model in pair)
        mean = [None if one is None else 0.25 * one + 0.75 * other for one, other in zip(first, second, strict=True)]
        assert_close(merged[name], (naive(weight, *mean) - weight).detach(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(delta, merging.deltas(pair[0])[name]) for name, delta in before[0].items())  # the models are as they were


def test_at_the_ends_stands_the_fused_adapter(pair, tiny_pipeline, tmp_path):
    """All ways of merging with weights 0 and 1 give, within rounding, the model into which the library fuses that one adapter."""
    latents, timesteps = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 700)
    both = [merging.deltas(model) for model in pair]
    for weights, model in (((1.0, 0.0), pair[0]), ((0.0, 1.0), pair[1])):
        folder = tmp_path / str(weights[0])
        model.save_adapter(folder)
        fused = load(tiny_pipeline, adapter=folder)
        for merged in (merging.linear(both, weights), merging.averaged(pair, weights)):
            ours = load(tiny_pipeline)
            captions = ours.encode(["a red circle"] * 3)
            with torch.no_grad():
                base = ours.predict(latents, timesteps, captions)
                merging.add(ours, merged)
                expected = fused.predict(latents, timesteps, captions)
                assert_close(ours.predict(latents, timesteps, captions), expected, rtol=1e-3, atol=1e-4)
            assert (expected - base).abs().max() > 1e-2
            assert ours.network.state_dict().keys() == fused.network.state_dict().keys()


def test_what_merging_does_to_doras_magnitudes(attach):
    """Averaged adapters have rows of the mean magnitude; merged weights have shorter ones, as directions differ."""
    pair, weights = (attach(1), attach(2)), (0.5, 0.5)
    base = {name: layer.base_layer.weight for name, layer in merging.adapted_layers(pair[0]).items()}
    both = [merging.deltas(model) for model in pair]
    straight, mean = merging.linear(both, weights), merging.averaged(pair, weights)
    for name, weight in base.items():
        m = [layer_of(model, name)[3] for model in pair]
        assert_close((weight + mean[name]).norm(dim=1), ((m[0] + m[1]) / 2).abs(), rtol=1e-4, atol=1e-5)
        assert ((weight + straight[name]).norm(dim=1) <= (m[0].abs() + m[1].abs()) / 2 + 1e-5).all()
    rows = {key: merging.describe(base, both, merged, weights) for key, merged in (("weights", straight), ("adapters", mean))}
    assert all(row["rows"] < 1 and row["apart"] == 0 for row in rows["weights"])
    assert all(abs(row["rows"] - 1) < 1e-4 and row["apart"] > 0.01 for row in rows["adapters"])
    first = rows["weights"][0]
    a, b = (one[first["layer"]].flatten() for one in both)
    assert first["cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
    assert first["norm"] == pytest.approx(float((0.5 * a + 0.5 * b).norm() / base[first["layer"]].norm()), rel=1e-4)


def test_ties_worked_by_hand():
    """Half of six entries stay, over both layers: (4, -3, 2) of the first, (-5, 1.5, 2.5) of the second. Signs elected: of 4 - 5, of -3, of 2 + 1.5, of 2.5."""
    first = {"a": torch.tensor([[4.0, -3.0]]), "b": torch.tensor([[2.0, 1.0], [0.5, 0.2]])}
    second = {"a": torch.tensor([[-5.0, 0.1]]), "b": torch.tensor([[1.5, -0.3], [0.4, 2.5]])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merging.ties([first, second], 0.5)
    assert_close(merged["a"], torch.tensor([[-5.0, -3.0]]))
    assert_close(merged["b"], torch.tensor([[1.75, 0.0], [0.0, 2.5]]))
    assert_close(merging.ties([first, first], 0.5)["a"], first["a"])
    with pytest.raises(ValueError, match="density is 1"):
        merging.ties([first, second], 1)


def test_what_does_not_fit_is_refused(attach, tiny_pipeline):
    model = attach(1)
    wide, narrow = merging.deltas(model), merging.deltas(attach(1, target_modules=("attention",)))
    with pytest.raises(ValueError, match=r"adapter 2 does not fit the first: .* is in one of them only"):
        merging.linear([wide, narrow], [0.5, 0.5])
    name = next(iter(wide))
    for method in (lambda several: merging.linear(several, [0.5, 0.5]), lambda several: merging.ties(several, 0.5)):
        with pytest.raises(ValueError, match=r"does not fit the first: .* is \(1, 2\), not"):
            method([wide, wide | {name: torch.zeros(1, 2)}])
    for other in ({"rank": 2}, {"adapter": "lora"}):
        with pytest.raises(ValueError, match="does not fit the first"):
            merging.averaged([model, attach(1, **other)], [0.5, 0.5])
    with pytest.raises(ValueError, match="sum to 1"):
        merging.averaged([model, model], [0.5, 0.6])
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        merging.linear([wide, wide], [1.0])
    bare = load(tiny_pipeline)
    with pytest.raises(ValueError, match="carries no adapter to merge"):
        merging.deltas(bare)
    for broken in ({"unet.nothing": torch.zeros(2, 2)}, {name: torch.zeros(1, 1)}):
        with pytest.raises(ValueError, match="the model has no layer"):
            merging.add(bare, broken)
