"""COCO's numbers from lists of objects, by pycocotools and without PyTorch."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trainer.coco_file import Truth

# COCOeval.stats in its own order, and in words.
STATS = {
    "map": "AP, mean over IoU 0.50 to 0.95",
    "map50": "AP at IoU 0.50",
    "map75": "AP at IoU 0.75",
    "map_small": "AP of small objects, below 32 x 32",
    "map_medium": "AP of medium objects",
    "map_large": "AP of large objects, above 96 x 96",
    "mar_1": "AR with 1 box per image",
    "mar_10": "AR with 10 boxes per image",
    "mar_100": "AR with 100 boxes per image",
    "mar_small": "AR of small objects",
    "mar_medium": "AR of medium objects",
    "mar_large": "AR of large objects",
}


def coco_scores(
    truth: Truth, found: list[dict[str, Any]], names: Sequence[str], *, masks: bool = False
) -> dict[str, float]:
    """The twelve numbers, then `ap/CLASS` and `ap50/CLASS`; -1 where there is nothing to score.

    found: COCO's results, `category_id` a label. masks: score those in place of boxes, as
    `segm_map50` and so on, without the classes'.
    """
    categories = [{"id": label, "name": name} for label, name in enumerate(names)]
    rows = [row | {"id": number, "iscrowd": 0} for number, row in enumerate(found, 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(
            _index(truth.images, categories, truth.objects),
            _index(truth.images, categories, rows),
            "segm" if masks else "bbox",
        )
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    prefix = "segm_" if masks else ""
    numbers = {
        f"{prefix}{name}": float(value)
        for name, value in zip(STATS, evaluator.stats, strict=True)
    }
    return numbers if masks else numbers | _by_class(evaluator, names)


def _index(
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    objects: list[dict[str, Any]],
) -> COCO:
    index = COCO()
    index.dataset = {"images": images, "categories": categories, "annotations": objects}
    index.createIndex()
    return index


def _by_class(evaluator: COCOeval, names: Sequence[str]) -> dict[str, float]:
    # [IoU, recall, class], all areas, 100 detections
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    scores: dict[str, float] = {}
    for label, name in enumerate(names):
        scores[f"ap/{name}"] = _mean(precision[:, :, label])
        scores[f"ap50/{name}"] = _mean(precision[0, :, label])
    return scores


def _mean(precision: np.ndarray) -> float:
    scored = precision[precision > -1]
    return float(scored.mean()) if scored.size else -1.0
