"""Oracles: arithmetic by hand on the parameters' own numbers, counted calls of the denoiser's evaluations elsewhere (test_cost), PEFT's own adapter, and the
published sizes of T2I-CompBench's splits."""

import dataclasses

import pytest

from mitune import config, finetuning, models, plan, probe

SIZES = plan.Sizes(latent=256, adapter=1000)
COMPBENCH = {"color": 679, "shape": 685, "texture": 695}  # distinct training prompts; 700 in the others; 300 of the test split


def compbench(category, split):
    return {"train": COMPBENCH.get(category, 700), "test": 300, "comp": 0}.get(split)


def changed(**changes):
    return config.read(config.merge(config.read_yaml(config.root() / "params.yaml"), changes))


def of_model(name):
    return changed(model=name, benchmark="t2i-compbench", prompts="data/t2i-compbench", reports=f"reports/{name}")


def test_the_default_stages_by_hand():
    stages = plan.plan(changed(), SIZES, lambda category, split: 0 if (category, split) == ("color", "comp") else None)
    assert stages["pool"].evaluations == 6 * (40 + 12) * 16 * 25 * 2 == 249_600
    assert stages["pool"].disk == 6 * 52 * 16 * (256 + 2 * 25) * 4  # latents and two terms a step, float32
    assert stages["pool"].largest == 40 * 16 * (256 + 2 * 25) * 4
    assert stages["scores"].evaluations == 6 * 52 * 16 * 48 * 2
    assert (stages["finetune"].steps, stages["finetune"].samples) == (6 * 4 * 60, 6 * 4 * 60 * 16)
    assert stages["finetune"].disk == 24 * 1000 * 2  # saved in float16
    images = (5 * (60 + 20) + 60) * 4  # color has no compositional prompts here
    assert stages["evaluate"].evaluations == 5 * images * 25 * (1 + 2)  # base and four arms; without guidance one branch
    assert stages["base"].evaluations == 6 * 300 * 24 * 2
    assert stages["pool"].hours(probe.Rates(800, 160)) == pytest.approx(249_600 / 800 / 3600)


def test_what_cells_share_is_counted_once():
    """color, three seeds: one pool of 50 candidates in two blocks for all; M = 100 adds two blocks; a seed adds an adapter and its evaluation."""
    study = {"M30_k1": None, "M50_k7": {"M": 50, "k": 7}, "M100_k1": {"M": 100, "k": 1}}
    others = dict.fromkeys(("cfg_rounds", "adapters", "merging", "selection", "caption_noise"))
    stages = plan.plan(changed(studies={**others, "set_size": study}), SIZES)
    pool, scores = 40 * 100 * 25 * 2, 40 * 100 * 2 * sum(t > 300 for t in timesteps())
    evaluations = (1 + 3 * 3) * 120 * 25  # the base once, three cells of three seeds; guidance 1
    assert stages["set_size"].evaluations == pool + scores + evaluations
    assert stages["set_size"].steps == 3 * 3 * 60
    random = plan.plan(changed(studies={**others, "set_size": {**study, "M50_k1": {"select": "random"}}}), SIZES)
    assert random["set_size"] == stages["set_size"]  # it asks for no score, and the others ask for this one
    again = plan.plan(changed(studies={**others, "set_size": study, "adapters": {"same": {"M": 100, "k": 1}, "dora": None, **dict.fromkeys(ADAPTERS)}}), SIZES)
    assert again["adapters"] == plan.Work()


ADAPTERS = ("lora", "text_encoder", "rank4", "attention", "all_t")


def timesteps():
    """48 timesteps, evenly spaced over 1..1000."""
    return [round((2 * i + 1) * 1000 / 96) for i in range(48)]


def test_rounds_make_pools_of_their_own():
    def of(rounds):
        study = {
            "R": {"rounds": rounds, "M": 8, "block": 8, "guidance_scales": [1.0]},
            **dict.fromkeys(("R1", "R2", "R3", "random", "guided", "guided_random")),
        }
        others = dict.fromkeys(("set_size", "adapters", "merging", "selection", "caption_noise"))
        return plan.plan(changed(studies={**others, "cfg_rounds": study}), SIZES)["cfg_rounds"]

    assert of(2).steps == 2 * of(1).steps == 2 * 3 * 60
    scored = sum(t > 300 for t in timesteps())
    assert of(2).evaluations - of(1).evaluations == 3 * 40 * 8 * 2 * (25 + scored)  # a seed's own adapter makes a seed's own pool


def test_more_candidates_are_more_work():
    works = [plan.plan(changed(pool={"M": m}), SIZES)["pool"] for m in (1, 16, 50)]
    assert [work.evaluations for work in works] == [m * works[0].evaluations for m in (1, 16, 50)]
    assert [work.disk for work in works] == sorted({work.disk for work in works})


def test_the_full_profile_has_the_steps_that_were_counted_before():
    stages = plan.plan(plan.parameters("full"), SIZES)
    assert sum(stages[study].steps for study in ("cfg_rounds", "set_size", "adapters", "merging", "selection")) == 42_780


def test_the_papers_profile_is_the_papers_setting():
    params = plan.parameters("paper")
    stages = plan.plan(params, SIZES, compbench)
    prompts = 679 + 685 + 695 + 3 * 700
    assert stages["pool"].evaluations == (prompts + 6 * params.pool.n_prompts["val"]) * 50 * 50 * 2
    assert stages["finetune"].samples == 6 * 4 * 300 * 400
    tuning = params.finetune
    assert (tuning.rank, tuning.lora_alpha, tuning.learning_rate, vars(tuning.timesteps)) == (32, 32, 1e-4, {"low": 500, "high": 1000})  # Table 8
    assert max(cell.rounds for cell in plan.recipes(params, "cfg_rounds").values()) == 3
    assert {cell.M for cell in plan.recipes(params, "set_size").values()} == {30, 50, 100, 500}  # Table 11


def test_a_gpu_day_is_less_than_a_day():
    """At the rates that the profile names, and with a quarter of the day left for decoding and judging."""
    stages = plan.plan(plan.parameters("gpu-day"), plan.Sizes(4 * 64 * 64, 33_000_000), compbench)
    assert 12 < sum(work.hours(probe.Rates(500, 133)) for work in stages.values()) < 18


def test_the_adapters_size_is_pefts(tiny_pipeline):
    params = changed(models={"shapes": {"pipeline": str(tiny_pipeline)}})
    latent, adapter = dataclasses.astuple(plan.sizes(params))
    model = models.load(tiny_pipeline)
    assert latent == model.latent_shape[0] * model.latent_shape[1] * model.latent_shape[2]
    for kind in ("dora", "lora"):
        tuning = dataclasses.replace(params.finetune, adapter=kind)
        finetuning.add_adapter(model, tuning, seed=0)
        trained = sum(parameter.numel() for parameter in finetuning.trained_parameters(model).values())
        assert finetuning.adapter_size(probe.blank(tiny_pipeline), tuning) == trained
        finetuning.remove_adapter(model)
    assert adapter == finetuning.adapter_size(model.network, params.finetune)
    with pytest.raises(ValueError, match="cannot read the denoiser's configuration of '/nowhere'"):
        probe.blank("/nowhere")


@pytest.mark.parametrize(("model", "blocks", "context", "side"), [("sd21-base", {320: 5, 640: 5, 1280: 6}, 1024, 64), ("sdxl", {640: 10, 1280: 60}, 2048, 128)])
def test_a_plan_needs_no_weight_and_no_network(model, blocks, context, side, monkeypatch, tmp_path):
    """The adapter by hand: rank (inputs + outputs) and an output more of each layer of the transformer blocks of each width."""
    params, another = of_model(model), of_model("spright")
    monkeypatch.setenv("MITUNE_ROOT", str(tmp_path))  # where nothing was downloaded
    layers = [layer for c, n in blocks.items() for layer in n * [*6 * [(c, c)], *2 * [(context, c)], (c, 8 * c), (4 * c, c)]]
    assert plan.sizes(params) == plan.Sizes(4 * side**2, sum(32 * (inputs + outputs) + outputs for inputs, outputs in layers))
    with pytest.raises(ValueError, match="there is no folder 'data/spright/pipeline': `make weights MODEL=spright` takes it from"):
        plan.sizes(another)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluations-per-second", "0"], "argument --evaluations-per-second: '0' must be a number above 0"),
        (["--evaluations-per-second", "nan"], "'nan' must be a number above 0"),
        (["--evaluations-per-second", "fast"], "'fast' must be a number above 0"),
        (["--evaluations-per-second", "5", "--processes", "0"], "argument --processes: '0' must be a whole number, at least 1"),
        (["--evaluations-per-second", "5", "--processes", "1.5"], "'1.5' must be a whole number, at least 1"),
        (["--samples-per-second", "5"], "argument --samples-per-second: give --evaluations-per-second too"),
    ],
)
def test_impossible_numbers_are_refused_by_name(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mitune.plan", *arguments])
    with pytest.raises(SystemExit):
        plan.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_rates_are_measured_on_the_model_itself(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.2)
    params = changed(models={"shapes": {"pipeline": str(tiny_pipeline)}}, pool={"batch_size": 4}, finetune={"batch_size": 8, "micro_batch_size": 2})
    rates = probe.rates(params)
    assert rates.evaluations > 0 and rates.samples > 0 and rates.memory is None


def test_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mitune.plan", "--evaluations-per-second", "1000", "--processes", "2"])
    assert plan.main() == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "shapes: 1,000.0 evaluations and 333.3 training samples a second (given), processes: 2"
    cells = {row.split(" | ")[0].lstrip("| "): row.strip("| ").split(" | ")[1:] for row in rows}
    assert cells["pool"][0] == "249,600" and cells["pool"][-1] == f"{249_600 / 2000 / 3600:.2f}"
    assert cells["all"][1] == f"{sum(int(values[1].replace(',', '')) for name, values in cells.items() if name not in ('stage', '---', 'all')):,}"
    assert [plan.readable(size) for size in (None, 3 * 2**20, 5 * 2**29)] == ["-", "3 MiB", "2.5 GiB"]
