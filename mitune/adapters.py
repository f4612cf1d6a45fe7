"""Adapters as diffusers' `load_lora_weights` reads them: written with their settings, and put on a pipeline's networks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from mitune.loading import describe, quiet

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for


def save(pipeline, adapted: Mapping[str, torch.nn.Module], folder: Path, dtype: torch.dtype) -> None:
    """Write the adapters attached to these networks, by the pipeline's names of them, rank and alpha in the metadata; equal ones give equal bytes.

    Raises:
        ValueError: no network carries one.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors.torch import save_file

    if not adapted:
        raise ValueError("the model carries no adapter to save; attach one, or load it with fuse=False")
    layers, settings = {}, {}
    for part, network in adapted.items():
        ((_, config),) = network.peft_config.items()
        state = sorted(_layers(network).items())
        layers[f"{part}_lora_layers"] = {key: value.detach().to("cpu", dtype).contiguous() for key, value in state}
        settings |= {f"{part}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}  # one entry: safetensors writes several in random order
    pipeline.save_lora_weights(folder, save_function=partial(save_file, metadata=metadata), **layers)


def attach(pipeline, folder: Path) -> list[str]:
    """Load the adapter in `folder` into the networks of the pipeline that it is for, in float32; their names.

    Raises:
        ValueError: unless every tensor of the file found its place, all are finite, and some product B A is not zero.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise ValueError(f"there is no adapter in {str(folder)!r}: {ADAPTER_FILE} is missing; write it with save_adapter")
    try:
        stored, *_, settings = pipeline.lora_state_dict(folder, weight_name=ADAPTER_FILE, return_lora_metadata=True)
        networks = {part: getattr(pipeline, part) for part in sorted({key.partition(".")[0] for key in stored})}
        for part, network in networks.items():
            if part.startswith("text_encoder"):
                with quiet(warnings=True):
                    pipeline.load_lora_into_text_encoder(stored, None, network, prefix=part, adapter_name="default", metadata=settings)
            else:
                network.load_lora_adapter(folder, prefix=part, weight_name=ADAPTER_FILE, adapter_name="default")
        loaded = {f"{part}.{key}": value for part, network in networks.items() for key, value in _layers(network).items()}
    except Exception as error:
        raise ValueError(f"the adapter {str(file)!r} does not fit the model: {describe(error)}; was it trained on another?") from error
    if stored.keys() != loaded.keys():
        different = len(stored.keys() ^ loaded.keys())
        raise ValueError(f"the adapter {str(file)!r} does not fit the model: {different} tensors differ by name; was it trained on another?")
    if not all(value.isfinite().all() for value in loaded.values()):
        raise ValueError(f"the adapter {str(file)!r} holds values that are not finite; train it again with a lower learning rate")
    if not any(value.any() for key, value in loaded.items() if "lora_B" in key):
        raise ValueError(f"the adapter {str(file)!r} changes no weight: its B matrices are zero; train it first")
    for network in networks.values():
        network.float()  # the file may be float16
    return list(networks)


def _layers(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """An attached adapter's tensors by the names that the network's own library finds again: transformers' loader knows DoRA's magnitudes
    by their full name only, which PEFT shortens."""
    from peft.utils import get_peft_model_state_dict
    from transformers import PreTrainedModel

    (name,) = network.peft_config
    ending = ".weight" if isinstance(network, PreTrainedModel) else ""
    layers = get_peft_model_state_dict(network, adapter_name=name)
    return {key + ending if key.endswith(".lora_magnitude_vector") else key: value for key, value in layers.items()}
