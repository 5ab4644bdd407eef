"""The sections of a page about an evaluation: curves, classes, confusions, sizes, worst images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.readers.samples import SampleTable
from trainer.report.console import score
from trainer.report.plots import (
    REST,
    SERIES,
    SMALL_TABLE,
    Axes,
    Plot,
    Series,
    bars,
    confusion_table,
    lines,
)
from trainer.report.progress import Pair, class_names_in, is_score
from trainer.report.worst_pictures import caption
from trainer.scoring.mistakes import Diagnosis, condensed
from trainer.scoring.scores import ScoreCurve

MOST_PAIRS = 8  # of classes that are confused
SIZES = ("small", "medium", "large")


@dataclass(frozen=True, eq=False)
class Scored:
    """One evaluation: its metrics, its diagnosis, drawings of its worst images, and a description
    of the evaluated weights for people.
    """

    metrics: Mapping[str, float]
    diagnosis: Diagnosis
    worst: Sequence[Pair]
    what: str

    def score(self, name: str) -> float:
        """The metric, NaN if it is missing or there was nothing to score."""
        value = float(self.metrics.get(name, math.nan))
        return value if is_score(value) else math.nan


def results_of(scored: Scored, samples: SampleTable, by_size: Sequence[int]) -> dict[str, Any]:
    """The plots and the values in their captions. by_size: the number of small, medium and large
    true boxes.
    """
    table = scored.diagnosis.confusion
    counts, rows, columns = condensed(scored.diagnosis)
    judged = zip(scored.diagnosis.worst, scored.worst, strict=True)
    return {
        "recall": _recall_plot(scored),
        "f1": _f1_plot(scored.diagnosis),
        "confusion": confusion_table(counts, rows, columns) if counts.any() else Plot(None),
        "several_classes": len(scored.diagnosis.class_names) > 1,
        "wide_confusion": len(rows) > SMALL_TABLE,
        "sizes": _sizes_plot(scored, by_size),
        "class_extremes": _extremes(
            {name: scored.score(f"ap50/{name}") for name in class_names_in(scored.metrics)},
            {each.name: each.num_truths for each in scored.diagnosis.curves},
        ),
        "size_extremes": _extremes(
            {size: scored.score(f"map_{size}") for size in SIZES},
            dict(zip(SIZES, by_size, strict=True)),
        ),
        "confused": _confused(scored.diagnosis),
        "worst": [(samples.path(each.index), caption(each), pair) for each, pair in judged],
        "num_true": int(table[:-1].sum()),
        "num_missed": int(table[:-1, -1].sum()),
        "num_false": int(table[-1, :-1].sum()),
    }


def _drawn_curves(diagnosis: Diagnosis) -> list[tuple[ScoreCurve, str]]:
    """Curves that have points, and their colours."""
    curves = [(each, SERIES[number]) for number, each in enumerate(diagnosis.main_curves)]
    curves += [(diagnosis.rest, REST)] if diagnosis.rest else []
    return [(each, colour) for each, colour in curves if len(each.thresholds) and each.num_truths]


def _recall_plot(scored: Scored) -> Plot:
    series = [
        Series(
            each.name,
            [0.0, *each.recall],
            [each.precision[0], *each.precision],
            colour,
            "together" if colour == REST else f"AP50 {score(scored.score(f'ap50/{each.name}'))}",
            mark=(each.best.recall, each.best.precision) if each.best else None,
        )
        for each, colour in _drawn_curves(scored.diagnosis)
    ]
    return lines(series, Axes("recall", "precision", (0, 1.01), (0, 1.04)), 270)


def _f1_plot(diagnosis: Diagnosis) -> Plot:
    series = []
    for each, colour in _drawn_curves(diagnosis):
        # From every box kept to none.
        thresholds, f1 = each.thresholds[::-1], each.f1[::-1]
        x, y = [0.0, *thresholds, thresholds[-1], 1.0], [f1[0], *f1, 0.0, 0.0]
        best = each.best
        note = f"best at {best.threshold:.2f}" if best else None
        mark = (best.threshold, best.f1) if best else None
        series.append(Series(each.name, x, y, colour, note, mark=mark))
    return lines(series, Axes("score threshold", "F1", (0, 1.01), (0, 1.04)), 270)


def _sizes_plot(scored: Scored, by_size: Sequence[int]) -> Plot:
    prefixes = {"AP": "map_"}
    if "segm_map" in scored.metrics:
        prefixes["AP of masks"] = "segm_map_"
    prefixes["recall with 100 boxes"] = "mar_"
    names = [f"{size} ({count:,})" for size, count in zip(SIZES, by_size, strict=True)]
    columns = {
        name: [scored.score(prefix + size) for size in SIZES] for name, prefix in prefixes.items()
    }
    return bars(names, columns, "{:.3f}", 1.0)


def _extremes(scores: Mapping[str, float], boxes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The worst and the best class or size, with its true boxes, if two or more have a score and
    one is above 0.
    """
    known = sorted((value, name) for name, value in scores.items() if is_score(value))
    if len(known) < 2 or not known[-1][0]:
        return []
    return [
        {"name": name, "score": value, "boxes": boxes[name]}
        for value, name in (known[0], known[-1])
    ]


def _confused(diagnosis: Diagnosis) -> list[tuple[str, str, int, float]]:
    """The pairs of classes that are confused most often: true class, predicted class, boxes, share
    of the true boxes of that class.
    """
    table, names = diagnosis.confusion[:-1], diagnosis.class_names
    between, totals = table[:, :-1].copy(), table.sum(1)
    np.fill_diagonal(between, 0)
    order = np.argsort(-between, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [divmod(int(place), len(names)) for place in order if between.flat[place]]
    return [
        (names[true], names[other], int(between[true, other]), between[true, other] / totals[true])
        for true, other in pairs
    ]
