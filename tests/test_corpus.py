"""Oracle: counts. Splits are disjoint as scenes, and captions are wrong at the rates that were set."""

import pytest
import torch

from mitune import captions, corpus

SHARES = dict.fromkeys(captions.CATEGORIES, 1.0)


@pytest.mark.parametrize("category", captions.CATEGORIES)
def test_splits_are_disjoint_as_scenes(category):
    splits = corpus.prompt_splits(category, seed=0)
    keys = {name: {captions.scene_key(captions.parse(prompt)) for prompt in prompts} for name, prompts in splits.items()}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))
    held_out = {name: [any(map(captions.is_held_out, captions.parse(prompt).phrases)) for prompt in prompts] for name, prompts in splits.items()}
    assert all(held_out.pop("comp", [True])) and not any(map(any, held_out.values()))
    assert len(splits["train"]) >= 40 and len(splits["val"]) >= 12 and len(splits["test"]) >= 40


def test_first_come_distinct_scenes():
    prompts = corpus.prompt_splits("color", seed=0)["test"][:60]
    assert len({captions.scene_key(captions.parse(prompt)) for prompt in prompts}) == 60


def test_web_captions_are_wrong_at_the_set_rates():
    generator = torch.Generator().manual_seed(0)
    true = corpus.sample_captions(600, generator, SHARES)
    drawn, said = corpus.web_captions(true, corpus.CaptionNoise(neglect=0.15, wrong=0.35), generator)
    wrong = sum(str(caption) != text for caption, text in zip(true, said, strict=True)) / 600
    neglected = float((drawn.shape[:, 1] < 0).float().mean())
    assert abs(wrong - 0.35) < 3 * (0.35 * 0.65 / 600) ** 0.5 and abs(neglected - 0.15) < 3 * (0.15 * 0.85 / 600) ** 0.5


def test_without_noise_captions_are_true():
    generator = torch.Generator().manual_seed(0)
    true = corpus.sample_captions(50, generator, SHARES)
    drawn, said = corpus.web_captions(true, corpus.CaptionNoise(neglect=0.0, wrong=0.0), generator)
    assert said == [str(caption) for caption in true] and (drawn.shape[:, 1] >= 0).all()


def test_captions_are_misquoted_at_a_rate_and_errors_of_a_lower_rate_remain():
    generator = torch.Generator().manual_seed(0)
    true = [str(caption) for caption in corpus.sample_captions(900, generator, {"color": 0.8, "single": 0.2})]
    pairs = [len(captions.parse(text).phrases) == 2 for text in true]
    said = {rate: corpus.misquoted(true, rate, seed=3) for rate in (0.0, 0.3, 0.6, 1.0)}
    wrong = {rate: {n for n, (text, told) in enumerate(zip(true, texts, strict=True)) if text != told} for rate, texts in said.items()}
    assert wrong[0.0] == set() and wrong[1.0] == {n for n, pair in enumerate(pairs) if pair}
    for rate in (0.3, 0.6):
        assert abs(len(wrong[rate]) / sum(pairs) - rate) < 3 * (rate * (1 - rate) / sum(pairs)) ** 0.5
    assert wrong[0.3] < wrong[0.6] and all(said[0.3][n] == said[0.6][n] for n in wrong[0.3])
