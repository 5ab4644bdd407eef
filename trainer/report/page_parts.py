"""The parts that a page is put together from: escaped text, tables, figures, tiles.

Every function takes plain text and returns HTML; what is already HTML is of type `Html` and is
taken as it is. A page is one file: no script, nothing fetched.
"""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

from PIL import Image

from trainer.report.plots import Figure, Theme, as_svg
from trainer.report.progress import as_jpeg, is_score


class Html(str):
    """Text that needs no escaping any more."""


@dataclass(frozen=True)
class Cell:
    """Of a table: `number` is aligned to the right, with a `meter` (0..1) before it if given; it
    stays on one line unless it `wraps`.
    """

    text: str
    number: bool = False
    meter: float | None = None
    wraps: bool = False


def plain(value: object) -> Html:
    """Escaped. File names need not be valid text, nor class names printable: both are shown."""
    if isinstance(value, Html):
        return value
    text = str(value).encode("utf-8", "backslashreplace").decode()
    shown = "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in text)
    return Html(escape(shown))


def with_flags(text: object) -> Html:
    """Flags of the command line set apart, so that none is broken into two lines."""
    return Html(re.sub(r"--[a-z_]+", r'<code class="flag">\g<0></code>', plain(text)))


def joined(*parts: object) -> Html:
    return Html("".join(plain(part) for part in parts))


def element(tag: str, *content: object, **attributes: str) -> Html:
    """`class_` and the like give `class`; attributes are escaped."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value
    )
    return Html(f"<{tag}{given}>{joined(*content)}</{tag}>")


def section(key: str, title: str, lead: object, *content: object) -> Html:
    head = joined(element("h2", title), element("p", lead, class_="lead") if lead else "")
    return element("section", head, *content, id=key)


def grid(*cards: Html) -> Html:
    return element("div", *cards, class_="grid")


def card(title: str, *content: object) -> Html:
    return element("div", element("h3", title) if title else "", *content, class_="card")


def plot_card(
    title: str,
    draw: Callable[[Theme], Figure] | None,
    caption: object,
    legend: object = "",
    *,
    wide: bool = False,
    nothing: str = "",
) -> Html:
    """A figure with its legend and a caption that says what one sees. Without anything to draw it
    says `nothing`.
    """
    parts = [element("h3", title)]
    if draw is None:
        parts.append(element("div", nothing, class_="empty"))
    else:
        plot = element("div", Html(as_svg(draw, title)), class_="plot")
        parts += [plot, plain(legend), element("figcaption", with_flags(caption))]
    return element("figure", *parts, class_="card wide section-card" if wide else "card")


def legend_of(entries: Sequence[tuple[str, str, str]]) -> Html:
    """Name, CSS variable and a remark of each colour; nothing without any."""
    items = []
    for name, variable, remark in entries:
        swatch = element("i", style=f"--colour: var(--{variable})")
        items.append(element("li", swatch, element("div", name, " ", element("span", remark))))
    return element("ul", *items, class_="legend") if items else Html("")


def series_variable(number: int | None) -> str:
    """The CSS variable of a line's colour, numbered as in `trainer.report.plots.Series`."""
    if number is None:
        return "accent"
    return "rest" if number < 0 else f"series-{number + 1}"


def tiles(entries: Sequence[tuple[str, str, str]]) -> Html:
    """Name, value and note of the numbers that matter most."""
    items = [
        element(
            "div",
            element("dt", name),
            element("dd", value, class_="value"),
            element("dd", note, class_="note"),
            class_="tile",
        )
        for name, value, note in entries
    ]
    return element("dl", *items, class_="tiles")


def table(
    head: Sequence[Cell], rows: Sequence[Sequence[Cell]], total: Sequence[Cell] | None = None
) -> Html:
    top = element("tr", *(element("th", c.text, class_=_class(c)) for c in head))
    body = [element("tr", *(_cell(cell) for cell in row)) for row in rows]
    if total is not None:
        body.append(element("tr", *(_cell(cell) for cell in total), class_="total"))
    inside = element("table", element("thead", top), element("tbody", *body))
    return element("div", inside, class_="scroll")


def _cell(cell: Cell) -> Html:
    if cell.meter is None:
        return element("td", cell.text, class_=_class(cell) or "name")
    width = f"width: {100 * min(max(cell.meter, 0), 1):.0f}%"
    meter = element("span", element("i", style=width), class_="meter")
    return element("td", meter, cell.text, class_="number")


def _class(cell: Cell) -> str:
    return ("number wraps" if cell.wraps else "number") if cell.number else ""


def settings_table(values: Sequence[tuple[str, object]]) -> Html:
    rows = [
        element("tr", element("td", name), element("td", element("code", value), class_="value"))
        for name, value in values
    ]
    return element("table", element("tbody", *rows), class_="settings")


def folded(title: str, *content: object) -> Html:
    return element("details", element("summary", title), *content)


def picture(image: Image.Image, description: str) -> Html:
    """A JPEG inside the page."""
    data = base64.b64encode(as_jpeg(image, quality=82)).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return Html(f'<img src="data:image/jpeg;base64,{data}" {size} alt="{plain(description)}">')


def number(value: float, digits: int = 3) -> str:
    """'-' for what there is nothing to score of."""
    return f"{value:.{digits}f}" if is_score(value) else "-"


def page(title: str, *body: object) -> str:
    folder = resources.files("trainer.report") / "template"
    whole = Template((folder / "page.html").read_text(encoding="utf-8"))
    style = (folder / "style.css").read_text(encoding="utf-8")
    return whole.substitute(title=plain(title), style=style, body=joined(*body))
