"""Oracle: the file itself, and the rules written beside its keys."""

import copy
import re

import pytest

from mitune import config


@pytest.fixture
def values():
    return copy.deepcopy(config.read_yaml(config.root() / "params.yaml"))


def write(values, folder):
    from ruamel.yaml import YAML

    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(values, file)
    return folder / "params.yaml"


def put(values, key, value):
    *folders, last = key.split(".")
    for folder in folders:
        values = values[folder]
    if value is KeyError:
        del values[last]
    else:
        values[last] = value


def test_the_projects_own_parameters_are_valid_and_typed():
    params = config.load()
    assert params.finetune.learning_rate == 3e-4
    assert params.pool.n_prompts["train"] == 40
    assert params.estimators["path"].kappa is None
    with pytest.raises(AttributeError):
        params.pool.M = 3


def test_the_toy_overlay_is_valid(values):
    overlay = config.read_yaml(config.root() / "mitune" / "smoke.yaml")
    merged = config.merge(values, overlay)
    assert config.read(merged).categories == ("color", "spatial")
    assert merged["pool"]["guidance_scale"] == values["pool"]["guidance_scale"]
    assert values["pool"]["M"] == 16  # the original is untouched


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("pool.m", 16, "unknown key pool.m"),
        ("pool.M", KeyError, "missing key pool.M"),
        ("seed", KeyError, "missing key seed"),
        ("pool.M", 0, "pool.M is 0: it must be at least 1"),
        ("pool.M", "16", "pool.M is '16': it must be a whole number"),
        ("pool.M", True, "pool.M is True"),
        ("pool.n_prompts.dev", 3, "pool.n_prompts.dev"),
        ("set.k", 17, "set.k is 17 and pool.M is 16"),
        ("set.best", "stanard", "set.best is 'stanard'"),
        ("categories", ["colour"], "'colour'"),
        ("categories", ["color", "color"], "twice"),
        ("categories", [], "categories is []"),
        ("dtype", "float23", "dtype is 'float23'"),
        ("device", "gpu", "device is 'gpu'"),
        ("model", "sd", "model is 'sd'"),
        ("model", "sd", "a new one is a line there, with a folder or a hub name"),
        ("model", "sdxl", "reports is 'reports': for model 'sdxl' it must be 'reports/sdxl'"),
        ("benchmark", "coco", "benchmark is 'coco': `benchmarks` has "),
        ("benchmark", "t2i-compbench", "prompts is 'data/shapes/prompts': for benchmark 't2i-compbench' it must be 'data/t2i-compbench'"),
        ("benchmarks.shapes.prompt", "p.csv", "unknown key benchmarks.shapes.prompt"),
        ("benchmarks.shapes.holdout", {"val": 0}, "benchmarks.shapes.holdout.val is 0: it must be at least 1"),
        ("benchmarks.shapes.holdout", {"train": 1}, "benchmarks.shapes.holdout has 'train': it makes splits that the benchmark lacks"),
        ("benchmarks.shapes.splits", {"dev": "val"}, "unknown key benchmarks.shapes.splits.dev: the splits are train, val, test, comp"),
        ("benchmarks.shapes.splits", {"val": "a", "test": "a"}, "benchmarks.shapes.splits has an entry twice"),
        ("benchmarks.t2i-compbench.holdout", {"test": 1}, "benchmarks.t2i-compbench.holdout has 'test'"),
        ("studies.common.categories", ["colour"], "studies.common.categories has 'colour'"),
        ("reports", "reports/shapes", "reports is 'reports/shapes'"),
        ("finetune.timesteps.low", 1000, "low must be below high"),
        ("finetune.learning_rate", "2e-4x", "finetune.learning_rate is '2e-4x': it must be a number"),
        ("arms", ["chance"], "arms has 'chance'"),
        ("finetune.text_encoder", "yes", "finetune.text_encoder is 'yes': it must be true or false"),
        ("finetune.betas", [0.9, 1.5], "finetune.betas[1] is 1.5"),
        ("information.guidance_scales", [1.0, 5.0], "information.guidance_scales is 1, 5: it must have pool.guidance_scale"),
        ("information.guidance_scales", [1.5, 2.5, 2.5], "information.guidance_scales has an entry twice"),
        ("information.step_grid", [10, 10], "information.step_grid has an entry twice"),
        ("information.step_grid", [10, 25], "information.step_grid has 25, which information.num_inference_steps is already"),
        ("information.step_grid", [1], "information.step_grid[0] is 1: it must be between 2 and 1000"),
        ("information.n_prompts.train", 3, "unknown key information.n_prompts.train"),
        ("information.n_prompts.val", KeyError, "missing key information.n_prompts.val"),
        ("information.M", 2, "information.M is 2: it must be at least 3"),
        ("information.rendered", 1, "information.rendered is 1"),
        ("estimators.path.latents", "renoised", "estimators.path.latents"),
        ("models.shapes.variance", "none", "estimators.path.form is path: no step has noise; remove the entry, or set models.shapes.variance: small"),
        ("models.sdxl.vae_dtype", "half", "models.sdxl.vae_dtype is 'half': it must be one of float32, bfloat16, float16"),
        ("models.sdxl.attention", "flash", "models.sdxl.attention is 'flash'"),
        ("models.sdxl.tf32", "yes", "models.sdxl.tf32 is 'yes': it must be true or false"),
        ("estimators.path.kappa", "paper", "estimators.path.kappa"),
        ("estimators.standard.latents", "trajectory", "estimators.standard.latents"),
        ("estimators.standard.t_min", 999, "estimators.standard.t_min is 999"),
        ("evaluate.guidance_scales", [-1.0], "evaluate.guidance_scales[0] is -1.0"),
        ("pool.num_inference_steps", 1, "between 2 and 1000"),
        ("exact_worlds.world.modes", 1, "exact_worlds.world.modes is 1"),
        ("exact_worlds.caption_errors", [1.0], "exact_worlds.caption_errors[0] is 1.0"),
        ("exact_worlds.flow.low", 1.0, "exact_worlds.flow is 1.0 to 1.0: low must be below high"),
        ("exact_worlds.flow.high", 1.5, "exact_worlds.flow.high is 1.5"),
        ("exact_worlds.two_component_errors", [0.5], "exact_worlds.two_component_errors[0] is 0.5"),
    ],
)
def test_bad_values_are_refused_by_name_in_one_line(values, tmp_path, key, value, named):
    put(values, key, value)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        config.load(write(values, tmp_path))
    assert str(error.value).startswith("params.yaml: ")
    assert "\n" not in str(error.value)


def test_the_categories_are_the_benchmarks(values):
    for key in ("mean_of_six", "joint_of_six"):
        del values["studies"]["merging"][key]
    own = {"prompts": "mine.csv", "benchmark": "mine", "benchmarks": values["benchmarks"] | {"mine": {"prompts": "mine.csv"}}}
    assert config.read(values | own | {"categories": ["cats", "dogs-2"]}).categories == ("cats", "dogs-2")
    with pytest.raises(ValueError, match="categories has 'a/b': a category names a stage and a folder"):
        config.read(values | own | {"categories": ["a/b"]})


def test_another_model_does_not_take_the_embedded_prompts(values):
    other = {"model": "sd", "reports": "reports/sd", "models": values["models"] | {"sd": values["models"]["shapes"]}}
    with pytest.raises(ValueError, match=r"benchmark is 'shapes' and model 'sd': .* only the embedded judge reads them; set another benchmark"):
        config.read(values | other)
    config.read(values | other | {"benchmark": "t2i-compbench", "prompts": "data/t2i-compbench"})


def test_a_file_that_is_no_mapping_is_named(tmp_path):
    for text in ("", "a: [1", "- 1"):
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"params\.yaml") as error:
            config.load(tmp_path / "params.yaml")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="missing"):
        config.load(tmp_path / "absent.yaml")


def test_exponents_are_numbers(tmp_path):
    (tmp_path / "a.yaml").write_text("rate: 1e-4\n")
    assert config.read_yaml(tmp_path / "a.yaml") == {"rate": 1e-4}


def test_a_stage_sees_only_what_it_declares(values):
    params = config.read(config.declared(["model", "models.shapes", "pool"], values | {"models": values["models"] | {"sd": {}}}))
    assert params.pool.M == 16
    assert list(params.models) == ["shapes"]
    with pytest.raises(AttributeError, match="'finetune' is not declared"):
        _ = params.finetune
    with pytest.raises(AttributeError, match=r"params\.yaml"):
        params.model = "sd"
    with pytest.raises(ValueError, match="unknown parameter 'pol'"):
        config.read({"pol": 1})
    with pytest.raises(ValueError, match=r"unknown parameter 'models.sdx'"):
        config.declared(["models.sdx"], values)


def test_by_hand_the_whole_file_is_read():
    assert config.read(None) == config.load()


def test_the_root_is_found_upwards(tmp_path, monkeypatch):
    monkeypatch.delenv("MITUNE_ROOT", raising=False)
    (tmp_path / "params.yaml").write_text("")
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    assert config.root() == tmp_path
    monkeypatch.setenv("MITUNE_ROOT", "/elsewhere")
    assert str(config.root()) == "/elsewhere"


def test_every_output_of_every_stage_lies_under_its_models_name():
    """Another model's reports are in reports/<model>, and no stage writes anywhere else."""
    for name, stage in config.read_yaml(config.root() / "dvc.yaml")["stages"].items():
        stage = stage.get("do", stage)
        outputs = [out if isinstance(out, str) else next(iter(out)) for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])]
        assert outputs, name
        assert all(out.startswith(("results/${model}/", "${reports}/")) for out in outputs), name
