"""Oracles: the cells counted by hand, git's and DVC's own account of the project, and what was put into a profile's folder before."""

import dataclasses
import subprocess

import pytest

from mitune import config, profiles, smoke
from mitune.checks import CATEGORIES
from mitune.recipes import Studies, recipes

STUDIES = [field.name for field in dataclasses.fields(Studies) if field.name != "common"]


def merged(*names):
    values = config.read_yaml(config.root() / "params.yaml")
    for name in names:
        values = config.merge(values, config.read_yaml(profiles.FOLDER / f"{name}.yaml"))
    return config.read(values)


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["full"], {"cfg_rounds": 6, "set_size": 5, "adapters": 6, "merging": 18, "selection": 14, "caption_noise": 6}),
        (["full", "smoke"], {"cfg_rounds": 3, "set_size": 3, "adapters": 2, "merging": 12, "selection": 5, "caption_noise": 2}),
    ],
)
def test_every_recipe_of_the_widened_studies_is_valid(names, counts):
    params = merged(*names)
    cells = {study: recipes(params, study) for study in STUDIES}
    assert {study: len(some) for study, some in cells.items()} == counts
    assert cells["set_size"]["M500_k1"].M == 500
    assert cells["adapters"]["dora"].categories == CATEGORIES
    assert cells["selection"]["spatial_aligned"].categories == ("spatial",)


def test_the_full_profile_changes_nothing_but_the_studies_and_asks_for_prompts_that_are_there():
    params, default = merged("full"), config.load()
    assert vars(params) | {"studies": None} == vars(default) | {"studies": None}
    assert {recipe.M for recipe in recipes(params, "selection").values()} == {params.studies.common.M}
    lambdas = {round(recipe.weights[0], 6) for recipe in recipes(params, "merging").values() if recipe.merge == "weights" and recipe.arm is None}
    assert {n / 10 for n in range(11)} <= lambdas
    for study in STUDIES:
        wider, cells = recipes(params, study), recipes(default, study)
        assert cells.keys() <= wider.keys()
        assert all(len(wider[key].seeds) >= len(recipe.seeds) and len(wider[key].categories) >= len(recipe.categories) for key, recipe in cells.items())
    for category in CATEGORIES:
        prompts = (config.root() / default.prompts / f"{category}_train.txt").read_text(encoding="utf-8").splitlines()
        assert len(prompts) >= params.studies.common.n_prompts


def test_a_profile_is_a_clone_of_its_own_that_goes_on(tmp_path, monkeypatch):
    from dvc.repo import Repo

    project = smoke.clone(tmp_path / "project", overlay=None)
    monkeypatch.setenv("MITUNE_ROOT", str(project))
    before = (project / "params.yaml").read_bytes()
    (project / "data" / "t2i-compbench").mkdir()
    (project / "data" / "t2i-compbench" / "color_train.txt").write_text("a red car")
    folder = profiles.prepare("full")
    assert folder == project / "profiles" / "full"
    assert "M500_k1" in config.load(folder / "params.yaml").studies.set_size
    assert (project / "params.yaml").read_bytes() == before
    assert (folder / "data" / "t2i-compbench" / "color_train.txt").read_text() == "a red car"
    assert (folder / "data" / "shapes").is_dir() and not (folder / "data" / "shapes").is_symlink()
    assert not subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True).stdout
    with Repo(str(project)) as repo:
        assert not [stage for stage in repo.index.stages if "profiles" in stage.relpath]
    with Repo(str(folder)) as repo:
        assert repo.cache.local.path == str(project / ".dvc" / "cache" / "files" / "md5")
    (folder / "dvc.lock").write_text("schema: '2.0'\n")
    (folder / "reports").mkdir()
    (folder / "reports" / "README.md").write_text("kept")
    (project / ".scratch" / "shared" / "pool-0").mkdir()
    (project / "params.yaml").write_text(before.decode().replace("n_prompts: 40 ", "n_prompts: 39 "))
    assert profiles.prepare("full") == folder
    assert config.load(folder / "params.yaml").studies.common.n_prompts == 39
    assert (folder / "dvc.lock").is_file() and (folder / "reports" / "README.md").read_text() == "kept"
    assert (folder / ".scratch" / "shared" / "pool-0").is_dir()
    assert not (project / "reports").exists() and not (project / "dvc.lock").exists()
