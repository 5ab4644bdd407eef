"""Sections of a page on what a run was made of: its data, what the check found, settings,
environment, time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from trainer.data.dataset_statistics import MEDIUM, MOST_BARS, SIDE_EDGES, SMALL, Statistics
from trainer.readers.findings import GRAVEST_FIRST, Finding
from trainer.report.console import duration
from trainer.report.page_parts import (
    Cell,
    Html,
    card,
    element,
    folded,
    grid,
    joined,
    legend_of,
    plot_card,
    section,
    settings_table,
    table,
)
from trainer.report.plots import Axes, Series, bars, lines, shares, thinned
from trainer.report.run_history import History
from trainer.settings.config import TrainConfig
from trainer.settings.wording import counted
from vidt.model.config import ViDTConfig

MOST_CLASSES = 14  # in a picture; the others are summed up
MOST_FINDINGS = 5  # of a kind that are told in words


def data_section(splits: Sequence[Statistics], num_queries: int) -> Html:
    """The first split is the one that is learnt from, if there are two."""
    lead = "What there is to learn from and to validate on, after the check."
    cards = [_splits_card(splits), _classes_card(splits), _sides_card(splits)]
    cards.append(_counts_card(splits, num_queries))
    return section("data", "Dataset", lead, grid(*cards))


def _splits_card(splits: Sequence[Statistics]) -> Html:
    rows = [
        ("images", [f"{each.num_images:,}" for each in splits]),
        ("true boxes", [f"{each.num_boxes:,}" for each in splits]),
        ("boxes an image", [f"{each.num_boxes / max(each.num_images, 1):.1f}" for each in splits]),
        ("most in an image", [f"{each.counts.max(initial=0):,}" for each in splits]),
        ("images without a box", [f"{each.num_empty:,}" for each in splits]),
        ("crowd regions", [f"{each.num_crowd:,}" for each in splits]),
        *(
            (f"{name} boxes", [f"{each.by_size[place]:,}" for each in splits])
            for place, name in enumerate(("small", "medium", "large"))
        ),
        ("most frequent image size", [_image_size(each) for each in splits]),
    ]
    head = [Cell(""), *(Cell(each.source, True, wraps=True) for each in splits)]
    cells = [
        [Cell(name), *(Cell(value, True, wraps=True) for value in values)] for name, values in rows
    ]
    return card("Images and boxes", table(head, cells))


def _image_size(split: Statistics) -> str:
    if not split.image_sizes:
        return "-"
    height, width = split.image_sizes[0]
    more = f" and {split.num_image_sizes - 1:,} more" if split.num_image_sizes > 1 else ""
    return f"{width} x {height}{more}"


def _legend(splits: Sequence[Statistics]) -> Html:
    colours = ("accent", "series-2")[: len(splits)]
    return legend_of(
        [(each.source, colour, "") for each, colour in zip(splits, colours, strict=True)]
    )


def _classes_card(splits: Sequence[Statistics]) -> Html:
    first = splits[0]
    order = np.argsort(-first.per_class, kind="stable")
    shown, others = order[:MOST_CLASSES], order[MOST_CLASSES:]
    names = [first.class_names[label] for label in shown]
    columns = [[float(each.per_class[label]) for label in shown] for each in splits]
    if len(others):
        names.append(counted(len(others), "other"))
        for column, each in zip(columns, splits, strict=True):
            column.append(float(each.per_class[others].sum()))
    rarest = first.class_names[order[-1]]
    text: object = ""
    if len(order) > 1:
        few = counted(int(first.per_class[order[-1]]), "box", "boxes")
        text = joined(
            "Fewest: ", element("b", rarest), f" with {few} in ",
            counted(int(first.images_per_class[order[-1]]), "image"),
            ". A class with few boxes is learnt late; more pictures of it help more than more "
            "epochs.",
        )  # fmt: skip
    draw = bars(names, columns, lambda value: f"{value:,.0f}")
    return plot_card("True boxes of each class", draw, text, _legend(splits))


def _sides_card(splits: Sequence[Statistics]) -> Html:
    heights = [_percent(each.sides) for each in splits]
    filled = np.flatnonzero(sum(heights))
    low, high = (int(filled[0]), int(filled[-1])) if len(filled) else (0, 1)
    cut = slice(max(low - 1, 0), high + 2)
    edges = SIDE_EDGES[max(low - 1, 0) : min(high + 2, len(SIDE_EDGES) - 1) + 1].tolist()
    guides = [
        (side, text)
        for side, text in ((SMALL, "32"), (MEDIUM, "96"))
        if edges[0] < side < edges[-1]
    ]
    axes = Axes("side of a box: root of its area, pixels", "% of boxes", log_x=True, guides=guides)
    draw = shares(edges, *_two([each[cut] for each in heights]), axes)
    text = (
        "Small ends at 32, large begins at 96. Both splits should look alike. Boxes of a few "
        "pixels call for a larger --eval_size."
    )
    has_any = any(each.num_boxes for each in splits)
    return plot_card(
        "Size of the boxes", draw if has_any else None, text, _legend(splits), nothing="No box."
    )


def _counts_card(splits: Sequence[Statistics], num_queries: int) -> Html:
    most = max(int(each.counts.max(initial=0)) for each in splits)
    width = max(1, math.ceil((most + 1) / MOST_BARS))
    edges = np.arange(0, most + 1 + width, width) - 0.5
    heights = [_percent(np.histogram(each.counts, edges)[0]) for each in splits]
    near = most > 0.5 * num_queries
    guides = [(num_queries, f"{num_queries} queries")] if near else []
    reach = max(edges[-1], 1.08 * num_queries if near else 0)
    axes = Axes(
        "boxes in an image", "% of images", x_range=(edges[0], reach), guides=guides, whole_x=True
    )
    text = (
        f"At most {most:,} in an image; the detector finds at most {num_queries} "
        "(--det_token_num). "
        + ("Raise it: some images have more." if most > num_queries else "That is enough.")
    )
    draw = shares(edges.tolist(), *_two(heights), axes)
    return plot_card("Boxes in an image", draw, text, _legend(splits))


def _percent(counts: np.ndarray) -> np.ndarray:
    return 100 * counts / max(counts.sum(), 1)


def _two(heights: Sequence[np.ndarray]) -> tuple[list[float], list[float] | None]:
    columns = [each.tolist() for each in heights]
    return columns[0], columns[1] if len(columns) > 1 else None


def findings_section(findings: Sequence[Finding]) -> Html:
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind, finding.action), []).append(finding)
    items = []
    for key in sorted(groups, key=lambda key: GRAVEST_FIRST.index(key[0])):
        severity, kind, action = key
        group = groups[key]
        shown = [element("li", finding.line()) for finding in group[:MOST_FINDINGS]]
        more = sum(finding.count for finding in group[MOST_FINDINGS:])
        rest = [element("li", f"and {more:,} more; see findings.csv")] if more else []
        head = joined(element("span", severity, class_=f"chip {severity}"), " ", element("b", kind))
        count = sum(finding.count for finding in group)
        items.append(
            element(
                "div",
                element("p", head, f", {action}: {count:,}"),
                element("ul", *shown, *rest),
                class_="card section-card findings",
            )
        )
    lead = "What the check before the run found in the data, and what it did about it."
    inside = joined(*items) if items else element("div", "Nothing found.", class_="empty")
    return section("findings", "Findings of the check", lead, inside)


def settings_section(settings: Mapping[str, Any], environment: Mapping[str, str]) -> Html:
    owned = (*fields(TrainConfig), *fields(ViDTConfig))
    defaults = {field.name: field.default for field in owned}
    changed: list[tuple[str, object]] = []
    same: list[tuple[str, object]] = []
    for name, value in settings.items():
        default = defaults.get(name)
        as_saved = list(default) if isinstance(default, tuple) else default
        (same if value == as_saved else changed).append((f"--{name}", value))
    parts: list[object] = [settings_table(changed)]
    if same:
        parts.append(folded(f"{len(same)} settings at their defaults", settings_table(same)))
    cards = grid(
        card("Settings other than the defaults", *parts),
        card("Environment", settings_table(list(environment.items()))),
    )
    return section("settings", "Configuration and environment", "", cards)


def time_section(history: History) -> Html:
    """Of a training, this start alone."""
    speed = [each for each in history.of("images_per_second") if not math.isnan(each)]
    memory = [each for each in history.of("memory_gib") if not math.isnan(each)]
    total, evaluating = history.seconds, history.seconds_evaluating
    entries = [("time since this start", duration(total))]
    if total:
        entries.append(("of it evaluating", f"{duration(evaluating)}, {evaluating / total:.0%}"))
    if history.num_evaluations:
        entries.append(("an evaluation", duration(evaluating / history.num_evaluations)))
    if speed:
        entries.append(("training, median", f"{np.median(speed):.3g} images/s"))
    if memory:
        entries.append(("most memory used", f"{max(memory):.2f} GiB"))
    if history.first_step:
        entries.append(("resumed after step", f"{history.first_step:,}"))
    draw = None
    if speed:
        points = thinned(history.steps, history.of("images_per_second"))
        axes = Axes("optimiser steps", "", y_range=(0, 1.15 * max(speed)), whole_x=True)
        draw = lines([Series("images/s", *points)], axes, 190)
    text = (
        "Images a second over all processes, loading included. Dips that come back are evaluations "
        "and saves; a curve that stays low while the device idles wants more --num_workers."
    )
    cards = grid(
        card("Time", settings_table(entries)),
        plot_card("Throughput", draw, text, nothing="No log line yet."),
    )
    return section("time", "Time and throughput", "", cards)


def evaluation_time_section(seconds: float, num_images: int) -> Html:
    entries = [
        ("predicting and scoring", duration(seconds)),
        ("validation images", f"{num_images:,}"),
        ("images/s", f"{num_images / max(seconds, 1e-9):.3g}"),
    ]
    return section("time", "Time and throughput", "", grid(card("Time", settings_table(entries))))
