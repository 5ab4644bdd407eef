"""What a detector's scores are worth, class by class: precision, recall and F1 at every threshold,
and the threshold at which F1 is highest.

A box is right if it overlaps a true box of its class by at least half (IoU 0.5), as COCO matches
them; nothing is interpolated. P points of a curve, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.scoring.average_precision import DetectionMatches

MOST_POINTS = 400  # of a curve that is kept; more cannot be seen


@dataclass(frozen=True)
class OperatingPoint:
    """What is right if boxes that score at least `threshold` are kept."""

    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class ScoreCurve:
    """One class, or several together, as the threshold falls. `best` is the point of the highest
    F1; None where nothing right was found, or there is nothing to find.
    """

    name: str
    num_truths: int
    thresholds: np.ndarray  # float64 [P], falling
    precision: np.ndarray  # [P]
    recall: np.ndarray  # [P], not falling; NaN where there is nothing to find
    best: OperatingPoint | None

    @property
    def f1(self) -> np.ndarray:
        """[P]; 0 where nothing right was found."""
        total = np.nan_to_num(self.precision + self.recall)
        product = np.nan_to_num(2 * self.precision * self.recall)
        return np.divide(product, total, out=np.zeros_like(total), where=total > 0)


@dataclass(frozen=True, eq=False)
class Hits:
    """The boxes found of one class, or several, and which are right."""

    scores: np.ndarray  # float64 [D]
    right: np.ndarray  # bool [D]
    num_truths: int


def curve(name: str, hits: Hits) -> ScoreCurve:
    """Points only where the score changes: boxes of equal score are kept or left together."""
    order = np.argsort(-hits.scores, kind="stable")
    scores, right = hits.scores[order], hits.right[order]
    ends = np.flatnonzero(np.diff(scores, append=-np.inf))
    found = right.cumsum()[ends]
    recall = found / hits.num_truths if hits.num_truths else np.full(len(ends), np.nan)
    full = ScoreCurve(name, hits.num_truths, scores[ends], found / (ends + 1), recall, None)
    f1 = full.f1
    place = int(f1.argmax()) if len(f1) else 0
    best = None
    if len(f1) and f1[place] > 0:
        columns = (full.thresholds, full.precision, full.recall, f1)
        best = OperatingPoint(*(float(column[place]) for column in columns))
    keep = np.unique(np.linspace(0, len(ends) - 1, min(len(ends), MOST_POINTS)).round().astype(int))
    return replace(
        full,
        thresholds=full.thresholds[keep],
        precision=full.precision[keep],
        recall=full.recall[keep],
        best=best,
    )


def hits_of(shares: Sequence[DetectionMatches], num_classes: int) -> list[Hits]:
    """The hits of each class over all images, at IoU 0.5 and whatever their size; regions to ignore
    are left out.
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
    """Several classes as if they were one."""
    return _joined([(each.scores, each.right) for each in hits], sum(h.num_truths for h in hits))


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]], num_truths: int) -> Hits:
    scores = np.concatenate([np.zeros(0), *(scores for scores, _ in parts)])
    right = np.concatenate([np.zeros(0, bool), *(right for _, right in parts)])
    return Hits(scores, right, num_truths)
