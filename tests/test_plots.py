"""Invariants: what is drawn where, nothing global changed, equal figures equal bytes."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from mitune import plots
from mitune.statistics import Interval

SERIES = {
    "base": {"color": Interval(50, 45, 55, 60), "shape": Interval(43, 40, 46, 60)},
    "MI-TUNE": {"color": Interval(65, 60, 70, 60), "shape": Interval(50, float("nan"), float("nan"), 1)},
}


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def test_grid_accepts_bytes_and_floats_alike():
    images = torch.randint(256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    pictures = plots._pixels(images)
    np.testing.assert_allclose(pictures, plots._pixels(images.float() / 127.5 - 1), atol=1e-6)
    np.testing.assert_allclose(pictures[1, 2, 4, 5], images[1, 2, :, 4, 5].numpy() / 255, atol=1e-6)


def test_grid_writes_scores_captions_and_columns():
    figure = plots.image_grid(np.zeros((2, 3, 3, 8, 8)), scores=np.arange(6).reshape(2, 3), captions=["a red circle", "a blue moon"], columns=["1", "8", "16"])
    axes = np.array(figure.axes).reshape(2, 3)
    assert axes[1, 2].get_xlabel() == "5.0"
    assert axes[1, 0].get_ylabel() == "a blue moon"
    assert axes[0, 1].get_title() == "8"


@pytest.mark.parametrize("wrong", [{"scores": np.zeros((3, 2))}, {"captions": ["one"]}, {"columns": ["one"]}])
def test_grid_refuses_what_does_not_fit(wrong):
    with pytest.raises(ValueError, match="do not fit a grid of 2 x 3"):
        plots.image_grid(np.zeros((2, 3, 3, 8, 8)), **wrong)
    with pytest.raises(ValueError, match="must have the shape"):
        plots.image_grid(np.zeros((2, 3, 8, 8, 3)))


@pytest.mark.parametrize(
    "draw", [lambda **k: plots.interval_dots(SERIES, xlabel="alignment (%)", **k), lambda **k: plots.interval_bars(SERIES, ylabel="alignment (%)", **k)]
)
def test_intervals_show_control_and_reference(draw):
    figure = draw(control="base", reference={"color": 65.04})
    (ax,) = figure.axes
    handles, labels = ax.get_legend_handles_labels()
    assert set(labels) == {"base", "MI-TUNE", "paper"}
    assert figure.legends
    grey = dict(zip(labels, handles, strict=True))["base"][0]
    color = grey.get_color() if hasattr(grey, "get_color") else grey.get_facecolor()
    assert matplotlib.colors.to_hex(color) == plots.CONTROL


def test_dots_stand_at_the_means_with_their_ends():
    (ax,) = plots.interval_dots({"tau": SERIES["base"]}, xlabel="x", zero=True).axes
    container = ax.containers[0]
    np.testing.assert_allclose(container[0].get_xdata(), [50, 43])
    np.testing.assert_allclose(container[2][0].get_segments()[0][:, 0], [45, 55])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["color", "shape"]


def test_curves_with_and_without_bands():
    x = np.arange(1, 5)
    figure = plots.curves({"knows": (x, x, x - 1, x + 1), "does": (x, x**2)}, xlabel="step", ylabel="%", reference={"target": 3}, log_x=True)
    (ax,) = figure.axes
    assert len(ax.collections) == 1
    assert len(ax.lines) == 3
    assert ax.get_xscale() == "log"
    points = {"does": ([2.0, 3.0], list(SERIES["base"].values()))}
    (ax,) = plots.curves({"knows": (x, x), "does": (x, x**2)}, points=points, xlabel="step", ylabel="%").axes
    assert ax.containers[0].lines[0].get_color() == ax.lines[1].get_color()


def test_trade_off_joins_the_points_in_order_and_marks_some():
    paths = {name: {"1.0": (rows["color"], rows["shape"]), "2.5": (rows["shape"], rows["color"])} for name, rows in SERIES.items()}
    figure = plots.trade_off(paths, xlabel="CMMD", ylabel="%", control="base", marked={"front": [("MI-TUNE", "2.5")]})
    (ax,) = figure.axes
    np.testing.assert_allclose(ax.containers[1].lines[0].get_xydata(), [[65, 50], [50, 65]])
    assert ax.containers[0].lines[0].get_color() == plots.CONTROL
    assert [text.get_text() for text in ax.texts] == ["1.0", "2.5"] * 2
    np.testing.assert_allclose(ax.lines[-1].get_xydata(), [[50, 65]])


def test_settings_are_left_alone_and_bytes_are_equal(tmp_path):
    before = dict(matplotlib.rcParams)
    files = [plots.save(plots.interval_bars(SERIES, ylabel="%"), tmp_path / "new" / f"{n}.png") for n in range(2)]
    assert dict(matplotlib.rcParams) == before
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size > 5000


def test_a_legend_is_no_wider_than_its_figure():
    long = {f"a series with quite a long name, number {n}": {"a": Interval(1.0, 0.5, 1.5, 3)} for n in range(3)}
    figure = plots.interval_dots(long, xlabel="share (%)")
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width and len(legend.get_texts()) == 3


def test_bars_stand_on_their_level():
    (ax,) = plots.interval_bars({"AUC": {"a": Interval(0.7, 0.6, 0.8, 9), "b": Interval(0.4, 0.3, 0.5, 9)}}, ylabel="AUC", level=0.5).axes
    bars = ax.containers[-1]
    np.testing.assert_allclose([(bar.get_y(), bar.get_y() + bar.get_height()) for bar in bars], [(0.5, 0.7), (0.5, 0.4)])


def test_a_label_of_one_series_stands_on_its_line_and_the_paper_is_last_in_the_legend():
    apart = {"picked": {"MI": Interval(1, 0, 2, 9)}, "control": {"random": Interval(0, -1, 1, 9)}}
    figure = plots.interval_dots(apart, xlabel="x", control="control", reference={"MI": 2.0})
    np.testing.assert_allclose([container[0].get_ydata()[0] for container in figure.axes[0].containers], figure.axes[0].get_yticks())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["picked", "control", "paper"]


def test_a_level_has_the_colour_of_its_line():
    (ax,) = plots.curves({"a": ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])}, xlabel="x", ylabel="y", levels={"b, joint": ("b", 0.5)}).axes
    assert ax.lines[2].get_color() == ax.lines[1].get_color()
    assert ax.lines[2].get_linestyle() == "--"


def test_a_series_without_rows_leaves_the_others_where_they_are():
    (ax,) = plots.interval_bars({"none": {}, "AUC": {"a": Interval(0.7, 0.6, 0.8, 9)}}, ylabel="AUC").axes
    assert [patch.get_height() for patch in ax.patches] == [0.7]
