"""Oracles: work done at once for work that grew, counted calls, DVC's own account of its stages, and the rules written in params.yaml."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mitune import artifacts, config, networks, reading, repro, smoke, tradeoff
from mitune.artifacts import Results, read_table
from mitune.recipes import Tuning, recipes
from mitune.stages import cell, judging, open_model, pairs, steps


@pytest.fixture
def values(toy_values):
    toy_values["studies"]["set_size"] = {"same": {}, "larger": {"M": 5}}
    toy_values["studies"]["common"]["block"] = 2
    return toy_values


@pytest.fixture
def params(values, in_toy_project):
    return in_toy_project(values)


def recipe_of(params, **changes):
    return dataclasses.replace(recipes(params, "set_size")["same"], **changes)


# ---------------------------------------------------------------- recipes


def test_a_recipe_is_the_cell_over_the_default(values):
    params = config.read(values)
    cells = recipes(params, "set_size")
    assert list(cells) == ["same", "larger"]
    assert (cells["larger"].M, cells["larger"].k) == (5, params.studies.common.k)
    assert cells["same"].tuning == Tuning(**{name: value for name, value in vars(params.finetune).items() if name != "seed"} | {"steps": 4})
    assert cells["same"] == recipes(params, "adapters")["dora"]
    assert recipes(params, "adapters")["text_encoder"].text_encoder is True


def test_equal_cells_of_different_studies_are_one_recipe():
    """Of params.yaml: so that each is computed once."""
    params = config.load()
    cells = {study: recipes(params, study) for study in ("cfg_rounds", "set_size", "adapters", "selection")}
    assert cells["set_size"]["M50_k1"] == cells["adapters"]["dora"] == cells["selection"]["standard"]
    assert dataclasses.replace(cells["cfg_rounds"]["random"], guidance_scales=()) == dataclasses.replace(cells["selection"]["random"], guidance_scales=())
    assert {recipe.batch_size for some in cells.values() for recipe in some.values()} == {params.finetune.batch_size}


@pytest.mark.parametrize(
    ("study", "cell", "named"),
    [
        ("set_size", {"k": 9, "M": 8}, "studies.set_size.x.k is 9 and M is 8"),
        ("set_size", {"M": 0}, "studies.set_size.x.M is 0: it must be at least 1"),
        ("set_size", {"m": 8}, "unknown key studies.set_size.x.m"),
        ("set_size", {"seed": 1}, "unknown key studies.set_size.x.seed"),
        ("set_size", {"seeds": []}, "studies.set_size.x.seeds is []"),
        ("set_size", {"seeds": [1, 1]}, "studies.set_size.x.seeds has an entry twice"),
        ("set_size", {"select": "stanard"}, "studies.set_size.x.select is 'stanard'"),
        ("set_size", {"categories": ["colour"]}, "studies.set_size.x.categories has 'colour'"),
        ("set_size", None, "studies.set_size.x is None: it must be a mapping"),
        ("adapters", {"adapter": "vera"}, "studies.adapters.x.adapter is 'vera'"),
        ("adapters", {"text_encoder": 1}, "studies.adapters.x.text_encoder is 1: it must be true or false"),
        ("adapters", {"timesteps": {"low": 9, "high": 9}}, "studies.adapters.x.timesteps is 9 to 9"),
        ("cfg_rounds", {"rounds": 0}, "studies.cfg_rounds.x.rounds is 0: it must be at least 1"),
        ("cfg_rounds", {"guidance_scales": []}, "studies.cfg_rounds.x.guidance_scales is []"),
        ("cfg_rounds", {"guidance_scales": [1, 1.0]}, "studies.cfg_rounds.x.guidance_scales has an entry twice"),
        ("cfg_rounds", {"reference_images": 1}, "studies.cfg_rounds.x.reference_images is 1: it must be at least 2"),
        ("selection", {"real": 1.5}, "studies.selection.x.real is 1.5: it must be between 0.0 and 1.0"),
        ("selection", {"real_captions": "true"}, "studies.selection.x.real_captions is 'true': it must be one of web, clean"),
        ("selection", {"real": 0.5, "real_pairs": 1}, "studies.selection.x.real is 0.5: that is 2 images, and real_pairs is 1"),
        ("selection", {"real": 0.5, "select": "path"}, "studies.selection.x.real is 0.5 and select path: it has no trajectory"),
        ("selection", {"pool_adapter": "judge"}, "studies.selection.x.pool_adapter is 'judge': it must be a mapping"),
        ("selection", {"pool_adapter": {"select": "jugde"}}, "studies.selection.x.pool_adapter.select is 'jugde'"),
        ("selection", {"pool_adapter": {"rank": 0}}, "studies.selection.x.pool_adapter.rank is 0: it must be at least 1"),
        ("selection", {"pool_adapter": {"test_prompts": 1}}, "studies.selection.x.pool_adapter.test_prompts has no meaning"),
        ("selection", {"pool_adapter": {"unet": "data"}}, "studies.selection.x.pool_adapter.unet has no meaning"),
        ("caption_noise", {"unet": 3}, "studies.caption_noise.x.unet is 3: it must be text"),
        ("selection", {"pool_adapter": {}, "rounds": 2}, "studies.selection.x.rounds is 2: the pool of a later round"),
    ],
)
def test_an_impossible_cell_is_refused_by_its_full_name(values, study, cell, named):
    values["studies"][study]["x"] = cell
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        config.read(values)
    assert "\n" not in str(error.value)


def test_an_impossible_default_or_study_or_key_is_refused(values):
    for study, entry, named in (("common", {"M": 0}, "studies.common.M is 0"), ("sizes", {}, "unknown key studies.sizes"), ("set_size", {"M 8": {}}, "M 8")):
        with pytest.raises(ValueError, match=named):
            config.read(config.merge(values, {"studies": {study: entry}}))


def test_null_in_an_overlay_removes_a_key():
    assert config.merge({"a": {"b": 1, "c": 2}}, {"a": {"b": None, "d": None}}) == {"a": {"c": 2}}


# ---------------------------------------------------------------- the shared pool


@pytest.mark.parametrize("rule", ["standard", "path", "judge"])
def test_prefixes_of_a_grown_pool_are_those_of_a_pool_made_at_once(params, rule, monkeypatch, tmp_path):
    small = steps.candidates(params, recipe_of(params, M=3, select=rule), "color")
    grown = steps.candidates(params, recipe_of(params, M=5, select=rule), "color")
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path / "another"))
    at_once = steps.candidates(params, recipe_of(params, M=5, select=rule), "color")
    assert torch.equal(grown.latents, at_once.latents) and torch.equal(grown.score, at_once.score)
    assert torch.equal(grown.latents[:, :3], small.latents) and torch.equal(grown.score[:, :3], small.score)
    assert grown.latents.shape[:2] == (4, 5)


def test_the_studies_pool_and_scores_are_the_stages(params):
    """Blocks of M images are what stage `pool` makes, and their scores what stage `scores` computes."""
    from mitune.stages import pool, scores

    pool.build(params, "color")
    table = scores.build(params, "color").query("split == 'train'")
    for rule in ("standard", "orthogonal_t50", "path", "judge", "similarity"):
        ours = steps.candidates(params, recipe_of(params, M=params.pool.M, block=params.pool.M, select=rule), "color")
        torch.testing.assert_close(ours.score.flatten().double(), torch.tensor(table[rule].to_numpy()), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.latents, artifacts.read_tensors(Results(params.model).pool("color", "train"))["latents"])


def test_a_recipe_that_asks_for_more_prompts_than_there_are_takes_all(params):
    recipe, there = recipes(params, "set_size")["same"], len(steps.read_prompts(params, "color", "train"))
    assert steps.fitted(params, recipe, "color") == recipe
    assert steps.fitted(params, recipe_of(params, n_prompts=10_000), "color").n_prompts == there


def test_a_set_holds_the_best_or_a_draw(params):
    pool = steps.candidates(params, recipe_of(params, M=4, select="path"), "color")
    chosen, latents = steps.keep(pool, recipe_of(params, M=4, select="path", k=2), seed=0, draw=0)
    best = pool.score.sort(dim=1, descending=True).indices[:, :2].flatten()
    assert chosen["image"].tolist() == best.tolist()
    assert torch.equal(latents, pool.latents[torch.arange(4).repeat_interleave(2), best])
    random = recipe_of(params, M=4, select="random")
    pool = steps.candidates(params, random, "color")
    draws = [steps.keep(pool, random, seed=0, draw=draw)[0]["image"].tolist() for draw in range(3)]
    assert len({tuple(draw) for draw in draws}) > 1
    assert draws[0] == steps.keep(pool, random, seed=0, draw=0)[0]["image"].tolist()


# ---------------------------------------------------------------- a cell


def test_a_cell_of_two_seeds(params, tmp_path, monkeypatch):
    """Its outputs, and that a second time, and for a cell of another study with the same recipe, nothing is computed."""
    table = cell.build(params, "adapters", "dora")
    place = Results(params.model).cell("adapters", "dora")
    recipe = recipes(params, "adapters")["dora"]
    assert read_table(place / "images.parquet", "cell").equals(table[list(artifacts.SCHEMAS["cell"])])
    assert len(table) == recipe.test_prompts * recipe.test_images * len(recipe.seeds) * len(recipe.guidance_scales)
    assert (table.groupby(["guidance_scale", "prompt_id", "image"])["base_judge"].nunique() == 1).all()
    assert (table["similarity"] != table["base_similarity"]).any()
    costs = read_table(place / "costs.parquet", "costs")
    assert costs["seed"].tolist() == list(recipe.seeds) and (costs["parameters"] > 0).all()
    assert costs["pool"].tolist() == [2 * 4 * 4 * 4] * 2
    weights = [(place / "adapters" / f"color-{seed}" / "pytorch_lora_weights.safetensors").read_bytes() for seed in recipe.seeds]
    assert weights[0] != weights[1]
    monkeypatch.setattr(steps, "open_model", None)
    assert cell.build(params, "adapters", "dora").equals(table)
    assert cell.build(params, "set_size", "same").equals(table)


def test_a_cell_computed_anew_gives_equal_bytes(params):
    def files():
        cell.build(params, "adapters", "text_encoder")
        place = Results(params.model).cell("adapters", "text_encoder")
        return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file() and file.name != "seconds.json"}

    first = files()
    shutil.rmtree(config.root() / ".scratch")
    assert files() == first
    assert len(first) == 6


# ---------------------------------------------------------------- another denoiser


def test_a_cell_of_another_denoiser_is_that_of_a_model_that_has_it(params, values, tiny_pipeline, tmp_path):
    """And every estimator's scores of its pool are those by which it would select."""
    torch.manual_seed(3)
    networks.build_unet(32).half().save_pretrained(tmp_path / "another")
    values["studies"]["caption_noise"] = {key: {"M": 4, "block": 4, "examine_pool": True, "unet": unet} for key, unet in (("other", "another"), ("own", None))}
    values["studies"]["common"] |= {"seeds": [0]}
    params = config.read(values)
    tables = {key: cell.build(params, "caption_noise", key) for key in ("other", "own")}
    assert (tables["other"]["base_similarity"] != tables["own"]["base_similarity"]).any()
    shutil.copytree(tiny_pipeline, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "unet"), shutil.copytree(tmp_path / "another", tmp_path / "whole" / "unet")
    values["models"]["shapes"]["pipeline"] = str(tmp_path / "whole")
    whole = cell.build(config.read(values), "caption_noise", "own")
    assert whole.equals(tables["other"])
    recipe = recipes(params, "caption_noise")["own"]
    scores = reading.cells(params, "caption_noise", "scores", "train").query("cell == 'other'")
    chosen = read_table(Results(params.model).cell("caption_noise", "other") / "sets.parquet", "kept")
    best = scores.loc[scores.groupby("prompt_id")[recipe.select].idxmax()]
    assert best["image"].tolist() == chosen["image"].tolist()
    assert best["judge"].tolist() == pytest.approx(chosen["judge"].tolist(), rel=1e-5)
    assert {*params.estimators, "judge", "similarity"} <= set(scores) and len(scores) == recipe.n_prompts * recipe.M


# ---------------------------------------------------------------- rounds


def test_a_later_round_is_the_earlier_rounds_model_trained_on_its_own_images(params):
    recipe = recipe_of(params, M=3, select="standard", rounds=2)
    model = steps.tuned(params, recipe, "color", seed=1)
    first, second = model.adapters
    assert steps.tuned(params, recipe_of(params, M=3, select="standard"), "color", seed=1).adapters == (first,)
    pool = steps.candidates(params, recipe, "color", first, first=4)  # 3 images in blocks of 2 take up 0 to 3
    chosen, latents = steps.keep(pool, recipe, seed=params.seed, draw=1)
    assert steps.adapter(params, recipe, latents, list(chosen["prompt"]), first, seed=1) == second
    assert model.kept.query("round == 2")["image"].tolist() == chosen["image"].tolist()
    of_base = steps.candidates(params, recipe, "color", first=4)
    assert not torch.equal(pool.latents, of_base.latents) and not torch.equal(pool.score, of_base.score)
    assert steps.adapter(params, recipe, latents, list(chosen["prompt"]), seed=1) != second
    assert model.evaluations == {name: 2 * count for name, count in pool.evaluations.items()}
    assert list(model.seconds["finetune"]) == ["color-1", "color-1-2"] and list(model.seconds["pool"]) == ["color", "color-1-2"]
    scores = [steps.evaluation(params, recipe, "color", *adapters)["similarity"].tolist() for adapters in ((), (first,), (first, second), (second,))]
    assert len(set(map(tuple, scores))) == 4


def test_a_score_is_of_the_model_that_it_is_asked_of(params):
    recipe = recipe_of(params, M=2, select="standard")
    trained = steps.tuned(params, recipe, "color", seed=0).adapters
    items = steps.read_prompts(params, "color", "train", 4)
    block = steps._pool_block(params, recipe, "color", items, 0)
    own, others = (
        artifacts.read_tensors(steps._score_block(params, recipe, "color", items, block, *on) / "block.safetensors")["score"] for on in ((), trained)
    )
    assert not torch.equal(own, others)


# ---------------------------------------------------------------- mixtures and other models' pools


@pytest.mark.parametrize(("share", "count"), [(0.25, 5), (0.5, 10), (0.9, 18), (1.0, 20)])
def test_a_mixture_has_exactly_its_share_of_the_best_real_pairs(params, share, count):
    recipe = recipe_of(params, M=5, k=5, real=share, real_pairs=24)
    chosen, latents, pools = steps.fine_tuning_set(params, recipe, "color", seed=0)
    real = chosen[chosen["source"] == "real"]
    assert (len(chosen), len(real), len(latents)) == (20, count, 20)
    best = pools[-1].score.flatten().sort(descending=True, stable=True).indices[:count]
    assert real["prompt_id"].tolist() == best.tolist()
    assert torch.equal(latents[-count:], pools[-1].latents[best, 0])
    assert real["prompt"].tolist() == [pools[-1].prompts[n].text for n in best]
    assert len(pools) == (1 if share == 1 else 2)
    whole, of_pool = steps.keep(steps.candidates(params, recipe, "color"), recipe, seed=params.seed, draw=0)
    rows = whole.reset_index().merge(chosen[chosen["source"] == "pool"], on=["prompt_id", "image"])["index"].tolist()
    assert len(rows) == 20 - count and torch.equal(latents[: 20 - count], of_pool[rows])


def test_another_model_is_given_real_images_at_its_own_size(params, tmp_path):
    """Oracle: the pictures as PIL made them, encoded by the pipeline's own autoencoder."""
    from diffusers import AutoencoderKL

    other = config.Declared(vars(params) | {"model": "sd", "models": {"sd": params.models["shapes"]}, "real_images": "photographs"})
    recipe = recipe_of(params, real=1.0, real_pairs=3, select="random")
    with pytest.raises(ValueError, match="photographs is missing: give a folder of images"):
        steps.real_candidates(other, recipe, "color")
    (tmp_path / "photographs").mkdir()
    for n in range(4):
        Image.new("RGB", (40, 33), (60 * n, 0, 0)).save(tmp_path / "photographs" / f"{n}.png")
        (tmp_path / "photographs" / f"{n}.txt").write_text(f"red {60 * n}")
    found = steps.real_candidates(other, recipe, "color")
    vae = AutoencoderKL.from_pretrained(params.models["shapes"].pipeline, subfolder="vae", torch_dtype=torch.float32)
    assert len({item.text for item in found.prompts}) == 3
    for item, latents in zip(found.prompts, found.latents, strict=True):
        picture = torch.tensor([float(item.text.split()[1]), 0.0, 0.0])[:, None, None].expand(1, 3, 64, 64) / 127.5 - 1
        with torch.no_grad():
            expected = vae.encode(picture).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"real is 1\.0 and real_images has none: name a folder"):
        steps.real_candidates(config.Declared(vars(other) | {"real_images": None}), recipe, "color")


def test_web_captions_are_wrong_and_clean_ones_true(params):
    judge, shares = judging.open_judges(params)[0], {}
    for captions in ("web", "clean"):
        images, texts = pairs.draw(params, recipe_of(params, real_captions=captions, real_pairs=300), "color")
        shares[captions] = float((judge.score(images, texts) > 0.5).float().mean())
    assert shares["clean"] > 0.9
    assert 0.25 < shares["clean"] - shares["web"] < 0.6  # of two objects 1 - (1 - 0.35) (1 - 0.15) = 0.45 are wrong
    _, texts = pairs.draw(params, recipe_of(params, real_from="category", real_captions="clean", real_pairs=20), "spatial")
    assert all(any(word in text for word in (" on the left of ", " on the right of ", " above ", " below ")) for text in texts)


def test_the_pool_of_another_model_and_the_adapter_of_the_base(params):
    aligned = recipe_of(params, real=1.0, real_captions="clean", real_from="category", real_pairs=8, select="random")
    recipe = recipe_of(params, M=2, select="standard", pool_adapter=aligned)
    model = steps.tuned(params, recipe, "spatial", seed=0)
    source = steps.tuned(params, aligned, "spatial", seed=aligned.seeds[0]).adapters
    pool = steps.candidates(params, recipe, "spatial", *source)
    chosen, latents = steps.keep(pool, recipe, seed=params.seed, draw=0)
    assert model.adapters == (steps.adapter(params, recipe, latents, list(chosen["prompt"]), seed=0),)
    assert not torch.equal(pool.latents, steps.candidates(params, recipe, "spatial").latents)


# ---------------------------------------------------------------- quality and variety


def test_features_are_those_of_the_images_of_their_rows(params, values):
    values["studies"]["cfg_rounds"] = {"R2": {"rounds": 2, "M": 2, "val_prompts": 2, "guidance_scales": [1.0, 2.0]}}
    params = config.read(values)
    table = cell.build(params, "cfg_rounds", "R2")
    found, similarity = reading.cell_features(params, "cfg_rounds", "R2"), judging.open_judges(params)[1]
    for name, column in (("images", "similarity"), ("base", "base_similarity")):
        text = torch.nn.functional.normalize(tradeoff_text(similarity, table["prompt"].tolist()), dim=-1).double().numpy()
        np.testing.assert_allclose((found[name] * text).sum(1), table[column], atol=2e-3)
    adapters = sorted(path.name for path in (Results(params.model).cell("cfg_rounds", "R2") / "adapters").iterdir())
    assert adapters == ["color-0", "color-0-2", "color-1", "color-1-2"]
    assert reading.cells(params, "cfg_rounds", "cell")["split"].unique().tolist() == ["test"]
    ours, base = (tradeoff.view(params, "cfg_rounds", "R2", 2.0, of=of) for of in ("images", "base"))
    assert ours.features.shape == (2 * 3, 96) and ours.reference.shape == (3, 2, 96)
    assert ours.prompts.tolist() == [0, 1, 2] * 2 and ours.measures == ("cmmd", "vendi")
    apart = tradeoff.difference(ours, base, "cmmd")
    assert apart.mean == pytest.approx(tradeoff.value(ours, "cmmd").mean - tradeoff.value(base, "cmmd").mean)
    assert tradeoff.difference(ours, base, "cmmd", times=2).mean == pytest.approx(apart.mean - tradeoff.value(base, "cmmd").mean)
    assert tradeoff.point(tradeoff.view(params, "cfg_rounds", "R2", 1.0, split="val"), "vendi") >= 1
    assert tradeoff.view(params, "cfg_rounds", "R2", 1.0, of="decoded").features.shape == (3, 96)
    with pytest.raises(ValueError, match="same prompts and seeds"):
        tradeoff.difference(ours, tradeoff.view(params, "cfg_rounds", "R2", 2.0, split="val"), "vendi")


def tradeoff_text(similarity, texts):
    from mitune.alignment import text_features

    with torch.inference_mode():
        return text_features(similarity.model, similarity.tokenizer, texts)


def test_rendered_scenes_are_nearer_to_the_reference_than_an_untrained_models_images(params):
    recipe = recipe_of(params, test_prompts=12, reference_images=4)
    found = steps.reference(params, recipe, "color")
    assert found["reference"].shape == (48, 96) and found["decoded"].shape == (12, 96)
    judged = open_model(params).decode(torch.randn(12, 4, 8, 8))
    noise = judging.open_judges(params)[1].features(judged).double().numpy()
    reference = found["reference"].double().numpy()
    assert tradeoff.quality.cmmd(reference[::2], reference[1::2]) < tradeoff.quality.cmmd(noise, reference)


def test_the_front_and_the_sweet_spot():
    points = {"a": (1.0, 50.0), "b": (2.0, 60.0), "c": (2.5, 55.0), "d": (4.0, 70.0), "e": (1.0, 40.0)}
    assert tradeoff.front(points) == ["a", "b", "d"]
    assert tradeoff.sweet_spot(points, 3.0) == "b"
    assert tradeoff.sweet_spot(points, 0.5) == "a"


# ---------------------------------------------------------------- reading


def test_a_removed_key_leaves_no_row(params, values):
    for key in recipes(params, "set_size"):
        cell.build(params, "set_size", key)
    assert reading.cells(params, "set_size", "cell")["cell"].unique().tolist() == ["same", "larger"]
    del values["studies"]["set_size"]["larger"]
    fewer = config.read(values)
    for kind in ("cell", "kept", "costs"):
        assert reading.cells(fewer, "set_size", kind)["cell"].unique().tolist() == ["same"]
    assert reading.cell_seconds(fewer, "set_size").columns.tolist() == ["same"]


# ---------------------------------------------------------------- DVC


def declared(folder):
    """What DVC itself finds of each stage: its command, and the values of its parameters."""
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        return {stage.addressing.rpartition(":")[2]: (stage.cmd, [dep.read_params() for dep in stage.params]) for stage in repo.index.stages}


def test_a_new_or_changed_key_concerns_its_own_cell_and_article_alone(tmp_path):
    """Of parameters and commands; what else a stage depends on is files, which a key does not change."""
    folder = smoke.clone(tmp_path / "clone")
    before, overlay = declared(folder), tmp_path / "overlay.yaml"
    assert {"set_size@M50_k1", "adapters@dora", "cfg_rounds@R2", "selection@real50", "caption_noise@wrong_30"} <= set(before)
    assert {"04_cfg_rounds", "05_set_size", "08_selection", "10_caption_noise"} <= set(before)

    def merged(cells):
        overlay.write_text(f"studies: {{set_size: {cells}}}")
        smoke.merge_into(folder / "params.yaml", overlay)
        return declared(folder)

    added = merged("{M6_k2: {M: 6, k: 2}}")
    assert added.keys() - before.keys() == {"set_size@M6_k2"}
    assert {name for name in before if added[name] != before[name]} == {"05_set_size"}
    changed = merged("{M6_k2: {M: 7}}")
    assert {name for name in added if changed[name] != added[name]} == {"set_size@M6_k2", "05_set_size"}
    assert merged("{M6_k2: null}") == before


def test_the_spine_has_no_study_and_no_index():
    own = ["code", "base", "pool@color", "finetune@color-judge", "00_base_model", "01a_exact_worlds", "03_finetuning"]
    assert repro.spine([*own, "set_size@M50_k1", "adapters@dora", "05_set_size", "10_caption_noise", "99_claims", "index"]) == own
