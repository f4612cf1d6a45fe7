"""Oracles: the pipeline's own sampler and decoder, and the files themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mitune import config, generate
from mitune.images import captioned
from mitune.pixels import eight_bit
from mitune.sampling import noise_generator, sample
from mitune.stages import open_model

TEXTS = ["a red circle", "a blue square and a red circle", "ein grüner Kreis"]
SETTINGS = {"images": 2, "guidance_scale": 2.5, "num_inference_steps": 3}


@pytest.fixture
def params(toy_values, in_toy_project, monkeypatch):
    params = in_toy_project(toy_values)
    monkeypatch.setattr(config, "load", lambda: params)
    return params


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\r\n".join(["", *TEXTS, TEXTS[0]]), encoding="utf-8")
    return file


def test_images_are_the_samplers_for_seed_prompt_and_number(params, prompts, tmp_path):
    items = generate.asked(prompts, "prompt", None, 0)
    assert [(item.prompt_id, item.text) for item in items] == list(enumerate(TEXTS, start=1))
    assert generate.generate(params, items, tmp_path / "out", **SETTINGS) == 6
    model = open_model(params)
    for item in items:
        for image in (0, 1):
            own = sample(
                model,
                model.encode([item.text]),
                model.null,
                guidance_scale=2.5,
                num_inference_steps=3,
                generators=[noise_generator(params.seed, item.text, image)],
            )
            expected = eight_bit(model.decode(own.latents))[0].permute(1, 2, 0).numpy()
            found = np.array(Image.open(tmp_path / "out" / f"{item.prompt_id:06d}-{image}.png"))
            assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1  # rounding, by the size of a batch
    assert [item.caption for item in captioned(tmp_path / "out")] == [text for text in TEXTS for _ in (0, 1)]


def test_what_is_there_is_kept_and_other_settings_are_refused(params, prompts, tmp_path):
    items, out = generate.asked(prompts, "prompt", None, 0), tmp_path / "out"
    generate.generate(params, items[:2], out, **SETTINGS | {"images": 1})
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
    assert generate.generate(params, items, out, **SETTINGS) == 4
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert generate.generate(params, items, out, **SETTINGS) == 0
    with pytest.raises(ValueError, match="holds images of other settings"):
        generate.generate(params, items, out, **SETTINGS | {"guidance_scale": 1.0})
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.md").write_text("mine")
    for place in (other, other / "notes.md"):
        with pytest.raises(ValueError, match="is no empty folder, nor one of this command: give another folder"):
            generate.generate(params, items, place, **SETTINGS)


def test_what_cannot_be_made_leaves_nothing(params, prompts, tmp_path):
    items, out = generate.asked(prompts, "prompt", None, 0), tmp_path / "out"
    for wrong in ({"images": 0}, {"guidance_scale": -1.0}, {"num_inference_steps": 0}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            generate.generate(params, items, out, **SETTINGS | wrong)
    with pytest.raises(ValueError, match="is missing or empty"):
        generate.generate(params, items, out, **SETTINGS, adapter=[tmp_path / "none"])
    assert not out.exists()


def test_drawn_prompts_are_those_of_the_seed(prompts, tmp_path):
    drawn = {seed: [item.text for item in generate.asked(prompts, "prompt", 2, seed)] for seed in range(8)}
    assert all(len(texts) == 2 and set(texts) < set(TEXTS) for texts in drawn.values()) and len({tuple(texts) for texts in drawn.values()}) > 1
    with pytest.raises(ValueError, match=r"n is 4: .* has 3 distinct prompts; ask for 1 to 3"):
        generate.asked(prompts, "prompt", 4, 0)
    for n, text in enumerate(TEXTS):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(text, encoding="utf-8")
    assert [item.text for item in generate.asked(tmp_path, "prompt", None, 0)] == TEXTS
    (tmp_path / "prompts.docx").touch()
    with pytest.raises(ValueError, match=r"prompts\.docx ends in '\.docx': a file of prompts ends in \.txt"):
        generate.asked(tmp_path / "prompts.docx", "prompt", None, 0)


def test_the_command_says_what_it_made(params, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate.main([str(prompts), str(out), "--n", "1", "--steps", "2"]) == 0
    assert capsys.readouterr().out == f"{out}: 1 images made, 0 were there\n"
    made = json.loads((out / generate.SETTINGS).read_text())
    assert made["guidance_scale"] == params.evaluate.guidance_scales[0] and made["num_inference_steps"] == 2 and made["seed"] == params.seed
    assert generate.main([str(tmp_path / "none.csv"), str(out)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("mitune: ") and "none.csv is missing" in told and told.count("\n") == 1
