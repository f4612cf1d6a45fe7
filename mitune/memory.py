"""How much memory of an accelerator a model takes, estimated before anything runs on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALIVE = 40
"""Hidden states of full size that a network holds at once, skip connections and a feed-forward layer's inner width among them: a rule, rather too many."""

CHANNELS = 1024  # numbers that the autoencoder holds at once of each pixel, likewise
PIXELS = 2**20  # of the images in one pass of the autoencoder


@dataclass(frozen=True)
class Footprint:
    """What memory depends on. `weights` is parameters and bytes each, by part of the pipeline."""

    weights: Mapping[str, tuple[int, int]]
    positions: int  # places of a latent at which the network has hidden states, in its widest part
    width: int  # of these
    itemsize: int  # bytes of each number of them
    vae_itemsize: int

    def needed(self, images: int) -> int:
        """Bytes, for `images` at once, each in both branches: the weights, and the larger of 2 images x positions x width x ALIVE x itemsize and
        PIXELS x CHANNELS x vae_itemsize."""
        weights = sum(count * size for count, size in self.weights.values())
        network = 2 * images * self.positions * self.width * ALIVE * self.itemsize
        return weights + max(network, PIXELS * CHANNELS * self.vae_itemsize)

    def images(self, free: int) -> int:
        """How many at once `free` bytes have room for; 0 if not even one."""
        if self.needed(0) > free:
            return 0
        rest = free - sum(count * size for count, size in self.weights.values())
        return rest // (2 * self.positions * self.width * ALIVE * self.itemsize)


def footprint(model) -> Footprint:
    """Of a model of `mitune.pipelines`, its networks in the dtypes that they have."""
    config, (_, height, width) = model.network.config, model.latent_shape
    parts = {name: part for name, part in model.pipeline.components.items() if hasattr(part, "parameters")}
    weights = {name: (sum(p.numel() for p in part.parameters()), part.dtype.itemsize) for name, part in parts.items()}
    if "patch_size" in config:  # a transformer: every layer has all positions
        positions, inner = height * width // config.patch_size**2, config.num_attention_heads * config.attention_head_dim
    else:
        positions, inner = height * width, config.block_out_channels[0]
    return Footprint(weights, positions, inner, model.network.dtype.itemsize, model.pipeline.vae.dtype.itemsize)


def check(found: Footprint, images: int, free: int) -> None:
    """Raises ValueError unless `images` at once fit into `free` bytes."""
    needed = found.needed(images)
    if needed <= free:
        return
    fits = found.images(free)
    remedy = f"lower batch_size to {fits} or less" if fits else "use dtype: bfloat16, a lower text_dtype, or a larger device"
    raise ValueError(f"{images} images at once take about {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free: {remedy}")
