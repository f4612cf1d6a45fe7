"""Oracle: the rendered pixels and plain geometry. What a caption says holds in the scene, measured another way than it was made."""

import pytest
import torch

from mitune import captions, geometry, scenes


def draw(text, n=12, seed=0):
    return scenes.sample_scenes([captions.parse(text)] * n, torch.Generator().manual_seed(seed))


def distance_of_masks(drawn, i):
    """Smallest distance, px, between pixels of the two objects, from their masks alone."""
    masks = [geometry.coverage(drawn.shape[:, k], drawn.radius[:, k], drawn.centre[:, k])[i] > 0.5 for k in (0, 1)]
    points = [mask.nonzero().float() for mask in masks]
    return float(torch.cdist(*points).min())


@pytest.mark.parametrize("relation", captions.DIRECTIONS)
def test_directions_hold_with_a_margin(relation):
    drawn = draw(f"a circle {captions.RELATIONS[relation]} a star")
    offset = drawn.centre[:, 0] - drawn.centre[:, 1]
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    assert (sign * offset[:, axis] > 1.7 * offset[:, 1 - axis].abs()).all()


def test_apart_is_eight_pixels_and_touching_at_most_one():
    apart, touching = draw("a cross apart from a square"), draw("a cross touching a square")
    assert min(distance_of_masks(apart, i) for i in range(12)) >= 8
    assert max(distance_of_masks(touching, i) for i in range(12)) <= 1 + 2**0.5  # pixel centres stand up to a diagonal apart
    assert (geometry.overlap_share(touching.shape, touching.radius, touching.centre) < 0.05).all()


def test_overlapping_covers_a_quarter_of_the_smaller():
    drawn = draw("a moon overlapping a triangle")
    first, second = (geometry.coverage(drawn.shape[:, k], drawn.radius[:, k], drawn.centre[:, k]) for k in (0, 1))
    share = torch.minimum(first, second).sum((1, 2)) / torch.minimum(first.sum((1, 2)), second.sum((1, 2)))
    assert (share >= 0.25).all() and (share <= 0.75).all()


@pytest.mark.parametrize("inner", [shape for shape in captions.SHAPES if shape != "circle"])
def test_inside_is_inside(inner):
    drawn = draw(f"a {inner} inside a circle", n=6)
    inside, outside = (geometry.coverage(drawn.shape[:, k], drawn.radius[:, k], drawn.centre[:, k]) for k in (0, 1))
    assert (inside <= outside + 1e-3).all()
    assert scenes.contact(drawn) == ["inside"] * 6


def test_every_relation_is_read_back():
    for name, words in captions.CONTACTS.items():
        assert set(scenes.contact(draw(f"a star {words} a square"))) == {name}


def test_what_is_said_is_drawn_and_colours_differ():
    drawn = draw("a small red striped circle and a big blue dotted star")
    names = {"shape": ("circle", "star"), "color": ("red", "blue"), "texture": ("striped", "dotted"), "size": ("small", "big")}
    words = {"shape": captions.SHAPES, "color": captions.COLORS, "texture": captions.TEXTURES, "size": captions.SIZES}
    for name, said in names.items():
        assert [words[name][i] for i in getattr(drawn, name)[0]] == list(said)
    free = draw("a circle and a star", n=50)
    assert (free.color[:, 0] != free.color[:, 1]).all()


def test_free_attributes_avoid_held_out_pairs_unless_said():
    drawn = draw("a moon and a star", n=60)
    assert not (drawn.texture[drawn.shape == captions.SHAPES.index("moon")] == captions.TEXTURES.index("dotted")).any()
    said = draw("a dotted moon and a solid star", n=3)
    assert (said.texture[:, 0] == captions.TEXTURES.index("dotted")).all()


def test_solid_areas_are_those_of_the_shapes():
    """Rendered area against the closed form: pi r^2 for a circle, 2 (1.24 r)^2 for the square."""
    for shape, area in (("circle", torch.pi), ("square", 2 * 1.24**2)):
        drawn = draw(f"a solid {shape}", n=8)
        mask = geometry.coverage(drawn.shape[:, 0], drawn.radius[:, 0], drawn.centre[:, 0])
        torch.testing.assert_close(mask.sum((1, 2)), area * drawn.radius[:, 0] ** 2, rtol=0.02, atol=1.0)


def test_images_are_seeded_and_in_range():
    images = [scenes.render(draw("a red circle and a blue star"), torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*images) and images[0].shape == (12, 3, 64, 64) and images[0].abs().max() <= 1


@pytest.mark.parametrize(("plain", "share"), [(0.9, 0.9 + 0.1 / 3), (0.0, 1 / 3)])
def test_what_is_not_said_is_plain_at_the_set_rate(plain, share):
    drawn = scenes.sample_scenes([captions.parse("a red circle and a blue star")] * 600, torch.Generator().manual_seed(1), plain=plain)
    assert (drawn.texture == captions.TEXTURES.index("solid")).float().mean() == pytest.approx(share, abs=0.04)


def test_a_texture_looks_the_same_in_every_latent_cell():
    """Its own darkening of a large plain square, read from pixels, repeats every 8 px wherever the square stands."""
    drawn = draw("a big yellow dotted circle", n=2)
    drawn.radius[:] = 60.0
    images = scenes.render(drawn, torch.Generator().manual_seed(0))[..., 16:48, 16:48]
    assert images.std() > 0.1
    torch.testing.assert_close(images[..., 8:, 8:], images[..., :-8, :-8])
    torch.testing.assert_close(images[0], images[1])
