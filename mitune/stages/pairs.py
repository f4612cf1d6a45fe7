"""Captioned images that the model did not make, where a study mixes them in: real ones or, of the embedded model, from its pretraining distribution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from mitune import captions as grammar
from mitune import config, images, scenes
from mitune.config import embedded
from mitune.corpus import CaptionNoise, sample_captions, web_captions
from mitune.recipes import Recipe
from mitune.sampling import noise_generator


def key(params, recipe: Recipe, category: str) -> tuple:
    """All that `encoded` depends on beside the model; of real images their names and captions, not their bytes."""
    if embedded(params):
        return params.seed, category, recipe.real_pairs, recipe.real_captions, recipe.real_from, dict(params.pretrain)
    return tuple((item.name, item.caption) for item in real(params, recipe))


def encoded(params, recipe: Recipe, category: str, model) -> tuple[torch.Tensor, list[str]]:
    """Latents (N, C, h, w) of `real_pairs` images and their captions: `draw`n ones of the embedded model, of any other `real` ones."""
    if embedded(params):
        pictures, texts = draw(params, recipe, category)
        return model.encode_images(pictures), texts
    items = real(params, recipe)
    return torch.cat([model.encode_images(part) for part in opened(params, items, model)]), [item.caption for item in items]


def opened(params, items: list[images.Captioned], model) -> Iterator[torch.Tensor]:
    """Images (n, 3, H, W) at the model's size, `pool.batch_size` at once."""
    size, count = model.latent_shape[-1] * model.pipeline.vae_scale_factor, params.pool.batch_size
    return (images.pixels(items[start : start + count], size) for start in range(0, len(items), count))


def real(params, recipe: Recipe) -> list[images.Captioned]:
    """`real_pairs` of the images in `real_images`. Raises ValueError where there are none or fewer."""
    if params.real_images is None:
        raise ValueError(f"real is {recipe.real} and real_images has none: name a folder or tar shards of captioned images there, or remove the cell")
    return images.draw(images.captioned(config.root() / params.real_images), recipe.real_pairs, params.seed)


def apart(params, recipe: Recipe, category: str, counts: dict[str, int]) -> dict[str, list[images.Captioned]] | None:
    """So many of `real_images` by name, none of them twice, in the sets of the recipe or for another of its categories; None where there are too few."""
    if params.real_images is None:
        return None
    found = images.captioned(config.root() / params.real_images)
    own = iter(images.draw(found, len(found), params.seed)[recipe.real_pairs :][recipe.categories.index(category) :: len(recipe.categories)])
    drawn = {name: list(itertools.islice(own, count)) for name, count in counts.items()}
    return drawn if all(len(drawn[name]) == count for name, count in counts.items()) else None


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
