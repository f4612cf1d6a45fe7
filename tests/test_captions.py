"""Oracle: the grammar itself. What is written can be read back, wordings of a scene share a key, and a corruption changes one thing."""

import pytest
import torch

from mitune import captions
from mitune.captions import Caption, Phrase


@pytest.fixture
def sampled():
    generator = torch.Generator().manual_seed(0)
    return [captions.sample_caption(category, generator) for category in (*captions.CATEGORIES, "single") for _ in range(40)]


def test_captions_read_back(sampled):
    for caption in sampled:
        assert captions.parse(str(caption)) == caption


def test_a_foreign_prompt_is_refused_by_name():
    with pytest.raises(ValueError, match="a red bench"):
        captions.parse("a red bench and a blue bowl")


def test_the_world_is_large_enough():
    keys = {name: {captions.scene_key(caption) for caption in captions.category_captions(name)} for name in captions.CATEGORIES[:-1]}
    assert len(keys["color"]) == 300  # 15 pairs of shapes, 5 * 4 colours
    assert {name: len(k) for name, k in keys.items()} == {"color": 300, "shape": 60, "texture": 90, "spatial": 60, "non_spatial": 55}


def test_wordings_of_one_scene_share_its_key():
    left = Caption((Phrase("circle"), Phrase("star")), "left")
    right = Caption((Phrase("star"), Phrase("circle")), "right")
    assert captions.scene_key(left) == captions.scene_key(right)
    assert captions.scene_key(left) != captions.scene_key(Caption((Phrase("star"), Phrase("circle")), "left"))


def test_corruptions_are_wrong_by_one_error(sampled):
    for caption in sampled:
        for kind, wrong in captions.corruptions(caption).items():
            for other in wrong:
                assert captions.scene_key(other) != captions.scene_key(caption), (kind, str(caption), str(other))
                assert (other.relation != caption.relation) == (kind == "layout")
                assert ([p.shape for p in other.phrases] != [p.shape for p in caption.phrases]) == (kind == "object")


def test_a_mistake_names_its_kind(sampled):
    generator = torch.Generator().manual_seed(1)
    for caption in sampled:
        kind, wrong = captions.mistake(caption, generator, kinds=("swap", "replace", "layout", "object"))
        assert wrong in captions.corruptions(caption)[kind]
    assert captions.mistake(captions.parse("a circle and a star"), generator, kinds=("swap", "layout")) is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a red circle", ["a red circle"]),
        ("a red circle and a blue star", ["a red circle", "a blue star"]),
        ("a circle above a star", ["a circle", "a star", "a circle above a star"]),
        (
            "a small red solid star inside a big blue dotted circle",
            ["a small red solid star", "a big blue dotted circle", "a star inside a circle"],
        ),
    ],
)
def test_components_are_the_noun_phrases_and_the_bare_relation(text, parts):
    assert [str(part) for part in captions.components(captions.parse(text))] == parts


@pytest.mark.parametrize(
    ("text", "drawable"),
    [
        ("a star inside a circle", True),
        ("a small star inside a big circle", True),
        ("a circle inside a star", False),
        ("a big star inside a big circle", False),
        ("a small star inside a small circle", False),
        ("a big star touching a small moon", True),
    ],
)
def test_only_a_small_object_in_a_container_lies_inside(text, drawable):
    assert captions.is_drawable(captions.parse(text)) == drawable


def test_swapped_attributes_stay_with_their_words():
    swapped = captions.corruptions(captions.parse("a red circle and a blue star"))["swap"]
    assert [str(caption) for caption in swapped] == ["a blue circle and a red star"]


def test_held_out_pairs_are_never_sampled(sampled):
    assert not any(captions.is_held_out(phrase) for caption in sampled for phrase in caption.phrases)
