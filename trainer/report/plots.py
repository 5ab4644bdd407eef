"""Curves, bars and tables of a run as pictures, drawn by matplotlib without a display.

Drawn once, seen on any background: in the SVG of a page every colour is a CSS variable (`--ink`,
`--accent`, `--series-1`...), and text takes the page's font. matplotlib is imported when something
is drawn, not before. Sizes are in pixels of the page.
"""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

WIDTH = 380  # of a figure, in pixels of the page
NUM_SERIES = 6  # colours that are told apart, also by most colour-blind eyes; then one of the rest
LONGEST_LABEL = 18  # characters
SMALL_TABLE = 6  # rows of a table that leaves room beside it

Figure: TypeAlias = Any  # matplotlib's, which must not be imported here


@dataclass(frozen=True)
class Theme:
    """Colours by their part. `series` has NUM_SERIES of them, `rest` is for what is summed up."""

    ink: str = "#1a2130"
    muted: str = "#5b6676"
    line: str = "#dfe4ec"
    accent: str = "#0b62c1"
    on_accent: str = "#ffffff"
    card: str = "#ffffff"
    rest: str = "#8a94a3"
    series: tuple[str, ...] = ("#0b62c1", "#c8500a", "#00845d", "#b0529a", "#a87400", "#2f9fc9")


# Colours that nobody would choose: each becomes the CSS variable of its part.
_PARTS = ("ink", "muted", "line", "accent", "on_accent", "card", "rest")
_MARKS = {part: f"#0101{number:02x}" for number, part in enumerate(_PARTS, 1)}
_SERIES_MARKS = tuple(f"#0102{number:02x}" for number in range(1, NUM_SERIES + 1))
PAGE = Theme(**_MARKS, series=_SERIES_MARKS)
VARIABLES = {mark: f"var(--{part.replace('_', '-')})" for part, mark in _MARKS.items()} | {
    mark: f"var(--series-{number})" for number, mark in enumerate(_SERIES_MARKS, 1)
}


@dataclass(frozen=True)
class Series:
    """A line through points; `colour` counts from 0, -1 for the rest, None for the main one."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    colour: int | None = None
    dots: bool = False
    faint: bool = False
    mark: tuple[float, float] | None = None  # a point to point out


@dataclass(frozen=True)
class Axes:
    """What the axes say, and how far they go; None: as far as the data."""

    x: str = ""
    y: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log_x: bool = False
    log_y: bool = False
    whole_x: bool = False  # no ticks between whole numbers
    guides: Sequence[tuple[float, str]] = field(default=())  # upright lines: x, text


def as_svg(draw: Callable[[Theme], Figure], description: str) -> str:
    """What `draw` makes, as an element of a page, described for those who do not see it."""
    with _settings(PAGE):
        figure = draw(PAGE)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    return _for_a_page(text.getvalue(), (width, height), description)


def as_picture(draw: Callable[[Theme], Figure]) -> Image.Image:
    """What `draw` makes, in light colours, with two pixels for one."""
    theme = Theme()
    with _settings(theme):
        encoded = io.BytesIO()
        draw(theme).savefig(encoded, format="png", dpi=144, facecolor=theme.card)
    return Image.open(encoded).convert("RGB")


def lines(series: Sequence[Series], axes: Axes, height: int = 232) -> Callable[[Theme], Figure]:
    """Lines over a common axis."""

    def draw(theme: Theme) -> Figure:
        figure, plot = _figure(theme, WIDTH, height)
        _set_axes(plot, axes, theme)
        for each in series:
            colour = _colour(each.colour, theme)
            style: dict[str, Any] = {"color": colour, "lw": 1.1 if each.faint else 2}
            style |= {"alpha": 0.5} if each.faint else {}
            dots = each.dots or np.isfinite(each.y).sum() == 1  # a line of one point shows nothing
            style |= {"marker": "o", "ms": 4.5, "mec": theme.card} if dots else {}
            plot.plot(each.x, each.y, **style)
            if each.mark is not None:
                plot.plot(*each.mark, "o", ms=8, mfc=colour, mec=theme.card, mew=2, zorder=5)
        if axes.y_range is None and not axes.log_y:
            _keep_apart(plot, series)
        if axes.whole_x and not axes.x_range:
            plot.set_xlim(left=0)  # only now: it ends the search for limits that show all
        return figure

    return draw


def shares(
    edges: Sequence[float],
    filled: Sequence[float],
    outlined: Sequence[float] | None,
    axes: Axes,
    height: int = 216,
) -> Callable[[Theme], Figure]:
    """Two histograms over the same bins [n + 1]: one filled, one as a line; heights [n]."""

    def draw(theme: Theme) -> Figure:
        figure, plot = _figure(theme, WIDTH, height)
        _set_axes(plot, axes, theme)
        plot.stairs(filled, edges, fill=True, color=theme.accent, alpha=0.35, lw=0)
        if outlined is not None:
            plot.stairs(outlined, edges, color=theme.series[1], lw=1.8)
        plot.set_ylim(0, 1.12 * max([*filled, *(outlined or ()), 0.01]))
        return figure

    return draw


def bars(
    names: Sequence[str],
    columns: Sequence[Sequence[float]],
    formats: Callable[[float], str],
    longest: float | None = None,
) -> Callable[[Theme], Figure]:
    """For each name one lying bar a column, with its value written at its end; NaN has none."""

    def draw(theme: Theme) -> Figure:
        thick, gap = 13, 14
        row = thick * len(columns) + gap
        margins = {"left": _margin(names), "top": 4, "bottom": 4}
        figure, plot = _figure(theme, WIDTH, row * len(names) + 8, **margins)
        numbers = np.array([[float(value) for value in column] for column in columns])
        reach = longest or max(np.nan_to_num(numbers).max(initial=0), 1e-9)
        for number, column in enumerate(numbers):
            colour = theme.accent if number == 0 else theme.series[number]
            for place, value in enumerate(column):
                y = place * row + number * thick
                plot.barh(y, np.nan_to_num(value), thick - 2, color=colour, alpha=0.85)
                text = "no such objects" if np.isnan(value) else formats(value)
                where = (np.nan_to_num(value) + reach / 80, y)
                plot.text(*where, text, va="center_baseline", color=theme.muted, size=10)
        middle = thick * (len(columns) - 1) / 2
        plot.set_yticks([place * row + middle for place in range(len(names))], _short(names))
        plot.set(xlim=(0, 1.18 * reach), xticks=[])
        plot.set_ylim(row * len(names) - gap / 2 - thick / 2, -gap / 2 - thick / 2)
        plot.tick_params(length=0, labelsize=11, labelcolor=theme.ink)
        plot.spines[:].set_visible(False)
        return figure

    return draw


def confusion_table(
    table: np.ndarray, rows: Sequence[str], columns: Sequence[str]
) -> Callable[[Theme], Figure]:
    """Counts [rows, columns] as a table: the stronger a field, the larger its share of its row."""

    def draw(theme: Theme) -> Figure:
        cell = 48 if len(rows) <= SMALL_TABLE else 38
        left, top = _margin(rows) + 18, _margin(columns) * 0.72 + 22
        right = _margin(columns) * 0.72
        height, width = cell * len(rows) + top + 6, cell * len(columns) + left + right
        figure, plot = _figure(theme, width, height, left=left, top=top, bottom=6, right=right)
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        for row, column in np.ndindex(*table.shape):
            _field(plot, (column, row), share[row, column], int(table[row, column]), theme)
        plot.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        plot.set_xticks(np.arange(len(columns)) + 0.5, _short(columns), rotation=45, ha="left")
        plot.set_yticks(np.arange(len(rows)) + 0.5, _short(rows))
        plot.xaxis.tick_top()
        plot.xaxis.set_label_position("top")
        plot.tick_params(length=0, labelsize=11, labelcolor=theme.ink)
        for axis, text in ((plot.xaxis, "found as"), (plot.yaxis, "truth")):
            axis.set_label_text(text, color=theme.muted, size=10.5)
        plot.xaxis.set_label_coords(0.5, 1 + (top - 14) / (cell * len(rows)))
        plot.yaxis.set_label_coords(-(left - 14) / (cell * len(columns)), 0.5)
        plot.spines[:].set_visible(False)
        return figure

    return draw


def thinned(x: Sequence[float], y: Sequence[float], most: int = 300) -> tuple[list, list]:
    """At most so many points, each the mean of its neighbours, for lines over many steps."""
    parts = min(len(x), most)
    groups = [np.array_split(np.asarray(each, np.float64), parts or 1) for each in (x, y)]
    means = [[float(group.mean()) for group in some if len(group)] for some in groups]
    return means[0], means[1]


@contextmanager
def _settings(theme: Theme) -> Iterator[None]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(_style(theme)):
        # Text in a script that this font lacks is drawn by the page's.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def _style(theme: Theme) -> Any:
    """Of matplotlib's own settings those that are other than its defaults."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "a page looks the same whenever it is made",
        "text.parse_math": False,  # "$" is a letter
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "text.color": theme.ink,
        "axes.edgecolor": theme.line,
        "axes.labelcolor": theme.muted,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": theme.line,
        "grid.linewidth": 0.8,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
    }


def _figure(
    theme: Theme,
    width: float,
    height: float,
    *,
    left: float = 46,
    right: float = 12,
    top: float = 10,
    bottom: float = 40,
) -> tuple[Figure, Any]:
    """A figure with one plot in it, margins in pixels."""
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(width / 72, height / 72), dpi=72)
    place = (
        left / width,
        bottom / height,
        1 - (left + right) / width,
        1 - (top + bottom) / height,
    )
    return figure, figure.add_axes(place)


def _set_axes(plot: Any, axes: Axes, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    plot.grid(axis="y")
    plot.set(xlabel=axes.x)
    plot.set_ylabel(axes.y)
    plot.tick_params(length=0, pad=6)
    plot.yaxis.set_major_locator(MaxNLocator(5))
    if axes.log_x:
        plot.set_xscale("log", base=2)
        plot.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        plot.xaxis.set_minor_locator(NullLocator())
    if axes.log_y:
        plot.set_yscale("log")
        plot.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        plot.yaxis.set_minor_formatter(lambda value, _: "")
    if axes.whole_x:
        plot.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if axes.x_range:
        plot.set_xlim(axes.x_range)
    if axes.y_range:
        plot.set_ylim(axes.y_range)
    for x, text in axes.guides:
        plot.axvline(x, color=theme.muted, lw=1, ls=(0, (3, 3)))
        left_of_it = axes.x_range is not None and x > sum(axes.x_range) / 2
        place = {"xytext": (-4 if left_of_it else 4, -9), "textcoords": "offset points"}
        style = {"color": theme.muted, "size": 9.5, "ha": "right" if left_of_it else "left"}
        plot.annotate(shortened(text), (x, 1), xycoords=("data", "axes fraction"), **place, **style)


def _keep_apart(plot: Any, series: Sequence[Series]) -> None:
    """Values that are all but equal look so: the axis spans a tenth of them to either side."""
    values = np.concatenate([np.zeros(0), *(np.asarray(each.y, float) for each in series)])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    reach = 0.1 * (np.abs(values).max() or 1)
    if np.ptp(values) < reach:
        middle = (values.min() + values.max()) / 2
        plot.set_ylim(middle - reach, middle + reach)


def _field(plot: Any, corner: tuple[int, int], share: float, count: int, theme: Theme) -> None:
    """One field of a table, its number readable on it; nothing is written for 0."""
    from matplotlib.patches import Rectangle

    x, y = corner[0] + 0.03, corner[1] + 0.03
    strength = 0.08 + 0.92 * share if count else 0.1
    colour = theme.accent if count else theme.rest
    plot.add_patch(Rectangle((x, y), 0.94, 0.94, fc=colour, lw=0, alpha=strength, clip_on=False))
    if count:
        ink = theme.on_accent if strength > 0.55 else theme.ink
        size = 11 if count < 1000 else 9.5 if count < 10000 else 8
        text = f"{count}" if count < 100_000 else f"{count / 1000:.0f}k"
        middle = (x + 0.47, y + 0.47)
        plot.text(*middle, text, color=ink, ha="center", va="center_baseline", size=size)


def _colour(number: int | None, theme: Theme) -> str:
    if number is None:
        return theme.accent
    return theme.rest if number < 0 else theme.series[number % NUM_SERIES]


def _short(names: Sequence[str]) -> list[str]:
    return [shortened(name) for name in names]


def shortened(name: str, longest: int = LONGEST_LABEL) -> str:
    """Control characters and line breaks have no place in a label."""
    shown = "".join(letter if letter.isprintable() else " " for letter in name)
    return shown if len(shown) <= longest else shown[: longest - 2] + ".."


def _margin(names: Sequence[str]) -> float:
    """Room for labels, in pixels; wide scripts take two letters' place."""
    widths = [sum(2 if ord(letter) > 0x2E7F else 1 for letter in name) for name in _short(names)]
    return 16 + 6.3 * max([*widths, 4])


def _for_a_page(svg: str, size: tuple[int, int], description: str) -> str:
    """An inline element: CSS variables for colours, the page's font, and no ids that clash."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+id="[A-Za-z0-9]+_\d+"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*|font-family: [^;\"]*; ?", _font_size, svg)
    svg = re.sub("|".join(VARIABLES), lambda found: VARIABLES[found[0]], svg)
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    label = escape(shortened(description, 80))
    head = (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{label}" '
        f'style="--natural: {size[0]}px" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def _font_size(found: re.Match) -> str:
    return f"font-size: {found[1]}" if found[1] else ""
