"""Curves, bars and tables drawn by matplotlib: as SVG for a page, as pictures for TensorBoard.

In the SVG every colour is a CSS variable of the page (`--ink`, `--accent`, `--series-2`...) and
text takes the page's font, so one drawing suits a light page and a dark one. matplotlib is imported
when something is drawn: the trainer starts without it. Sizes are in pixels of the page.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

WIDTH = 380  # of a figure, in pixels of the page
LONGEST_LABEL = 18  # characters
SMALL_TABLE = 6  # rows of a table that leaves room for another card beside it

INK, MUTED, LINE, CARD, REST = "#1a2130", "#5b6676", "#dfe4ec", "#ffffff", "#8a94a3"
# Most colour-blind readers can tell these apart too.
SERIES = ("#0b62c1", "#c8500a", "#00845d", "#b0529a", "#a87400", "#2f9fc9")
ACCENT = SERIES[0]
VARIABLES = {  # CSS variable of each colour
    **{INK: "ink", MUTED: "muted", LINE: "line", CARD: "card", REST: "rest", ACCENT: "accent"},
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES[1:], 2)},
}
STYLE: Any = {  # where it differs from matplotlib's defaults
    "svg.fonttype": "none",
    "svg.hashsalt": "the same plot gives the same text",
    "text.parse_math": False,  # "$" is a letter
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
}

Figure: TypeAlias = Any  # matplotlib's, which must not be imported here


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure, None where there is nothing to draw, and its legend: name, colour and note."""

    figure: Figure | None
    legend: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True)
class Series:
    """A line through points. The legend names it if it has a note, which may be empty."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    colour: str = ACCENT
    note: str | None = None
    dots: bool = False
    faint: bool = False
    mark: tuple[float, float] | None = None  # a point to highlight


@dataclass(frozen=True)
class Axes:
    """Labels and limits of the axes; a range of None follows the data."""

    x: str = ""
    y: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log_x: bool = False
    log_y: bool = False
    whole_x: bool = False  # ticks at whole numbers only
    guides: Sequence[tuple[float, str]] = ()  # vertical lines: x, text


@contextmanager
def _style() -> Iterator[None]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        # The page's font has the letters that matplotlib's lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


@_style()
def as_svg(figure: Figure, description: str) -> str:
    """An SVG element for a page; the description is for readers who cannot see it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    return _for_a_page(text.getvalue(), (width, height), description)


@_style()
def as_picture(figure: Figure) -> Image.Image:
    """The figure on white, at twice its size in pixels."""
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=144, facecolor=CARD)
    return Image.open(encoded).convert("RGB")


@_style()
def lines(series: Sequence[Series], axes: Axes, height: int = 232) -> Plot:
    """Lines over a common axis; no figure without any."""
    if not series:
        return Plot(None)
    figure, plot = _figure(WIDTH, height)
    _set_axes(plot, axes)
    for each in series:
        style: dict[str, Any] = {"lw": 1.1, "alpha": 0.5} if each.faint else {"lw": 2}
        if each.dots or np.isfinite(each.y).sum() == 1:  # a line of one point shows nothing
            style |= {"marker": "o", "ms": 4.5, "mec": CARD}
        plot.plot(each.x, each.y, color=each.colour, **style)
        if each.mark is not None:
            plot.plot(*each.mark, "o", ms=8, mfc=each.colour, mec=CARD, mew=2, zorder=5)
    if axes.y_range is None and not axes.log_y:
        _widen_flat_range(plot)
    if axes.whole_x and not axes.x_range:
        plot.set_xlim(left=0)  # last: it ends matplotlib's search for limits
    legend = [(each.name, each.colour, each.note) for each in series if each.note is not None]
    return Plot(figure, legend)


@_style()
def histograms(
    edges: Sequence[float], heights: Mapping[str, Sequence[float]], axes: Axes, height: int = 216
) -> Plot:
    """One histogram, or two, over the same bins: edges [n + 1], heights [n] by name. The first is
    filled, the second is an outline.
    """
    figure, plot = _figure(WIDTH, height)
    _set_axes(plot, axes)
    for number, values in enumerate(heights.values()):
        filled = number == 0
        style = {"alpha": 0.35, "lw": 0} if filled else {"lw": 1.8}
        plot.stairs(values, edges, fill=filled, color=SERIES[number], **style)
    plot.set_ylim(0, 1.12 * max(0.01, *(max(values) for values in heights.values())))
    return Plot(figure, _legend(heights))


@_style()
def bars(
    names: Sequence[str],
    columns: Mapping[str, Sequence[float]],
    form: str = "{:,.0f}",
    longest: float | None = None,
) -> Plot:
    """One horizontal bar per name and column, with its value at the end; NaN has no bar."""
    thick, gap = 13, 14
    row = thick * len(columns) + gap
    size = (WIDTH, row * len(names) + 8)
    figure, plot = _figure(*size, left=_label_width(names), top=4, bottom=4)
    numbers = np.array([*columns.values()], float)
    reach = longest or max(np.nan_to_num(numbers).max(initial=0), 1e-9)
    tops = row * np.arange(len(names))
    for number, column in enumerate(numbers):
        style = {"color": SERIES[number], "alpha": 0.85}
        drawn = plot.barh(tops + number * thick, np.nan_to_num(column), thick - 2, **style)
        texts = ["no such objects" if np.isnan(value) else form.format(value) for value in column]
        plot.bar_label(drawn, texts, padding=3, color=MUTED, size=10)
    plot.set_yticks(tops + thick * (len(columns) - 1) / 2, _short(names))
    plot.set(xlim=(0, 1.18 * reach), xticks=[])
    plot.set_ylim(row * len(names) - gap / 2 - thick / 2, -gap / 2 - thick / 2)
    _hide_frame(plot)
    return Plot(figure, _legend(columns))


@_style()
def confusion_table(table: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Plot:
    """Counts [rows, columns] as cells, coloured by their share of the row."""
    cell = 48 if len(rows) <= SMALL_TABLE else 38
    left, top = _label_width(rows) + 18, _label_width(columns) * 0.72 + 22
    right = _label_width(columns) * 0.72
    height, width = cell * len(rows) + top + 6, cell * len(columns) + left + right
    figure, plot = _figure(width, height, left=left, top=top, bottom=6, right=right)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    for row, column in np.ndindex(*table.shape):
        _cell(plot, (column, row), share[row, column], int(table[row, column]))
    plot.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    plot.set_xticks(np.arange(len(columns)) + 0.5, _short(columns), rotation=45, ha="left")
    plot.set_yticks(np.arange(len(rows)) + 0.5, _short(rows))
    plot.xaxis.tick_top()
    _hide_frame(plot)
    plot.set_xlabel("predicted", size=10.5)
    plot.set_ylabel("truth", size=10.5)
    plot.xaxis.set_label_coords(0.5, 1 + (top - 14) / (cell * len(rows)))
    plot.yaxis.set_label_coords(-(left - 14) / (cell * len(columns)), 0.5)
    return Plot(figure)


def thinned(x: Sequence[float], y: Sequence[float], most: int = 300) -> tuple[list, list]:
    """At most so many points, each the mean of its neighbours."""
    parts = min(len(x), most)
    groups = [np.array_split(np.asarray(each, np.float64), parts or 1) for each in (x, y)]
    means = [[float(group.mean()) for group in some if len(group)] for some in groups]
    return means[0], means[1]


def shortened(name: str, longest: int = LONGEST_LABEL) -> str:
    """A label on one line, without control characters."""
    shown = "".join(letter if letter.isprintable() else " " for letter in name)
    return shown if len(shown) <= longest else shown[: longest - 2] + ".."


def _figure(
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
    size = (1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure, figure.add_axes((left / width, bottom / height, *size))


def _set_axes(plot: Any, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    plot.grid(axis="y")
    plot.set(xlabel=axes.x, ylabel=axes.y)
    plot.tick_params(length=0, pad=6)
    plot.yaxis.set_major_locator(MaxNLocator(5))
    if axes.log_x:
        plot.set_xscale("log", base=2)
        plot.xaxis.set_major_formatter("{x:g}")
        plot.xaxis.set_minor_formatter("")
    if axes.log_y:
        plot.set_yscale("log")
        plot.yaxis.set_major_formatter("{x:g}")
        plot.yaxis.set_minor_formatter("")
    plot.tick_params(which="minor", length=0)
    if axes.whole_x:
        plot.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    limits = {"xlim": axes.x_range, "ylim": axes.y_range}
    plot.set(**{name: limit for name, limit in limits.items() if limit})
    for x, text in axes.guides:
        plot.axvline(x, color=MUTED, lw=1, ls=(0, (3, 3)))
        right = axes.x_range is not None and x > sum(axes.x_range) / 2
        place = {"xytext": (-4 if right else 4, -9), "textcoords": "offset points"}
        style = {"color": MUTED, "size": 9.5, "ha": "right" if right else "left"}
        plot.annotate(shortened(text), (x, 1), xycoords=("data", "axes fraction"), **place, **style)


def _widen_flat_range(plot: Any) -> None:
    """Extends the y axis to a tenth of the values or more: nearly equal ones shall look equal."""
    low, high = plot.dataLim.intervaly
    reach = 0.1 * (max(abs(low), abs(high)) or 1)
    if np.isfinite(high) and high - low < reach:
        plot.set_ylim((low + high) / 2 - reach, (low + high) / 2 + reach)


def _hide_frame(plot: Any) -> None:
    plot.tick_params(length=0, labelsize=11, labelcolor=INK)
    plot.spines[:].set_visible(False)


def _cell(plot: Any, corner: tuple[int, int], share: float, count: int) -> None:
    """One cell with its count, in ink that is readable on it; nothing is written for 0."""
    from matplotlib.patches import Rectangle

    x, y = corner[0] + 0.03, corner[1] + 0.03
    strength = 0.08 + 0.92 * share if count else 0.1
    colour = ACCENT if count else REST
    plot.add_patch(Rectangle((x, y), 0.94, 0.94, fc=colour, lw=0, alpha=strength, clip_on=False))
    if count:
        ink = CARD if strength > 0.55 else INK
        size = 11 if count < 1000 else 9.5 if count < 10000 else 8
        text = f"{count}" if count < 100_000 else f"{count / 1000:.0f}k"
        plot.text(x + 0.47, y + 0.47, text, color=ink, ha="center", va="center_baseline", size=size)


def _legend(columns: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(name, SERIES[number], "") for number, name in enumerate(columns)]


def _short(names: Sequence[str]) -> list[str]:
    return [shortened(name) for name in names]


def _label_width(names: Sequence[str]) -> float:
    """Pixels; letters of wide scripts (Chinese, Korean...) count twice."""
    widths = [sum(2 if ord(letter) > 0x2E7F else 1 for letter in name) for name in _short(names)]
    return 16 + 6.3 * max([*widths, 4])


def _for_a_page(svg: str, size: tuple[int, int], description: str) -> str:
    """matplotlib's file as an inline element: CSS variables for colours, the page's font, no ids
    that would clash with those of another plot.
    """
    svg = svg[svg.index("<svg") :]
    replacements = (
        (r"(?s)<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", ""),
        (r'\s+id="[\w.]+_\d+"', ""),
        (r"font: ([\d.]+px)[^;\"]*", r"font-size: \1"),
        (r"font-family: [^;\"]*; ?", ""),
        (r"(\.\d\d)\d+(?=[^<>]*>)", r"\1"),  # invisible digits
        (r' transform="rotate\(-?0 [^)]*\)"', ""),
        (r"\s*\n\s*", "\n"),
    )
    for pattern, replacement in replacements:
        svg = re.sub(pattern, replacement, svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var(--{variable})")
    label = escape(shortened(description, 80))
    head = (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{label}" '
        f'style="--natural: {size[0]}px" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + svg[svg.index(">") + 1 :].strip()
