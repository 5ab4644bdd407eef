"""The sections of a page about a run: data, findings, settings, environment, speed."""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from trainer.data.dataset_statistics import MEDIUM, MOST_BARS, SIDE_EDGES, SMALL, Statistics
from trainer.readers.findings import GRAVEST_FIRST, Finding
from trainer.report.console import duration
from trainer.report.plots import Axes, Plot, Series, bars, histograms, lines, thinned
from trainer.report.run_history import RunHistory
from trainer.settings.config import TrainConfig
from vidt.errors import counted
from vidt.model.config import ViDTConfig

MOST_CLASSES = 14  # in a plot; the others are summed up
MOST_FINDINGS = 5  # of a kind that are listed
PACKAGES = ("vidt", "torch", "torchvision", "accelerate", "timm", "numpy", "pillow", "pycocotools")


def environment_of(accelerator: Accelerator) -> dict[str, str]:
    """Device, precision, processes and versions of this machine, by name."""
    facts = {
        "device": _device(accelerator.device),
        "processes": str(accelerator.num_processes),
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "threads per process": str(torch.get_num_threads()),
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "system": platform.platform(terse=True),
        "Python": platform.python_version(),
    }
    if torch.version.cuda:
        facts["CUDA of PyTorch"] = torch.version.cuda
    return facts | {name: _version(name) for name in PACKAGES}


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def data_plots(splits: Sequence[Statistics], num_queries: int) -> dict[str, Any]:
    """Plots of one split, or of two, training first; the rarest class as name, boxes, images."""
    first = splits[0]
    order = np.argsort(-first.per_class, kind="stable")
    last = int(order[-1])
    counts = (int(first.per_class[last]), int(first.images_per_class[last]))
    most = max(int(each.counts.max(initial=0)) for each in splits)
    return {
        "classes": _classes_plot(splits, order),
        "sides": _sides_plot(splits) if any(each.num_boxes for each in splits) else Plot(None),
        "counts": _counts_plot(splits, num_queries, most),
        "rarest": (first.class_names[last], *counts) if len(order) > 1 else None,
        "most_boxes": most,  # in one image
    }


def _by_split(splits: Sequence[Statistics], columns: Sequence[np.ndarray]) -> dict[str, list]:
    """Columns by the name of their split; two splits may have one name."""
    names = [each.source for each in splits]
    if len({*names}) < len(names):
        names = ["training", "validation"]
    return {name: column.tolist() for name, column in zip(names, columns, strict=True)}


def _classes_plot(splits: Sequence[Statistics], order: np.ndarray) -> Plot:
    shown, others = order[:MOST_CLASSES], order[MOST_CLASSES:]
    names = [splits[0].class_names[label] for label in shown]
    columns = [each.per_class[shown] for each in splits]
    if len(others):
        names.append(counted(len(others), "other"))
        sums = [each.per_class[others].sum() for each in splits]
        columns = [np.append(column, total) for column, total in zip(columns, sums, strict=True)]
    return bars(names, _by_split(splits, columns))


def _sides_plot(splits: Sequence[Statistics]) -> Plot:
    heights = [_percent(each.sides) for each in splits]
    filled = np.flatnonzero(sum(heights))
    low, high = max(int(filled[0]) - 1, 0), min(int(filled[-1]) + 2, len(SIDE_EDGES) - 1)
    edges = SIDE_EDGES[low : high + 1].tolist()
    guides = [(side, f"{side}") for side in (SMALL, MEDIUM) if edges[0] < side < edges[-1]]
    label = "box side: square root of the area, pixels"
    axes = Axes(label, "% of boxes", log_x=True, guides=guides)
    return histograms(edges, _by_split(splits, [each[low:high] for each in heights]), axes)


def _counts_plot(splits: Sequence[Statistics], num_queries: int, most: int) -> Plot:
    width = max(1, math.ceil((most + 1) / MOST_BARS))
    edges = np.arange(0, most + 1 + width, width) - 0.5
    heights = [_percent(np.histogram(each.counts, edges)[0]) for each in splits]
    near = most > 0.5 * num_queries
    guides = [(num_queries, f"{num_queries} queries")] if near else []
    limits = (edges[0], max(edges[-1], 1.08 * num_queries if near else 0))
    axes = Axes("boxes in an image", "% of images", limits, guides=guides, whole_x=True)
    return histograms(edges.tolist(), _by_split(splits, heights), axes)


def _percent(counts: np.ndarray) -> np.ndarray:
    return 100 * counts / max(counts.sum(), 1)


def finding_groups(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings by severity, kind and action, gravest first; `more` counts those without a line."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind, finding.action), []).append(finding)
    return [
        {
            "severity": severity,
            "kind": kind,
            "action": action,
            "count": sum(finding.count for finding in group),
            "lines": [finding.line() for finding in group[:MOST_FINDINGS]],
            "more": sum(finding.count for finding in group[MOST_FINDINGS:]),
        }
        for (severity, kind, action), group in sorted(
            groups.items(), key=lambda item: GRAVEST_FIRST.index(item[0][0])
        )
    ]


def changed_and_default(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that differ from their defaults, and those that do not."""
    owned = (*fields(TrainConfig), *fields(ViDTConfig))
    defaults = {field.name: field.default for field in owned}
    changed: dict[str, Any] = {}
    same: dict[str, Any] = {}
    for name, value in settings.items():
        default = defaults.get(name)
        as_saved = list(default) if isinstance(default, tuple) else default
        (same if value == as_saved else changed)[name] = value
    return changed, same


def training_times(history: RunHistory) -> dict[str, str]:
    """Durations, speed and memory since this start of the run."""
    total, evaluating = history.seconds, history.seconds_evaluating
    speed, memory = median_speed(history), history.known("memory_gib")
    times = {"since this start": duration(total)}
    if total:
        times["evaluations"] = f"{duration(evaluating)}, {evaluating / total:.0%}"
    if history.num_evaluations:
        times["per evaluation"] = duration(evaluating / history.num_evaluations)
    if speed:
        times["training, median"] = f"{speed:.3g} images/s"
    if memory:
        times["peak memory"] = f"{max(memory):.2f} GiB"
    if history.first_step:
        times["resumed after step"] = f"{history.first_step:,}"
    return times


def median_speed(history: RunHistory) -> float | None:
    """Images per second of the median log line since this start; None without a line."""
    known = history.known("images_per_second")
    return median(known) if known else None


def evaluation_times(seconds: float, num_images: int) -> dict[str, str]:
    return {
        "predicting and scoring": duration(seconds),
        "validation images": f"{num_images:,}",
        "images/s": f"{num_images / max(seconds, 1e-9):.3g}",
    }


def throughput_plot(history: RunHistory) -> Plot:
    """Images per second of each log line of this start."""
    known = history.known("images_per_second")
    if not known:
        return Plot(None)
    points = thinned(history.steps, history.of("images_per_second"))
    axes = Axes("optimiser steps", y_range=(0, 1.15 * max(known)), whole_x=True)
    return lines([Series("images/s", *points)], axes, 190)
