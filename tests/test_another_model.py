"""Every stage and article of a model that is not the embedded one, in one process. Oracles: what is asked for, and what cannot be without rendered truth."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mitune import artifacts, config, networks, reading
from mitune.language import Sentence
from mitune.recipes import Studies, recipes
from mitune.stages import base, cell, evaluate, finetune, information, judging, lacks, merging, pairs, pool, scores, sets, steps

PROJECT = config.root()
WORDS = {"color": "a {} bench and a {} bowl", "spatial": "a {} cup on the left of a {} plate in the {} kitchen"}
CUT = {
    "model": "tiny",
    "benchmark": "mine",
    "prompts": "mine.csv",
    "reports": "reports/tiny",
    "benchmarks": {"mine": {"prompts": "mine.csv"}},
    "pool": {"n_prompts": {"train": 3, "val": 2}, "M": 3},
    "categories": ["color"],
    "finetune": {"steps": 2, "checkpoint_every": 2, "adapter": "lora", "rank": 2, "lora_alpha": 2, "target_modules": ["attention"]},
    "evaluate": {"n_prompts": 2, "images": 1, "num_inference_steps": 2, "guidance_scales": [1.0, 2.0]},
    "information": {"n_prompts": {"val": 2, "test": 2}, "M": 3, "step_grid": [3]},
    "studies": {
        "common": {"seeds": [0], "n_prompts": 2, "M": 2, "block": 2, "test_prompts": 2, "steps": 2},
        "cfg_rounds": {"R1": {"M": 2, "block": 2, "guidance_scales": [1.0]}, "R2": {"M": 2, "block": 2, "guidance_scales": [1.0]}},
        "set_size": {"M50_k1": {"M": 2}, "M5_k2": {"M": 2, "k": 2}},
        "merging": {"lambda_50": {"categories": ["color", "spatial"]}, "mean_of_six": None, "ties": None, "joint": None},
        "selection": {"real25": {"real": 0.5}, "spatial_own": {"M": 2, "block": 2}},
        "caption_noise": {"wrong_30_random": None},
    },
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIPModel of random weights and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = networks.build_tokenizer(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=layers | {"image_size": 32, "patch_size": 8}, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def values(toy_values, tiny_xl, tiny_clip, tmp_path, monkeypatch):
    """The toy parameters, of a small SDXL and prompts outside the grammar, in a project's folder of their own."""
    judge = {"kind": "clipscore", "weights": str(tiny_clip)}
    entry = {"pipeline": str(tiny_xl), "judge": judge, "similarity": judge, "variance": "small"}
    adjectives = ("green", "old", "wooden", "small", "broken", "tall", "new")
    rows = [
        {"prompt": words.format(one, adjectives[n - 1], adjectives[n - 2]), "category": category, "split": ("train", "val", "test")[n % 3 if n < 6 else 0]}
        for category, words in WORDS.items()
        for n, one in enumerate(adjectives)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    shutil.copytree(PROJECT / "paper", tmp_path / "paper")
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    monkeypatch.setattr(information, "read_sentence", lambda: lambda text: Sentence(text, tuple(text.split(" in the ")[0].split(" and ")), ()))
    return config.merge(toy_values, CUT | {"models": {"tiny": entry}})


def article(name: str, values: dict) -> str | None:
    """Run the code of an article in this process; "ended" if it ended itself (`reading.end`)."""
    notebook = json.loads((PROJECT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    names: dict = {}
    try:
        for source in ("".join(one["source"]) for one in notebook["cells"] if one["cell_type"] == "code"):
            exec(compile(source, name, "exec"), names)
            if "parameters" in names and names["parameters"] is None:
                names["parameters"] = values
    except SystemExit:
        return "ended"
    return None


@pytest.mark.filterwarnings("ignore")
def test_all_that_the_embedded_model_does_runs_on_another(values):
    params = config.read(values)
    table, checks = base.build(params)
    assert table.empty and not checks
    for category in params.categories:
        pool.build(params, category)
        scores.build(params, category)
        sets.build(params, category)
        for arm in params.arms:
            finetune.build(params, category, arm)
        evaluate.build(params, category)
        tables = information.build(params, category)
        assert tables["rendered"].empty and set(tables["candidates"]["guidance_scale"]) == set(params.information.guidance_scales)
    phrases = reading.information_terms(params)["phrase_standard"]
    assert {"rendered_standard"}.isdisjoint(reading.information_terms(params)) and phrases.isnan().any() and not phrases[:, 0].isnan().any()
    for study in Studies.__dataclass_fields__.keys() - {"common"}:
        for key in recipes(params, study):
            merging.build(params, key) if study == "merging" else cell.build(params, study, key)
    lacking = {study: recipes(params, study).keys() - reading.made(params, study) for study in Studies.__dataclass_fields__.keys() - {"common"}}
    assert {study for study, keys in lacking.items() if keys} == {"adapters", "selection", "caption_noise"} and lacking["adapters"] == {"text_encoder"}
    assert lacking["selection"] == {"real25", "real50", "spatial_aligned"} and lacking["caption_noise"] == recipes(params, "caption_noise").keys()
    names = sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb") if path.stem not in ("01a_exact_worlds", "09_cost"))
    ended = {name for name in names if article(name, values)}
    assert ended == {"01d_learning_to_rank", "10_caption_noise"}
    reports = config.root() / params.reports
    assert {path.stem for path in (reports / "claims").iterdir()} == set(names) - {"99_claims"} == {path.stem for path in (reports / "metrics").iterdir()}
    assert all((reports / "figures" / name).is_dir() for name in names if name != "99_claims")
    assert artifacts.read_json(reports / "claims/10_caption_noise.json") == []
    found = artifacts.read_json(reports / "metrics/04_cfg_rounds.json")
    assert set(found["quality"]) == {"vendi"} and "rounds_cost_quality" not in found["claims"] and "rounds_cost_variety" in found["claims"]


def test_the_reference_of_quality_is_real_images_that_no_set_has(values, tmp_path):
    """Oracle: the similarity model's features of the files themselves, at the model's size as they are."""
    generator, folder = np.random.default_rng(0), tmp_path / "photographs"
    folder.mkdir()
    for n in range(24):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"noise {n}")
    params = config.read(config.merge(values, {"real_images": "photographs", "studies": {"common": {"real_pairs": 6, "reference_images": 3}}}))
    both = dataclasses.replace(recipes(params, "set_size")["M50_k1"], categories=("color", "spatial"))
    drawn = {category: pairs.apart(params, both, category, {"reference": 6, "decoded": 2}) for category in both.categories}
    names = [item.name for parts in drawn.values() for items in parts.values() for item in items]
    in_sets = {item.name for item in pairs.real(params, both)}
    assert len(set(names)) == len(names) == 16 and len(in_sets) == 6 and not in_sets & set(names)
    found = steps.reference(params, both, "spatial")
    _, similarity = judging.open_judges(params, "spatial")
    pictures = torch.stack([torch.tensor(np.array(Image.open(item.name))).permute(2, 0, 1) for item in drawn["spatial"]["reference"]]) / 127.5 - 1
    torch.testing.assert_close(found["reference"].float(), similarity.features(pictures).half().float(), rtol=1e-2, atol=1e-3)
    assert found["decoded"].shape == (2, found["reference"].shape[1])
    few = config.Declared(vars(params) | {"real_images": None})
    assert steps.reference(few, both, "color") == {} and pairs.apart(params, both, "color", {"reference": 12}) is None
    assert lacks_of(params) == {"clean", "category", "denoiser"} and lacks_of(few) == {"real", "clean", "category", "denoiser"}


def lacks_of(params) -> set[str]:
    """Which changes of the default recipe the model cannot be given."""
    recipe = recipes(params, "set_size")["M50_k1"]
    changes = {
        "nothing": {},
        "real": {"real": 0.5},
        "clean": {"pool_adapter": dataclasses.replace(recipe, real=0.5, real_captions="clean")},
        "category": {"real": 1.0, "real_from": "category"},
        "denoiser": {"unet": "data/shapes/caption_noise/wrong_0"},
        "own": {"unet": "data/tiny/unet"},
    }
    return {name for name, change in changes.items() if lacks(params, dataclasses.replace(recipe, **change))}
