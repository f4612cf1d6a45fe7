"""Where a model's files come from, and whether they are whole: one clear line, with the remedy, for all that can be wrong with them."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

WANTED = ("*.json", "*.txt", "*.model", "*/model*.safetensors", "*diffusion_pytorch_model*.safetensors")  # of a repository: configurations, tokenizers, weights
UNWANTED = ("*fp16*", "*non_ema*", "*flax*", "*onnx*", "*openvino*", "safety_checker/*", "vae_1_0/*")


def located(source: str | Path, *, folder: Path | None = None) -> Path:
    """The folder `source`, or that of the hub's "owner/name" or "owner/name@revision", downloaded if it is not on this machine (into `folder` if one is given).

    Raises:
        ValueError: no such folder, no such model or revision, a gated model without a token, no network.
    """
    name, _, revision = str(source).partition("@")
    if Path(source).is_dir():
        return Path(source)
    if not on_hub(source):
        raise ValueError(f"there is no model in {str(source)!r}; name a diffusers pipeline folder or a hub model 'owner/name'")
    from huggingface_hub import errors, snapshot_download

    try:
        with quiet():
            return Path(snapshot_download(name, revision=revision or None, local_dir=folder, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except errors.GatedRepoError as error:
        remedy = f"accept its licence at https://huggingface.co/{name}, then `hf auth login` or set HF_TOKEN"
        raise ValueError(f"the model {name!r} is gated and this machine has no token that may read it: {remedy}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(f"the hub has no model {str(source)!r} that this machine may read; check its name and revision, or set HF_TOKEN") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        remedy = "download it where there is a network (`hf download`), and name the folder: with HF_HUB_OFFLINE=1 nothing else is asked"
        raise ValueError(f"the model {str(source)!r} is not on this machine, and the hub cannot be reached: {remedy}") from error


def on_hub(source: str | Path) -> bool:
    """Whether this can be a name on the hub, "owner/name" or "owner/name@revision"."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", str(source)))


def check_pipeline(folder: Path) -> tuple[str, list[str]]:
    """The class of the pipeline in a folder, and its parts, by its `model_index.json`.

    Raises:
        ValueError: no index, or a part that is missing, or whose weights are missing, cut off or a pickle.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"cannot load a diffusers pipeline from {str(folder)!r}: its model_index.json is {describe(error)}; download it again") from error
    for part in parts:
        if part == "safety_checker":
            continue
        if not (folder / part).is_dir():
            raise ValueError(f"cannot load a diffusers pipeline from {str(folder)!r}: its folder {part!r} is missing; download it again")
        if part.startswith("tokenizer") and not (folder / part / "tokenizer_config.json").is_file():
            raise ValueError(f"{str(folder / part / 'tokenizer_config.json')!r} is missing, which says how long a prompt may be; download it again")
        if (folder / part / "config.json").is_file():
            check_weights(folder / part)
    return index.get("_class_name", ""), parts


def check_weights(folder: Path) -> None:
    """Raises ValueError unless the folder of one network has its weights, whole and as safetensors."""
    files, pickles = sorted(folder.glob("*.safetensors")), sorted([*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")])
    if not files and pickles:
        raise ValueError(f"{str(pickles[0])!r} is a pickle, which can run any code, and no safetensors file is beside it; take a revision that has one")
    if not files:
        raise ValueError(f"there are no weights in {str(folder)!r}: no safetensors file; download it again")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(index)!r} is no list of weights ({describe(error)}); download it again") from error
        for name in sorted(named):
            if not (folder / name).is_file():
                raise ValueError(f"{str(folder / name)!r} is missing, of which {index.name} says that it is there; download it again")
    for file in files:
        check_file(file)


def check_file(file: Path) -> None:
    """Raises ValueError unless a safetensors file is whole: its header, and as many bytes as this says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is not a whole safetensors file ({describe(error)}); delete it and download it again") from error


def check_tokenizer(tokenizer, source: str | Path) -> None:
    """Raises ValueError for a tokenizer that knows no word, which is what transformers makes, without an error, where the vocabulary is missing."""
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:  # T5's has a mark of spaces even then
        raise ValueError(f"the tokenizer of {str(source)!r} knows no word: its tokenizer.json or vocabulary is missing; download it again")


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is a pickle of more than tensors, which can run any code"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def quiet(*, warnings: bool = False) -> Iterator[None]:
    """The libraries' loading bars off, which would end up in saved notebooks, the hub's word of each attempt too, and unless `warnings` transformers' about
    torchvision on importing."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import logging as of_hub
    from transformers.utils import logging as of_transformers

    shown, verbosity = [module for module in (of_diffusers, of_transformers) if module.is_progress_bar_enabled()], of_transformers.get_verbosity()
    attempts = of_hub.get_verbosity()
    of_hub.set_verbosity_error()
    for module in shown:
        module.disable_progress_bar()
    if not warnings:
        of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        of_hub.set_verbosity(attempts)
        of_transformers.set_verbosity(verbosity)
        for module in shown:
            module.enable_progress_bar()
