"""Precision, recall and F1 of each class at every score threshold, and the threshold with the
highest F1.

A detection is right if COCO's matching gives it a true box of its class at IoU 0.5. Nothing is
interpolated. P points of a curve, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.scoring.average_precision import DetectionMatches

MOST_POINTS = 400  # of a stored curve; more cannot be seen in a plot


@dataclass(frozen=True)
class OperatingPoint:
    """Precision, recall and F1 of the detections that score at least `threshold`."""

    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class ScoreCurve:
    """The curve of one class, or of several together, as the threshold falls. `best` is the point
    with the highest F1; None if no detection is right.
    """

    name: str
    num_truths: int
    thresholds: np.ndarray  # float64 [P], falling
    precision: np.ndarray  # [P]
    recall: np.ndarray  # [P], not falling; NaN without true boxes
    best: OperatingPoint | None

    @property
    def f1(self) -> np.ndarray:
        """[P]; 0 where no detection is right."""
        total = np.nan_to_num(self.precision + self.recall)
        product = np.nan_to_num(2 * self.precision * self.recall)
        return np.divide(product, total, out=np.zeros_like(total), where=total > 0)


@dataclass(frozen=True, eq=False)
class Hits:
    """The detections of one class, or of several, and which are right."""

    scores: np.ndarray  # float64 [D]
    right: np.ndarray  # bool [D]
    num_truths: int


def curve(name: str, hits: Hits) -> ScoreCurve:
    """The curve, with points only where the score changes: equal scores stay together."""
    order = np.argsort(-hits.scores, kind="stable")
    scores, right = hits.scores[order], hits.right[order]
    ends = np.flatnonzero(np.diff(scores, append=-np.inf))
    found = right.cumsum()[ends]
    recall = found / hits.num_truths if hits.num_truths else np.full(len(ends), np.nan)
    full = ScoreCurve(name, hits.num_truths, scores[ends], found / (ends + 1), recall, None)
    f1 = full.f1
    highest = int(f1.argmax()) if len(f1) else 0
    best = None
    if len(f1) and f1[highest] > 0:
        columns = (full.thresholds, full.precision, full.recall, f1)
        best = OperatingPoint(*(float(column[highest]) for column in columns))
    keep = np.unique(np.linspace(0, len(ends) - 1, min(len(ends), MOST_POINTS)).round().astype(int))
    return replace(
        full,
        thresholds=full.thresholds[keep],
        precision=full.precision[keep],
        recall=full.recall[keep],
        best=best,
    )


def hits_of(shares: Sequence[DetectionMatches], num_classes: int) -> list[Hits]:
    """The hits of each class over all images, at IoU 0.5 and for all sizes, without detections in
    crowd regions.
    """
    label = np.concatenate([share.label for share in shares])
    score = np.concatenate([share.score for share in shares])
    right = np.concatenate([share.right[0, 0] for share in shares], dtype=bool)
    counts = right | np.concatenate([share.wrong[0, 0] for share in shares], dtype=bool)
    truths = sum(share.totals[0] for share in shares)
    return [
        Hits(score[counts & (label == each)], right[counts & (label == each)], int(truths[each]))
        for each in range(num_classes)
    ]


def pooled(hits: Sequence[Hits]) -> Hits:
    """Several classes as one."""
    return _joined([(each.scores, each.right) for each in hits], sum(h.num_truths for h in hits))


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]], num_truths: int) -> Hits:
    scores = np.concatenate([np.zeros(0), *(scores for scores, _ in parts)])
    right = np.concatenate([np.zeros(0, bool), *(right for _, right in parts)])
    return Hits(scores, right, num_truths)
