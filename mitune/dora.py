"""Weights with an adapter merged in, W' = m (W + s B A) / ||W + s B A||, so that a layer multiplies once, and not by W, A and B in turn.

PEFT computes the norm of W + s B A in every forward pass; here an optimizer step takes one norm and one merged weight a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """W' of an adapted linear layer (see `finetuning.add_adapter`); the norm takes no gradient, as in DoRA (Liu et al. 2024, Section 4.3)."""
    weight = layer.base_layer.weight + layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    if not layer.use_dora["default"]:
        return weight
    return (layer.lora_magnitude_vector["default"].weight / weight.detach().norm(dim=1))[:, None] * weight


@contextlib.contextmanager
def merged_forward(*networks: nn.Module) -> Iterator[None]:
    """Within the context adapted layers multiply by `merged_weight`, computed in each pass: the same function and gradients as PEFT's."""
    with _replaced({layer: partial(_forward, layer) for layer in _adapted(networks)}):
        yield


@contextlib.contextmanager
def merged_once(*networks: nn.Module) -> Iterator[None]:
    """As `merged_forward`, for several passes, each with its own `backward`, between two changes of the adapter: weights are merged once, on entering.

    The passes' gradients gather in the merged weights and reach the adapter, by the chain rule, on leaving.
    """
    layers = _adapted(networks)
    merged = [merged_weight(layer) for layer in layers]
    leaves = [weight.detach().requires_grad_() for weight in merged]
    with _replaced({layer: partial(_multiply, layer, leaf) for layer, leaf in zip(layers, leaves, strict=True)}):
        yield
    reached = [(weight, leaf.grad) for weight, leaf in zip(merged, leaves, strict=True) if leaf.grad is not None]
    torch.autograd.backward(*map(list, zip(*reached, strict=True)))


@contextlib.contextmanager
def bfloat16_around(*networks: nn.Module) -> Iterator[None]:
    """Within the context all but the adapted layers is in bfloat16, and with it the activations and the products; on leaving everything is as before.

    The weights that the adapter changes stay in float32 and are rounded as merged: of weights that bfloat16 holds exactly, rounding would take back every
    change below half their last digit, and so an adapter's first steps.
    """
    own = {id(parameter) for layer in _adapted(networks) for parameter in layer.parameters()}
    others = [parameter for network in networks for parameter in network.parameters() if id(parameter) not in own]
    whole = [parameter.data for parameter in others]
    for parameter in others:
        parameter.data = parameter.data.to(torch.bfloat16)
    try:
        yield
    finally:
        for parameter, data in zip(others, whole, strict=True):
            parameter.data = data


def _adapted(networks: tuple[nn.Module, ...]) -> list[nn.Module]:
    return [module for network in networks for module in network.modules() if hasattr(module, "lora_A")]


def _forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _multiply(layer, merged_weight(layer), x)


def _multiply(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    bias = layer.base_layer.bias
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@contextlib.contextmanager
def _replaced(forwards: dict[nn.Module, partial]) -> Iterator[None]:
    """Within the context these layers have these forwards."""
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in forwards:
            del layer.forward
