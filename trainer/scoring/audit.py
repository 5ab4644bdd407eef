"""Annotations that a detector disagrees with, ranked by how much.

Five kinds of suspicion, each with a score from 0 to 1, so that one list can hold all of them. s is
the score of a detection, o an IoU, r the share of a class's annotations that the detector finds:

- forgotten object, s (1 - o): a confident detection far from every annotation, the nearest of IoU o
- wrong box, s (1 - o) / 0.6, at most s: a detection of the annotation's class whose IoU o is
  middling
- wrong class, r (s - s'): a detection of another class at the place of the annotation; s' is the
  best score there of its own class
- unsupported object, (r (1 - so))^2: no detection matches the annotation; so is the largest product
  of a detection's score and IoU
- doubled picture, 1 - (1 - c)/0.05: two pictures whose thumbnails have the correlation c

r makes a class that the detector does not know raise no suspicion. Similar in spirit to ObjectLab
(https://arxiv.org/abs/2309.00832). Boxes are xyxy in pixels of the image. K classes, N images, m
detections, n annotations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou, nms

from trainer.readers.samples import Sample, SampleTable
from trainer.scoring.mistakes import MIN_IOU, NOTHING, JudgedImage, judge
from vidt.predict.detections import Detections
from vidt.predict.selection import NO_BEST

FORGOTTEN, BOX, CLASS = "forgotten object", "wrong box", "wrong class"
UNSUPPORTED, DOUBLED = "unsupported object", "doubled picture"
KINDS = (FORGOTTEN, BOX, CLASS, UNSUPPORTED, DOUBLED)
NEAR = 0.1  # IoU from which a detection may be about a badly placed annotation
FAR = 0.4  # IoU up to which a box is as wrong as it can be
AGREES = 0.75  # IoU from which a box counts as right
ONE_OBJECT = 0.6  # IoU from which two detections are about one object
CONFIDENT = 0.5  # share of a class's usual score from which a detection is confident
LEAST = 0.05  # lower scores are not reported
THUMBNAIL = 16  # pixels of a side
ALIKE = 0.95  # correlation of thumbnails from which pictures are alike
FLAT = 2.0  # grey levels; thumbnails that deviate less say nothing
BLOCK = 1024  # pictures that are compared at once


@dataclass(frozen=True)
class Suggestion:
    """What the detector sees instead."""

    label: int
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Suspicion:
    """An annotation, an object or a pair of pictures that a person should look at."""

    kind: str
    score: float
    index: int  # of the image in the table
    annotation: int | None = None  # of the image; None: a forgotten object, or a picture
    suggestion: Suggestion | None = None
    twin: int | None = None  # index of the other picture


def audit(
    samples: SampleTable, detections: Mapping[int, Detections], thumbnails: np.ndarray
) -> list[Suspicion]:
    """All suspicions, highest score first. `detections` of all scores, by index; an image without
    them is not audited. `thumbnails`, float32 [N, 256], are those of `thumbnail`, 0 for an image
    that cannot be read.
    """
    usual, found = usual_scores(samples, detections)
    suspicions = list(doubled_pictures(thumbnails))
    for index, each in sorted(detections.items()):
        suspicions += audit_image(samples[index], index, each, CONFIDENT * usual, found)
    kept = [each for each in suspicions if each.score >= LEAST]
    return sorted(kept, key=lambda each: (-each.score, each.index, each.annotation or 0))


def usual_scores(
    samples: SampleTable, detections: Mapping[int, Detections]
) -> tuple[Tensor, Tensor]:
    """Of each class the median score of the detections that match its annotations, and the share of
    the annotations that are matched by more than half of it: float64 [K] and [K].
    """
    scores: list[list[float]] = [[] for _ in samples.class_names]
    for index, each in detections.items():
        sample = samples[index]
        of_own = own_scores(sample, each)[~sample.crowd].tolist()
        for label, score in zip(sample.labels[~sample.crowd].tolist(), of_own, strict=True):
            scores[label].append(score)
    matched = [np.array([score for score in each if score > 0]) for each in scores]
    usual = [float(np.median(each)) if len(each) else NO_BEST for each in matched]
    shares = [
        float((np.array(each) >= CONFIDENT * score).mean()) if each else 0.0
        for each, score in zip(scores, usual, strict=True)
    ]
    return torch.tensor(usual, dtype=torch.float64), torch.tensor(shares, dtype=torch.float64)


def own_scores(sample: Sample, detections: Detections) -> Tensor:
    """The best score of each annotation's class at its place, 0 without one: float64 [n]."""
    matches = _overlaps(detections, sample) >= MIN_IOU
    matches &= detections.labels[:, None] == sample.labels
    return _highest(detections.scores.double()[:, None] * matches)


def audit_image(
    sample: Sample, index: int, detections: Detections, confident: Tensor, found: Tensor
) -> Iterator[Suspicion]:
    """Suspicions about the annotations of one image. confident: the least score of an object of
    each class [K]; found: the share of its annotations that the detector finds [K].
    """
    objects = detections[nms(detections.boxes, detections.scores, ONE_OBJECT)]
    judged = judge(sample, index, objects, None, confident)
    objects, overlaps = judged.detections, _overlaps(judged.detections, sample)
    pairs = _pairs(judged, sample, overlaps)
    own = own_scores(sample, detections)
    for row, column in pairs.items():
        seen, overlap = _suggestion(objects, row), float(overlaps[row, column])
        label = int(sample.labels[column])
        if seen.label != label:
            score = float(found[label]) * max(0.0, seen.score - float(own[column]))
            yield Suspicion(CLASS, score, index, column, seen)
        elif overlap < AGREES:
            score = seen.score * min(1.0, (1 - overlap) / (1 - FAR))
            yield Suspicion(BOX, score, index, column, seen)
    nearest = _highest(overlaps.T)
    for row in (judged.true_class == NOTHING).nonzero().flatten().tolist():
        if row not in pairs:
            seen = _suggestion(objects, row)
            yield Suspicion(FORGOTTEN, seen.score * (1 - float(nearest[row])), index, None, seen)
    support = _highest(detections.scores.double()[:, None] * _overlaps(detections, sample))
    for column in (judged.predicted_class == NOTHING).nonzero().flatten().tolist():
        if column not in pairs.values():
            share = float(found[sample.labels[column]])
            score = (share * (1 - float(support[column]))) ** 2
            yield Suspicion(UNSUPPORTED, score, index, column)


def _pairs(judged: JudgedImage, sample: Sample, overlaps: Tensor) -> dict[int, int]:
    """The annotation of each object: those that `judge` matched, then objects near a free
    annotation of their class, the surest first.
    """
    pairs = {row: column for row, column in enumerate(judged.annotation.tolist()) if column >= 0}
    same = judged.detections.labels[:, None] == sample.labels
    for row in (judged.true_class == NOTHING).nonzero().flatten().tolist():
        free = same[row] & (judged.predicted_class == NOTHING)
        free[list(pairs.values())] = False
        candidates = overlaps[row] * free
        if len(candidates) and float(candidates.max()) >= NEAR:
            pairs[row] = int(candidates.argmax())
    return pairs


def thumbnail(image: Image.Image) -> np.ndarray:
    """16 x 16 grey values with mean 0 and norm 1, so that the product of two thumbnails is their
    correlation; 0 for a flat image: float32 [256].
    """
    side = (THUMBNAIL, THUMBNAIL)
    grey = np.asarray(image.resize(side, Image.Resampling.BOX).convert("L"), np.float32).ravel()
    grey -= grey.mean()
    return grey / np.linalg.norm(grey) if grey.std() >= FLAT else np.zeros_like(grey)


def doubled_pictures(thumbnails: np.ndarray) -> Iterator[Suspicion]:
    """Each picture that looks like an earlier one, with the most similar of them. Thumbnails bear
    what moves the bits of a difference hash: another size, compression, noise on a plain ground.
    """
    for start in range(0, len(thumbnails), BLOCK):
        alike = thumbnails[start : start + BLOCK] @ thumbnails[: start + BLOCK].T
        alike = np.tril(alike, start - 1)  # earlier pictures only
        twins = alike.argmax(1)
        for row in np.flatnonzero(alike.max(1) >= ALIKE).tolist():
            twin = int(twins[row])
            score = 1 - (1 - min(1.0, float(alike[row, twin]))) / (1 - ALIKE)
            yield Suspicion(DOUBLED, score, start + row, twin=twin)


def merged(found: Sequence[Detections]) -> Detections:
    """The detections of several detectors in one image as those of one: boxes of a class that
    overlap are averaged, weighted by score, with at most one of each detector; the score is the
    mean over all detectors, 0 for those that have no such box.
    """
    if len(found) == 1:
        return found[0]
    scores = torch.cat([each.scores for each in found])
    labels = torch.cat([each.labels for each in found])
    boxes = torch.cat([each.boxes for each in found])
    owners = torch.arange(len(found)).repeat_interleave(torch.tensor([len(e) for e in found]))
    alike = (box_iou(boxes, boxes) >= MIN_IOU) & (labels[:, None] == labels)
    free = torch.ones(len(scores), dtype=torch.bool)
    rows: list[tuple[float, int, Tensor]] = []
    for first in scores.argsort(descending=True, stable=True).tolist():
        if not free[first]:
            continue
        members = [first]
        for owner in set(range(len(found))) - {int(owners[first])}:
            candidates = scores * (free & alike[first] & (owners == owner))
            if float(candidates.max()) > 0:
                members.append(int(candidates.argmax()))
        free[members] = False
        weights = scores[members].clamp(min=1e-9)
        box = (weights[:, None] * boxes[members]).sum(0) / weights.sum()
        rows.append((float(scores[members].sum()) / len(found), int(labels[first]), box))
    rows.sort(key=lambda row: -row[0])
    return Detections(
        torch.tensor([score for score, _, _ in rows]),
        torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        torch.stack([box for *_, box in rows]) if rows else torch.zeros(0, 4),
        class_names=found[0].class_names,
    )


def _overlaps(detections: Detections, sample: Sample) -> Tensor:
    """IoU: float64 [m, n]."""
    return box_iou(detections.boxes.double(), sample.boxes.double())


def _highest(table: Tensor) -> Tensor:
    """The largest value of each column, 0 in a table without rows."""
    return table.amax(0) if len(table) else table.new_zeros(table.shape[1])


def _suggestion(detections: Detections, row: int) -> Suggestion:
    x0, y0, x1, y1 = detections.boxes[row].tolist()
    return Suggestion(int(detections.labels[row]), float(detections.scores[row]), (x0, y0, x1, y1))
