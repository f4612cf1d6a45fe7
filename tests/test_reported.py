"""Oracles: the arithmetic of the paper's own tables, and numbers quoted in its text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mitune.reported import load

FILE = Path(__file__).parents[1] / "paper" / "reported.yaml"
CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")


@pytest.fixture(scope="module")
def reported():
    return load(FILE)


def test_headline_numbers(reported):
    assert reported["table_1"].value("MI-TUNE", "blip_vqa", "color") == 65.04
    assert reported["table_1"].value("SD-2.1-base", "blip_vqa", "spatial") == 15.77
    assert reported["kendall_tau"].value("MI", "hps") == 0.68
    assert reported["table_8"].value("MI-TUNE", "learning_rate") == 1e-4
    assert reported["table_3"].value("HPS only", "hps", "color") is None


def test_gains_of_table_1_are_differences_of_its_rows(reported):
    table = reported["table_1"]
    for metric in ("blip_vqa", "hps"):
        for category in CATEGORIES:
            gain = table.value("MI-TUNE", metric, category) - table.value("SD-2.1-base", metric, category)
            assert table.value("MI-TUNE minus base", metric, category) == pytest.approx(gain, abs=0.006)
    for method in ("SD-2.1-base", "A&E", "SDG", "SCG", "DPOK", "GORS", "HN-ITM", "MI-TUNE"):
        mean = sum(table.value(method, "blip_vqa", category) for category in CATEGORIES) / 6
        assert table.value(method, "blip_vqa", "avg") == pytest.approx(mean, abs=0.006)


def test_uncertain_cells_are_refused_and_stand_in_no_row(reported):
    with pytest.raises(ValueError, match=r"uncertain.*29\.58.*29\.38") as error:
        reported["table_3"].value("MI+Real(0.5)", "hps", "color")
    assert "\n" not in str(error.value)
    n = 0
    for table in reported.tables.values():
        printed = {(row, column) for row, column, _ in table.cells()}
        for cell in table.uncertain:
            n += 1
            assert (cell["row"], cell["column"]) not in printed
            assert cell["readings"]
            assert cell["note"]
    assert n > 25


def test_copies_agree(reported):
    for first, second in (("table_5", "table_14"), ("table_3", "table_10")):
        copy = {(row, column): value for row, column, value in reported[second].cells()}
        shared = [(value, copy[row, column]) for row, column, value in reported[first].cells() if (row, column) in copy]
        assert len(shared) >= 5
        assert all(a == b for a, b in shared)


def test_every_table_is_located_and_every_claim_testable(reported):
    assert {f"table_{n}" for n in range(1, 15)} <= set(reported.tables)
    assert all(table.title and table.unit and table.where for table in reported.tables.values())
    assert len(reported.claims) == 27
    assert all(claim.claim and claim.evidence and claim.reported is not None and claim.comparison for claim in reported.claims.values())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r["table_99"], "no 'table_99'"),
        (lambda r: r["table_1"].value("SDXL", "hps", "color"), "no 'SDXL'"),
        (lambda r: r["table_1"].value("MI-TUNE", "fid", "color"), "no 'fid'.*it has blip_vqa, hps, human"),
        (lambda r: r["table_5"].value("MI-TUNE", "hps", "color"), "no 'color'"),
        (lambda r: load(FILE.with_name("nothing.yaml")), "is missing"),
    ],
)
def test_what_is_not_there_is_named(reported, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(reported)


def test_a_foreign_file_is_refused(tmp_path):
    file = tmp_path / "reported.yaml"
    file.write_text("table_1: {title: x, colour: red}\nclaims: []\n")
    with pytest.raises(ValueError, match="not a file of reported numbers"):
        load(file)
