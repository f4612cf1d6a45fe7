"""Prompt files in T2I-CompBench's format: UTF-8 text, one prompt a line, named `{category}_{split}.txt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """A prompt and its home: `prompt_id` is the line of its file, counted from 0."""

    prompt_id: int
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """The distinct prompts of a file in its order, the first of duplicates kept; blank lines, CRLF and a byte-order mark are passed over.

    Raises ValueError for a file that is missing, empty, or not UTF-8.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: a prompt file holds one prompt a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    prompts: dict[str, Prompt] = {}
    for line, prompt in enumerate(part.strip() for part in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")):
        if prompt:
            prompts.setdefault(prompt, Prompt(line, prompt))
    if not prompts:
        raise ValueError(f"{path} has no prompt: write one prompt a line")
    return list(prompts.values())


def load(folder: Path, category: str, split: str, n: int | None = None) -> list[Prompt]:
    """The first `n` prompts (all by default) of one split (ours: train, val, test, comp; T2I-CompBench calls its test split `val`).

    Raises ValueError for an unknown category or split, and for an `n` above the number of prompts.
    """
    folder = Path(folder)
    path = folder / f"{category}_{split}.txt"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*_*.txt")) if folder.is_dir() else []
        raise ValueError(f"no prompts for category {category!r}, split {split!r}: {folder} has {', '.join(known) or 'no prompt files'}")
    prompts = read_prompts(path)
    if n is not None and n > len(prompts):
        raise ValueError(f"{path} has {len(prompts)} distinct prompts, {n} were asked for: lower n_prompts or add prompts")
    return prompts[:n]
