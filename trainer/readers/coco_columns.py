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

from trainer.readers.findings import MOST_OF_A_KIND, Finding, Severity
from trainer.readers.values import number_of, shortened, truth, whole_number

Row = dict[str, Any]
KEYS = ("image_id", "category_id", "bbox")  # that an annotation must have
# Kinds of values that are read although COCO writes them otherwise: severity and action.
TEXT_NUMBER, POLYGON_BOX = "number in another form", "box that only a polygon states"
NO_ID, ODD_CROWD = "annotation without a whole number as id", "iscrowd that is neither 0 nor 1"
_TOLD: dict[str, tuple[Severity, str]] = {
    TEXT_NUMBER: ("info", "read"),
    POLYGON_BOX: ("info", "computed: the box around it"),
    NO_ID: ("info", "its position in the list is used"),
    ODD_CROWD: ("warning", "read as 0"),
}


class Told:
    """How many values of each kind were read although COCO writes them otherwise, and the first."""

    def __init__(self) -> None:
        self._count = Counter[str]()
        self._first: dict[str, str] = {}

    def add(self, kind: str, position: int, key: str, value: Any, what: str = "annotation") -> None:
        """`position` in the list, from 1."""
        self._count[kind] += 1
        if kind not in self._first:
            shown = "" if value is None else f": {key} {shortened(value)}"
            self._first[kind] = f"the first is {what} number {position} of the list{shown}"

    def findings(self, source: str, file: str) -> list[Finding]:
        return [
            Finding(kind, *_TOLD[kind], detail, source, file, count=self._count[kind])
            for kind, detail in self._first.items()
        ]


@dataclass
class ImageColumns:
    """The usable images, and the entries of the malformed ones."""

    ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width), (0, 0): not given
    malformed: list[Row] = field(default_factory=list)  # the first MOST_OF_A_KIND
    num_malformed: int = 0
    num_rows: int = 0
    told: Told = field(default_factory=Told)

    def add(self, rows: list[Row]) -> None:
        for row in rows:
            self.num_rows += 1
            own_id, name = whole_number(row.get("id")), row.get("file_name")
            if own_id is not None and _is_file_name(name):
                if type(row["id"]) is not int:
                    self.told.add(TEXT_NUMBER, self.num_rows, "id", row["id"], "image")
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
            if first.setdefault(own_id, name) != name:
                return own_id, first[own_id], name
        return None

    def drop_repeated(self) -> tuple[np.ndarray, list[int]] | None:
        """Keep the first image of each file. Return the row, among those kept, of each image that
        was there, int64 [N], and the rows of those dropped; None if all files differ.
        """
        names = [
            os.path.normpath(name) if "./" in name or "//" in name else name for name in self.names
        ]
        if len(set(names)) == len(names):
            return None
        rows: dict[str, int] = {}
        kept = np.array([rows.setdefault(name, len(rows)) for name in names], np.int64)
        first = np.unique(kept, return_index=True)[1].tolist()
        dropped = np.setdiff1d(np.arange(len(kept)), first).tolist()
        self.ids, self.sizes = [self.ids[i] for i in first], [self.sizes[i] for i in first]
        self.names = [self.names[i] for i in first]
        return kept, dropped


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
        self.told = Told()
        self._num_odd = Counter[str]()
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, rows: list[Row]) -> None:
        part = _annotations(rows, self.num_rows + 1, self.told)
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
        parts = self._parts or [_annotations([], 1, self.told)]
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


def _annotations(rows: list[Row], first: int, told: Told) -> dict[str, np.ndarray]:
    """The columns of `Annotations`; `first` is the position of the first row."""

    def whole(key: str) -> tuple[np.ndarray, np.ndarray]:
        return _numbers([row.get(key) for row in rows], key, first, told)

    ids, no_id = whole("id")
    for row in np.flatnonzero(no_id).tolist():
        told.add(NO_ID, first + row, "id", rows[row].get("id"))
    positions = np.arange(first, first + len(rows))
    image_ids, no_image = whole("image_id")
    category_ids, no_category = whole("category_id")
    xywh, well_formed = _box_columns(rows, first, told)
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
        "crowd": _crowd([row.get("iscrowd") for row in rows], first, told),
    }


def _numbers(values: list[Any], key: str, first: int, told: Told) -> tuple[np.ndarray, np.ndarray]:
    """int64 [M], 0 where a value is no integer, and bool [M], where that is so."""
    if set(map(type, values)) == {int}:
        with contextlib.suppress(OverflowError):
            return np.array(values, np.int64), np.zeros(len(values), np.bool_)
    numbers = [whole_number(value) for value in values]
    for row, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if number is not None and type(value) is not int:
            told.add(TEXT_NUMBER, first + row, key, value)
    column = np.array([number or 0 for number in numbers], np.int64)
    return column, np.array([number is None for number in numbers], np.bool_)


def _floats(values: list[Any]) -> np.ndarray:
    """float64 [M], NaN where a value is not a number."""
    if set(map(type, values)) <= {int, float}:
        with contextlib.suppress(OverflowError):
            return np.array(values, np.float64)
    return np.array([number_of(value) for value in values], np.float64)


def _box_columns(rows: list[Row], first: int, told: Told) -> tuple[np.ndarray, np.ndarray]:
    """xywh, float64 [M, 4], NaN where a box is not four numbers, and bool [M], which ones are."""
    boxes = [row.get("bbox") for row in rows]
    if set(map(type, boxes)) == {list} and set(map(len, boxes)) == {4}:  # type: ignore[arg-type]
        values = list(chain.from_iterable(boxes))  # type: ignore[arg-type]
        if set(map(type, values)) <= {int, float}:
            with contextlib.suppress(OverflowError):
                return np.array(values, np.float64).reshape(-1, 4), np.ones(len(boxes), np.bool_)
    read = [_box(row, first + index, told) for index, row in enumerate(rows)]
    columns = np.array([box or [np.nan] * 4 for box in read], np.float64).reshape(-1, 4)
    return columns, np.array([box is not None for box in read], np.bool_)


def _box(row: Row, position: int, told: Told) -> list[float] | None:
    """xywh of an annotation; None if its bbox is not four numbers."""
    box = row.get("bbox")
    if not box and isinstance(row.get("segmentation"), list):
        found = _box_around(row["segmentation"])
        if found is not None:
            told.add(POLYGON_BOX, position, "bbox", box)
        return found
    if not isinstance(box, list) or len(box) != 4 or any(type(v) is bool for v in box):
        return None
    numbers = [number_of(value) for value in box]
    as_text = [isinstance(value, str) for value in box]
    if any(np.isnan(n) and not isinstance(v, float) for n, v in zip(numbers, box, strict=True)):
        return None
    if any(as_text):
        told.add(TEXT_NUMBER, position, "bbox", box)
    return numbers


def _box_around(polygons: list[Any]) -> list[float] | None:
    """xywh of the box around polygons; None if one is not x, y, x, y, ..."""
    points: list[float] = []
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return None
        points += [number_of(value) for value in polygon]
    if not points or not np.isfinite(points).all():
        return None
    xs, ys = points[::2], points[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _crowd(values: list[Any], first: int, told: Told) -> np.ndarray:
    """bool [M]; a value that is no truth value is reported and False."""
    if set(map(type, values)) <= {int, bool, type(None)} and set(values) <= {0, 1, None}:
        return np.fromiter(map(bool, values), np.bool_, len(values))
    read = [truth(value) for value in values]
    for row, (value, written) in enumerate(zip(read, values, strict=True)):
        if value is None or isinstance(written, str):
            kind = ODD_CROWD if value is None else TEXT_NUMBER
            told.add(kind, first + row, "iscrowd", written)
    return np.fromiter(map(bool, read), np.bool_, len(read))


def repeated_boxes(
    owners: np.ndarray, labels: np.ndarray, crowd: np.ndarray, boxes: np.ndarray
) -> np.ndarray:
    """bool [M]: whether an earlier box of the same image and class has the same corners."""
    repeated = np.zeros(len(owners), np.bool_)
    rows = _of_equal_sum(owners, labels, boxes)
    columns = [*boxes[rows].T, crowd[rows], labels[rows], owners[rows]]
    order = np.lexsort(columns)  # stable: the first of equal ones stays first
    same = np.ones(max(len(rows) - 1, 0), np.bool_)
    for column in columns:
        same &= column[order[1:]] == column[order[:-1]]
    repeated[rows[order[1:][same]]] = True
    return repeated


def _of_equal_sum(owners: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Rows whose weighted sum is that of another row: only these can be equal, and they are few.
    Sorting one column takes a tenth of the time of sorting six.
    """
    sums = owners * np.sqrt(3) + labels * np.sqrt(5)
    with np.errstate(invalid="ignore", over="ignore"):
        # Not by a matrix product, which may round equal rows differently.
        for column, weight in zip(
            boxes.T.astype(np.float64), (1, np.pi, np.e, 2**0.5), strict=True
        ):
            sums += column * weight
    ordered = np.sort(sums)
    return np.flatnonzero(np.isin(sums, ordered[1:][ordered[1:] == ordered[:-1]]))


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
