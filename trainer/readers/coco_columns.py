"""Rows of COCO's lists as columns, a part of a list at a time: millions of rows are stored as a few
arrays. Also decides which boxes are usable. NumPy alone, without PyTorch.
"""

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeGuard

import numpy as np

from trainer.readers.findings import MOST_OF_A_KIND

Row = dict[str, Any]
KEYS = ("image_id", "category_id", "bbox")  # that an annotation must have


@dataclass
class ImageColumns:
    """The usable images, and the entries of the malformed ones."""

    ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width), (0, 0): not given
    malformed: list[Row] = field(default_factory=list)  # the first MOST_OF_A_KIND
    num_malformed: int = 0
    num_rows: int = 0

    def add(self, rows: list[Row]) -> None:
        self.num_rows += len(rows)
        for row in rows:
            own_id, name = row.get("id"), row.get("file_name")
            if _is_id(own_id) and _is_file_name(name):
                self.ids.append(own_id)
                self.names.append(name)
                self.sizes.append(_size(row))
            else:
                self.num_malformed += 1
                if len(self.malformed) < MOST_OF_A_KIND:
                    self.malformed.append(row)

    def repeated(self) -> tuple[int, str, str] | None:
        """An id that is used twice and the names of the first two images with it, or None."""
        if len(set(self.ids)) == len(self.ids):
            return None
        first: dict[int, str] = {}
        for own_id, name in zip(self.ids, self.names, strict=True):
            if own_id in first:
                return own_id, first[own_id], name
            first[own_id] = name
        raise AssertionError


@dataclass(frozen=True, eq=False)
class Annotations:
    """M annotations as in the file, malformed ones included."""

    ids: np.ndarray  # int64 [M]; the position in the list, from 1, where the file has none
    image_ids: np.ndarray  # int64 [M]
    category_ids: np.ndarray  # int64 [M]
    no_image: np.ndarray  # bool [M], image_id is no integer
    no_category: np.ndarray  # bool [M], category_id is no integer
    boxes: np.ndarray  # float32 [M, 4], xyxy
    no_box: np.ndarray  # bool [M], bbox is not four numbers
    areas: np.ndarray  # float32 [M]; that of the box where the file has none
    no_area: np.ndarray  # bool [M]
    crowd: np.ndarray  # bool [M]


class AnnotationColumns:
    """Collects annotations part by part."""

    def __init__(self) -> None:
        self.num_rows = 0
        # Values of the first rows of each kind that are not numbers, by position.
        self.odd: dict[int, Row] = {}
        self._num_odd = Counter[str]()
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, rows: list[Row]) -> None:
        part = _annotations(rows, self.num_rows + 1)
        for kind in ("no_image", "no_category", "no_box"):
            odd = np.flatnonzero(part[kind])[: MOST_OF_A_KIND - self._num_odd[kind]].tolist()
            self._num_odd[kind] += len(odd)
            self.odd |= {
                self.num_rows + row: {key: rows[row].get(key) for key in KEYS} for row in odd
            }
        self.num_rows += len(rows)
        self._parts.append(part)

    def joined(self) -> Annotations:
        """Join and release the parts column by column, so that memory never holds all twice."""
        parts = self._parts or [_annotations([], 1)]
        self._parts = []
        names = list(parts[0])
        return Annotations(
            **{name: np.concatenate([part.pop(name) for part in parts]) for name in names}
        )


def _is_file_name(name: Any) -> TypeGuard[str]:
    try:
        return isinstance(name, str) and bool(os.fsencode(name))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _is_id(value: Any) -> TypeGuard[int]:
    """Whether it is an integer of 64 bits; JSON's true is not."""
    return type(value) is int and -(2**63) <= value < 2**63


def _annotations(rows: list[Row], first: int) -> dict[str, np.ndarray]:
    """The columns of `Annotations`; `first` is the position of the first row."""
    ids, no_id = _numbers([row.get("id") for row in rows])
    positions = np.arange(first, first + len(rows))
    image_ids, no_image = _numbers([row.get("image_id") for row in rows])
    category_ids, no_category = _numbers([row.get("category_id") for row in rows])
    xywh, well_formed = _box_columns([row.get("bbox") for row in rows])
    areas = _floats([row.get("area") for row in rows])
    no_area = np.isnan(areas)
    with np.errstate(over="ignore", invalid="ignore"):  # the dataset check drops boxes without area
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        box_areas = (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1])
        areas = np.where(no_area, box_areas, areas).astype(np.float32)
        boxes = xyxy.astype(np.float32)
    return {
        "ids": np.where(no_id, positions, ids),
        "image_ids": image_ids,
        "category_ids": category_ids,
        "no_image": no_image,
        "no_category": no_category,
        "boxes": boxes,
        "no_box": ~well_formed,
        "areas": areas,
        "no_area": no_area,
        "crowd": np.fromiter((bool(row.get("iscrowd")) for row in rows), np.bool_, len(rows)),
    }


def _numbers(values: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [M], 0 where a value is no integer, and bool [M], where that is so."""
    if set(map(type, values)) == {int}:
        with contextlib.suppress(OverflowError):
            return np.array(values, np.int64), np.zeros(len(values), np.bool_)
    known = [_is_id(value) for value in values]
    column = np.array([v if good else 0 for v, good in zip(values, known, strict=True)], np.int64)
    return column, ~np.array(known, np.bool_)


def _floats(values: list[Any]) -> np.ndarray:
    """float64 [M], NaN where a value is not a number."""
    if set(map(type, values)) <= {int, float}:
        with contextlib.suppress(OverflowError):
            return np.array(values, np.float64)
    return np.array([number_of(value) for value in values], np.float64)


def _box_columns(boxes: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """xywh, float64 [M, 4], NaN where a box is not four numbers, and bool [M], which ones are."""
    if set(map(type, boxes)) == {list} and set(map(len, boxes)) == {4}:
        values = list(chain.from_iterable(boxes))
        if set(map(type, values)) <= {int, float}:
            with contextlib.suppress(OverflowError):
                return np.array(values, np.float64).reshape(-1, 4), np.ones(len(boxes), np.bool_)
    well_formed = [
        isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)
        for box in boxes
    ]
    rows = [
        [number_of(value) for value in box] if good else [np.nan] * 4
        for box, good in zip(boxes, well_formed, strict=True)
    ]
    return np.array(rows, np.float64).reshape(-1, 4), np.array(well_formed, np.bool_)


def number_of(value: Any) -> float:
    """NaN for a value that is not a number."""
    try:
        return float(value) if isinstance(value, (int, float)) else float("nan")
    except OverflowError:  # an integer of more than 300 digits
        return float("inf")


def _size(image: Row) -> tuple[int, int]:
    """(height, width), (0, 0) if not given."""
    height, width = number_of(image.get("height")), number_of(image.get("width"))
    if not (0 < height < 2**31 and 0 < width < 2**31):
        return 0, 0
    return int(height), int(width)


@dataclass(frozen=True, eq=False)
class JudgedBoxes:
    """Boxes clipped to their images, and what is wrong with the annotated ones."""

    boxes: np.ndarray  # float32 [M, 4], clipped
    areas: np.ndarray  # float32 [M], of the objects: at most the area of the box
    finite: np.ndarray  # bool [M]
    empty: np.ndarray  # bool [M], without area
    outside: np.ndarray  # bool [M], without area inside their image
    excess: np.ndarray  # float32 [M], pixels by which they exceed the image

    @property
    def usable(self) -> np.ndarray:
        return self.finite & ~self.empty & ~self.outside


def judge_boxes(boxes: np.ndarray, areas: np.ndarray, sizes: np.ndarray) -> JudgedBoxes:
    """Judge boxes float32 [M, 4], xyxy in pixels, and areas [M] as annotated; sizes [M, 2] are the
    (height, width) of each box's image, infinite where unknown.
    """
    corner = np.tile(sizes[:, ::-1].astype(np.float32), 2)
    with np.errstate(invalid="ignore", over="ignore"):  # from boxes that are dropped
        clipped = np.minimum(np.maximum(boxes, 0), corner)
        box_areas = (clipped[:, 2:] - clipped[:, :2]).prod(1)
        excess = np.abs(boxes - clipped).max(1, initial=0)
    # A mask is no larger than its box; a larger area belongs to the unclipped box.
    areas = np.where(areas > 0, np.minimum(areas, box_areas), box_areas)
    finite = np.isfinite(boxes).all(1)
    return JudgedBoxes(clipped, areas, finite, _empty(boxes), _empty(clipped), excess)


def _empty(boxes: np.ndarray) -> np.ndarray:
    return np.any(boxes[:, 2:] <= boxes[:, :2], axis=1)
