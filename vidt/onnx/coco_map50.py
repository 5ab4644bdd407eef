"""A detector's map50 on a dataset in COCO's layout, by pycocotools: enough to compare two forms of
one detector.

Needs no torch. What is detected is clipped to the image, as in training's own evaluation; annotated
boxes stay as they are, and those without area are no truth.
"""

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vidt.errors import UserError
from vidt.images.files import read_image


def _is_whole(value: Any) -> bool:
    return isinstance(value, int)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_side(value: Any) -> bool:
    return _is_number(value) and 1 <= value < 2**31


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


# What a row of each list needs: a test by key.
_NEEDED: dict[str, dict[str, Callable[[Any], bool]]] = {
    "categories": {"id": _is_whole, "name": _is_text},
    "images": {"id": _is_whole, "file_name": _is_text, "height": _is_side, "width": _is_side},
    "annotations": {"image_id": _is_whole, "category_id": _is_whole, "bbox": _is_box},
}


def _content(annotations: Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(annotations).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{annotations} cannot be read as a COCO file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{annotations} cannot be read as a COCO file: it holds no object")
    return content


def _rows(
    annotations: Path,
    content: dict[str, Any],
    key: str,
    needed: dict[str, Callable[[Any], bool]],
) -> list[dict[str, Any]]:
    rows = content.get(key)
    if not isinstance(rows, list):
        raise UserError(f'{annotations} cannot be read as a COCO file: it has no list "{key}"')
    for place, row in enumerate(rows):
        for name, fits in needed.items():
            value = row.get(name) if isinstance(row, dict) else None
            if not fits(value):
                shown = f"{value!r:.80}" if isinstance(row, dict) and name in row else "missing"
                raise UserError(f"{annotations}: {key}[{place}]: {name} is {shown}")
    return rows


def _object(row: dict[str, Any]) -> dict[str, Any] | None:
    """What counts of an annotation; None if its box has no area."""
    try:
        x, y, width, height = map(float, row["bbox"])
        area = float(row["area"]) if _is_number(row.get("area")) else width * height
    except OverflowError:  # a whole number of 300 digits
        return None
    if not (math.isfinite(x + y + width + height) and width > 0 and height > 0):
        return None
    return {
        "image_id": row["image_id"],
        "category_id": row["category_id"],
        "bbox": [x, y, width, height],
        "area": area,
        "iscrowd": int(bool(row.get("iscrowd"))),
    }


class CocoImages:
    """The images of a COCO file, in its order, and their truth by class name."""

    def __init__(self, annotations: Path, folder: Path, class_names: Sequence[str]) -> None:
        """Every row is looked at, so that nothing is wrong with them later.

        Raises UserError, naming the file, if it is no COCO file, has a row that cannot be used or
        none of the classes; and naming an image that is not there.
        """
        content = _content(annotations)
        categories, self._images, truth = (
            _rows(annotations, content, key, fits) for key, fits in _NEEDED.items()
        )
        repeated = [key for key, n in Counter(row["id"] for row in self._images).items() if n > 1]
        if repeated:
            raise UserError(f"{annotations}: image id {repeated[0]} is used twice")
        ids = {category["name"]: category["id"] for category in categories}
        self._category_ids = [ids.get(name) for name in class_names]
        if not any(number is not None for number in self._category_ids):
            raise UserError(
                f"{annotations} has classes {', '.join(ids)}; the detector knows "
                f"{', '.join(class_names)}"
            )
        self._truth = [each for each in map(_object, truth) if each is not None]
        self.files = [Path(folder) / image["file_name"] for image in self._images]
        self.sizes = [(int(image["height"]), int(image["width"])) for image in self._images]
        missing = next((file for file in self.files if not file.is_file()), None)
        if missing is not None:
            raise UserError(f"{missing}: no such file, but {annotations} has it")

    def pictures(self) -> Iterator[Image.Image]:
        """Raises `vidt.images.files.UnreadableImage` for a damaged file."""
        for file, size in zip(self.files, self.sizes, strict=True):
            yield read_image(file, size)

    def map50(self, found: Iterable[Any]) -> float:
        """Mean AP at IoU 0.5 over the classes, 0..1. found: for each image in order `scores` [N],
        `labels` [N] and `boxes` [N, 4] (xyxy, pixels), arrays or tensors.
        """
        rows = [
            row
            for image, detections in zip(self._images, found, strict=True)
            for row in self._detected(image, detections)
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = COCOeval(self._index(self._truth), self._index(rows), "bbox")
            known = {number for number in self._category_ids if number is not None}
            evaluator.params.catIds = sorted(known)
            evaluator.evaluate()
            evaluator.accumulate()
        # [IoU, recall, class, area, most detections]: IoU 0.5, all areas, 100 detections
        precision = evaluator.eval["precision"][0, :, :, 0, -1]
        scored = precision[precision > -1]
        return float(scored.mean()) if scored.size else -1.0

    def _detected(self, image: dict[str, Any], detections: Any) -> Iterator[dict[str, Any]]:
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
            "annotations": numbered,
        }
        index.createIndex()
        return index
