"""Features of images for distances between distributions (`quality`), by the networks and recipes of FID, FD-DINOv2 and CMMD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from mitune.alignment import embedded
from mitune.loading import describe
from mitune.pixels import IMAGENET, Recipe, eight_bit, prepared
from mitune.pretrained import file, pretrained

INCEPTION_FILE = "inception-2015-12-05.pt"


class Features:
    """Images in [-1, 1] to features (N, d), float32, by `network`, which takes what `prepare` makes of images (N, 3, H, W)."""

    def __init__(self, network: Callable[[torch.Tensor], torch.Tensor], prepare: Callable[[torch.Tensor], torch.Tensor], device: str, *, batch_size: int = 64):
        self.network, self.prepare, self.device, self.batch_size = network, prepare, device, batch_size

    @torch.inference_mode()
    def features(self, images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Of images (N, 3, H, W), or of a list of images (3, H, W) of any sizes."""
        return torch.cat([self._part(images[n : n + self.batch_size]) for n in range(0, len(images), self.batch_size)])

    def _part(self, images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        if isinstance(images, torch.Tensor):
            return self.network(self.prepare(images.to(self.device))).float()
        ready = [self.prepare(image[None].to(self.device)) for image in images]
        alike = len({image.shape for image in ready}) == 1
        return torch.cat([self.network(part).float() for part in ([torch.cat(ready)] if alike else ready)])


def inception(source: str | Path, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 64) -> Features:
    """FID's (Heusel et al. 2017): the 2048 pooled features of the original Inception v3, from its TorchScript file as NVIDIA publishes it with StyleGAN,
    which resizes inside. Raises ValueError where `source` is no such file nor has one."""
    path = file(source, INCEPTION_FILE)
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:
        raise ValueError(f"{path} is not TorchScript: {describe(error)}; download {INCEPTION_FILE} of StyleGAN's metrics") from error
    return Features(lambda pixels: network(pixels, return_features=True), eight_bit, device, batch_size=batch_size)


def dinov2(source: str | Path, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 64) -> Features:
    """FD-DINOv2's (Stein et al. 2023): the class token of ViT-L/14 after the last norm, of images resized to 224 px, both edges."""
    from transformers import Dinov2Model

    model, recipe = pretrained(Dinov2Model, source, device=device, dtype=dtype), Recipe(224, "stretch", IMAGENET)
    return Features(lambda pixels: model(pixels.to(model.dtype)).last_hidden_state[:, 0], lambda part: prepared(part, recipe), device, batch_size=batch_size)


def clip(source: str | Path, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 64) -> Features:
    """CMMD's (Jayasumana et al. 2024): the unit-norm embedding of CLIP ViT-L/14 at 336 px, of the centre of images resized by the shorter edge."""
    from transformers import CLIPModel

    model = pretrained(CLIPModel, source, device=device, dtype=dtype)
    recipe = Recipe(model.config.vision_config.image_size, "crop")
    return Features(
        lambda pixels: F.normalize(embedded(model, pixels.to(model.dtype)).float(), dim=-1), lambda part: prepared(part, recipe), device, batch_size=batch_size
    )
