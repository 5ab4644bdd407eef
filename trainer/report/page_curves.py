"""The curves of a page: loss, its terms and average precision over the steps of a training."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from trainer.report.console import score
from trainer.report.plots import SERIES, Axes, Plot, Series, lines, thinned
from trainer.report.run_history import RunHistory

Rows: TypeAlias = Sequence[Mapping[str, float]]  # of metrics.csv
AP_NAMES = {
    "map50": "AP50",
    "map": "AP",
    "segm_map50": "AP50 of masks",
    "segm_map": "AP of masks",
}


def curves_of(history: RunHistory, rows: Rows, best_by: str = "map50") -> dict[str, Any]:
    """The plots and the values in their captions. Losses cover this start of the run, evaluations
    all starts; the best has the highest `best_by`.
    """
    losses, scores = _column(rows, "loss")[1], _column(rows, best_by)[1]
    names = [name for name in (rows[-1] if rows else {}) if name.startswith("ap50/")]
    names = [name for name in names if _column(rows, name)[0]]
    return {
        "loss": _loss_plot(history, rows),
        "terms": _terms_plot(history, rows),
        "precision": _precision_plot(rows, best_by),
        "classes": _classes_plot(rows, names),
        "num_evaluations": len(scores),
        "since_best": len(scores) - 1 - int(np.argmax(scores)) if scores else 0,
        "loss_falls": losses[-1] < 0.98 * losses[-2] if len(losses) > 1 else None,
        "num_classes": len(names),  # that have a score; not all are drawn
    }


def _loss_plot(history: RunHistory, rows: Rows) -> Plot:
    series = []
    if history.steps:
        points = thinned(history.steps, history.of("loss"))
        series.append(Series("log lines", *points, faint=True))
    if any(_column(rows, "loss")):
        series.append(Series("mean between evaluations", *_column(rows, "loss"), dots=True))
    return _loss_lines(series)


def _terms_plot(history: RunHistory, rows: Rows) -> Plot:
    by_evaluation = len(rows) > 1 or not history.steps
    if by_evaluation:
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: _column(rows, name) for name in names}
    else:
        columns = {name: thinned(history.steps, history.of(name)) for name in history.numbers}
    terms = {
        name.removeprefix("loss_"): column
        for name, column in columns.items()
        if name.startswith("loss_") and not re.search(r"_\d+$", name) and column[0]
    }
    largest = sorted(terms, key=lambda name: -np.nanmean(terms[name][1]))
    return _loss_lines(_coloured({name: terms[name] for name in largest}, by_evaluation, "{:.3g}"))


def _precision_plot(rows: Rows, best_by: str) -> Plot:
    columns = {shown: _column(rows, name) for name, shown in AP_NAMES.items()}
    series = []
    for each in _coloured({name: column for name, column in columns.items() if column[0]}):
        best = int(np.argmax(each.y))
        mark = (each.x[best], each.y[best]) if each.name == AP_NAMES.get(best_by) else None
        series.append(replace(each, note=f"best {score(each.y[best])}", mark=mark))
    return _score_lines(series)


def _classes_plot(rows: Rows, names: Sequence[str]) -> Plot:
    weakest = sorted(names, key=lambda name: _column(rows, name)[1][-1])[: len(SERIES)]
    columns = {name.removeprefix("ap50/"): _column(rows, name) for name in names if name in weakest}
    return _score_lines(_coloured(columns))


def _coloured(
    columns: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    dots: bool = True,
    form: str = "{:.3f}",
) -> list[Series]:
    """A line for each of the first columns, its last value as a note."""
    return [
        Series(name, *columns[name], SERIES[number], form.format(columns[name][1][-1]), dots)
        for number, name in enumerate(list(columns)[: len(SERIES)])
    ]


def _loss_lines(series: Sequence[Series]) -> Plot:
    """On a logarithmic axis where the values are too far apart for a linear one."""
    values = np.concatenate([np.zeros(0), *(np.asarray(each.y, float) for each in series)])
    values = values[np.isfinite(values)]
    log = bool(len(values) and values.min() > 0 and values.max() > 20 * values.min())
    return lines(series, Axes("optimiser steps", log_y=log, whole_x=True))


def _score_lines(series: Sequence[Series]) -> Plot:
    top = max((max(each.y) for each in series), default=0.0)
    limits = (0, min(1.02, max(0.1, 1.15 * top)))
    return lines(series, Axes("optimiser steps", y_range=limits, whole_x=True))


def _column(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have one."""
    pairs = [(row["step"], row[name]) for row in rows if not math.isnan(row.get(name, math.nan))]
    return [step for step, _ in pairs], [value for _, value in pairs]
