"""Pretrained networks of other people, from a folder or from the hub, and what it says where they cannot be had: one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mitune.loading import check_file, check_tokenizer, describe, on_hub, quiet


def pretrained(kind: Any, source: str | Path, *, device: str = "cpu", dtype: str = "float32") -> torch.nn.Module:
    """A transformers model of class `kind` for inference, from a folder or the hub ("owner/name" or "owner/name@revision").

    Raises:
        ValueError: it cannot be read, or its weights are not all there.
    """
    for weights in Path(source).glob("*.safetensors"):
        check_file(weights)
    with quiet():
        model, loaded = _opened(kind, source, dtype=getattr(torch, dtype), output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{str(source)!r} is not a {kind.__name__}: {len(missing)} of its tensors are missing, {missing[0]} for one; name other weights")
    return model.requires_grad_(False).eval().to(device)


def companion(kind: Any, source: str | Path) -> Any:
    """The tokenizer, processor or configuration beside a model. Raises ValueError where it cannot be read, or knows no word."""
    with quiet():
        found = _opened(kind, source)
    tokenizer = getattr(found, "tokenizer", found)
    if hasattr(tokenizer, "get_vocab"):
        check_tokenizer(tokenizer, source)
    return found


def file(source: str | Path, name: str) -> Path:
    """The file `source`, or the file `name` of the folder or hub repository `source`. Raises ValueError where there is none."""
    place = Path(source)
    if place.is_file() or (place / name).is_file():
        return place if place.is_file() else place / name
    if place.is_dir():
        raise ValueError(f"{name} is missing in {str(source)!r}: download it there, or name the file")
    _must_be_on_hub(name, source)
    try:
        from huggingface_hub import hf_hub_download

        repository, _, revision = str(source).partition("@")
        with quiet():
            return Path(hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:
        raise ValueError(_cannot(name, source, error)) from error


def _opened(kind: Any, source: str | Path, **options) -> Any:
    name, _, revision = str(source).partition("@")
    if Path(source).is_dir():
        name, revision = str(source), None
    else:
        _must_be_on_hub(kind.__name__, source)
    try:
        return kind.from_pretrained(name, revision=revision or None, **options)
    except Exception as error:
        raise ValueError(_cannot(kind.__name__, source, error)) from error


def _must_be_on_hub(what: str, source: str | Path) -> None:
    if not on_hub(source):
        raise ValueError(f"cannot read {what} from {str(source)!r}: that is no folder, and no name on the hub ('owner/name')")


def _cannot(what: str, source: str | Path, error: Exception) -> str:
    return f"cannot read {what} from {str(source)!r}: {describe(error)}; name a folder that has it, or download it from the hub first"
