"""Sections of a page on how well a detector does: curves, classes, confusions, sizes, images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.readers.samples import SampleTable
from trainer.report.page_parts import (
    Cell,
    Html,
    card,
    element,
    folded,
    grid,
    joined,
    legend_of,
    number,
    picture,
    plain,
    plot_card,
    section,
    series_variable,
    table,
)
from trainer.report.plots import SMALL_TABLE, Axes, Series, bars, confusion_table, lines, shortened
from trainer.report.progress import Pair, class_names_in, is_score
from trainer.report.worst_pictures import RIGHT, WRONG, caption
from trainer.scoring.mistakes import Diagnosis, condensed
from trainer.scoring.scores import ScoreCurve
from trainer.settings.wording import counted

MOST_PAIRS = 8  # of classes that are confused
SHOWN_IMAGES = 6  # before the rest is folded away
MOST_ROWS = 40  # of a table before the rest is folded away
BOXES = "true boxes"
SIZES = (("map_small", "small"), ("map_medium", "medium"), ("map_large", "large"))


@dataclass(frozen=True, eq=False)
class Scored:
    """One evaluation: its numbers, what they come from, and its worst images drawn."""

    metrics: Mapping[str, float]
    diagnosis: Diagnosis
    worst: Sequence[Pair]
    what: str  # of which weights, for people

    def score(self, name: str) -> float:
        return float(self.metrics.get(name, math.nan))


def classes_section(scored: Scored) -> Html:
    lead = (
        "A detector gives every box a score. The lower the threshold, the more is found and the "
        "more of it is wrong. A box is right here if it overlaps a true one of its class by half."
    )
    curves = grid(_recall_card(scored), _f1_card(scored))
    return section("classes", "Classes and thresholds", lead, curves, _class_table(scored))


def _shown_curves(diagnosis: Diagnosis) -> list[tuple[ScoreCurve, int]]:
    """Curves and their colours."""
    shown = [(each, place) for place, each in enumerate(diagnosis.main_curves)]
    return shown + ([(diagnosis.rest, -1)] if diagnosis.rest else [])


def _recall_card(scored: Scored) -> Html:
    shown = [
        (each, colour) for each, colour in _shown_curves(scored.diagnosis) if _has_points(each)
    ]
    series = [
        Series(
            each.name,
            [0.0, *each.recall],
            [each.precision[0], *each.precision],
            colour,
            mark=(each.best.recall, each.best.precision) if each.best else None,
        )
        for each, colour in shown
    ]
    legend = [
        (each.name, series_variable(colour), f"AP50 {number(scored.score(f'ap50/{each.name}'))}")
        if colour >= 0
        else (each.name, "rest", "together")
        for each, colour in shown
    ]
    axes = Axes("recall: share of the true boxes that is found", "precision", (0, 1.01), (0, 1.04))
    text = (
        "Up and to the right is better. The dot is where F1, the balance of both, is highest. "
        "A curve that ends early has boxes that are not found at any score: more training, a "
        "larger --eval_size, or more --det_token_num."
    )
    draw = lines(series, axes, 270) if series else None
    return plot_card(
        "Precision and recall", draw, text, legend_of(legend), nothing="No box was found."
    )


def _f1_card(scored: Scored) -> Html:
    together = scored.diagnosis.together
    shown = [
        (each, colour) for each, colour in _shown_curves(scored.diagnosis) if _has_points(each)
    ]
    series = [
        Series(
            each.name,
            *_falling_to_nothing(each),
            colour,
            mark=(each.best.threshold, each.best.f1) if each.best else None,
        )
        for each, colour in shown
    ]
    legend = [
        (each.name, series_variable(colour), _at(each)) for each, colour in shown if each.best
    ]
    text: object = "The flatter a curve is around its dot, the less its threshold matters."
    if together.best:
        best = together.best
        value = element("b", f"{best.threshold:.2f}")
        text = joined(
            "One threshold for all classes: ", value, f" gives F1 {best.f1:.2f}, precision ",
            f"{best.precision:.2f} and recall {best.recall:.2f}. ", text,
        )  # fmt: skip
    axes = Axes("threshold on the score", "F1", (0, 1.01), (0, 1.04))
    draw = lines(series, axes, 270) if series else None
    return plot_card("F1 by threshold", draw, text, legend_of(legend), nothing="No box was found.")


def _has_points(curve: ScoreCurve) -> bool:
    return bool(len(curve.thresholds) and curve.num_truths)


def _falling_to_nothing(curve: ScoreCurve) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and F1, from all that was found to nothing."""
    thresholds, f1 = curve.thresholds[::-1], curve.f1[::-1]
    ends = thresholds[-1:]
    return np.concatenate([[0], thresholds, ends, [1]]), np.concatenate([f1[:1], f1, [0, 0]])


def _at(curve: ScoreCurve) -> str:
    return f"best at {curve.best.threshold:.2f}" if curve.best else "nothing right"


def _class_table(scored: Scored) -> Html:
    diagnosis = scored.diagnosis
    head = [
        Cell("class"),
        *(Cell(name, True) for name in ("true boxes", "AP50", "AP", "best threshold")),
        *(Cell(name, True) for name in ("precision", "recall", "F1")),
    ]
    by_size = sorted(diagnosis.curves, key=lambda each: -each.num_truths)
    rows = [_class_row(scored, each, each.name) for each in by_size]
    everything = _class_row(scored, diagnosis.together, "all classes, one threshold")
    text = "Of each class at its own best threshold. A threshold found on few boxes is a guess."
    first = table(head, rows[:MOST_ROWS], everything if len(rows) > 1 else None)
    parts = [first, element("p", text, class_="note-below")]
    if len(rows) > MOST_ROWS:
        rest = f"the other {counted(len(rows) - MOST_ROWS, 'class', 'classes')}"
        parts.append(folded(rest, table(head, rows[MOST_ROWS:])))
    return element("div", card("Thresholds that balance both", *parts), class_="section-card")


def _class_row(scored: Scored, curve: ScoreCurve, name: str) -> list[Cell]:
    whole = curve is scored.diagnosis.together
    names = ("map50", "map") if whole else (f"ap50/{curve.name}", f"ap/{curve.name}")
    ap50, ap = (scored.score(each) for each in names)
    best = curve.best
    numbers = (best.precision, best.recall, best.f1) if best else (math.nan,) * 3
    return [
        Cell(name),
        Cell(f"{curve.num_truths:,}", True),
        Cell(number(ap50), True, ap50 if is_score(ap50) else 0.0),
        Cell(number(ap), True),
        Cell(f"{best.threshold:.2f}" if best else "-", True),
        *(Cell(number(each, 2), True) for each in numbers),
    ]


def confusion_section(scored: Scored) -> Html:
    counts, rows, columns = condensed(scored.diagnosis)
    draw = confusion_table(counts, rows, columns) if counts.any() else None
    lead = "What true boxes were taken for, with each class's best threshold."
    text = (
        "A row is what is there, a column what it was found as: on the diagonal it is right. The "
        "last column was not found, the last row was found where nothing is. The stronger a field, "
        "the larger its share of its row."
    )
    wide = len(rows) > SMALL_TABLE
    nothing = "No box, neither true nor found."
    cards = (plot_card("Counts", draw, text, wide=wide, nothing=nothing), _mixed_up(scored))
    inside = joined(*cards) if wide else grid(*cards)
    return section("confusion", "Confusion matrix", lead, inside)


def _mixed_up(scored: Scored) -> Html:
    """The pairs of classes that are taken for each other most often."""
    table_of_all, names = scored.diagnosis.confusion[:-1], scored.diagnosis.class_names
    between = table_of_all[:, :-1].copy()
    np.fill_diagonal(between, 0)
    totals = table_of_all.sum(1)
    order = np.argsort(-between, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [divmod(int(place), len(names)) for place in order if between.flat[place]]
    rows = [
        [
            Cell(names[true]),
            Cell(names[found]),
            Cell(f"{between[true, found]:,}", True),
            Cell(f"{between[true, found] / totals[true]:.0%}", True),
        ]
        for true, found in pairs
    ]
    if not rows:
        text = "No true box was taken for another class."
        return card("Most often confused", element("div", text, class_="empty"))
    head = [Cell("truth"), Cell("found as"), Cell("boxes", True), Cell("share", True)]
    text = (
        "Share is of the true boxes of that class. Look at labels of these pairs first: people "
        "often confuse what a detector confuses."
    )
    note = element("p", text, class_="note-below")
    return element("div", card("Most often confused", table(head, rows), note), class_="beside")


def sizes_section(scored: Scored, by_size: tuple[int, int, int]) -> Html:
    names = [f"{name} ({count:,})" for (_, name), count in zip(SIZES, by_size, strict=True)]
    shown = [("AP", "")] + ([("AP of masks", "segm_")] if "segm_map" in scored.metrics else [])
    columns = [[_or_nan(scored.score(prefix + key)) for key, _ in SIZES] for _, prefix in shown]
    recalls = [_or_nan(scored.score(f"mar_{key[4:]}")) for key, _ in SIZES]
    legend = [
        (text, "accent" if place == 0 else f"series-{place + 1}", "")
        for place, text in enumerate([*(name for name, _ in shown), "recall with 100 boxes"])
    ]
    draw = bars(names, [*columns, recalls], lambda value: f"{value:.3f}", 1.0)
    text = (
        "Small is below 32 x 32 pixels of the original image, large above 96 x 96; in brackets how "
        "many true boxes there are. Small objects gain most from a larger --eval_size. Much recall "
        "with little AP says that boxes are found but ranked or placed badly."
    )
    bar_card = plot_card("AP and recall by size", draw, text, legend_of(legend))
    cards = grid(bar_card, _all_numbers(scored))
    return section("sizes", "Small and large objects", "", cards)


def _all_numbers(scored: Scored) -> Html:
    explained = (
        ("map50", "AP50, boxes that overlap by half"),
        ("map75", "AP75, by three quarters"),
        ("map", "AP, mean over ten demands"),
        ("mar_1", "recall with 1 box an image"),
        ("mar_10", "recall with 10 boxes"),
        ("mar_100", "recall with 100 boxes"),
        ("segm_map50", "AP50 of masks"),
        ("segm_map", "AP of masks"),
    )
    rows = [
        [Cell(text), Cell(number(scored.score(name)), True)]
        for name, text in explained
        if name in scored.metrics
    ]
    return card("COCO numbers", table([Cell("measure"), Cell("value", True)], rows))


def _or_nan(value: float) -> float:
    return value if is_score(value) else math.nan


def worst_section(scored: Scored, samples: SampleTable) -> Html:
    lead = joined(
        "The validation images with the most mistakes, each class from its best threshold on: ",
        element("span", "", class_="swatch", style=f"background: {RIGHT}"),
        " right, ",
        element("span", "", class_="swatch", style=f"background: {WRONG}"),
        " wrong. Often it is the truth that is wrong: an object that nobody labelled.",
    )
    figures = []
    for judged, pair in zip(scored.diagnosis.worst, scored.worst, strict=True):
        name = samples.path(judged.index).rpartition("/")[2]
        halves = [
            element("div", element("p", what), picture(image, f"{what}: {shortened(name, 60)}"))
            for what, image in zip(("truth", "prediction"), pair, strict=True)
        ]
        text = element("figcaption", element("b", caption(judged)), " ", name)
        inside = joined(text, element("div", *halves, class_="pair"))
        figures.append(element("figure", inside, class_="card section-card"))
    first, rest = figures[:SHOWN_IMAGES], figures[SHOWN_IMAGES:]
    if not figures:
        first = [element("div", "No image with a mistake that can be shown.", class_="empty")]
    more = folded(f"{len(rest)} more", *rest) if rest else ""
    return section("worst", "Worst images", lead, *first, more)


def remarks(scored: Scored) -> list[Html]:
    """What stands out, one sentence each."""
    return [*_extreme_classes(scored), *_missed_and_false(scored), *_worst_size(scored)]


def _extreme_classes(scored: Scored) -> list[Html]:
    scores = {name: scored.score(f"ap50/{name}") for name in class_names_in(scored.metrics)}
    known = {name: value for name, value in scores.items() if is_score(value)}
    if len(known) < 2 or not any(known.values()):
        return []
    weakest, strongest = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    low, high = element("b", weakest), element("b", strongest)
    first = joined(low, f" is the weakest class (AP50 {known[weakest]:.2f}), ")
    return [joined(first, high, f" the strongest ({known[strongest]:.2f}).")]


def _missed_and_false(scored: Scored) -> list[Html]:
    table = scored.diagnosis.confusion
    missed, false, total = (
        int(counts.sum()) for counts in (table[:-1, -1], table[-1, :-1], table[:-1])
    )
    if not total:
        return []
    return [
        plain(
            f"With each class's best threshold, {missed:,} of {counted(total, 'true box', BOXES)} "
            f"are missed ({missed / total:.0%}), and {counted(false, 'box', 'boxes')} found where "
            "nothing is."
        )
    ]


def _worst_size(scored: Scored) -> list[Html]:
    known = {text: scored.score(key) for key, text in SIZES if is_score(scored.score(key))}
    if len(known) < 2 or not any(known.values()):
        return []
    low = min(known, key=known.__getitem__)
    return [plain(f"Of the sizes, {low} objects are found worst (AP {known[low]:.2f}).")]
