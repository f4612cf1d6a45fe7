"""Oracle: a reader that is told what was drawn, and the errors that it is made to make."""

import pytest
import torch
import torch.nn.functional as F

from mitune import captions, scenes
from mitune.corpus import judge_labels
from mitune.stages.base import judge_accuracy


class Reader:
    """Answers every question about `drawn` rightly, but for centres shifted by `shift` (2,) px times the object's number (0 or 1)."""

    def __init__(self, drawn: scenes.Scenes, shift=(0.0, 0.0)):
        self.drawn, self.known = drawn, judge_labels(drawn)["contact"]
        rows, n = torch.arange(len(drawn)), len(captions.SHAPES)
        words = {"color": captions.COLORS, "texture": captions.TEXTURES, "size": captions.SIZES}
        self.answers = {name: torch.zeros(len(drawn), n, len(options)) for name, options in words.items()}
        self.answers |= {"present": torch.full((len(drawn), n, 1), -1.0), "centre": torch.zeros(len(drawn), n, 2), "feature": torch.zeros(len(drawn), n, 1)}
        for i in (0, 1):
            here = drawn.shape[:, i] >= 0
            at = (rows[here], drawn.shape[here, i])
            for name, options in words.items():
                self.answers[name][at] = F.one_hot(getattr(drawn, name)[here, i], len(options)).float()
            self.answers["present"][at] = 1.0
            self.answers["centre"][at] = drawn.centre[here, i] + i * torch.tensor(shift)

    def __call__(self, images):
        return self.answers

    def contact(self, feature, first, second):
        return F.one_hot(self.known[self.known >= 0], 5).float()


@pytest.fixture(scope="module")
def drawn():
    texts = ["a red circle on the left of a blue square", "a red star above a blue circle", "a small red circle inside a big blue square", "a red circle"]
    return scenes.sample_scenes([captions.parse(text) for text in texts], torch.Generator().manual_seed(3))


def test_a_reader_that_knows_everything_is_always_right(drawn):
    assert set(judge_accuracy(Reader(drawn), torch.zeros(4, 3, 64, 64), drawn).values()) == {1.0}


def test_a_direction_is_asked_where_there_is_one(drawn):
    """Of a circle in the middle of a square there is none; where there is one, an error counts."""
    drawn.centre[2, 0], drawn.centre[2, 1] = torch.tensor([31.0, 32.0]), torch.tensor([33.0, 32.0])
    near = judge_accuracy(Reader(drawn, shift=(-4.0, 0.0)), torch.zeros(4, 3, 64, 64), drawn)
    assert near["direction"] == 1.0
    far = judge_accuracy(Reader(drawn, shift=(-60.0, 0.0)), torch.zeros(4, 3, 64, 64), drawn)
    assert far["direction"] == 0.0
    assert near["color"] == far["color"] == 1.0
