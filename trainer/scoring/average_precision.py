"""COCO's average precision and recall, equal to the numbers of pycocotools (COCOeval).

pycocotools loops over images and classes in Python; here NumPy handles all images at once. Every
process matches the detections of its images (`match`), then `accumulate` joins the matches of all
processes and computes precision and recall.

D detections, M objects, P pairs of a detection and an object of the same image and class, T IoU
thresholds, R recalls, K classes, A ranges of area, L limits on the detections of a class in an
image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from pycocotools import mask as coco_mask

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
LIMITS = (1, 10, 100)
# Lowest and highest area in pixels, both included: all, small, medium, large.
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])

# COCO's twelve metrics, in COCO's order.
STATS = (
    *("map", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)

# The same in the order in which a run shows them: first the one that selects the best weights.
COCO_NUMBERS = (
    *("map50", "map", "map75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)

BLOCK = 2**18  # pairs whose overlaps are computed at once

# Maps the indices of detections [P] and of objects [P] to the overlap of each pair, 0..1 [P]. Pairs
# of one detection are adjacent, and so are the detections of one image and class.
Overlap: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Objects:
    """The true objects. `image` is any number that identifies an image; `label` is 0..K-1."""

    image: np.ndarray  # int64 [M]
    label: np.ndarray  # int64 [M]
    area: np.ndarray  # float64 [M]
    crowd: np.ndarray  # bool [M]: detections in it are neither right nor wrong


@dataclass(frozen=True, eq=False)
class DetectionColumns:
    """The detections in the images."""

    image: np.ndarray  # int64 [D]
    label: np.ndarray  # int64 [D]
    area: np.ndarray  # float64 [D]
    score: np.ndarray  # float64 [D]


@dataclass(frozen=True, eq=False)
class DetectionMatches:
    """Detections sorted by class, image and falling score, and whether they are right."""

    label: np.ndarray  # int64 [D]
    image: np.ndarray  # int64 [D]
    rank: np.ndarray  # int64 [D], within the image and class
    score: np.ndarray  # float64 [D]
    right: np.ndarray  # bool [A, T, D]
    wrong: np.ndarray  # bool [A, T, D]; one that is neither does not count
    totals: np.ndarray  # int64 [A, K], number of objects to detect


@dataclass(frozen=True, eq=False)
class Scores:
    """-1 where there is no object; precision is for the largest limit."""

    precision: np.ndarray  # [T, R, K, A]
    recall: np.ndarray  # [T, K, A, L]


def xywh(boxes: np.ndarray) -> np.ndarray:
    """Boxes [N, 4] xyxy to x, y, width and height in double precision."""
    corners = boxes.astype(np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def overlap_of_boxes(detections: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> Overlap:
    """IoU of boxes [D, 4] and [M, 4], xywh in float64. If the object is a crowd region, the
    intersection is divided by the area of the detection.
    """

    def overlap(detection: np.ndarray, truth: np.ndarray) -> np.ndarray:
        blocks = [slice(start, start + BLOCK) for start in range(0, len(truth), BLOCK)]
        parts = [
            _overlaps(detections[detection[block]].T, objects[truth[block]].T, crowd[truth[block]])
            for block in blocks
        ]
        return np.concatenate([np.zeros(0), *parts])

    return overlap


def overlap_of_masks(
    detections: list[dict[str, Any]], objects: list[dict[str, Any]], crowd: np.ndarray
) -> Overlap:
    """IoU of masks in pycocotools' form, one image and class at a time. If the object is a crowd
    region, crowd [M] bool, the intersection is divided by the area of the detection.
    """

    def overlap(detection: np.ndarray, truth: np.ndarray) -> np.ndarray:
        first = np.append(starts_of_runs(detection), len(truth))  # pair of each detection
        # Detections of one image and class begin with the same object.
        bounds = np.append(starts_of_runs(truth[first[:-1]]), len(first) - 1)
        parts = [np.zeros(0)]
        for start, stop in pairwise(bounds.tolist()):
            own = truth[first[start] : first[start + 1]]
            rows = detection[first[start:stop]]
            there = [objects[number] for number in own]
            iou = coco_mask.iou([detections[row] for row in rows], there, crowd[own].tolist())
            parts.append(np.asarray(iou).reshape(-1))
        return np.concatenate(parts)

    return overlap


def _overlaps(here: np.ndarray, there: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """The overlap of boxes [4, P] with boxes [4, P], both xywh: [P]."""
    width, height = (
        np.minimum(here[side] + here[axis], there[side] + there[axis])
        - np.maximum(here[axis], there[axis])
        for axis, side in ((0, 2), (1, 3))
    )
    shared = np.where((width > 0) & (height > 0), width * height, 0.0)
    area, other = here[2] * here[3], there[2] * there[3]
    union = np.where(crowd, area, area + other - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def match(
    objects: Objects, detections: DetectionColumns, overlap: Overlap, num_classes: int
) -> DetectionMatches:
    """Matches each detection, best first, with the free object that overlaps it most."""
    order = np.lexsort(
        (-detections.score, detections.image, detections.label)
    )  # stable, like every sort in this file
    rank = _ranks_in_runs(
        starts_of_runs(detections.label[order], detections.image[order]), len(order)
    )
    order, rank = order[rank < LIMITS[-1]], rank[rank < LIMITS[-1]]
    label, image = detections.label[order], detections.image[order]

    row, truth = _pairs(label, image, objects)
    iou = overlap(order[row], truth)
    near = iou >= THRESHOLDS[0]  # the others match nothing
    row, truth, iou = row[near], truth[near], iou[near]

    shape = (len(AREAS), len(THRESHOLDS), len(order))
    right, wrong = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    totals = np.zeros((len(AREAS), num_classes), np.int64)
    for number, (low, high) in enumerate(AREAS):
        ignored = objects.crowd | (objects.area < low) | (objects.area > high)
        totals[number] = np.bincount(objects.label[~ignored], minlength=num_classes)
        outside = (detections.area[order] < low) | (detections.area[order] > high)
        wrong[number] = ~outside
        choices = _choices(label, image, row, truth, iou, ignored, objects.crowd)
        for threshold, which, won in choices:
            right[number, threshold, which] = ~ignored[won]
            wrong[number, threshold, which] = False
    return DetectionMatches(label, image, rank, detections.score[order], right, wrong, totals)


def _choices(
    label: np.ndarray,
    image: np.ndarray,
    row: np.ndarray,
    truth: np.ndarray,
    iou: np.ndarray,
    ignored: np.ndarray,
    crowd: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields matches as (threshold, row, object). label and image [D] belong to the rows, the
    sorted detections; row, truth and iou [P] belong to the pairs.

    Detections choose in turns: first the best detection with a pair of every image and class, then
    the second best, and so on. Each prefers objects that count, then the highest IoU, then the last
    object.
    """
    order = np.lexsort((truth, iou, ~ignored[truth], row))  # each row's first choice comes last
    row, truth, iou = row[order], truth[order], iou[order]
    close = iou >= np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    taken = np.zeros((len(THRESHOLDS), len(ignored)), np.bool_)
    for pairs in _turns(label[row], image[row], row):
        truths = truth[pairs]
        free = close[:, pairs] & (~taken[:, truths] | crowd[truths])
        starts = starts_of_runs(row[pairs])
        best = np.maximum.reduceat(np.where(free, np.arange(len(pairs)), -1), starts, axis=1)
        threshold, chooser = np.nonzero(best >= 0)
        won = truths[best[threshold, chooser]]
        taken[threshold, won] = True
        yield threshold, row[pairs[starts[chooser]]], won


def _turns(label: np.ndarray, image: np.ndarray, row: np.ndarray) -> list[np.ndarray]:
    """Indices of the pairs, which are sorted by label, image and row: those of the first row of
    every label and image, those of the second, and so on.
    """
    starts = starts_of_runs(row)
    turn = _ranks_in_runs(starts_of_runs(label[starts], image[starts]), len(starts))
    turn = np.repeat(turn, np.diff(np.append(starts, len(row))))
    order = np.argsort(turn, kind="stable")
    return np.split(order, starts_of_runs(turn[order])[1:]) if len(order) else []


def _pairs(label: np.ndarray, image: np.ndarray, objects: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Pairs each detection with each object of its image and class: row and object index, [P]."""
    span = max(image.max(initial=0), objects.image.max(initial=0)) + 1
    keys = objects.label * span + objects.image
    order = np.argsort(keys, kind="stable")
    first, last = (
        np.searchsorted(keys[order], label * span + image, side) for side in ("left", "right")
    )
    counts = last - first
    row = np.repeat(np.arange(len(label)), counts)
    return row, order[np.repeat(first, counts) + _ranks_in_runs(counts.cumsum() - counts, len(row))]


def starts_of_runs(*columns: np.ndarray) -> np.ndarray:
    """Where a run of equal values starts."""
    changes = np.ones(len(columns[0]), np.bool_)
    changes[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(changes)


def _ranks_in_runs(starts: np.ndarray, length: int) -> np.ndarray:
    """0, 1, 2, ... within each run that begins at one of `starts`: [length]."""
    return np.arange(length) - np.repeat(starts, np.diff(np.append(starts, length)))


def accumulate(shares: Sequence[DetectionMatches]) -> Scores:
    """Precision and recall over all images; each image is in one share."""
    label, image, rank, score = (
        np.concatenate([getattr(share, name) for share in shares])
        for name in ("label", "image", "rank", "score")
    )
    order = np.lexsort((rank, image, -score, label))
    rank = rank[order]
    right, wrong = (
        np.concatenate([getattr(share, name) for share in shares], axis=2)[:, :, order]
        for name in ("right", "wrong")
    )
    totals = np.sum([share.totals for share in shares], axis=0)
    num_areas, num_classes = totals.shape
    precision = np.full((len(THRESHOLDS), len(RECALLS), num_classes, num_areas), -1.0)
    recall = np.full((len(THRESHOLDS), num_classes, num_areas, len(LIMITS)), -1.0)
    bounds = np.searchsorted(label[order], np.arange(num_classes + 1))
    for area, number in zip(*np.nonzero(totals), strict=True):
        own = slice(bounds[number], bounds[number + 1])
        hits, total = right[area, :, own], totals[area, number]
        for position, limit in enumerate(LIMITS):
            recall[:, number, area, position] = hits[:, rank[own] < limit].sum(axis=1) / total
        precision[:, :, number, area] = _precision(hits, wrong[area, :, own], total)
    return Scores(precision, recall)


def _precision(right: np.ndarray, wrong: np.ndarray, total: int) -> np.ndarray:
    """Precision [T, R] of one class, whose detections are sorted by falling score: the highest at
    each recall or beyond, 0 if the recall is not reached.
    """
    hits, misses = (each.cumsum(axis=1).astype(np.float64) for each in (right, wrong))
    reached = hits / total
    precision = hits / (misses + hits + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
    positions = np.array([np.searchsorted(each, RECALLS) for each in reached])
    return np.take_along_axis(best, positions, axis=1)


def coco_numbers(scores: Scores) -> dict[str, float]:
    """The metrics of STATS; -1 where there is nothing to score."""
    precision, recall = scores.precision, scores.recall
    everywhere, sizes = precision[..., 0], (1, 2, 3)
    at = THRESHOLDS.tolist().index
    values = (
        *(everywhere, everywhere[at(0.5)], everywhere[at(0.75)]),
        *(precision[..., size] for size in sizes),
        *(recall[:, :, 0, limit] for limit in range(len(LIMITS))),
        *(recall[:, :, size, -1] for size in sizes),
    )
    return dict(zip(STATS, map(_mean, values), strict=True))


def class_numbers(scores: Scores, names: Sequence[str]) -> dict[str, float]:
    """`ap/CLASS` and `ap50/CLASS` of each class, for objects of all sizes."""
    precision = scores.precision[..., 0]
    numbers: dict[str, float] = {}
    for label, name in enumerate(names):
        numbers[f"ap/{name}"] = _mean(precision[:, :, label])
        numbers[f"ap50/{name}"] = _mean(precision[0, :, label])
    return numbers


def _mean(values: np.ndarray) -> float:
    scored = values[values > -1]
    return float(scored.mean()) if scored.size else -1.0
