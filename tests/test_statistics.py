"""Oracles: closed forms, scipy, brute force over pairs, and the coverage of the interval."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from mitune import statistics
from mitune.statistics import Interval

FEW = {"resamples": 500}


def covers(interval: statistics.Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


def test_mean_is_of_rows_and_n_is_of_clusters():
    interval = statistics.mean_interval([0.0, 1.0, 1.0, 1.0], ["a", "a", "b", "b"], **FEW)
    assert interval.mean == 0.75
    assert interval.n == 2
    assert (interval.low, interval.high) == (0.5, 1.0)  # the two clusters' means


def test_interval_matches_the_normal_one_for_independent_rows():
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = statistics.mean_interval(values, np.arange(400))
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_interval_covers_the_truth_where_rows_resemble_within_a_cluster():
    rng = np.random.default_rng(1)
    hits = naive = 0
    for _ in range(200):
        clusters = np.repeat(np.arange(30), 6)
        values = rng.normal(0, 1, 30)[clusters] + rng.normal(0, 0.5, 180)
        hits += covers(statistics.mean_interval(values, clusters, **FEW), 0)
        naive += covers(statistics.mean_interval(values, np.arange(180), **FEW), 0)
    assert 0.87 <= hits / 200 <= 0.99
    assert naive / 200 < 0.75  # resampling images would claim far too much


def test_seeds_crossed_with_prompts_widen_the_interval():
    prompts, seeds = np.repeat(np.arange(20), 3), np.tile(np.arange(3), 20)
    values = np.array([-1.0, 0.0, 1.0])[seeds] + 0.01 * np.random.default_rng(2).normal(size=60)
    one, both = statistics.mean_interval(values, prompts, **FEW), statistics.mean_interval(values, prompts, seeds, **FEW)
    assert both.high - both.low > 20 * (one.high - one.low)


def test_crossed_bootstrap_agrees_with_a_plain_loop():
    rng = np.random.default_rng(3)
    prompts, seeds, values = np.repeat(np.arange(8), 4), np.tile(np.arange(4), 8), rng.normal(size=32)
    table = values.reshape(8, 4)
    loop = [table[np.ix_(rng.integers(8, size=8), rng.integers(4, size=4))].mean() for _ in range(20_000)]
    interval = statistics.mean_interval(values, prompts, seeds, resamples=20_000)
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(loop, [0.025, 0.975]), atol=0.02)


def test_same_seed_same_interval_and_row_order_does_not_matter():
    rng = np.random.default_rng(4)
    values, clusters, order = rng.normal(size=60), np.repeat(np.arange(20), 3), rng.permutation(60)
    first, second = statistics.mean_interval(values, clusters, **FEW), statistics.mean_interval(values[order], clusters[order], **FEW)
    assert first == statistics.mean_interval(values, clusters, **FEW)
    np.testing.assert_allclose([first.mean, first.low, first.high], [second.mean, second.low, second.high])


def test_paired_difference_removes_what_the_rows_share():
    rng = np.random.default_rng(5)
    prompts, shared = np.repeat(np.arange(40), 5), rng.normal(0, 10, 200)
    interval = statistics.paired_difference(shared + 1, shared, prompts, **FEW)
    np.testing.assert_allclose([interval.mean, interval.low, interval.high], 1)
    assert covers(statistics.mean_interval(shared + 1, prompts, **FEW), 0)
    with pytest.raises(ValueError, match="aligned rows"):
        statistics.paired_difference([1.0, 2.0], [1.0], [0, 0])


def test_one_cluster_has_no_interval():
    interval = statistics.mean_interval([1.0, 2.0], [0, 0])
    assert interval.mean == 1.5
    assert np.isnan([interval.low, interval.high]).all()


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [([], [], "no values"), ([1.0, np.nan], [0, 1], "1 values are not finite"), ([1.0, 2.0], [0], "differ in length")],
)
def test_bad_input_is_named_in_one_line(values, clusters, message):
    with pytest.raises(ValueError, match=message) as error:
        statistics.mean_interval(values, clusters)
    assert "\n" not in str(error.value)


def test_format():
    assert f"{Interval(61.57, 58.0, 65.12, 60):.1f}" == "61.6 [58.0, 65.1], n = 60"
    assert f"{Interval(0.6157, 0.58, 0.6512, 60, 3).scaled(100):.1f}" == "61.6 [58.0, 65.1], n = 60 (+ 3 undefined)"
    assert f"{-Interval(0.5, 0.4, 0.6, 60).shifted(-1):.1f}" == "0.5 [0.4, 0.6], n = 60"
    assert f"{Interval(0.5, 0.4, 0.6, 60).brief('+.1f')}" == "+0.5 [+0.4, +0.6]"


def test_where_there_is_no_interval_none_is_printed():
    assert f"{statistics.mean_interval([1.0, 2.0], [0, 0]):.1f}" == "1.5 [—], n = 1"
    assert f"{statistics.over_prompts([np.nan, 2.0]):.1f}" == "2.0 [—], n = 1 (+ 1 undefined)"
    assert f"{statistics.over_prompts([np.nan, np.nan]):.1f}" == "—, n = 0 (+ 2 undefined)"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.96, 1.04, True), (0.95, 1.05, True), (0.94, 1.01, None), (1.01, 1.06, None), (0.5, 2.0, None), (1.06, 1.09, False), (0.8, 0.94, False),
     (float("nan"), float("nan"), None)],
)  # fmt: skip
def test_a_mean_is_equivalent_to_a_value_not_or_undecided(low, high, expected):
    assert Interval((low + high) / 2, low, high, 12).equivalent(1, 0.05) is expected


def test_tau_is_the_mean_of_scipys_and_constant_prompts_are_counted():
    rng = np.random.default_rng(6)
    prompt = np.repeat([7, 3, 5], 8)
    score, label = rng.normal(size=24), rng.integers(3, size=24).astype(float)
    label[8:16] = 1.0
    expected = np.mean([stats.kendalltau(score[prompt == name], label[prompt == name]).statistic for name in (7, 5)])
    interval = statistics.kendall_tau(score, label, prompt, **FEW)
    assert interval.mean == pytest.approx(expected)
    assert interval.n == 2
    assert interval.undefined == 1


def test_three_ranks_are_the_papers():
    mi = np.random.default_rng(7).permutation(50).astype(float)
    rank = 50 - mi  # 1 is the highest
    label = np.zeros(50)
    label[rank == 1], label[rank == 25], label[rank == 50] = 0.5, 0.9, 0.1
    interval = statistics.tau_three_ranks(mi, label, np.zeros(50), **FEW)
    assert interval.mean == pytest.approx(1 / 3)  # two pairs agree, one does not
    label[rank == 24], label[rank == 26] = 7, 7  # not looked at
    assert statistics.tau_three_ranks(mi, label, np.zeros(50), **FEW).mean == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least 3"):
        statistics.tau_three_ranks([1.0, 2.0], [1.0, 2.0], [0, 0])


@pytest.mark.parametrize("images", [3, 4, 5])
def test_three_ranks_are_distinct_for_small_pools(images):
    values = np.arange(images, dtype=float)
    assert statistics.tau_three_ranks(values, values, np.zeros(images), **FEW).mean == pytest.approx(1)


def test_auc_counts_pairs():
    rng = np.random.default_rng(8)
    prompt = np.repeat(np.arange(4), 9)
    score, label = rng.integers(5, size=36).astype(float), rng.integers(2, size=36)
    label[prompt == 2] = 1
    expected = []
    for name in (0, 1, 3):
        rows = prompt == name
        pairs = itertools.product(score[rows & (label == 1)], score[rows & (label == 0)])
        expected.append(np.mean([(one > zero) + 0.5 * (one == zero) for one, zero in pairs]))
    interval = statistics.auc_within(score, label, prompt, **FEW)
    assert interval.mean == pytest.approx(np.mean(expected))
    assert interval.n == 3
    assert interval.undefined == 1
    with pytest.raises(ValueError, match="true or false"):
        statistics.auc_within(score, score / 5, prompt)


def test_the_auc_of_each_prompt_has_the_mean_of_all():
    rng = np.random.default_rng(10)
    prompt, score, label = np.repeat(["b", "a", "c"], 8), rng.normal(size=24), np.tile([0, 1], 12)
    label[16:] = 1
    found = statistics.auc_by_prompt(score, label, prompt)
    assert list(found) == ["a", "b", "c"]
    assert found["b"] == statistics.auc_within(score[:8], label[:8], prompt[:8]).mean
    assert np.isnan(found["c"])
    assert statistics.over_prompts(list(found.values()), **FEW) == statistics.auc_within(score, label, prompt, **FEW)


def test_a_difference_of_independent_means_has_the_normal_interval_where_both_have():
    a, b = Interval(5.0, 5 - 3.0, 5 + 3.0, 40), Interval(2.0, 2 - 4.0, 2 + 4.0, 30)
    assert statistics.independent_difference(a, b) == Interval(3.0, -2.0, 8.0, 30)
    skewed = statistics.independent_difference(Interval(1.0, 0.0, 1.0, 9), Interval(0.0, 0.0, 1.0, 9))
    assert (skewed.low, skewed.high) == (1 - np.sqrt(2), 1.0)  # each end from the sides that make the difference smaller, or larger
    assert np.isnan(statistics.independent_difference(a, Interval(1.0, np.nan, np.nan, 1)).low)


def test_correlation_is_pearsons_and_clusters_are_resampled_whole():
    rng = np.random.default_rng(9)
    prompt, score, value = np.repeat(np.arange(6), 8), rng.normal(size=48), rng.normal(size=48)
    value[prompt == 5] = 1.0
    expected = [np.corrcoef(score[prompt == name], value[prompt == name])[0, 1] for name in range(5)]
    interval = statistics.correlation_within(score, value, prompt, **FEW)
    assert interval.mean == pytest.approx(np.mean(expected))
    assert (interval.n, interval.undefined) == (5, 1)
    paired = statistics.correlation_within(score, value, prompt, prompt // 3, **FEW)
    assert paired.n == 2 and paired.mean == pytest.approx(np.mean(expected))
    assert (paired.low, paired.high) == pytest.approx(sorted([np.mean(expected[:3]), np.mean(expected[3:])]))
    assert statistics.auc_within(score, score > 0, prompt, prompt // 3, **FEW).n == 2
    with pytest.raises(ValueError, match="two clusters"):
        statistics.correlation_within(score, value, prompt, np.arange(48))


def test_auc_difference_is_paired_by_prompt():
    rng = np.random.default_rng(9)
    prompt, label = np.repeat(np.arange(6), 8), np.tile([0, 1], 24)
    label[prompt == 2] = 0
    a, b = rng.normal(size=(2, 48))
    difference = statistics.auc_difference(a, b, label, prompt, **FEW)
    apart = [statistics.auc_within(score, label, prompt, **FEW) for score in (a, b)]
    assert difference.mean == pytest.approx(apart[0].mean - apart[1].mean)
    assert (difference.n, difference.undefined) == (5, 1)
    same = statistics.auc_difference(a, 2 * a, label, prompt, **FEW)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_auc_without_any_usable_prompt_is_undefined():
    interval = statistics.auc_within([1.0, 2.0], [True, True], [0, 0])
    assert np.isnan(interval.mean)
    assert interval.n == 0
    assert interval.undefined == 1


def test_top_and_bottom():
    prompt, score, value = [0, 0, 0, 1, 1, 1], [1.0, 3.0, 2.0, 5.0, 5.0, 4.0], [10.0, 30.0, 20.0, 1.0, 2.0, 3.0]
    assert statistics.top_mean(score, value, prompt, **FEW).mean == pytest.approx((30 + 1) / 2)
    assert statistics.bottom_mean(score, value, prompt, **FEW).mean == pytest.approx((10 + 3) / 2)


@pytest.mark.parametrize(("low", "high", "positive"), [(0.1, 1.0, True), (-1.0, -0.1, False), (-0.1, 0.3, None), (float("nan"), float("nan"), None)])
def test_a_sign_is_known_only_where_the_interval_lies_on_one_side(low, high, positive):
    interval = statistics.Interval((low + high) / 2, low, high, 5)
    assert interval.positive is positive
    assert (-interval).positive is (None if positive is None else not positive)


# ---------------------------------------------------------------- jackknife


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(0).normal(3, 2, size=20)
    ours = statistics.jackknife(lambda rows: values[rows].mean(), np.arange(20))
    low, high = stats.t.interval(0.95, 19, values.mean(), values.std(ddof=1) / np.sqrt(20))
    np.testing.assert_allclose([ours.mean, ours.low, ours.high], [values.mean(), low, high], rtol=1e-9)
    assert ours.n == 20


def test_the_jackknife_takes_whole_clusters_and_adds_the_spread_of_seeds():
    """Of 3 seeds on the same 60 clusters of 2 rows; a constant has no width, an offset a seed only that of the seeds."""
    clusters, seeds = np.tile(np.repeat(np.arange(60), 2), 3), np.repeat([0, 1, 2], 120)
    seen = set()
    alone = statistics.jackknife(lambda rows: float(seeds[rows[0]]), clusters, seeds)
    width = stats.t.ppf(0.975, 19) * 1 / np.sqrt(3)
    np.testing.assert_allclose([alone.mean, alone.low, alone.high], [1, 1 - width, 1 + width], rtol=1e-9)
    statistics.jackknife(lambda rows: seen.add(tuple(np.bincount(clusters[rows], minlength=60))) or 0.0, clusters, seeds)
    assert len(seen) == 21 and all(set(counts) <= {0, 2} for counts in seen)
    one = statistics.jackknife(lambda rows: 5.0, np.zeros(4))
    assert one.mean == 5.0 and np.isnan(one.low)


@pytest.mark.parametrize(("held", "expected"), [((True, True), True), ((True, None), None), ((None, False), False), ((), True)])
def test_all_hold_if_each_does_and_fail_if_one_fails(held, expected):
    assert statistics.every(held) is expected
