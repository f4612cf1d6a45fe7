"""Oracle: an uninterrupted run. A stage that is killed goes on from its last shard and ends with the same bytes; sets refer into pools."""

import dataclasses
import itertools

import pytest
import torch

from mitune import captions, config, reading
from mitune.artifacts import Results, read_table, read_tensors
from mitune.information import kappa
from mitune.sampling import Sampler
from mitune.stages import evaluate, finetune, information, open_model, pool, read_prompts, scores, sets


@pytest.fixture
def params(toy_values, in_toy_project):
    return in_toy_project(toy_values)


def test_a_killed_pool_resumes_to_the_same_bytes(params, monkeypatch):
    place = Results(params.model).pool("color", "train")
    pool.build(params, "color")
    whole = place.read_bytes()
    place.unlink()
    calls, sample = itertools.count(1), pool.sample

    def killed(*arguments, **keywords):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return sample(*arguments, **keywords)

    monkeypatch.setattr(pool, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        pool.build(params, "color")
    assert not place.exists()
    begun, finished = next(calls) - 1, len(list((config.root() / ".scratch").glob("pool-color-train/*/*.safetensors")))
    assert finished == begun - 1 > 0
    pool.build(params, "color")
    shards = -(-params.pool.n_prompts["train"] // params.pool.shard_prompts) - (-params.pool.n_prompts["val"] // params.pool.shard_prompts)
    assert next(calls) - 2 - begun == shards - finished  # what was finished was not computed again
    assert place.read_bytes() == whole


def test_a_larger_pool_keeps_the_candidates_of_a_smaller_one(params):
    pool.build(params, "color")
    small = read_tensors(Results(params.model).pool("color", "train"))
    shapes = {"models": {"shapes": dict(vars(params.models["shapes"]))}, "benchmark": "shapes", "benchmarks": params.benchmarks}
    values = {"model": params.model, "device": "cpu", "dtype": "float32", "seed": params.seed, **shapes}
    larger = {**vars(params.pool), "n_prompts": dict(params.pool.n_prompts), "M": params.pool.M + 2}
    pool.build(config.read(values | {"pool": larger}), "color")
    large = read_tensors(Results(params.model).pool("color", "train"))
    torch.testing.assert_close(large["latents"][:, : params.pool.M], small["latents"], rtol=1e-4, atol=1e-4)


def test_sets_refer_to_the_best_of_the_pool(params):
    pool.build(params, "color")
    table = scores.build(params, "color")
    chosen = sets.build(params, "color")
    train = table[table["split"] == "train"]
    for arm, column in (("mi_paper", params.set.paper), ("mi_best", params.set.best), ("judge", "judge")):
        best = train.loc[train.groupby("prompt_id")[column].idxmax()].set_index("prompt_id")["image"]
        assert chosen[chosen["arm"] == arm].set_index("prompt_id")["image"].equals(best.rename("image"))
    assert chosen[chosen["arm"] == "random"]["draw"].nunique() == params.set.random_draws
    assert read_table(Results(params.model).sets("color"), "sets").equals(chosen[read_table(Results(params.model).sets("color"), "sets").columns])


def test_information_has_a_row_for_each_row_of_its_tables(params):
    for category in params.categories:
        information.build(params, category)
    candidates, stepped, rendered = (reading.tables(params, kind) for kind in ("candidates", "stepped", "rendered"))
    stored = reading.information_terms(params)
    asked = params.information
    at_study, r = candidates["guidance_scale"] == params.pool.guidance_scale, asked.timesteps
    assert len(rendered) == len(params.categories) * asked.n_prompts.test * asked.rendered
    chosen_on, confirmed_on = (len(params.categories) * n * asked.M for n in (asked.n_prompts.val, asked.n_prompts.test))
    assert len(candidates) == chosen_on + confirmed_on * len(asked.guidance_scales)
    assert set(candidates["guidance_scale"][candidates["split"] == "val"]) == {params.pool.guidance_scale}
    for name in ("renoised_orthogonal", "renoised_standard"):
        assert stored[name].shape == (len(candidates), r)
    for kind in information.NOISES:
        assert stored[f"{kind}_standard"].shape == (at_study.sum(), r)
        assert not torch.equal(stored[f"{kind}_standard"], stored["renoised_standard"][torch.tensor(at_study.tolist())])
    assert stored["rendered_standard"].shape == (len(rendered), r)
    phrases = torch.tensor([len(captions.components(captions.parse(text))) for text in candidates["prompt"][at_study]])
    for form in ("standard", "reduced"):
        assert torch.equal((~stored[f"phrase_{form}"].isnan()).sum((1, 2)), phrases * r)
    assert rendered.groupby(["category", "prompt"])["aligned"].mean().eq(0.5).all()
    assert (rendered["aligned"] == (rendered["drawn"] == rendered["prompt"])).all()
    assert (rendered["aligned"] == (rendered["error"] == "none")).all()
    for steps in asked.step_grid:
        of_steps, rows = reading.of_steps(stored, steps), stepped[stepped["num_inference_steps"] == steps]
        assert len(rows) == confirmed_on
        assert set(rows["split"]) == {"test"}
        assert torch.equal(of_steps["timesteps"], Sampler.of(torch.ones(1000), steps).timesteps)
        assert of_steps["orthogonal"].shape == of_steps["path"].shape == (len(rows), steps)
        assert of_steps["renoised_standard"].shape == (len(rows), r)
    whole = Results(params.model).information("color").read_bytes()
    Results(params.model).information("color").unlink()
    information.build(params, "color")
    assert Results(params.model).information("color").read_bytes() == whole


def test_information_draws_the_candidates_of_a_pool(params):
    """At the study's guidance, with as many steps."""
    same = dataclasses.replace(params.information, num_inference_steps=params.pool.num_inference_steps)
    information.build(config.Declared(vars(params) | {"information": same}), "color")
    pool.build(params, "color")
    table = scores.build(params, "color").query("split == 'val'")
    n = min(params.pool.n_prompts["val"], same.n_prompts.val) * params.pool.M
    ours = reading.tables(config.Declared({"model": params.model, "categories": ("color",)}), "candidates").query("split == 'val'")
    torch.testing.assert_close(torch.tensor(ours["similarity"].to_numpy()[:n]), torch.tensor(table["similarity"].to_numpy()[:n]), rtol=1e-3, atol=1e-3)


def test_the_default_profile_asks_for_no_more_prompts_than_are_shipped():
    params = config.load()
    for category in params.categories:
        for split, n in (*params.pool.n_prompts.items(), *vars(params.information.n_prompts).items()):
            assert len(read_prompts(params, category, split, n)) == n


def test_the_embedded_model_is_asked_only_what_its_judge_reads(params, tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,split\na red circle and a blue square,train\na green bench and a blue bowl,test\n")
    own = config.Declared(vars(params) | {"benchmark": "mine", "benchmarks": {"mine": config.Benchmark("mine.csv")}})
    assert [item.text for item in read_prompts(own, "mine", "train")] == ["a red circle and a blue square"]
    with pytest.raises(ValueError, match=r"benchmark 'mine', mine test, prompt 1: .*'a green bench and a blue bowl'.* reads only its grammar"):
        read_prompts(own, "mine", "test")


def test_an_evaluation_takes_all_prompts_where_there_are_fewer_than_asked_for(params):
    few = dataclasses.replace(params.evaluate, n_prompts=48, images=1, num_inference_steps=2, guidance_scales=(1.0,), shard_prompts=24)
    table = evaluate.build(config.Declared(vars(params) | {"evaluate": few, "arms": ()}), "non_spatial")
    assert len(table) == 47  # of non_spatial_test.txt


RFMI = {"form": "inner_product", "latents": "trajectory", "t_min": 50, "kappa": "paper"}


@pytest.mark.parametrize(
    ("fixture", "variance", "overlay", "forms"),
    [
        ("tiny_xl", "small", {}, {"orthogonal", "path"}),
        ("tiny_sd3", "small", {"estimators": {"rfmi": RFMI}, "set": {"best": "rfmi"}}, {"orthogonal", "path", "inner_product"}),
        ("tiny_sd3", "none", {"estimators": {"rfmi": RFMI, "path": None}}, {"orthogonal", "inner_product"}),
    ],
    ids=["xl", "flow", "euler"],
)
def test_the_same_stages_take_every_model(request, toy_values, in_toy_project, fixture, variance, overlay, forms):
    """From the pool to the evaluation of an adapter; the table's numbers are those of the stored terms."""
    cut = {"arms": ["mi_best"], "cost": {"arm": "mi_best"}, "finetune": {"steps": 2, "checkpoint_every": 2}, "renoise": {"timesteps": 3}}
    cut["evaluate"] = {"n_prompts": 2, "images": 1, "comp_prompts": 0, "guidance_scales": [1.0]}
    values = config.merge(config.merge(toy_values, overlay), cut)
    params = in_toy_project(values, pipeline=str(request.getfixturevalue(fixture)), variance=variance)
    pool.build(params, "color")
    stored = read_tensors(Results(params.model).pool("color", "train"))
    assert stored.keys() - {"prompt_ids", "latents", "timesteps"} == forms
    table = scores.build(params, "color")
    estimates = table[list(params.estimators)]
    assert estimates.notna().all(axis=None) and (estimates.nunique() > 1).all()
    if "rfmi" in params.estimators:
        kept = stored["timesteps"] > 50
        weighed = stored["inner_product"][..., kept] * kappa(open_model(params).alphas_cumprod, stored["timesteps"][kept])
        torch.testing.assert_close(torch.tensor(table.loc[table["split"] == "train", "rfmi"].to_numpy()), weighed.mean(-1).flatten(), rtol=1e-4, atol=1e-6)
    sets.build(params, "color")
    curve = finetune.build(params, "color", "mi_best")
    assert curve["loss"].notna().all()
    assert set(evaluate.build(params, "color")["arm"]) == {"base", "mi_best"}
