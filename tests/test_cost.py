"""Oracles: formulas for the units of work, counted calls of the denoiser, and a second reading of what was measured once."""

import pytest
import torch

from mitune import artifacts, bench, config, finetuning, models, threads
from mitune.artifacts import Results, read_json, read_table
from mitune.stages import cost


@pytest.fixture
def values(toy_values, in_toy_project, tiny_pipeline):
    """Toy parameters as plain values, in a project folder of their own where an adapter lies."""
    params, model = in_toy_project(toy_values), models.load(tiny_pipeline)
    finetuning.add_adapter(model, params.finetune, seed=0)
    with torch.no_grad():
        for parameter in finetuning.trained_parameters(model).values():
            parameter.add_(0.1)
    model.save_adapter(Results("shapes").adapter("color", params.cost.arm))
    return toy_values


def test_units_are_the_evaluations_that_are_made(values, monkeypatch):
    params, counters = config.read(values), []

    def counted(*arguments, **keywords):
        counters.append(bench.Timed(models.load(*arguments, **keywords)))
        return counters[-1]

    monkeypatch.setattr(cost, "load", counted)
    monkeypatch.setattr(cost, "open_model", lambda params: counted(params.models["shapes"].pipeline))
    for part, jobs in (("pool", 1), ("scores", 1), ("inference", 3), ("growth", 6)):
        made = list(cost.PARTS[part](params))
        assert len(made) == jobs
        for of, size, units, work in made:
            for counter in counters:
                counter.evaluations = 0
            work()
            assert sum(counter.evaluations for counter in counters) == units, (part, of, size)


def test_a_part_has_a_row_for_each_repeat(values):
    for part, rows, units in (("judge", 1, 4), ("finetune", 1, 1), ("inference", 6, 4)):
        table = cost.measure(values, part)
        assert len(table) == rows
        assert {row["units"] for row in table} == {units}
        assert all(row["seconds"] > 0 and row["memory"] > 50 for row in table)


def test_a_merged_network_is_the_bases_and_answers_as_the_attached_adapter(values):
    params = config.read(values)
    facts = cost.networks(params, Results("shapes").adapter("color", params.cost.arm))
    assert facts["networks"]["merged"] == facts["networks"]["base"]
    assert all(facts["networks"]["attached"][name] > value > 0 for name, value in facts["networks"]["base"].items())
    assert 0 < facts["difference"] < 1e-3


def test_measured_once_and_then_read(values, monkeypatch):
    params = config.read(values)
    monkeypatch.setattr(cost, "PARTS", {"judge": None})  # of the parent: the process that measures has its own
    table = cost.build(params, values)
    assert read_table(Results("shapes").cost("timed.parquet"), "timed").equals(table) and set(table["part"]) == {"judge"}
    facts = read_json(Results("shapes").cost("facts.json"))
    assert facts["recorded"] == {} and facts["machine"]["busy"] == threads.workers("cpu")
    monkeypatch.setattr(cost, "measure", None)
    assert cost.build(params, values).equals(table)
    assert artifacts.SCHEMAS["timed"].keys() == set(table.columns)
