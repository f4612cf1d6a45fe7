"""Oracle: boxes whose score is worked by hand, and a naive loop over OWLv2's own output."""

import json

import pytest
import torch
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from mitune.language import Sentence, related_objects
from mitune.spatial import CONFIDENCE, Found, Owl, Spatial, iou, position, spatial_score

LEFT, RIGHT, TOP, BOTTOM = "on the left of", "on the right of", "on the top of", "on the bottom of"


def box(x: float, y: float, half: float = 0.1) -> tuple[float, ...]:
    return x - half, y - half, x + half, y + half


def test_iou_by_hand():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1


@pytest.mark.parametrize(
    ("relation", "first", "second", "expected"),
    [
        (LEFT, box(0.2, 0.5), box(0.8, 0.4), 1),
        (RIGHT, box(0.2, 0.5), box(0.8, 0.4), 0),
        (RIGHT, box(0.8, 0.5), box(0.2, 0.4), 1),
        (TOP, box(0.5, 0.2), box(0.4, 0.8), 1),
        (BOTTOM, box(0.5, 0.8), box(0.4, 0.2), 1),
        (TOP, box(0.5, 0.8), box(0.4, 0.2), 0),
        (LEFT, box(0.2, 0.2), box(0.4, 0.9), 0),  # the other axis dominates
        (LEFT, box(0.2, 0.2), box(0.5, 0.5), 0),  # neither does
        (LEFT, (0, 0, 2, 2), (1, 0, 3, 2), 0.1 / (2 / 6)),  # IoU 2 / 6
        (LEFT, (0, 0, 10, 1), (9, 0, 19, 1), 1),  # IoU 1 / 19
        ("next to", box(0.1, 0.1), box(0.4, 0.9), 1),  # 0.3 of 0.3125 on one axis
        ("near", box(0.1, 0.1), box(0.5, 0.9), 0.3125 / 0.8),
        ("on top of", box(0.5, 0.2), box(0.5, 0.8), 0),
        (None, box(0.2, 0.5), box(0.8, 0.5), 0),
    ],
)
def test_positions_by_hand(relation, first, second, expected):
    assert position(relation, first, second) == pytest.approx(expected)


def test_scores_by_hand():
    a, b = Found(0.8, box(0.2, 0.5)), Found(0.6, box(0.8, 0.5))
    assert spatial_score(LEFT, a, b) == pytest.approx(0.25 * 1.4 + 0.5)
    assert spatial_score(RIGHT, a, b) == 0  # 0.35 is below 0.5
    assert spatial_score(RIGHT, Found(1.0, a.box), Found(1.0, b.box)) == 0.5
    assert spatial_score(LEFT, a, None) == 0 and spatial_score(LEFT, None, None) == 0


def test_images_are_scored_and_failures_named():
    sentences = {
        "a dog on the left of a cat": Sentence("", (), (("dog", "NOUN"), ("cat", "NOUN"))),
        "run": Sentence("run", (), (("run", "VERB"),)),
    }
    shown = [(Found(1.0, box(0.2, 0.5)), Found(0.4, box(0.8, 0.5))), (Found(1.0, box(0.8, 0.5)), Found(0.4, box(0.2, 0.5))), (Found(1.0, box(0.2, 0.5)), None)]
    asked = []

    def detect(images, names):
        asked.append((len(images), names))
        return shown

    scorer, prompts = Spatial(detect, sentences.__getitem__), ["a dog on the left of a cat", "a dog on the left of a cat", "run", "a dog on the left of a cat"]
    torch.testing.assert_close(scorer.score(torch.zeros(4, 3, 8, 8), prompts), torch.tensor([0.85, 0, 0, 0]))
    assert scorer.assess(torch.zeros(4, 3, 8, 8), prompts)[1] == ["none", "layout", "unread", "neglect"]
    assert asked[0] == (3, [("dog", "cat")] * 3)
    assert set(scorer.assess(torch.zeros(4, 3, 8, 8), prompts)[1]) <= set(Spatial.FAILURES)
    unread = Spatial(None, sentences.__getitem__, objects=related_objects)
    assert unread.score(torch.zeros(1, 3, 8, 8), ["run"]).tolist() == [0.0]


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    """OWLv2 of random weights, saved and loaded."""
    folder = tmp_path_factory.mktemp("owl")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=32)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Owlv2Config(
        text_config=tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 32},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    model = Owlv2ForObjectDetection(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(model.class_head.logit_shift.bias, 1.0)
    model.save_pretrained(folder / "owl")
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder / "owl")
    return Owl.load(folder / "owl", batch_size=2)


def test_owl_gives_each_name_its_surest_box(owl):
    images, names = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1, [("red circle", "star"), ("square", "ring"), ("star", "star")]
    found = owl(images, names)
    assert any(any(pair) for pair in found)
    for image, pair, ours in zip(images, names, found, strict=True):
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).numpy()
        inputs = owl.processor(images=[pixels], text=[[f"a photo of a {name}" for name in pair]], return_tensors="pt")
        with torch.inference_mode():
            output = owl.model(**inputs)
        best = [None, None]
        for logits, (x, y, width, height) in zip(output.logits[0], output.pred_boxes[0].tolist(), strict=True):
            label, confidence = int(logits.argmax()), float(logits.max().sigmoid())
            if confidence > CONFIDENCE and (best[label] is None or confidence > best[label].confidence):
                best[label] = Found(confidence, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))
        for one, other in zip(best, ours, strict=True):
            assert (one is None) == (other is None)
            if one:
                assert other.confidence == pytest.approx(one.confidence, abs=1e-5) and other.box == pytest.approx(one.box, abs=1e-5)


def test_unidets_weights_are_refused():
    with pytest.raises(ValueError, match="of detectron2, such as UniDet's, which cannot be run here: name OWLv2's"):
        Owl.load("Unified_learned_OCIM_RS200_6x+2x.pth")
