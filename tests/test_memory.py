"""Oracles: arithmetic by hand; parameters counted by torch."""

from __future__ import annotations

import pytest

from mitune.memory import ALIVE, CHANNELS, PIXELS, Footprint, check, footprint
from mitune.models import load

SD21 = Footprint({"unet": (866_000_000, 2), "text_encoder": (340_000_000, 4), "vae": (84_000_000, 4)}, 64 * 64, 320, 2, 4)
WEIGHTS = 866_000_000 * 2 + 340_000_000 * 4 + 84_000_000 * 4


def test_needed_is_weights_and_the_larger_of_network_and_autoencoder():
    assert SD21.needed(0) == WEIGHTS + PIXELS * CHANNELS * 4
    assert SD21.needed(50) == WEIGHTS + 2 * 50 * 4096 * 320 * ALIVE * 2
    assert SD21.needed(50) > SD21.needed(49)


def test_what_fits_is_named():
    for images in (30, 64):
        exactly = SD21.needed(images)
        check(SD21, images, exactly)
        assert SD21.images(exactly) == images
        with pytest.raises(ValueError, match=f"{images} images at once take about .* GiB are free: lower batch_size to {images - 1} or less"):
            check(SD21, images, exactly - 1)
    with pytest.raises(ValueError, match="use dtype: bfloat16"):
        check(SD21, 1, WEIGHTS)


@pytest.mark.parametrize(("fixture", "positions", "width"), [("tiny_pipeline", 64, 16), ("tiny_xl", 64, 32), ("tiny_sd3", 16, 32)])
def test_a_models_footprint_is_its_networks_own(request, fixture, positions, width):
    model = load(request.getfixturevalue(fixture), dtype="bfloat16")
    found = footprint(model)
    assert (found.positions, found.width, found.itemsize, found.vae_itemsize) == (positions, width, 2, 4)
    assert found.weights[model.network_name] == (sum(value.numel() for value in model.network.parameters()), 2)
    assert found.weights["vae"][1] == 4
