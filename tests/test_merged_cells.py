"""Oracles: counted rows, evaluations that other steps have made, equal bytes, and the rules written in params.yaml."""

import re
import shutil

import pytest
import torch

from mitune import artifacts, config, merging, models, reading
from mitune.artifacts import Results, read_table, read_tensors
from mitune.recipes import Studies, recipes
from mitune.stages import finetune, pool, scores, sets, steps
from mitune.stages import merging as stage


@pytest.fixture
def values(toy_values):
    toy_values["studies"]["common"] |= {"seeds": [0], "block": 4}
    toy_values["arms"] = ["mi_best"]
    color_and_shape, of_the_arm = {"categories": ["color", "shape"]}, {"categories": ["color", "spatial"], "arm": "mi_best"}
    toy_values["studies"]["merging"] = {
        "lambda_0": color_and_shape | {"merge": "weights", "weights": [0.0, 1.0]},
        "lambda_100": color_and_shape | {"merge": "weights", "weights": [1.0, 0.0]},
        "averaged": color_and_shape | {"merge": "adapters", "weights": [0.5, 0.5]},
        "ties": color_and_shape | {"merge": "ties", "density": 0.2},
        "joint": color_and_shape | {"merge": "joint"},
        "mean_of_six": of_the_arm | {"merge": "weights"},
        "joint_of_six": of_the_arm | {"merge": "joint"},
    }
    return toy_values


@pytest.fixture
def params(values, in_toy_project):
    return in_toy_project(values)


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        ({"merge": "weights"}, "x.categories has 1 entry"),
        ({"categories": ["color", "shape"]}, "missing key studies.merging.x.merge"),
        ({"categories": ["color", "shape"], "merge": "sum"}, "x.merge is 'sum'"),
        ({"categories": ["color", "shape"], "merge": "weights", "weights": [1.0]}, "x.weights has 1 entries"),
        ({"categories": ["color", "shape"], "merge": "weights", "weights": [1.0, -1.0]}, "x.weights[1] is -1.0"),
        ({"categories": ["color", "shape"], "merge": "joint", "weights": [0.5, 0.5]}, "x.weights: joint has none"),
        ({"categories": ["color", "shape"], "merge": "adapters", "weights": [0.5, 0.6]}, "x.weights sum to 1.1"),
        ({"categories": ["color", "shape"], "merge": "ties"}, "x.density is None: ties has one"),
        ({"categories": ["color", "shape"], "merge": "ties", "density": 1.0}, "x.density is 1.0"),
        ({"categories": ["color", "shape"], "merge": "joint", "density": 0.5}, "x.density is 0.5: ties has one"),
        ({"categories": ["color", "shape"], "merge": "joint", "rounds": 2}, "x.rounds is 2: merging takes one round"),
        ({"categories": ["color", "shape"], "merge": "joint", "real": 0.5, "real_pairs": 8}, "x.real is 0.5: merging takes"),
        ({"categories": ["color", "shape"], "merge": "joint", "pool_adapter": {"select": "random"}}, "x.pool_adapter is set: merging takes"),
        ({"categories": ["color", "shape"], "merge": "joint", "val_prompts": 2}, "x.val_prompts is 2: merging takes"),
        ({"categories": ["color", "spatial"], "merge": "joint", "arm": "mi_best", "M": 4}, "x.M: adapters of an arm are those of the pipeline"),
        ({"categories": ["color", "spatial"], "merge": "joint", "arm": "judge"}, "the pipeline has no adapter of 'judge'"),
        ({"categories": ["color", "shape"], "merge": "joint", "arm": "mi_best"}, "the pipeline has no adapter of 'shape'"),
    ],
)
def test_an_impossible_merge_is_refused_by_its_full_name(values, cell, named):
    values["studies"]["merging"]["x"] = cell
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        config.read(values)
    assert "studies.merging.x" in str(error.value) and "\n" not in str(error.value)


def test_adapters_of_an_arm_have_the_pipelines_seed_and_steps(values):
    values["finetune"]["seed"], values["finetune"]["steps"] = 7, 9
    cells = recipes(config.read(values), "merging")
    assert (cells["mean_of_six"].seeds, cells["mean_of_six"].steps) == ((7,), 9)
    assert (cells["lambda_0"].seeds, cells["lambda_0"].steps) == ((0,), 4)
    assert cells["mean_of_six"].shares == (0.5, 0.5)


def test_merged_cells(params):
    """Ends of lambda, a cell of every kind, what is read from them, and equal bytes from nothing."""
    keys = ["lambda_0", "lambda_100", "averaged", "ties", "joint"]
    tables = {key: stage.build(params, key) for key in keys}
    recipe = recipes(params, "merging")["lambda_0"]
    assert all(len(table) == 2 * recipe.test_prompts * recipe.test_images * len(recipe.guidance_scales) for table in tables.values())
    own = ["category", "guidance_scale", "prompt_id", "own_judge", "base_judge"]
    assert all(table[own].equals(tables["lambda_0"][own]) for table in tables.values())
    for key, category, other in (("lambda_0", "shape", "color"), ("lambda_100", "color", "shape")):
        rows = tables[key].groupby("category")[["judge", "own_judge"]]
        at_end, crossed = rows.get_group(category), rows.get_group(other)
        torch.testing.assert_close(torch.tensor(at_end["judge"].to_numpy()), torch.tensor(at_end["own_judge"].to_numpy()), rtol=1e-3, atol=1e-4)
        assert (crossed["judge"] != crossed["own_judge"]).any()
    place = Results(params.model).cell("merging", "ties")
    layers = read_table(place / "layers.parquet", "layers")
    assert layers["layer"].is_unique and layers["layer"].str.startswith("unet.").all() and (layers["apart"] > 0).all()
    asked = config.Declared(vars(params) | {"studies": Studies(params.studies.common, merging={key: dict(params.studies.merging[key]) for key in keys})})
    assert reading.cells(asked, "merging", "merged")["cell"].unique().tolist() == keys
    assert reading.cells(asked, "merging", "layers").groupby("cell", sort=False).size().index.tolist() == keys
    whole = {file.name: file.read_bytes() for file in place.iterdir()}
    shutil.rmtree(config.root() / ".scratch")
    stage.build(params, "ties")
    assert {file.name: file.read_bytes() for file in place.iterdir()} == whole and len(whole) == 2


def test_the_pipelines_adapters_are_merged_as_they_are(params):
    for category in ("color", "spatial"):
        pool.build(params, category)
        scores.build(params, category)
        sets.build(params, category)
        finetune.build(params, category, "mi_best")
    table = stage.build(params, "mean_of_six")
    recipe = recipes(params, "merging")["mean_of_six"]
    folders = [Results(params.model).adapter(category, "mi_best") for category in recipe.categories]
    for category, folder in zip(recipe.categories, folders, strict=True):
        own = steps.evaluation(params, recipe, category, folder)
        assert table.loc[table["category"] == category, "own_judge"].tolist() == own["judge"].tolist()
    source = params.models["shapes"].pipeline
    both = [merging.deltas(models.load(source, adapter=folder, fuse=False)) for folder in folders]
    mean = merging.linear(both, (0.5, 0.5))
    stored = read_tensors(stage.merged(params, recipe, folders, None) / "deltas.safetensors")
    assert stored.keys() == mean.keys() and all(torch.equal(stored[name], mean[name]) for name in mean)
    latents, captions = finetune.kept(params, "color", "mi_best")
    assert len(latents) == len(captions) == params.pool.n_prompts["train"] * params.set.k
    assert len(stage.build(params, "joint_of_six")) == len(table)


def test_a_prepared_model_is_known_by_its_key(params):
    recipe, opened = recipes(params, "merging")["lambda_0"], []

    def prepared(key):
        return steps.Prepared(lambda: opened.append(key) or steps.open_model(params), (key,))

    base = steps.evaluation(params, recipe, "color")
    for key in ("a", "b", "a"):
        assert steps.evaluation(params, recipe, "color", prepared=prepared(key)).equals(base)
    assert opened == ["a", "b"]
    assert artifacts.SCHEMAS["merged"].keys() == {"seed", *base.columns, *(f"{of}_{name}" for of in ("base", "own") for name in ("judge", "similarity"))}
