"""Benchmarks: whose prompts a model is fine-tuned on and examined with, by category and split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mitune.checks import SPLITS
from mitune.prompts import READERS, Prompt, Row, distinct, ranked, read_rows

MADE_BY = {"t2i-compbench": "make data-t2i-compbench", "diffusiondb": "make data-diffusiondb"}


@dataclass(frozen=True)
class Benchmark:
    """Prompts in a file or a folder of files (`mitune.prompts`), and how they are split.

    A file is `{category}_{split}`, as in T2I-CompBench, or `{category}`, which counts only in a folder that has none of the former; columns
    `category` and `split` take the place of its name, and what says no split is train. `splits` names those that the benchmark has, ours to
    its own (T2I-CompBench calls its test split val). `holdout` takes so many prompts of each category out of train for splits that the
    benchmark lacks: the first in the order of `mitune.prompts.ranked`; a larger `val` keeps the prompts of a smaller one.
    """

    source: Path
    column: str = "prompt"
    splits: Mapping[str, str] | None = None
    holdout: Mapping[str, int] | None = None
    seed: int = 0

    def load(self, category: str, split: str, n: int | None = None) -> list[Prompt]:
        """The first `n` distinct prompts (all by default) of a split, in the order of their file, each with its own id.

        Raises ValueError for an unknown category or split, for an `n` above the number of prompts, and as `mitune.prompts.read_rows` does.
        """
        found = self.prompts(category)
        if split not in found:
            has = ", ".join(f"{name} ({len(items)})" for name, items in found.items())
            what = f"category {category!r} has {has}" if found else f"it has {', '.join(self.categories()) or 'no prompt files'}"
            raise ValueError(f"no prompts for category {category!r}, split {split!r}, in {self.source}: {what}")
        items = found[split]
        if n is not None and n > len(items):
            raise ValueError(f"{self.source} has {len(items)} distinct prompts of {category} {split}, {n} were asked for: lower n_prompts or add prompts")
        return items[:n]

    def prompts(self, category: str) -> dict[str, list[Prompt]]:
        """Every split of a category that has prompts; none where the benchmark lacks the category."""
        found: dict[str, list[Prompt]] = {}
        for file in self._files():
            name, named = self._named(file)
            if name != category and file.suffix.lower() == ".txt":
                continue
            for row in read_rows(file, self.column):
                if (row.category or name) == category:
                    found.setdefault(self._split(file, row, named), []).append(row.prompt)
        found = {split: self._checked(distinct(found[split]), category, split) for split in SPLITS if split in found}
        return self._held_out(found, category) if found and self.holdout else found

    def categories(self) -> list[str]:
        """The categories that have prompts, in alphabetical order."""
        found = set()
        for file in self._files():
            name, _ = self._named(file)
            found |= {name} if file.suffix.lower() == ".txt" else {row.category or name for row in read_rows(file, self.column)}
        return sorted(found)

    def _files(self) -> list[Path]:
        source = Path(self.source)
        if not source.exists():
            raise ValueError(absent(source))
        files = [source] if source.is_file() else sorted(file for file in source.iterdir() if file.suffix.lower() in READERS)
        return [file for file in files if self._named(file)[1]] or files

    def _own(self) -> dict[str, str]:
        """The benchmark's names of splits to ours."""
        return {own: ours for ours, own in (self.splits or dict(zip(SPLITS, SPLITS, strict=True))).items()}

    def _named(self, file: Path) -> tuple[str, str | None]:
        """Category and split, ours, as the name of a file says them."""
        category, _, split = file.stem.rpartition("_")
        return (category, self._own()[split]) if category and split in self._own() else (file.stem, None)

    def _split(self, file: Path, row: Row, named: str | None) -> str:
        if row.split is None:
            return named or "train"
        if row.split not in self._own():
            known = ", ".join(self._own())
            raise ValueError(f"{file}, prompt {row.prompt.prompt_id}: split is {row.split!r}: it must be one of {known}, or `splits` must name it")
        return self._own()[row.split]

    def _checked(self, items: list[Prompt], category: str, split: str) -> list[Prompt]:
        seen: dict[int, str] = {}
        for item in items:
            if seen.setdefault(item.prompt_id, item.text) != item.text:
                raise ValueError(f"{self.source}: id {item.prompt_id} stands for two prompts of {category} {split}: {seen[item.prompt_id]!r}, {item.text!r}")
        return items

    def _held_out(self, found: dict[str, list[Prompt]], category: str) -> dict[str, list[Prompt]]:
        train, asked = found.get("train", []), sum(self.holdout.values())
        for split in self.holdout:
            if split in found:
                raise ValueError(f"holdout.{split} is {self.holdout[split]}: {self.source} has a split {split} of {category} already; remove it from holdout")
        if asked >= len(train):
            raise ValueError(f"holdout asks for {asked} prompts of {category}, and {self.source} has {len(train)} in train: lower it, so that some are left")
        left, home = ranked((item.text for item in train), self.seed), {}
        for split, n in self.holdout.items():
            home |= dict.fromkeys(left[:n], split)
            left = left[n:]
        home |= dict.fromkeys(left, "train")
        return found | {split: [item for item in train if home[item.text] == split] for split in (*self.holdout, "train")}


def absent(source: Path) -> str:
    """What to say of a source that is not there."""
    how = MADE_BY.get(source.name) or MADE_BY.get(source.parent.name)
    return f"{source} is missing: {f'`{how}` makes it (README, Prompts and images)' if how else 'a benchmark is a file or a folder of prompts'}"
