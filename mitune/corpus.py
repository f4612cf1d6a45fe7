"""What the embedded model learns from and is asked: rendered scenes with true captions, scenes with web captions, and prompt files.

Prompts are split by *scene*: every wording of a scene is in one split. The compositional split holds pairs of a shape and a colour or
texture that no pretraining scene contains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mitune import captions as grammar
from mitune import scenes
from mitune.alignment import CONTACT_CLASSES
from mitune.shards import progress

SPLITS = {"train": 0.38, "val": 0.12, "test": 0.50}  # shares of a category's scenes


@dataclass(frozen=True)
class CaptionNoise:
    """Rates at which pretraining captions are wrong: the three failures the paper names."""

    neglect: float  # the image lacks one of the two objects that the caption names
    wrong: float  # attributes swapped or replaced, or the relation turned


def sample_captions(n: int, generator: torch.Generator, shares: dict[str, float]) -> list[grammar.Caption]:
    """n captions, categories drawn with probability proportional to `shares`."""
    names, weights = list(shares), torch.tensor(list(shares.values()))
    return [grammar.sample_caption(names[i], generator) for i in torch.multinomial(weights, n, replacement=True, generator=generator).tolist()]


def web_captions(captions: list[grammar.Caption], noise: CaptionNoise, generator: torch.Generator) -> tuple[scenes.Scenes, list[str]]:
    """Scenes of which `captions` are true, and the captions that a careless web page would give them.

    With probability `wrong` the caption of a two-object scene is corrupted (binding or layout); independently, with probability
    `neglect`, the image lacks one of the two objects.
    """
    drawn = scenes.sample_scenes(captions, generator)
    said = []
    for n, caption in enumerate(captions):
        two = len(caption.phrases) == 2
        if two and torch.rand((), generator=generator) < noise.wrong:
            caption = grammar.corrupt(caption, generator) or caption
        said.append(str(caption))
        if two and torch.rand((), generator=generator) < noise.neglect:
            lost = int(torch.randint(2, (), generator=generator))
            if lost == 0:
                for name in ("shape", "color", "texture", "size", "radius", "centre"):
                    getattr(drawn, name)[n] = getattr(drawn, name)[n].flip(0)
            drawn.shape[n, 1] = -1
    return drawn, said


def misquoted(texts: list[str], wrong: float, *, seed: int) -> list[str]:
    """The captions that remain of `texts` when those of two objects are corrupted with probability `wrong` (binding or layout).

    What is wrong at one rate is wrong in the same way at every higher rate.
    """
    generator = torch.Generator().manual_seed(seed)
    said = []
    for text, draw in zip(texts, torch.rand(len(texts), generator=generator).tolist(), strict=True):
        caption = grammar.parse(text)
        false = grammar.corrupt(caption, generator) if len(caption.phrases) == 2 else None
        said.append(str(false) if false and draw < wrong else text)
    return said


def clean_scenes(n: int, shares: dict[str, float], *, seed: int, plain: float = scenes.PLAIN) -> tuple[torch.Tensor, list[grammar.Caption], scenes.Scenes]:
    """Rendered scenes, their true captions, and what was drawn; `plain` as in `sample_scenes`."""
    generator = torch.Generator().manual_seed(seed)
    captions = sample_captions(n, generator, shares)
    drawn = []
    with progress(n, "scenes", unit="scene") as bar:
        for i in range(0, n, 1000):
            drawn.append(scenes.sample_scenes(captions[i : i + 1000], generator, plain=plain))
            bar.update(len(drawn[-1]))
    joined = scenes.Scenes(*(torch.cat([getattr(part, name) for part in drawn]) for name in scenes.Scenes.__dataclass_fields__))
    return scenes.render(joined, generator), captions, joined


@torch.inference_mode()
def web_latents(n: int, shares: dict[str, float], noise: CaptionNoise, vae, *, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Scaled latents (N, 4, 8, 8) of scenes and their web captions."""
    generator = torch.Generator().manual_seed(seed)
    latents, texts = [], []
    with progress(n, "latents", unit="scene") as bar:
        for start in range(0, n, 1000):
            drawn, said = web_captions(sample_captions(min(1000, n - start), generator, shares), noise, generator)
            images = scenes.render(drawn, generator)
            latents += [vae.encode(part.to(vae.device)).latent_dist.mean.cpu() * vae.config.scaling_factor for part in images.split(250)]
            texts += said
            bar.update(len(said))
    return torch.cat(latents), texts


def judge_labels(drawn: scenes.Scenes) -> dict[str, torch.Tensor]:
    """The truth about N scenes: `shape`, `color`, `texture`, `size`, `centre` as drawn, and `contact` (N,), -1 where there is no clear margin."""
    names = [CONTACT_CLASSES.index(name) if name else -1 for start in range(0, len(drawn), 512) for name in scenes.contact(drawn[start : start + 512])]
    return {name: getattr(drawn, name) for name in ("shape", "color", "texture", "size", "centre")} | {"contact": torch.tensor(names)}


def prompt_splits(category: str, *, seed: int) -> dict[str, list[str]]:
    """Prompts of each split of a category: first one wording of every scene, then the other wordings, each in an order drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    if category == "complex":
        captions = list(dict.fromkeys(grammar.sample_caption("complex", generator) for _ in range(240)))
    else:
        captions = grammar.category_captions(category)
    by_scene: dict[str, list[grammar.Caption]] = {}
    for i in torch.randperm(len(captions), generator=generator).tolist():
        by_scene.setdefault(grammar.scene_key(captions[i]), []).append(captions[i])
    held_out = [wordings for wordings in by_scene.values() if any(map(grammar.is_held_out, wordings[0].phrases))]
    known = [wordings for wordings in by_scene.values() if wordings not in held_out]
    bounds = [0, *(round(len(known) * share) for share in (SPLITS["train"], SPLITS["train"] + SPLITS["val"], 1))]
    splits = {name: known[start:stop] for name, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False)} | ({"comp": held_out} if held_out else {})
    return {name: [str(w[i]) for i in range(max(map(len, group))) for w in group if i < len(w)] for name, group in splits.items()}


def write_prompts(folder: Path, *, seed: int) -> None:
    """The files `{category}_{split}.txt`, one prompt a line, as in T2I-CompBench."""
    folder.mkdir(parents=True, exist_ok=True)
    for category in grammar.CATEGORIES:
        for split, prompts in prompt_splits(category, seed=seed).items():
            (folder / f"{category}_{split}.txt").write_text("\n".join(prompts) + "\n")
