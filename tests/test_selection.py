"""Oracles: a hand-made table, brute force, and invariances."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mitune.selection import COLUMNS, select, select_random, successive_halving


def pool(n_prompts: int = 6, m: int = 8, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"prompt_id": np.repeat(np.arange(n_prompts), m), "image": np.tile(np.arange(m), n_prompts)})
    return table.assign(prompt=[f"a prompt {p}" for p in table["prompt_id"]], score=rng.normal(size=len(table)))


def test_takes_the_best_of_each_prompt_best_first():
    table = pool()
    chosen = select(table, "score", 3)
    assert list(chosen.columns) == COLUMNS
    assert len(chosen) == 18
    for prompt_id, rows in chosen.groupby("prompt_id"):
        scores = table[table["prompt_id"] == prompt_id].set_index("image")["score"]
        assert rows["image"].tolist() == scores.sort_values(ascending=False).index[:3].tolist()
    assert chosen["why"][1].endswith("rank 2 of 8")


def test_ties_go_to_the_lower_image_whatever_the_order_of_rows():
    table = pd.DataFrame({"prompt_id": [1, 1, 1, 0], "image": [2, 0, 1, 0], "score": [5.0, 4.0, 5.0, 1.0]})
    assert select(table, "score", 1)[["prompt_id", "image"]].values.tolist() == [[0, 0], [1, 1]]
    shuffled = pool().assign(score=1.0).sample(frac=1, random_state=0)
    assert (select(shuffled, "score", 2)["image"].to_numpy().reshape(-1, 2) == [0, 1]).all()


def test_all_of_a_pool_is_the_pool():
    assert len(select(pool(), "score", 8)) == 48


@pytest.mark.parametrize(
    ("change", "k", "message"),
    [
        (lambda t: t, 9, "k = 9 must lie in 1..M, and the smallest pool has M = 8"),
        (lambda t: t, 0, "k = 0"),
        (lambda t: t.drop(index=[3]), 8, "M = 7"),
        (lambda t: t.rename(columns={"score": "mi"}), 1, "no column 'score'"),
        (lambda t: t.assign(score=np.nan), 1, "48 values of 'score' are not finite"),
        (lambda t: pd.concat([t, t]), 1, "twice"),
    ],
)
def test_bad_input_is_one_clear_line(change, k, message):
    with pytest.raises(ValueError, match=message) as error:
        select(change(pool()), "score", k)
    assert "\n" not in str(error.value)


def test_random_depends_on_seed_draw_and_prompt_alone():
    table = pool(n_prompts=20)
    first = select_random(table, 2, seed=0, draw=0)
    pd.testing.assert_frame_equal(first, select_random(table.sample(frac=1, random_state=1), 2, seed=0, draw=0))
    some = table[table["prompt_id"].isin([3, 11])]
    pd.testing.assert_frame_equal(first[first["prompt_id"].isin([3, 11])].reset_index(drop=True), select_random(some, 2, seed=0, draw=0))
    assert not first["image"].equals(select_random(table, 2, seed=0, draw=1)["image"])
    assert not first["image"].equals(select_random(table, 2, seed=1, draw=0)["image"])
    with pytest.raises(ValueError, match="k = 9"):
        select_random(table, 9, seed=0, draw=0)


def test_random_is_uniform_and_a_larger_pool_changes_little():
    table = pool(n_prompts=2000, m=4)
    images = select_random(table, 1, seed=0, draw=0)
    counts = images["image"].value_counts().sort_index().to_numpy()
    assert ((counts - 500) ** 2 / 500).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001
    larger = select_random(pool(n_prompts=2000, m=5), 1, seed=0, draw=0)
    same = (images["image"] == larger["image"]).to_numpy()
    assert (larger["image"][~same] == 4).all()
    assert 0.75 < same.mean() < 0.85


def test_halving_meets_the_full_sum_where_contributions_agree_and_costs_less():
    values = np.repeat(np.random.default_rng(0).normal(size=(16, 1)), 24, 1)
    kept, needed = successive_halving(values, 1)
    assert kept.tolist() == [values[:, 0].argmax()]
    assert needed == 16 * 2 + 8 * (5 - 2) + 4 * (11 - 5) + 2 * (24 - 11)  # 24 (2^i - 1) / 15 contributions after round i


def test_halving_loses_a_late_bloomer_and_keeps_order():
    values = np.zeros((4, 4))
    values[0], values[1], values[2] = [1, 1, 1, 1], [2, 1, 1, 1], [-1, 0, 9, 9]
    assert successive_halving(values, 1)[0].tolist() == [1]
    assert successive_halving(values, 3)[0].tolist() == [2, 1, 0]  # a single round over everything
    assert successive_halving(values, 4)[1] == 16
    with pytest.raises(ValueError, match=r"k = 5 must lie in 1..M"):
        successive_halving(values, 5)
