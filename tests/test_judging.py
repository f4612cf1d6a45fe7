"""Oracle: params.yaml's own judges, and entries of real kinds whose loaders are watched."""

import dataclasses
import re
import typing
from types import SimpleNamespace

import pytest
import torch

from mitune import alignment, clip, config, features, judges, language, networks, spatial, vqa, weights
from mitune.artifacts import Results, read_tensors
from mitune.schema import build
from mitune.stages import evaluate, judging


def model(**entries) -> config.Model:
    values = {"pipeline": "p", "judge": {"kind": "clipscore"}, "similarity": {"kind": "clipscore", "weights": "a/b"}}
    return build(config.Model, values | entries, "models.tiny")


def params(**entries) -> SimpleNamespace:
    return SimpleNamespace(model="tiny", models={"tiny": model(**entries)}, device="cpu")


def test_every_kind_can_be_opened():
    kinds = {kind for entry in (judges.Judge, judges.Similarity, judges.Features) for kind in typing.get_args(typing.get_type_hints(entry)["kind"])}
    assert kinds == set(judging.KINDS)
    assert set(judging.PUBLISHED) < kinds and set(judges.PARTS) < kinds


def test_the_embedded_model_has_its_own_judges():
    judge, similarity = judging.open_judges(config.load())
    assert isinstance(judge, alignment.ShapesJudge) and isinstance(similarity, alignment.Similarity)


def test_an_entry_says_what_is_opened_with_which_settings(monkeypatch):
    opened = []
    monkeypatch.setattr(clip.ClipScore, "load", lambda source, **settings: opened.append((source, settings)) or "clip")
    monkeypatch.setattr(vqa.BlipVqa, "load", lambda source, read, **settings: opened.append((source, settings)) or "blip")
    monkeypatch.setattr(judging, "read_sentence", lambda: None)
    judged_by = params(judge={"kind": "blip-vqa", "weights": "x/y", "dtype": "float16", "batch_size": 8}, judges={"non_spatial": {"kind": "clipscore"}})
    assert judging.open_judges(judged_by, "color") == ("blip", "clip")
    assert judging.open_judges(judged_by, "non_spatial") == ("clip", "clip")
    fast, usual = {"device": "cpu", "dtype": "float16", "batch_size": 8}, {"device": "cpu", "dtype": "float32", "batch_size": 32}
    assert opened == [("x/y", fast), ("a/b", usual), ("openai/clip-vit-base-patch32", usual), ("a/b", usual)]


def test_three_in_one_has_its_parts_and_the_benchmarks_lists(monkeypatch, tmp_path):
    (tmp_path / "complex_val_spatial.txt").write_text("The cup is near the plate. Old.\r\nA dog next to a cat.")
    (tmp_path / "complex_train_action.txt").write_text("a dog chases a cat\n")
    (tmp_path / "complex_val_spatialaction.txt").write_text("all of it\n")
    sources = []
    for kind in (clip.ClipScore, vqa.BlipVqa, spatial.Owl):
        monkeypatch.setattr(kind, "load", lambda source, *_, **settings: sources.append(source))
    monkeypatch.setattr(judging, "read_sentence", lambda: None)
    opened, _ = judging.open_judges(params(judge={"kind": "3-in-1", "parts": {"blip-vqa": "x/y", "lists": str(tmp_path)}}))
    assert sources[:3] == ["x/y", "google/owlv2-base-patch16-ensemble", "openai/clip-vit-base-patch32"]
    assert opened.of_spatial == {"the cup is near the plate", "a dog next to a cat"} and opened.of_action == {"a dog chases a cat"}
    assert opened.spatial.objects is language.related_objects
    (tmp_path / "complex_train_action.txt").unlink()
    with pytest.raises(ValueError, match=r"has no complex_\*_action\.txt: download"):
        judging.open_judges(params(judge={"kind": "3-in-1", "parts": {"lists": str(tmp_path)}}))


def test_features_can_be_anothers(monkeypatch):
    scores, extractor = SimpleNamespace(score=lambda images, prompts: torch.ones(len(prompts))), SimpleNamespace(features=lambda images: images.flatten(1))
    monkeypatch.setattr(clip.ClipScore, "load", lambda source, **settings: scores)
    monkeypatch.setattr(features, "dinov2", lambda source, **settings: extractor)
    _, similarity = judging.open_judges(params(features={"kind": "dinov2"}))
    assert similarity.score(torch.zeros(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 1] and similarity.features(torch.zeros(2, 3, 4, 4)).shape == (2, 48)


def test_the_key_names_all_that_is_opened(tmp_path):
    base = judging.judges_key(params(), "color")
    changed = [{"judge": {"kind": "clipscore", "dtype": "float16"}}, {"judges": {"color": {"kind": "vqascore"}}}, {"features": {"kind": "clip"}}]
    assert all(judging.judges_key(params(**entries), "color") != base for entries in changed)
    assert judging.judges_key(params(judges={"shape": {"kind": "vqascore"}}), "color") == base
    assert tmp_path in judging.judges_key(params(judge={"kind": "3-in-1", "parts": {"clipscore": str(tmp_path)}}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"judge": {"kind": "blip"}}, r"models\.tiny\.judge\.kind is 'blip': it must be one of shapes, blip-vqa"),
        ({"judge": {"weights": "a"}}, r"missing key models\.tiny\.judge\.kind"),
        ({"judge": {"kind": "blip-vqa", "size": 3}}, r"unknown key models\.tiny\.judge\.size"),
        ({"judge": {"kind": "blip-vqa", "batch_size": 0}}, r"models\.tiny\.judge\.batch_size is 0: it must be at least 1"),
        ({"similarity": {"kind": "vqascore"}}, r"models\.tiny\.similarity\.kind is 'vqascore': it must be one of cosine, clipscore, hps-v2\.1"),
        ({"judge": {"kind": "blip-vqa", "parts": {"base": "a"}}}, r"unknown key models\.tiny\.judge\.parts\.base: blip-vqa has none; remove it"),
        ({"judge": {"kind": "3-in-1", "parts": {"hps": "a"}}}, r"unknown key models\.tiny\.judge\.parts\.hps: 3-in-1 has blip-vqa, 2d-spatial"),
        ({"judges": {"colour": {"kind": "vqascore"}}}, r"models\.tiny\.judges has 'colour': it must be one of color"),
        ({"features": {"kind": "inception", "weights": "a", "dtype": "float16"}}, r"models\.tiny\.features\.dtype is float16: FID's network is .* in float32"),
        ({"similarity": {"kind": "cosine", "weights": "a", "dtype": "float16"}}, r"models\.tiny\.similarity has more than kind and weights"),
    ],
)
def test_an_impossible_judge_is_refused_by_name(entries, message):
    plain = {"pipeline": "p", "judge": {"kind": "clipscore"}, "similarity": {"kind": "clipscore"}}
    with pytest.raises(ValueError, match=message) as error:
        config.read({"benchmark": "t2i-compbench", "models": {"tiny": plain | entries}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (judges.Judge(kind="shapes"), "kind shapes was named without weights, and has none of its own: add `weights`"),
        (judges.Features(kind="inception"), "kind inception was named without weights"),
        (judges.Judge(kind="clipscore", weights="nowhere"), "cannot read CLIPModel from 'nowhere'"),
        (judges.Judge(kind="vqascore", weights="nowhere"), "cannot read AutoModelForImageTextToText from 'nowhere'"),
        (judges.Judge(kind="hps-v2.1", weights="nowhere"), "cannot read HPS_v2.1_compressed.pt from 'nowhere'|cannot read CLIPConfig"),
    ],
)
def test_missing_weights_are_one_line(entry, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as error:
        judging.opened(entry, "cpu")
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "max_position_embeddings": 8}
    CLIPTextModel(CLIPTextConfig(**layers, bos_token_id=7, eos_token_id=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a CLIPModel: .* of its tensors are missing") as error:
        judging.opened(judges.Judge(kind="clipscore", weights=str(tmp_path)), "cpu")
    assert "\n" not in str(error.value)


def test_a_model_whose_weights_are_elsewhere_has_the_folders_that_dvc_yaml_names(tmp_path, monkeypatch):
    """Oracle: all that dvc.yaml's stages take of a model's data."""
    text = (config.root() / "dvc.yaml").read_text(encoding="utf-8")
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    own = {"pipeline": "data/tiny/pipeline", "judge": {"kind": "shapes", "weights": "data/tiny/judge"}}
    weights.make_room(SimpleNamespace(models={"tiny": model(**own)}), "tiny")
    assert [folder.name for folder in (tmp_path / "data" / "tiny").iterdir()] == ["similarity"]  # what is a model's own is not made up
    weights.make_room(params(), "tiny")
    assert {folder.name for folder in (tmp_path / "data" / "tiny").iterdir()} == set(re.findall(r"- data/\$\{model\}/(\S+)", text))


def test_judges_are_plain_values():
    assert dataclasses.asdict(judges.Judge(kind="vqascore")) == {"weights": None, "parts": None, "dtype": "float32", "batch_size": 32, "kind": "vqascore"}


def test_a_stage_evaluates_with_a_judge_of_real_images(toy_values, in_toy_project, tmp_path):
    """Oracle: the same networks asked by hand about the pictures that the stage kept."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path / "clip"
    tokenizer = networks.build_tokenizer(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=layers | {"image_size": 32, "patch_size": 8}, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    toy_values["evaluate"] |= {"n_prompts": 2, "images": 1, "num_inference_steps": 2, "comp_prompts": 0, "grid_prompts": 2, "guidance_scales": [1.0]}
    real = {"kind": "clipscore", "weights": str(folder)}
    params = in_toy_project(toy_values, judges={"color": real}, similarity=real, features={"kind": "clip", "weights": str(folder)})
    params = config.Declared(vars(params) | {"arms": ()})
    table = evaluate.build(params, "color")
    scorer, kept = clip.ClipScore.load(folder), read_tensors(Results("shapes").grids("color"))["base/1.0"]
    expected = scorer.score(kept.float() / 127.5 - 1, list(table["prompt"]))
    assert table["judge"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6) and set(table["failure"]) == {"unknown"}
    assert table["similarity"].equals(table["judge"])
