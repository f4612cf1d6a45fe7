"""Estimates with their uncertainty: bootstrap over prompts, rank agreement and discrimination within a prompt.

The independent unit is the *cluster* (a prompt or a scene), never the image: images of one prompt resemble one another, so
whole clusters are resampled. Where several seeds were run, clusters and seeds are resampled crossed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile interval over `n` clusters; `undefined` more clusters had no value at all.

    `f"{interval:.1f}"` prints "61.6 [58.0, 65.1], n = 60". Without two clusters there is no interval: low and high are nan, and print as a dash.
    """

    mean: float
    low: float
    high: float
    n: int
    undefined: int = 0

    def __format__(self, spec: str) -> str:
        body = f"{self.brief(spec or '.3g')}, n = {self.n}"
        return body + (f" (+ {self.undefined} undefined)" if self.undefined else "")

    def brief(self, spec: str) -> str:
        """Without n: "61.6 [58.0, 65.1]"; "61.6 [—]" of a single cluster, "—" of none."""
        if np.isnan(self.mean):
            return "—"
        return f"{self.mean:{spec}} [—]" if np.isnan(self.low) else f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, "")

    def scaled(self, factor: float) -> Interval:
        """The same interval in other units, as `scaled(100)` for percent; `factor` > 0."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor, self.n, self.undefined)

    def shifted(self, by: float) -> Interval:
        """Of the values plus a constant."""
        return Interval(self.mean + by, self.low + by, self.high + by, self.n, self.undefined)

    def __neg__(self) -> Interval:
        """Of the negated values."""
        return Interval(-self.mean, -self.high, -self.low, self.n, self.undefined)

    def above(self, level: float) -> bool | None:
        """Whether the mean is above `level`: True if the whole interval is, False if all of it lies below, None (undecided) otherwise."""
        return True if self.low > level else False if self.high < level else None

    @property
    def positive(self) -> bool | None:
        """Whether the mean is `above` 0."""
        return self.above(0)

    def equivalent(self, value: float, tolerance: float) -> bool | None:
        """Whether the mean is `value` within `tolerance`: True if the whole interval is, False if none of it is, None (undecided) otherwise."""
        if value - tolerance <= self.low and self.high <= value + tolerance:
            return True
        return False if self.high < value - tolerance or self.low > value + tolerance else None


def every(held: Iterable[bool | None]) -> bool | None:
    """Whether all hold: False if one does not, None (undecided) if one is undecided and none fails."""
    held = list(held)
    return False if False in held else None if None in held else True


# ---------------------------------------------------------------- bootstrap


def mean_interval(values, clusters, seeds=None, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean of `values` (N,) and its percentile bootstrap interval; whole clusters are resampled, crossed with seeds if given.

    With w_c, v_s the counts that one resample gives cluster c and seed s (Owen's pigeonhole bootstrap):
    mean* = sum_cs w_c v_s S_cs / sum_cs w_c v_s N_cs, where S_cs and N_cs are the sum and the number of values of a cell.

    Raises:
        ValueError: no values, lengths that differ, or values that are not finite.
    """
    values, clusters = _aligned(values, clusters)
    sums, counts = _cells(values, clusters, seeds)
    n = len(sums)
    if n < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"), n)
    rng = np.random.default_rng(seed)
    drawn = _resampled(n, resamples, rng)
    drawn_seeds = _resampled(sums.shape[1], resamples, rng)
    total, rows = ((drawn @ sums) * drawn_seeds).sum(1), ((drawn @ counts) * drawn_seeds).sum(1)
    means = total[rows > 0] / rows[rows > 0]  # an unbalanced table can yield a resample without rows
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), n)


def paired_difference(a, b, clusters, seeds=None, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean of a - b (N,), row i of both having the same prompt and the same noise, with the interval of `mean_interval`."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"paired values need aligned rows, got {a.shape} and {b.shape}; merge the tables on prompt and image first")
    return mean_interval(a - b, clusters, seeds, resamples=resamples, level=level, seed=seed)


def independent_difference(a: Interval, b: Interval) -> Interval:
    """a - b of two independent means; n is the smaller one's.

    MOVER (Zou and Donner 2008): low = d - sqrt((a - a_low)^2 + (b_high - b)^2), high = d + sqrt((a_high - a)^2 + (b - b_low)^2).
    """
    d = a.mean - b.mean
    return Interval(d, d - float(np.hypot(a.mean - a.low, b.high - b.mean)), d + float(np.hypot(a.high - a.mean, b.mean - b.low)), min(a.n, b.n))


# ---------------------------------------------------------------- of a whole sample


def jackknife(statistic: Callable[[np.ndarray], float], clusters, seeds=None, *, groups: int = 20, level: float = LEVEL) -> Interval:
    """The mean over seeds of a smooth statistic of a whole sample, such as a distance of distributions, and its interval by the delete-a-group jackknife.

    The n clusters are dealt in turn to G = min(groups, n) groups; with theta_g the value without group g and s the spread of the S seeds' values,
    variance = (G - 1) / G sum_g (theta_g - mean)^2 + s^2 / S, and the interval is Student's with G - 1 degrees of freedom.

    Args:
        statistic: of the rows (indices) of one seed.
        clusters: of all rows (N,), as in `mean_interval`.
    """
    clusters = np.asarray(clusters)
    seeds = np.zeros(len(clusters)) if seeds is None else np.asarray(seeds)
    names, which = np.unique(clusters, return_inverse=True)
    parts = [np.flatnonzero(seeds == seed) for seed in np.unique(seeds)]
    values = np.array([statistic(rows) for rows in parts])
    if len(names) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"), len(names))
    count = min(groups, len(names))
    without = np.array([np.mean([statistic(rows[which[rows] % count != group]) for rows in parts]) for group in range(count)])
    variance = (count - 1) / count * ((without - without.mean()) ** 2).sum() + (values.var(ddof=1) / len(values) if len(values) > 1 else 0.0)
    width = float(stats.t.ppf((1 + level) / 2, count - 1) * np.sqrt(variance))
    return Interval(float(values.mean()), float(values.mean()) - width, float(values.mean()) + width, len(names))


# ---------------------------------------------------------------- within a prompt


def kendall_tau(score, label, prompt, **bootstrap) -> Interval:
    """Mean over prompts of Kendall's tau-b between `score` and `label` (N,); a prompt in which either is constant is undefined."""
    score, label, prompt = _aligned(score, label, prompt)
    return over_prompts([stats.kendalltau(score[rows], label[rows], variant="b").statistic for rows in _groups(prompt)], **bootstrap)


def tau_three_ranks(mi, label, prompt, **bootstrap) -> Interval:
    """Kendall's tau-b of MI and `label` on the images that MI ranks 1, M/2 and M of its prompt (Section 3.1: ranks 1, 25, 50 of 50).

    Three images without ties give only -1, -1/3, 1/3 or 1.

    Raises:
        ValueError: a prompt with fewer than three images.
    """
    mi, label, prompt = _aligned(mi, label, prompt)
    taus = []
    for rows in _groups(prompt):
        if len(rows) < 3:
            raise ValueError(f"prompt {prompt[rows[0]]!r} has {len(rows)} images; three ranks need at least 3")
        chosen = _by_rank(mi, rows)[[0, max(len(rows) // 2 - 1, 1), -1]]
        taus.append(stats.kendalltau(mi[chosen], label[chosen], variant="b").statistic)
    return over_prompts(taus, **bootstrap)


def auc_within(score, label, prompt, clusters=None, **bootstrap) -> Interval:
    """Probability that an aligned image scores above a misaligned one of the same prompt (ties 1/2), mean over prompts having both.

    AUC = (R - n_1 (n_1 + 1) / 2) / (n_1 n_0), R the sum of the ranks of the n_1 aligned images (Mann-Whitney). `label` (N,) is
    true for aligned images; prompts whose images are all alike are undefined. `clusters` (N,), each a set of whole prompts, are what
    is resampled where prompts are not independent.
    """
    values, groups = _aucs(score, label, prompt)
    return over_prompts(values, _of_prompts(clusters, groups), **bootstrap)


def auc_by_prompt(score, label, prompt) -> dict[Hashable, float]:
    """The AUC of each prompt in sorted order, nan where it is undefined; arguments and mean as in `auc_within`."""
    return dict(zip(np.unique(prompt).tolist(), _aucs(score, label, prompt)[0], strict=True))


def auc_difference(a, b, label, prompt, clusters=None, **bootstrap) -> Interval:
    """The AUC of score `a` minus that of score `b` on the same images (N,), paired by prompt; arguments and what is undefined as in `auc_within`."""
    (of_a, groups), (of_b, _) = _aucs(a, label, prompt), _aucs(b, label, prompt)
    return over_prompts(np.subtract(of_a, of_b), _of_prompts(clusters, groups), **bootstrap)


def correlation_within(score, value, prompt, clusters=None, **bootstrap) -> Interval:
    """Mean over prompts of Pearson's correlation of `score` and `value` (N,); undefined where either is constant. `clusters` as in `auc_within`."""
    score, value, prompt = _aligned(score, value, prompt)
    groups = _groups(prompt)
    return over_prompts([_pearson(score[rows], value[rows]) for rows in groups], _of_prompts(clusters, groups), **bootstrap)


def top_mean(score, value, prompt, **bootstrap) -> Interval:
    """Mean over prompts of `value` at the image with the highest `score` (the first of equals)."""
    return _at_rank(score, value, prompt, 0, **bootstrap)


def bottom_mean(score, value, prompt, **bootstrap) -> Interval:
    """Mean over prompts of `value` at the image with the lowest `score` (the last of equals)."""
    return _at_rank(score, value, prompt, -1, **bootstrap)


def over_prompts(values: Sequence[float], clusters: np.ndarray | None = None, **bootstrap) -> Interval:
    """Interval of one value a prompt, the nan ones counted as undefined; prompts are resampled, or their `clusters` (P,)."""
    values = np.asarray(values, dtype=float)
    known = ~np.isnan(values)
    undefined = int((~known).sum())
    if not known.any():
        return Interval(float("nan"), float("nan"), float("nan"), 0, undefined)
    interval = mean_interval(values[known], np.arange(known.sum()) if clusters is None else clusters[known], **bootstrap)
    return Interval(interval.mean, interval.low, interval.high, interval.n, undefined)


def _aucs(score, label, prompt) -> tuple[list[float], list[np.ndarray]]:
    """The AUC of each prompt, nan where it is undefined, and the rows of each. Raises ValueError for labels other than true and false."""
    label = np.asarray(label)
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"labels must be true or false, got {np.unique(label)[:4].tolist()}; compare the score with its threshold first")
    score, label, prompt = _aligned(score, label.astype(float), prompt)
    groups = _groups(prompt)
    return [_auc(score[rows], label[rows] == 1) for rows in groups], groups


def _auc(score: np.ndarray, label: np.ndarray) -> float:
    ones, zeros = int(label.sum()), int((~label).sum())
    if not ones or not zeros:
        return float("nan")
    return float((stats.rankdata(score)[label].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def _pearson(score: np.ndarray, value: np.ndarray) -> float:
    score, value = score - score.mean(), value - value.mean()
    scale = np.sqrt((score**2).sum() * (value**2).sum())
    return float(score @ value / scale) if scale > 0 else float("nan")


def _at_rank(score, value, prompt, rank: int, **bootstrap) -> Interval:
    score, value, prompt = _aligned(score, value, prompt)
    return over_prompts([value[_by_rank(score, rows)[rank]] for rows in _groups(prompt)], **bootstrap)


def _of_prompts(clusters, groups: list[np.ndarray]) -> np.ndarray | None:
    """The cluster (P,) of each prompt, whose rows are its group. Raises ValueError for a prompt in two clusters."""
    if clusters is None:
        return None
    clusters = np.asarray(clusters)
    if any(len(np.unique(clusters[rows])) > 1 for rows in groups):
        raise ValueError("a prompt lies in two clusters; a cluster is a set of whole prompts")
    return np.array([clusters[rows[0]] for rows in groups])


# ---------------------------------------------------------------- arrays


def _aligned(values, *others) -> tuple[np.ndarray, ...]:
    """The arguments as arrays (N,) of one length; `values`, and every other numeric column, finite."""
    arrays = [np.asarray(values, dtype=float), *(np.asarray(other) for other in others)]
    if not len(arrays[0]):
        raise ValueError("no values to average; the table, or the part of it that was asked for, is empty")
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"columns differ in length: {[len(array) for array in arrays]}; pass columns of one table")
    bad = sum(int((~np.isfinite(array)).sum()) for array in arrays if array.dtype.kind == "f")
    if bad:
        raise ValueError(f"{bad} values are not finite; drop or repair those rows before averaging")
    return tuple(arrays)


def _groups(prompt: np.ndarray) -> list[np.ndarray]:
    """The rows of each prompt, in the table's order within it."""
    _, which = np.unique(prompt, return_inverse=True)
    return np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])


def _by_rank(score: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`rows` from the highest to the lowest score, equals in the table's order."""
    return rows[np.argsort(-score[rows], kind="stable")]


def _cells(values: np.ndarray, clusters: np.ndarray, seeds) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts (clusters, seeds) of the values; one seed where none are given."""
    names, row = np.unique(clusters, return_inverse=True)
    seed_names, column = np.unique(np.zeros(len(values)) if seeds is None else np.asarray(seeds), return_inverse=True)
    if len(column) != len(values):
        raise ValueError(f"{len(column)} seeds for {len(values)} values; pass columns of one table")
    cell, shape = row * len(seed_names) + column, (len(names), len(seed_names))
    size = shape[0] * shape[1]
    return np.bincount(cell, values, size).reshape(shape), np.bincount(cell, minlength=size).reshape(shape).astype(float)


def _resampled(n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n units occurs in each resample of n (resamples, n)."""
    drawn = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(float)
