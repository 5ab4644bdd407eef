"""The confusion matrix of a detector, and the images with the most mistakes.

Detections count if they reach the threshold of their class with the highest F1. In the order of
their scores they are matched at IoU 0.5, as in pycocotools: first to the true boxes of their own
class, then to the remaining ones of other classes, which is a confusion. K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from trainer.loop.agreement import Agreement
from trainer.readers.run_lengths import RunLengths
from trainer.readers.samples import Sample, SampleTable
from trainer.scoring.average_precision import DetectionMatches
from trainer.scoring.scores import ScoreCurve, curve, hits_of, pooled
from vidt.errors import counted
from vidt.predict.detections import Detections
from vidt.predict.selection import NO_BEST

MIN_IOU = 0.5
MOST_IMAGES = 12  # of the worst
MOST_CURVES = 6  # more lines in one plot cannot be told apart
MOST_ROWS = 12  # classes in a condensed confusion matrix
NOTHING = -1  # of a detection: background; of a true box: missed
CROWD = -2  # ignored: neither correct nor wrong


@dataclass(frozen=True, eq=False)
class JudgedImage:
    """One image of the table: its m detections that count, and its n true boxes, matched."""

    index: int
    detections: Detections  # m
    true_class: Tensor  # int64 [m], the true class of each detection, or NOTHING, or CROWD
    predicted_class: Tensor  # int64 [n], the predicted class of each true box, or NOTHING, or CROWD
    annotation: Tensor  # int64 [m], the true box of each detection, or NOTHING
    num_missed: int
    num_false: int
    num_confused: int
    masks: Sequence[RunLengths] | None = None  # of the m detections

    @property
    def num_mistakes(self) -> int:
        return self.num_missed + self.num_false + self.num_confused


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Results of an evaluation beyond its metrics; the same on every process."""

    class_names: tuple[str, ...]  # K
    curves: tuple[ScoreCurve, ...]  # K
    main: tuple[int, ...]  # the MOST_CURVES classes with the most true boxes
    rest: ScoreCurve | None  # the other classes with one threshold; None: there are no others
    together: ScoreCurve  # all classes with one threshold
    confusion: np.ndarray  # int64 [K + 1, K + 1], true by predicted; last: background, missed
    worst: tuple[JudgedImage, ...]  # most mistakes first; images without mistakes are left out

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """The threshold of each class with the highest F1; None if no detection of it is right."""
        return tuple(each.best.threshold if each.best else None for each in self.curves)

    @property
    def main_curves(self) -> list[ScoreCurve]:
        return [self.curves[label] for label in self.main]


def diagnose(
    samples: SampleTable,
    indices: Sequence[int],
    detections: Mapping[int, Detections],
    masks: Mapping[int, Sequence[RunLengths]],
    shares: Sequence[DetectionMatches],
    agreement: Agreement,
) -> Diagnosis:
    """Diagnoses this process's images, by index; `shares` are the box matches of all processes."""
    names = samples.class_names
    hits = hits_of(shares, len(names))
    curves = tuple(curve(name, each) for name, each in zip(names, hits, strict=True))
    best = [each.best.threshold if each.best else NO_BEST for each in curves]
    thresholds = torch.tensor(best, dtype=torch.float64)
    confusion = np.zeros((len(names) + 1, len(names) + 1), np.int64)
    worst: list[JudgedImage] = []
    for index in indices:
        sample = samples[index]
        judged = judge(sample, index, detections.get(index), masks.get(index), thresholds)
        _count(confusion, sample, judged)
        if judged.num_mistakes and index in detections:
            worst = _worst([*worst, judged])
    parts = agreement.gather_objects((confusion, worst))
    by_size = np.argsort([-each.num_truths for each in hits], kind="stable").tolist()
    main, others = by_size[:MOST_CURVES], by_size[MOST_CURVES:]
    name = f"the other {counted(len(others), 'class', 'classes')}"
    return Diagnosis(
        class_names=names,
        curves=curves,
        main=tuple(main),
        rest=curve(name, pooled([hits[label] for label in others])) if others else None,
        together=curve("all classes", pooled(hits)),
        confusion=sum((part for part, _ in parts), np.zeros_like(confusion)),
        worst=tuple(_worst([judged for _, part in parts for judged in part])),
    )


def condensed(diagnosis: Diagnosis) -> tuple[np.ndarray, list[str], list[str]]:
    """The confusion matrix with at most MOST_ROWS classes and the sum of the others, and the names
    of its rows (true) and columns (predicted).
    """
    table, names = diagnosis.confusion, diagnosis.class_names
    totals = table[:-1].sum(1) + table[:, :-1].sum(0)
    shown = np.sort(np.argsort(-totals, kind="stable")[:MOST_ROWS])
    group = np.full(len(table), len(shown))
    group[shown] = np.arange(len(shown))
    num_others = len(names) - len(shown)
    group[-1] = len(shown) + (num_others > 0)
    small = np.zeros((group[-1] + 1,) * 2, np.int64)
    np.add.at(small, (group[:, None], group), table)
    labels = [names[label] for label in shown] + [f"{num_others} others"] * (num_others > 0)
    return small, [*labels, "background"], [*labels, "missed"]


def judge(
    sample: Sample,
    index: int,
    detections: Detections | None,
    masks: Sequence[RunLengths] | None,
    thresholds: Tensor,
) -> JudgedImage:
    """Matches an image; detections None: it is unreadable. thresholds [K] are the least scores."""
    if detections is None:
        detections = Detections(
            torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
        )
    keep = detections.scores.double() >= thresholds[detections.labels]
    if masks is not None:
        masks = [masks[row] for row in keep.nonzero().flatten().tolist()]
    detections = detections[keep]
    boxes = clip_boxes_to_image(detections.boxes, sample.size)
    true_class, predicted_class, annotation = _matched(sample, boxes, detections.labels)
    same = true_class == detections.labels
    return JudgedImage(
        index=index,
        detections=detections,
        true_class=true_class,
        predicted_class=predicted_class,
        annotation=annotation,
        num_missed=int((predicted_class == NOTHING).sum()),
        num_false=int((true_class == NOTHING).sum()),
        num_confused=int((~same & (true_class >= 0)).sum()),
        masks=masks,
    )


def _matched(sample: Sample, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`true_class`, `predicted_class` and `annotation` of detections sorted by falling score."""
    overlaps = box_iou(boxes.double(), sample.boxes.double())  # [m, n]
    own = labels[:, None] == sample.labels
    free = ~sample.crowd
    true_class, annotation = (torch.full((len(boxes),), NOTHING) for _ in range(2))
    predicted_class = torch.where(sample.crowd, CROWD, NOTHING)
    for allowed in (own, ~own):
        for row in (true_class == NOTHING).nonzero().flatten().tolist():
            candidates = overlaps[row] * (free & allowed[row])
            column = int(candidates.argmax()) if len(candidates) else 0
            if len(candidates) and candidates[column] >= MIN_IOU:
                true_class[row], predicted_class[column] = sample.labels[column], labels[row]
                annotation[row] = column
                free[column] = False
        if allowed is own and bool(sample.crowd.any()):  # as COCO, before another class counts
            inside = _share_inside(boxes, sample.boxes[sample.crowd]) >= MIN_IOU
            inside &= own[:, sample.crowd]
            true_class[inside.any(1) & (true_class == NOTHING)] = CROWD
    return true_class, predicted_class, annotation


def _share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """The share of each box's area inside each region: [m, regions], 0..1."""
    low = torch.maximum(boxes[:, None, :2], regions[:, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-9)
    return (high - low).clamp(min=0).prod(2) / areas[:, None]


def _count(confusion: np.ndarray, sample: Sample, judged: JudgedImage) -> None:
    """Adds an image's true boxes and detections to the confusion matrix."""
    last = len(confusion) - 1
    truth, taken_for = sample.labels.numpy(), judged.predicted_class.numpy()
    counts = taken_for != CROWD
    columns = np.where(taken_for == NOTHING, last, taken_for)
    np.add.at(confusion, (truth[counts], columns[counts]), 1)
    false = judged.detections.labels.numpy()[(judged.true_class == NOTHING).numpy()]
    np.add.at(confusion, (np.full(len(false), last), false), 1)


def _worst(judged: list[JudgedImage]) -> list[JudgedImage]:
    return sorted(judged, key=lambda each: (-each.num_mistakes, each.index))[:MOST_IMAGES]
