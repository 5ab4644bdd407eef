"""Plots: colours that the page decides on, text that it draws, nothing that clashes or fails."""

import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from tiny_runs import environment

from trainer.report.plots import (
    REST,
    SERIES,
    Axes,
    Plot,
    Series,
    as_picture,
    as_svg,
    bars,
    confusion_table,
    histograms,
    lines,
    thinned,
)

HOSTILE = '<script>$x^2$ & "it"</script>\n\x07'
AXES = Axes("steps", "share", y_range=(0, 1), guides=[(0.5, HOSTILE)])
EVERY = [Series(each, [0, 1], [0, number / 9], each) for number, each in enumerate(SERIES)]
DRAWN: dict[str, Plot] = {
    "lines": lines([*EVERY, Series("rest", [0, 1], [1, 1], REST, mark=(0, 1))], AXES),
    "a point": lines([Series("a", [5.0], [0.5], dots=True)], Axes(whole_x=True)),
    "nan": lines([Series("a", [1, 2, 3], [np.nan, 0.5, np.nan])], Axes(whole_x=True)),
    "log": lines([Series("a", [1, 2], [0.001, 900.0])], Axes(log_y=True)),
    "histograms": histograms([1, 2, 4, 8], {"a": [10, 80, 10], "b": [0, 0, 100]}, Axes(log_x=True)),
    "one histogram": histograms([0, 1], {"a": [0.0]}, Axes()),
    "bars": bars(["cat", HOSTILE], {"a": [0.5, np.nan], "b": [0.0, 1.0]}, "{:.3f}", 1.0),
    "no bars": bars(["cat"], {"a": [0.0]}),
    "confusion": confusion_table(np.array([[7, 0], [123456, 2]]), ["cat", "-"], ["cat", HOSTILE]),
    "no confusion": confusion_table(np.zeros((2, 2), np.int64), ["cat", "-"], ["cat", "-"]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_colour_is_the_pages_own(name: str) -> None:
    svg = as_svg(DRAWN[name].figure, HOSTILE)
    assert re.findall(r"(?:fill|stroke): *#\w+", svg) == []
    assert "var(--" in svg
    ElementTree.fromstring(svg)  # well-formed: HOSTILE was escaped


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_in_it_clashes_with_the_page(name: str) -> None:
    svg = as_svg(DRAWN[name].figure, "a plot")
    ids = re.findall(r'\bid="([^"]+)"', svg)
    used = set(re.findall(r"#(\w+)\b", " ".join(re.findall(r'(?:url\(|href=")#\w+', svg))))
    assert len(ids) == len(set(ids)) and used <= set(ids)
    assert not re.search(r'\bid="[\w.]+_\d+"', svg), "another plot on the page has the same"
    assert "font-family" not in svg and "<style" not in svg and "<metadata" not in svg
    assert set(re.findall(r'https?://[^"]*', svg)) <= {"http://www.w3.org/1999/xlink"}


def test_a_name_that_looks_like_a_colour_is_a_name() -> None:
    svg = as_svg(bars([SERIES[0]], {"a": [1.0]}).figure, "a plot")
    assert f">{SERIES[0]}</text>" in svg


def test_numbers_are_written_whole_and_names_as_they_are() -> None:
    texts = re.findall(r">([^<>\n]+)</text>", as_svg(DRAWN["bars"].figure, "a plot"))
    assert {"0.500", "no such objects", "1.000", "cat"} <= set(texts)
    assert "&lt;script&gt;$x^2$ &amp; .." in texts


def test_a_script_that_the_font_lacks_is_left_to_the_page() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = as_svg(bars(["\u7269\u4f53"], {"a": [1.0]}).figure, "a plot")
    assert "\u7269\u4f53" in svg


def test_lines_end_within_their_axes() -> None:
    """The last point lies in the last tenth of the axis, not far beyond it."""
    figure = lines([Series("a", [400.0, 900.0], [0.2, 0.4])], Axes(whole_x=True)).figure
    left, right = figure.axes[0].get_xlim()
    assert left == 0 and 900 <= right <= 1000


def test_one_point_is_seen_and_its_axis_says_what_it_is() -> None:
    """Also where log lines beside it are all but equal: no offset, no axis of millionths."""
    points = [
        Series("a", [5, 10], [18.25600, 18.25662], faint=True),
        Series("b", [10], [18.256]),
    ]
    figure = lines(points, Axes(whole_x=True)).figure
    assert figure.axes[0].lines[1].get_marker() == "o"
    low, high = figure.axes[0].get_ylim()
    assert 15 < low < 17 and 19 < high < 21
    svg = as_svg(figure, "a plot")
    shown = [float(each) for each in re.findall(r">([\d.e+-]+)</text>", svg)]
    assert any(16 < each < 20 for each in shown) and max(shown) < 21


def test_the_same_plot_is_the_same_text() -> None:
    one, other = (as_svg(lines(EVERY, AXES).figure, "a") for _ in range(2))
    assert one == other


def test_a_picture_for_a_light_background() -> None:
    picture = as_picture(DRAWN["confusion"].figure)
    pixels = np.asarray(picture)
    assert (pixels[0] == 255).all() and picture.width > 200
    strong = (pixels == (11, 98, 193)).all(2)  # a field that has all of its row
    assert 1000 < strong.sum() < strong.size / 4


def test_many_points_become_few_and_keep_their_mean() -> None:
    x, y = thinned(list(range(10000)), [float(value) for value in range(10000)], 100)
    assert len(x) == len(y) == 100 and x == y and np.mean(y) == pytest.approx(4999.5)
    nothing: tuple[list[Any], list[Any]] = ([], [])
    assert thinned([], []) == nothing and thinned([3], [4.0]) == ([3.0], [4.0])


@pytest.mark.slow
def test_the_trainer_starts_without_loading_the_plotting_library() -> None:
    code = "import sys, trainer.train; sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=120)
    assert done.returncode == 0
