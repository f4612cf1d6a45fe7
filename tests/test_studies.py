"""Oracles: work done at once for work that grew, counted calls, DVC's own account of its stages, and the rules written in params.yaml."""

import dataclasses
import re
import shutil

import pytest
import torch

from mitune import artifacts, config, reading, repro, smoke
from mitune.artifacts import Results, read_table
from mitune.stages import cell, steps


@pytest.fixture
def values():
    root = config.root()
    values = config.merge(config.read_yaml(root / "params.yaml"), config.read_yaml(root / "mitune" / "smoke.yaml"))
    values["studies"]["set_size"] = {"same": {}, "larger": {"M": 5}}
    values["studies"]["common"]["block"] = 2
    return values


@pytest.fixture
def params(values, tiny_pipeline, tmp_path, monkeypatch):
    """Toy parameters in a project folder of their own, with the shipped prompts and judges."""
    root = config.root()
    shipped = {name: str(root / entry) for name, entry in values["models"]["shapes"].items()}
    values["models"]["shapes"] = shipped | {"pipeline": str(tiny_pipeline)}
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))
    return config.read(values)


def recipe_of(params, **changes):
    return dataclasses.replace(config.recipes(params, "set_size")["same"], **changes)


# ---------------------------------------------------------------- recipes


def test_a_recipe_is_the_cell_over_the_default(values):
    params = config.read(values)
    cells = config.recipes(params, "set_size")
    assert list(cells) == ["same", "larger"]
    assert (cells["larger"].M, cells["larger"].k) == (5, params.studies.common.k)
    assert cells["same"].tuning == config.Tuning(**{name: value for name, value in vars(params.finetune).items() if name != "seed"} | {"steps": 4})
    assert cells["same"] == config.recipes(params, "adapters")["dora"]
    assert config.recipes(params, "adapters")["text_encoder"].text_encoder is True


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
    recipe = config.recipes(params, "adapters")["dora"]
    assert read_table(place / "images.parquet", "cell").equals(table[list(artifacts.SCHEMAS["cell"])])
    assert len(table) == recipe.test_prompts * recipe.test_images * len(recipe.seeds) * len(params.evaluate.guidance_scales)
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
    assert len(first) == 5


# ---------------------------------------------------------------- reading


def test_a_removed_key_leaves_no_row(params, values):
    for key in config.recipes(params, "set_size"):
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
    assert {"set_size@M50_k1", "adapters@dora", "05_set_size", "06_adapters"} <= set(before)

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
    own = ["base", "pool@color", "finetune@color-judge", "00_base_model", "01a_exact_worlds", "03_finetuning"]
    assert repro.spine([*own, "set_size@M50_k1", "adapters@dora", "05_set_size", "10_caption_noise", "99_claims", "index"]) == own
