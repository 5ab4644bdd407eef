"""A detector's map50 on a dataset in COCO's layout, by pycocotools: enough to compare two forms of
one detector.

Needs no torch. Boxes are clipped to the image and those without area are no truth, as in training's
own evaluation.
"""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vidt.images import read_image


class CocoImages:
    """The images of a COCO file, in its order, and their truth by class name."""

    def __init__(self, annotations: Path, folder: Path, class_names: Sequence[str]) -> None:
        """Raises ValueError, naming the file, if it is no such file or has none of the classes."""
        try:
            content = json.loads(Path(annotations).read_text(encoding="utf-8"))
            ids = {category["name"]: category["id"] for category in content["categories"]}
            self._images = list(content["images"])
            self._truth = list(content["annotations"])
            self.files = [Path(folder) / image["file_name"] for image in self._images]
            self.sizes = [(image["height"], image["width"]) for image in self._images]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{annotations} cannot be read as a COCO file: {error!r}") from error
        self._category_ids = [ids.get(name) for name in class_names]
        if not any(number is not None for number in self._category_ids):
            raise ValueError(
                f"{annotations} has classes {', '.join(ids)}; the detector knows "
                f"{', '.join(class_names)}"
            )

    def pictures(self) -> Iterator[Image.Image]:
        """Raises `vidt.images.UnreadableImage` for a damaged file."""
        for file, size in zip(self.files, self.sizes, strict=True):
            yield read_image(file, size)

    def map50(self, found: Iterable[Any]) -> float:
        """Mean AP at IoU 0.5 over the classes, 0..1. found: for each image in order `scores` [N],
        `labels` [N] and `boxes` [N, 4] (xyxy, pixels), arrays or tensors.
        """
        rows = [
            row
            for image, detections in zip(self._images, found, strict=True)
            for row in self._rows(image, detections)
        ]
        truth = [row for row in self._truth if row["bbox"][2] > 0 and row["bbox"][3] > 0]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = COCOeval(self._index(truth), self._index(rows), "bbox")
            known = {number for number in self._category_ids if number is not None}
            evaluator.params.catIds = sorted(known)
            evaluator.evaluate()
            evaluator.accumulate()
        # [IoU, recall, class, area, most detections]: IoU 0.5, all areas, 100 detections
        precision = evaluator.eval["precision"][0, :, :, 0, -1]
        scored = precision[precision > -1]
        return float(scored.mean()) if scored.size else -1.0

    def _rows(self, image: dict[str, Any], detections: Any) -> Iterator[dict[str, Any]]:
        corners = np.asarray(detections.boxes, np.float64).reshape(-1, 4)
        limits = [image["width"], image["height"]] * 2
        for score, label, (x1, y1, x2, y2) in zip(
            np.asarray(detections.scores).tolist(),
            np.asarray(detections.labels).tolist(),
            corners.clip(0, limits).tolist(),
            strict=True,
        ):
            if self._category_ids[label] is not None:
                yield {
                    "image_id": image["id"],
                    "category_id": self._category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "score": score,
                }

    def _index(self, rows: list[dict[str, Any]]) -> COCO:
        index = COCO()
        categories = [{"id": number} for number in self._category_ids if number is not None]
        numbered = [{"iscrowd": 0, **row, "id": number} for number, row in enumerate(rows, 1)]
        index.dataset = {
            "images": self._images,
            "categories": categories,
            "annotations": [
                {"area": row["bbox"][2] * row["bbox"][3], **row} for row in numbered
            ],
        }
        index.createIndex()
        return index
