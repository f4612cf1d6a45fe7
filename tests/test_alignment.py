"""Oracle: a product worked by hand, the geometry of directions, and the shipped judge on rendered scenes."""

import math

import pytest
import torch

from mitune import alignment, captions, config, scenes

SHIPPED = config.root() / "data" / "shapes"


@pytest.fixture(scope="module")
def rendered():
    generator = torch.Generator().manual_seed(5)
    true = [captions.sample_caption(category, generator) for category in captions.CATEGORIES for _ in range(12)]
    wrong = [str(captions.corrupt(caption, generator)) for caption in true]
    return scenes.render(scenes.sample_scenes(true, generator), generator), [str(caption) for caption in true], wrong


def test_the_score_is_the_product_over_phrases_and_relation():
    torch.manual_seed(0)
    judge, image = alignment.ShapesJudge().eval(), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        answers = judge(image)
    circle, star = captions.SHAPES.index("circle"), captions.SHAPES.index("star")
    offset = answers["centre"][0, circle] - answers["centre"][0, star]
    by_hand = (
        answers["present"][0, circle, 0].sigmoid() * answers["color"][0, circle].softmax(-1)[captions.COLORS.index("red")]
        * answers["present"][0, star, 0].sigmoid() * answers["size"][0, star].softmax(-1)[captions.SIZES.index("big")]
        * torch.sigmoid(-offset[0] - offset[1].abs())
    )  # fmt: skip
    torch.testing.assert_close(judge.score(image, ["a red circle on the left of a big star"])[0], by_hand, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("offset", "relation"), [((-9, 2), "left"), ((9, 2), "right"), ((2, -9), "above"), ((2, 9), "below")])
def test_directions_are_told_by_the_dominant_axis(offset, relation):
    probability = {name: float(alignment.direction_probability(torch.tensor(offset, dtype=torch.float32), name)) for name in captions.DIRECTIONS}
    assert probability[relation] == pytest.approx(1 / (1 + math.exp(-7))) and max(probability, key=probability.get) == relation


def test_the_shipped_judge_tells_true_from_wrong(rendered):
    images, true, wrong = rendered
    judge = alignment.ShapesJudge.load(SHIPPED / "judge")
    right = judge.score(images, true) > 0.5
    assert right.float().mean() > 0.95 and (judge.score(images, wrong) < 0.5).float().mean() > 0.95
    scores, failures = judge.assess(images[right], [text for text, good in zip(true, right, strict=True) if good])
    assert failures.count("none") > 0.95 * right.sum() and bool((scores > 0.5).all())


def test_scores_do_not_depend_on_the_batch(rendered):
    images, true, _ = rendered
    judge, similarity = alignment.ShapesJudge.load(SHIPPED / "judge"), alignment.Similarity.load(SHIPPED / "similarity")
    for score in (judge.score, similarity.score):
        one_by_one = torch.cat([score(images[i : i + 1], true[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(score(images[:6], true[:6]), one_by_one, rtol=1e-4, atol=1e-5)


def test_a_prompt_outside_the_grammar_is_refused():
    with pytest.raises(ValueError, match="a purple elephant"):
        alignment.ShapesJudge().score(torch.zeros(1, 3, 64, 64), ["a purple elephant"])
