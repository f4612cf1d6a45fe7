"""Captioned images from the distribution that the base was pretrained on: what plays the part of real images where a study mixes them in."""

from __future__ import annotations

import torch

from mitune import captions as grammar
from mitune import scenes
from mitune.corpus import CaptionNoise, sample_captions, web_captions
from mitune.recipes import Recipe
from mitune.sampling import noise_generator


def draw(params, recipe: Recipe, category: str) -> tuple[torch.Tensor, list[str]]:
    """`real_pairs` rendered scenes (N, 3, H, W) and their captions, none of them seen in pretraining.

    Captions have the shares of the denoiser's last pretraining cycle, or are of the category alone (`real_from`), and are wrong at the rates of
    pretraining (`web`) or true (`clean`).
    """
    generator = noise_generator(params.seed, category, 0, "real")
    shares = {category: 1.0} if recipe.real_from == "category" else params.pretrain["unet_cycles"][-1]["shares"]
    noise = CaptionNoise(**params.pretrain["noise"]) if recipe.real_captions == "web" else CaptionNoise(neglect=0.0, wrong=0.0)
    drawn, texts = web_captions(sample_captions(recipe.real_pairs, generator, dict(shares)), noise, generator)
    return scenes.render(drawn, generator), texts


def rendered(prompts: list[str], count: int, seed: int, stream: str) -> torch.Tensor:
    """`count` rendered scenes (n, count, 3, H, W) of each prompt, of which it is true; each prompt's from its own generator."""
    images = []
    for text in prompts:
        generator = noise_generator(seed, text, 0, stream)
        images.append(scenes.render(scenes.sample_scenes([grammar.parse(text)] * count, generator), generator))
    return torch.stack(images)
