"""One model out of several adapters, by what each does to every adapted layer: delta_i = W'_i - W, with W' as in `finetuning.add_adapter`.

| | merged delta | |
|---|---|---|
| `linear` | sum_i w_i delta_i | the paper's Appendix E.3, and the mean of several |
| `averaged` | W'(sum_i w_i A_i, sum_i w_i B_i, sum_i w_i m_i) - W | the adapters themselves; the rows of W' have the mean magnitude |
| `ties` | mean of those entries of delta_i that are large and of the elected sign | Yadav et al. 2023, Algorithm 1 |

A row of W + `linear` is at most as long as the mean of the rows that it is merged from, for DoRA their magnitudes: it loses what their directions
differ by. PEFT's `add_weighted_adapter` merges A and B of DoRA adapters and leaves the magnitude of an untrained one; full deltas have no such trap.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mitune.dora import merged_weight
from mitune.pipelines import LatentDiffusion

Deltas = dict[str, torch.Tensor]
"""What is added to the weights (out, in) of layers, each by its network and place ("unet.down_blocks...to_q")."""


def adapted_layers(model: LatentDiffusion) -> dict[str, nn.Module]:
    """The layers that carry the attached adapter. Raises ValueError if there is none."""
    found = {f"{part}.{name}": layer for part, network in model.adapted.items() for name, layer in network.named_modules() if hasattr(layer, "lora_A")}
    if not found:
        raise ValueError("the model carries no adapter to merge; load it with fuse=False")
    return found


@torch.no_grad()
def deltas(model: LatentDiffusion) -> Deltas:
    """delta = W' - W of each layer that carries the attached adapter."""
    return {name: merged_weight(layer) - layer.base_layer.weight for name, layer in adapted_layers(model).items()}


def linear(several: Sequence[Deltas], weights: Sequence[float]) -> Deltas:
    """sum_i w_i delta_i. Raises ValueError for deltas of other layers or shapes, or weights that are not one each."""
    _check_fit(several)
    if len(weights) != len(several):
        raise ValueError(f"{len(several)} adapters and {len(weights)} weights; give each its own")
    return {name: sum(w * delta[name] for w, delta in zip(weights, several, strict=True)) for name in several[0]}


@torch.no_grad()
def averaged(models: Sequence[LatentDiffusion], weights: Sequence[float]) -> Deltas:
    """W' - W of the adapter whose A, B and (DoRA) magnitudes are the weighted sums of those attached to the models of one base.

    B A of the sums has the cross terms w_i w_j B_i A_j. A and B are known only up to B R, R^-1 A, so that sums of adapters mean something where
    the adapters have a start in common, which those of one seed and rank have.

    Raises:
        ValueError: adapters of other layers, ranks, kinds or scales, or weights that do not sum to 1: the base's share of a magnitude would not be 1.
    """
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights of adapters sum to {sum(weights):g}; they must sum to 1")
    layers = [adapted_layers(model) for model in models]
    own = [{f"{name}.{key}": value for name, layer in part.items() for key, value in layer.named_parameters() if "lora_" in key} for part in layers]
    _check_fit(own)
    if len({tuple(layer.scaling["default"] for layer in part.values()) for part in layers}) > 1:
        raise ValueError("adapters of other scales lora_alpha / rank do not fit one another; merge their weights")
    mean, found = linear(own, weights), {}
    for name, layer in layers[0].items():
        merged = copy.deepcopy(layer)
        merged.load_state_dict({key.removeprefix(f"{name}."): value for key, value in mean.items() if key.startswith(f"{name}.lora_")}, strict=False)
        found[name] = merged_weight(merged) - layer.base_layer.weight
    return found


def ties(several: Sequence[Deltas], density: float) -> Deltas:
    """TIES (Yadav et al. 2023, Algorithm 1, lambda = 1) by PEFT's functions, over the entries of all layers at once, as published.

    Trim: of each delta the share `density` of entries that are largest in absolute value stays, the others become 0. Elect: an entry's sign is
    that of the sum over the deltas (+ for 0). Merge: the mean of those that have it.

    Raises:
        ValueError: deltas of other layers or shapes, or a density that is not above 0 and below 1.
    """
    from peft.utils.merge_utils import ties as merge

    _check_fit(several)
    if not 0 < density < 1:
        raise ValueError(f"density is {density}; it must be above 0 and below 1")
    flat = [torch.cat([delta[name].flatten() for name in several[0]]) for delta in several]
    merged = merge(flat, torch.ones(len(flat)).to(flat[0]), density)
    parts = merged.split([delta.numel() for delta in several[0].values()])
    return {name: part.reshape(delta.shape) for (name, delta), part in zip(several[0].items(), parts, strict=True)}


@torch.no_grad()
def add(model: LatentDiffusion, merged: Deltas) -> None:
    """W + delta in place of W, in the weights' own dtype. Raises ValueError for a layer that the model lacks or that has another shape."""
    weights = {f"{part}.{name}": parameter for part, network in model.networks.items() for name, parameter in network.named_parameters()}
    for name, delta in merged.items():
        weight = weights.get(f"{name}.weight")
        if weight is None or weight.shape != delta.shape:
            raise ValueError(f"the model has no layer {name!r} of shape {tuple(delta.shape)}; were the adapters trained on another?")
        weight.add_(delta.to(weight))


def describe(base: Mapping[str, torch.Tensor], several: Sequence[Deltas], merged: Deltas, weights: Sequence[float]) -> list[dict[str, str | float]]:
    """What became of each layer, a row a layer; || || is the Frobenius norm, of `rows` that of a row.

    norm    ||delta|| / ||W||, W of `base`
    cosine  of two of the deltas that are merged, mean over pairs
    apart   ||delta - linear|| / ||linear||, linear = sum_i w_i delta_i
    rows    mean over rows of ||W + delta|| / sum_i w_i ||W + delta_i||: below 1 is what merging took from the magnitudes
    """
    straight, found = linear(several, weights), []
    for name, delta in merged.items():
        weight = base[name]
        mean = sum(w * (weight + one[name]).norm(dim=1) for w, one in zip(weights, several, strict=True))
        pairs = [F.cosine_similarity(a[name].flatten(), b[name].flatten(), dim=0) for a, b in itertools.combinations(several, 2)]
        row = {
            "norm": delta.norm() / weight.norm(),
            "cosine": torch.stack(pairs).mean(),
            "apart": (delta - straight[name]).norm() / straight[name].norm(),
            "rows": ((weight + delta).norm(dim=1) / mean).mean(),
        }
        found.append({"layer": name} | {key: float(value) for key, value in row.items()})
    return found


def _check_fit(several: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raises ValueError unless all have the same names and shapes."""
    first = several[0]
    for n, other in enumerate(several[1:], 2):
        if different := sorted(first.keys() ^ other.keys()):
            raise ValueError(f"adapter {n} does not fit the first: {different[0]!r} is in one of them only")
        for name, tensor in first.items():
            if tensor.shape != other[name].shape:
                raise ValueError(f"adapter {n} does not fit the first: {name!r} is {tuple(other[name].shape)}, not {tuple(tensor.shape)}")
