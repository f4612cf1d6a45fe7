"""Oracle: transformers' own image processors, and PIL."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mitune.pixels import CLIP, IMAGENET, Recipe, eight_bit, prepared


def pictures(height: int, width: int) -> torch.Tensor:
    """Two smooth images of 8 bits (2, 3, H, W)."""
    coarse = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").round().to(torch.uint8)


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


def assert_within_two_levels(ours: torch.Tensor, theirs: torch.Tensor, norm=CLIP):
    """PIL rounds after each of its two passes, torch after both."""
    levels = (ours - theirs).abs() * 255 * torch.tensor(norm[1]).view(3, 1, 1)
    assert ours.shape == theirs.shape and levels.max() < 2.01 and levels.mean() < 0.5


def test_eight_bits_are_those_of_a_file():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(eight_bit(to_unit(pixels)), pixels)
    assert torch.equal(eight_bit(torch.tensor([[-3.0, 3.0]])), torch.tensor([[0, 255]], dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(64, 64), (50, 70), (71, 40), (20, 24)])
def test_crop_is_clips_image_processor(shape):
    pixels = pictures(*shape)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})(list(pixels.numpy()), return_tensors="pt").pixel_values
    assert_within_two_levels(prepared(to_unit(pixels), Recipe(32, "crop")), theirs)


@pytest.mark.parametrize("shape", [(64, 64), (50, 70)])
def test_stretch_is_blips_image_processor(shape):
    pixels = pictures(*shape)
    theirs = BlipImageProcessorPil(size={"height": 48, "width": 48})(list(pixels.numpy()), return_tensors="pt").pixel_values
    assert_within_two_levels(prepared(to_unit(pixels), Recipe(48, "stretch")), theirs)


def test_pad_is_pils_resizing_on_a_black_square():
    pixels = pictures(40, 80)
    canvas = Image.new("RGB", (32, 32))
    canvas.paste(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((32, 16), Image.Resampling.BICUBIC), (0, 8))
    theirs = (torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255 - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(IMAGENET[1]).view(3, 1, 1)
    assert_within_two_levels(prepared(to_unit(pixels[:1]), Recipe(32, "pad", IMAGENET))[0], theirs, IMAGENET)


def test_an_image_of_the_right_size_is_not_resized():
    pixels = pictures(32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CLIP)
    for fit in ("stretch", "crop", "pad"):
        torch.testing.assert_close(prepared(to_unit(pixels), Recipe(32, fit)), (pixels / 255 - mean) / std)
