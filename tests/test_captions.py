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


def test_swapped_attributes_stay_with_their_words():
    swapped = captions.corruptions(captions.parse("a red circle and a blue star"))["swap"]
    assert [str(caption) for caption in swapped] == ["a blue circle and a red star"]


def test_held_out_pairs_are_never_sampled(sampled):
    assert not any(captions.is_held_out(phrase) for caption in sampled for phrase in caption.phrases)
