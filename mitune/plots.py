"""Figures in one style: image grids, intervals with a control, curves with bands.

Every function returns a matplotlib Figure and leaves the global settings alone. An interval is anything with the attributes
mean, low and high.
"""

from __future__ import annotations

import functools
import itertools
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.container import Container
from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("style.mplstyle")
CONTROL = "#808080"
SIDES = ((False, True), (True, True), (False, False), (True, False))  # right, up: where the labels of one path after another stand


def _styled(function):
    """Run `function` under the style file."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with plt.style.context(STYLE):
            result = function(*args, **kwargs)
            interactive = plt.isinteractive()  # a notebook's backend turns this on when the first figure loads it
        matplotlib.interactive(interactive)
        return result

    return wrapped


@_styled
def image_grid(images, *, scores=None, captions=None, columns=None, score_format: str = "{:.1f}", side: float = 1.0) -> Figure:
    """Rows of images (R, K, 3, H, W), uint8 or float in [-1, 1]; a score under each (R, K), a caption before each row (R), a heading over each column (K).

    `side` is an image's width in inches.

    Raises:
        ValueError: images of another shape, or scores, captions or columns that do not fit them.
    """
    pictures = _pixels(images)
    n_rows, n_columns = pictures.shape[:2]
    for name, given, shape in (("scores", scores, (n_rows, n_columns)), ("captions", captions, (n_rows,)), ("columns", columns, (n_columns,))):
        if given is not None and np.shape(given) != shape:
            raise ValueError(f"{name} of shape {np.shape(given)} do not fit a grid of {n_rows} x {n_columns} images; expected {shape}")
    margin = 1.7 if captions is not None else 0.0
    size = (margin + side * n_columns, (side + (0.24 if scores is not None else 0.04)) * n_rows + (0.3 if columns is not None else 0.0))
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for (r, c), ax in np.ndenumerate(axes):
        ax.imshow(pictures[r, c], interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if scores is not None:
            ax.set_xlabel(score_format.format(float(scores[r][c])), fontsize=10, labelpad=1)
        if captions is not None and c == 0:
            ax.set_ylabel(textwrap.fill(captions[r], 18), rotation=0, ha="right", va="center", fontsize=10)
        if columns is not None and r == 0:
            ax.set_title(columns[c], fontsize=11)
    return figure


@_styled
def interval_dots(series: dict[str, dict], *, xlabel: str, control: str | None = None, reference: dict[str, float] | None = None, zero: bool = False) -> Figure:
    """Dots with intervals: {series: {label: interval}}, a line a label, a colour a series; where no label has two series, each stands on its line.

    The series `control` is grey; `reference` {label: value} marks the paper's value by a cross; `zero` draws the line of no effect.
    """
    labels = _labels(series)
    beside = max((sum(label in rows for rows in series.values()) for label in labels), default=1)
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + len(labels) * max(0.42, 0.24 * beside)))
    for (name, rows), offset, color in _placed(series, control, width=0.66 if beside > 1 else 0.0):
        at, intervals = _points(rows, labels)
        means, errors = _bars(intervals)
        ax.errorbar(means, -(at + offset), xerr=errors, fmt="o", color=color, capsize=3, label=name)
    if reference:
        at = np.array([labels.index(label) for label in reference])
        ax.plot(list(reference.values()), -at, "x", color="black", ms=9, mew=2, label="paper")
    if zero:
        ax.axvline(0, color="black", lw=1)
    ax.set_yticks(-np.arange(len(labels)), labels)
    ax.set(xlabel=xlabel, ylim=(-len(labels) + 0.5, 0.5))
    ax.grid(axis="x")
    return _legend(figure, ax, len(series) + bool(reference))


@_styled
def interval_bars(series: dict[str, dict], *, ylabel: str, control: str | None = None, reference: dict[str, float] | None = None, level: float = 0.0) -> Figure:
    """Grouped bars with intervals: {series: {label: interval}}, a group a label; `control` and `reference` as in `interval_dots`.

    Bars stand on `level`, what no effect gives: one half for an AUC.
    """
    labels = _labels(series)
    figure, ax = plt.subplots(figsize=(max(6.4, 1.2 * len(labels)), 3.8))
    for (name, rows), offset, color in _placed(series, control, width=0.8):
        at, intervals = _points(rows, labels)
        means, errors = _bars(intervals)
        ax.bar(at + offset, means - level, 0.8 / len(series), level, yerr=errors, color=color, capsize=2, error_kw={"lw": 1.2}, label=name)
    if reference:
        at = np.array([labels.index(label) for label in reference])
        ax.hlines(list(reference.values()), at - 0.45, at + 0.45, color="black", ls="--", lw=1.5, label="paper")
    ax.axhline(level, color="black", lw=1)
    ax.set_xticks(range(len(labels)), labels)
    ax.set(ylabel=ylabel)
    ax.grid(axis="y")
    return _legend(figure, ax, len(series) + bool(reference))


@_styled
def curves(
    lines: dict[str, tuple], *, xlabel: str, ylabel: str, control: str | None = None, reference: dict[str, float] | None = None,
    points: dict[str, tuple] | None = None, levels: dict[str, tuple] | None = None, log_x: bool = False, log_y: bool = False,
) -> Figure:  # fmt: skip
    """Lines with bands: {name: (x, mean)} or {name: (x, mean, low, high)}; `reference` {name: y} draws dashed levels.

    `levels` {what: (name, y)} are dashed levels in the colour of the line of that name.
    `points` {name: (x, intervals)} are dots with error bars in the colour of the line of that name: what was measured beside what was computed.
    """
    figure, ax = plt.subplots()
    colors = _colors(lines, control)
    for name, (x, mean, *band) in lines.items():
        ax.plot(x, mean, color=colors[name], label=name)
        if band:
            ax.fill_between(x, *band, color=colors[name], alpha=0.2, lw=0)
    for name, (x, intervals) in (points or {}).items():
        means, errors = _bars(intervals)
        ax.errorbar(x, means, yerr=errors, fmt="o", color=colors[name], capsize=3, ms=6)
    dashed = [(what, level, colors[name]) for what, (name, level) in (levels or {}).items()]
    dashed += [(what, level, "black") for what, level in (reference or {}).items()]
    for what, level, color in dashed:
        ax.axhline(level, color=color, ls="--", lw=1.5, label=what)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    ax.grid()
    return _legend(figure, ax, len(lines) + len(dashed))


@_styled
def trade_off(paths: dict[str, dict], *, xlabel: str, ylabel: str, control: str | None = None, marked: dict[str, list] | None = None) -> Figure:
    """Paths through a plane: {name: {label: (x interval, y interval)}}, points joined in order with both error bars, a label at each, on a side of the path's.

    The path `control` is grey; `marked` {what: [(name, label), ...]} rings points.
    """
    figure, ax = plt.subplots(figsize=(7.4, 5.6))
    colors = _colors(paths, control)
    for (name, color), (right, up) in zip(((name, colors[name]) for name in paths), itertools.cycle(SIDES), strict=False):
        xs, ys = (_bars([point[axis] for point in paths[name].values()]) for axis in (0, 1))
        faint = (*matplotlib.colors.to_rgb(color), 0.25)
        ax.errorbar(xs[0], ys[0], xerr=xs[1], yerr=ys[1], fmt="o-", color=color, ecolor=faint, elinewidth=1.2, ms=5, label=name)
        for label, x, y in zip(paths[name], xs[0], ys[0], strict=True):
            halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
            side = {"ha": "left" if right else "right", "va": "bottom" if up else "top", "xytext": (6 if right else -6, 3 if up else -3)}
            ax.annotate(str(label), (x, y), textcoords="offset points", fontsize=9.5, color=color, path_effects=halo, zorder=4, **side)
    for size, (what, points) in zip((10, 14, 18), (marked or {}).items(), strict=False):
        x, y = zip(*([interval.mean for interval in paths[name][label]] for name, label in points), strict=True)
        ax.plot(x, y, "o", ms=size, mfc="none", mec="black", mew=1.2, ls="none", label=what)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid()
    return _legend(figure, ax, len(paths) + len(marked or {}))


@_styled
def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as PNG without a date or a program's name, so that equal figures are equal bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path


# ---------------------------------------------------------------- parts


def _pixels(images) -> np.ndarray:
    """(R, K, 3, H, W) -> (R, K, H, W, 3) in [0, 1]."""
    pictures = np.stack([np.stack([np.asarray(image) for image in row]) for row in images])
    if pictures.ndim != 5 or pictures.shape[2] != 3:
        raise ValueError(f"images must have the shape (rows, columns, 3, height, width), got {pictures.shape}")
    pictures = pictures / 255 if pictures.dtype == np.uint8 else (pictures + 1) / 2
    return np.clip(pictures.astype(np.float32), 0, 1).transpose(0, 1, 3, 4, 2)


def _labels(series: dict[str, dict]) -> list[str]:
    return list(dict.fromkeys(label for rows in series.values() for label in rows))


def _colors(names, control: str | None) -> dict[str, str]:
    """The cycle's colours in order, the control grey."""
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    others = [name for name in names if name != control]
    return {name: cycle[n % len(cycle)] for n, name in enumerate(others)} | {name: CONTROL for name in names if name == control}


def _placed(series: dict[str, dict], control: str | None, *, width: float):
    """Each (name, rows) with its offset within a group of `width` and its colour."""
    colors = _colors(series, control)
    for n, (name, rows) in enumerate(series.items()):
        yield (name, rows), (n - (len(series) - 1) / 2) * width / len(series), colors[name]


def _points(rows: dict, labels: list[str]) -> tuple[np.ndarray, list]:
    return np.array([labels.index(label) for label in rows]), list(rows.values())


def _bars(intervals: list) -> tuple[np.ndarray, np.ndarray]:
    """Means (n,) and the lengths (2, n) of their error bars; no bar where there is no interval."""
    means = np.array([interval.mean for interval in intervals], dtype=float)
    ends = np.array([[interval.low, interval.high] for interval in intervals], dtype=float).reshape(-1, 2).T
    return means, np.nan_to_num(np.maximum([means - ends[0], ends[1] - means], 0))


def _legend(figure: Figure, ax, n: int) -> Figure:
    """A legend above the axes, in as few rows as the figure is wide enough for, if there is more than one thing to tell apart; what has no interval is last."""
    if n > 1:
        entries = sorted(zip(*ax.get_legend_handles_labels(), strict=True), key=lambda entry: not isinstance(entry[0], Container))
        for rows in range(1, n + 1):
            legend = figure.legend(*zip(*entries, strict=True), loc="outside upper center", ncols=-(-n // rows))
            if rows == n or legend.get_window_extent().width <= figure.bbox.width:
                break
            legend.remove()
    return figure
