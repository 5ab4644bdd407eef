"""COCO metrics of a detector on the images of a COCO file, without PyTorch.

Scores equal those of a training run: like `trainer.data.dataset_check`, this drops boxes without
area or outside their image and clips the others, and `trainer.scoring.average_precision` scores
them.

N images, M objects, D detections.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trainer.readers.coco_columns import judge_boxes, repeated_boxes
from trainer.readers.coco_file import (
    FOREIGN_CLASS,
    MALFORMED_BOX,
    NO_FAULT,
    UNKNOWN_CATEGORY,
    UNKNOWN_IMAGE,
    CocoFile,
    read_masks,
)
from trainer.readers.run_lengths import areas_of, as_coco, rectangle
from trainer.scoring.average_precision import (
    STATS,
    DetectionColumns,
    DetectionMatches,
    Objects,
    accumulate,
    class_numbers,
    coco_numbers,
    match,
    overlap_of_boxes,
    overlap_of_masks,
    xywh,
)
from trainer.scoring.prediction_formats import ImagePredictions
from trainer.scoring.scores import curve, hits_of

# The metrics in words, in COCO's order.
WORDS = dict(
    zip(
        STATS,
        (
            "AP, mean over IoU 0.50 to 0.95",
            "AP at IoU 0.50",
            "AP at IoU 0.75",
            "AP of small objects, below 32 x 32",
            "AP of medium objects",
            "AP of large objects, above 96 x 96",
            "AR with 1 box per image",
            "AR with 10 boxes per image",
            "AR with 100 boxes per image",
            "AR of small objects",
            "AR of medium objects",
            "AR of large objects",
        ),
        strict=True,
    )
)
_LEFT_OUT = {
    UNKNOWN_IMAGE: "of an unknown image",
    UNKNOWN_CATEGORY: "of an unknown category",
    MALFORMED_BOX: "whose box is not four numbers",
    FOREIGN_CLASS: "of a class that the weights do not know",
}


@dataclass(frozen=True, eq=False)
class JudgedObjects:
    """The objects that count, and the number of others for each reason.

    `rows` are indices of the file's annotations, `image` of its images, 0..N-1; boxes are xyxy in
    pixels, clipped.
    """

    rows: np.ndarray  # int64 [M]
    image: np.ndarray  # int64 [M]
    labels: np.ndarray  # int64 [M]
    boxes: np.ndarray  # float32 [M, 4]
    areas: np.ndarray  # float32 [M]
    crowd: np.ndarray  # bool [M]
    left_out: Mapping[str, int] = field(default_factory=dict)


def judge(file: CocoFile, found: Mapping[int, ImagePredictions]) -> JudgedObjects:
    """Judges the objects of the predicted images, the keys of `found` (image index). Sizes that the
    file does not give are those of the image files.
    """
    sizes = np.array(_sizes(file, found), np.float64)
    sizes[sizes == 0] = np.inf
    rows = np.flatnonzero(file.faults == NO_FAULT)
    image = file.owners[rows]
    annotations = file.annotations
    judged = judge_boxes(annotations.boxes[rows], annotations.areas[rows], sizes[image])
    left_out = Counter(dict.fromkeys(_LEFT_OUT.values(), 0))
    for fault, words in _LEFT_OUT.items():
        left_out[words] += int((file.faults == fault).sum())
    left_out[_LEFT_OUT[MALFORMED_BOX]] += int((~judged.finite).sum())
    left_out["whose box has no area in its image"] = int((judged.finite & ~judged.usable).sum())
    labels, crowd = file.labels[rows], annotations.crowd[rows]
    again = repeated_boxes(image, labels, crowd, annotations.boxes[rows]) & judged.usable
    left_out["whose box is there twice"] = int(again.sum())
    which = judged.usable & ~again & np.isin(image, list(found))
    return JudgedObjects(
        rows=rows[which],
        image=image[which],
        labels=labels[which],
        boxes=judged.boxes[which],
        areas=judged.areas[which],
        crowd=crowd[which],
        left_out={words: count for words, count in left_out.items() if count},
    )


def box_scores(
    file: CocoFile,
    truth: JudgedObjects,
    found: Mapping[int, ImagePredictions],
    names: Sequence[str],
) -> dict[str, float]:
    """The twelve metrics, then `ap/CLASS` and `ap50/CLASS`; -1 where there is nothing to score."""
    scores = accumulate([matches(file, truth, found, names)])
    return coco_numbers(scores) | class_numbers(scores, names)


def best_thresholds(
    file: CocoFile,
    truth: JudgedObjects,
    found: Mapping[int, ImagePredictions],
    names: Sequence[str],
) -> list[float | None]:
    """The threshold of each class with the highest F1; None if no detection of it is right."""
    hits = hits_of([matches(file, truth, found, names)], len(names))
    best = [curve(name, each).best for name, each in zip(names, hits, strict=True)]
    return [point.threshold if point else None for point in best]


def matches(
    file: CocoFile,
    truth: JudgedObjects,
    found: Mapping[int, ImagePredictions],
    names: Sequence[str],
) -> DetectionMatches:
    things, boxes = _detections(file, found)
    overlap = overlap_of_boxes(boxes, xywh(truth.boxes), truth.crowd)
    return match(_objects(file, truth), things, overlap, len(names))


def map50(
    file: CocoFile,
    sizes: Sequence[tuple[int, int]],
    detections: Iterable[Any],
    names: Sequence[str],
) -> float:
    """Mean AP at IoU 0.5, 0..1, of the detections in each image, in the order of the file. Their
    `scores` [N], `labels` [N] and `boxes` [N, 4] (xyxy, pixels) are arrays or CPU tensors; boxes
    are clipped to the images, whose (height, width) are `sizes`.
    """
    found = {}
    for index, (size, each) in enumerate(zip(sizes, detections, strict=True)):
        boxes = np.asarray(each.boxes, np.float64).reshape(-1, 4)
        found[index] = ImagePredictions(
            file="",
            size=size,
            boxes=boxes.clip(0, [*size[::-1], *size[::-1]]),
            labels=np.asarray(each.labels).tolist(),
            scores=np.asarray(each.scores, np.float64).tolist(),
        )
    return box_scores(file, judge(file, found), found, names)["map50"]


def mask_scores(
    file: CocoFile,
    truth: JudgedObjects,
    found: Mapping[int, ImagePredictions],
    names: Sequence[str],
) -> tuple[dict[str, float], int]:
    """The twelve metrics of masks, as `segm_map50` and so on, and the number of objects with an
    unusable mask; no metrics if the detector predicts no masks or no object has one.
    """
    if not any(each.masks for each in found.values()):
        return {}, 0
    keep = np.zeros(len(file.faults), np.bool_)
    keep[truth.rows] = True
    sizes = _sizes(file, found)
    read = list(read_masks(file, keep, sizes))
    unusable = sum(bool(problem) for _, _, problem in read)
    present = np.array([bool(mask) for _, mask, _ in read], np.bool_)
    if not present.any():
        return {}, unusable
    true_masks = [
        as_coco(mask or rectangle(box, sizes[image]), sizes[image])
        for (_, mask, _), box, image in zip(
            read, truth.boxes.tolist(), truth.image.tolist(), strict=True
        )
    ]
    # The box of an object without a mask is a crowd region: nothing in it is right or wrong.
    crowd = truth.crowd | ~present
    objects = replace(_objects(file, truth), crowd=crowd)
    things, _ = _detections(file, found)
    entries = [
        as_coco(mask.encode(), each.size) for each in found.values() for mask in each.masks or ()
    ]
    things = replace(things, area=np.array(areas_of(entries), np.float64))
    overlap = overlap_of_masks(entries, true_masks, crowd)
    numbers = coco_numbers(accumulate([match(objects, things, overlap, len(names))]))
    return {f"segm_{name}": number for name, number in numbers.items()}, unusable


def _sizes(file: CocoFile, found: Mapping[int, ImagePredictions]) -> list[tuple[int, int]]:
    """(height, width) of each image; (0, 0) if neither the file nor a prediction gives it."""
    sizes = enumerate(file.images.sizes)
    return [
        found[index].size if size == (0, 0) and index in found else size for index, size in sizes
    ]


def _order(file: CocoFile) -> np.ndarray:
    """Each image's rank by id, int64 [N]: COCO sorts equal scores in this order."""
    return np.argsort(np.argsort(np.array(file.images.ids, np.int64)))


def _objects(file: CocoFile, truth: JudgedObjects) -> Objects:
    areas = truth.areas.astype(np.float64)
    return Objects(_order(file)[truth.image], truth.labels, areas, truth.crowd)


def _detections(
    file: CocoFile, found: Mapping[int, ImagePredictions]
) -> tuple[DetectionColumns, np.ndarray]:
    """The detections, and their boxes [D, 4] xywh."""
    counts = [len(each.labels) for each in found.values()]
    image = np.repeat(_order(file)[np.array(list(found), np.int64)], counts)
    labels = np.concatenate([np.zeros(0, np.int64), *(each.labels for each in found.values())])
    scores = np.concatenate([np.zeros(0), *(each.scores for each in found.values())])
    corners = np.concatenate([np.zeros((0, 4)), *(each.boxes for each in found.values())])
    boxes = xywh(corners.astype(np.float32))
    areas = boxes[:, 2].clip(0) * boxes[:, 3].clip(0)
    return DetectionColumns(image, labels.astype(np.int64), areas, scores), boxes
