"""Section of a page on how a training went: loss, its parts, average precision."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from trainer.report.page_parts import (
    Html,
    grid,
    legend_of,
    number,
    plot_card,
    section,
    series_variable,
)
from trainer.report.plots import NUM_SERIES, Axes, Series, lines, thinned
from trainer.report.run_history import History
from trainer.settings.wording import counted

NOTHING_YET = "No evaluation yet: this appears after the first one."


def curves_section(
    history: History, rows: Sequence[Mapping[str, float]], *, ended: bool = True
) -> Html:
    """What more epochs would do is said of a run that has `ended`: before, the rate still falls."""
    cards = [_loss_card(history, rows, ended), _precision_card(rows, ended)]
    cards += [_terms_card(history, rows), _each_class_card(rows)]
    lead = "How the run went. Loss is computed on the training images, AP on the validation images."
    return section("curves", "Training curves", lead, grid(*cards))


def _loss_card(history: History, rows: Sequence[Mapping[str, float]], ended: bool) -> Html:
    series = []
    if history.steps:
        series.append(
            Series("log lines", *thinned(history.steps, history.of("loss")), None, faint=True)
        )
    steps, losses = _column(rows, "loss")
    if steps:
        series.append(Series("mean between evaluations", steps, losses, None, dots=True))
    text = "Thin: the log lines of this start. Dots: the mean since the evaluation before. "
    if ended and len(losses) >= 2:
        falling = losses[-1] < 0.98 * losses[-2]
        text += (
            "It was still falling at the end of the curve: more epochs may help."
            if falling
            else "It no longer falls: more epochs of the same will hardly help."
        )
    axes = Axes("optimiser steps", "", log_y=_spans(series), whole_x=True)
    draw = lines(series, axes) if series else None
    return plot_card("Loss", draw, text, nothing="No log line yet.")


def _precision_card(rows: Sequence[Mapping[str, float]], ended: bool) -> Html:
    names = {
        "map50": "AP50",
        "map": "AP",
        "segm_map50": "AP50 of masks",
        "segm_map": "AP of masks",
    }
    series, legend = [], []
    for place, (name, shown) in enumerate(names.items()):
        steps, scores = _column(rows, name)
        if not steps:
            continue
        best = int(np.argmax(scores))
        mark = (steps[best], scores[best]) if name == "map50" else None
        series.append(Series(shown, steps, scores, place, dots=True, mark=mark))
        legend.append((shown, series_variable(place), f"best {number(scores[best])}"))
    top = max((max(each.y) for each in series), default=0.0)
    axes = Axes("optimiser steps", "", y_range=(0, min(1.02, max(0.1, 1.15 * top))), whole_x=True)
    draw = lines(series, axes) if series else None
    text = (
        f"{_best_so_far(rows, ended)} AP50 counts a box as found if it overlaps the true box by "
        "half; AP is the mean over ten stricter demands."
    )
    return plot_card("Average precision", draw, text, legend_of(legend), nothing=NOTHING_YET)


def _each_class_card(rows: Sequence[Mapping[str, float]]) -> Html:
    last = rows[-1] if rows else {}
    names = [name for name in last if name.startswith("ap50/") and _column(rows, name)[0]]
    weakest = sorted(names, key=lambda name: _column(rows, name)[1][-1])[:NUM_SERIES]
    shown = [name for name in names if name in weakest]  # in the order of the classes
    series = [
        Series(name, *_column(rows, name), place, dots=True) for place, name in enumerate(shown)
    ]
    legend = [
        (name.removeprefix("ap50/"), series_variable(place), number(series[place].y[-1]))
        for place, name in enumerate(shown)
    ]
    which = f"The {len(shown)} weakest classes. " if len(names) > len(shown) else ""
    text = (
        f"{which}Numbers are of the last evaluation. A class that stays at the bottom wants more "
        "or better labels, one that still rises only time."
    )
    top = max((max(each.y) for each in series), default=0.0)
    axes = Axes("optimiser steps", "", y_range=(0, min(1.02, max(0.1, 1.15 * top))), whole_x=True)
    draw = lines(series, axes) if series else None
    return plot_card("AP50 of each class", draw, text, legend_of(legend), nothing=NOTHING_YET)


def _best_so_far(rows: Sequence[Mapping[str, float]], ended: bool) -> str:
    _, scores = _column(rows, "map50")
    if not scores:
        return ""
    best = int(np.argmax(scores))
    if best == len(scores) - 1 and len(scores) > 1:
        more = ": more epochs may help" if ended else " so far"
        return f"The large dot is the best, and it is the last one{more}."
    since = len(scores) - 1 - best
    if since:
        return f"The large dot is the best; {counted(since, 'evaluation')} since were not better."
    return "There is one evaluation so far."


def _terms_card(history: History, rows: Sequence[Mapping[str, float]]) -> Html:
    columns: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    by_evaluation = len(rows) > 1 or not history.steps
    if by_evaluation:
        names = [name for row in rows for name in row]
        columns = {name: _column(rows, name) for name in dict.fromkeys(names)}
    else:
        columns = {name: thinned(history.steps, history.of(name)) for name in history.numbers}
    terms = {
        name: column
        for name, column in columns.items()
        if name.startswith("loss_") and not re.search(r"_\d+$", name) and column[0]
    }
    largest = sorted(terms, key=lambda name: -np.nanmean(terms[name][1]))[:NUM_SERIES]
    series = [
        Series(name, *terms[name], place, dots=by_evaluation) for place, name in enumerate(largest)
    ]
    legend = [
        (name.removeprefix("loss_"), series_variable(place), f"{terms[name][1][-1]:.3g}")
        for place, name in enumerate(largest)
    ]
    text = (
        "Parts of the loss, of the last decoder layer: ce is the class, bbox and giou the place of "
        "a box. One that rises while the others fall has too much weight or bad labels."
    )
    axes = Axes("optimiser steps", "", log_y=_spans(series), whole_x=True)
    draw = lines(series, axes) if series else None
    return plot_card("Loss terms", draw, text, legend_of(legend), nothing="No log line yet.")


def _column(rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have one."""
    pairs = [(row["step"], row[name]) for row in rows if not math.isnan(row.get(name, math.nan))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _spans(series: Sequence[Series]) -> bool:
    """Whether the values are so far apart that only a logarithmic axis shows them all."""
    values = np.concatenate([np.zeros(0), *(np.asarray(each.y, float) for each in series)])
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > 20 * values.min())
