"""COCO files: one for all images of a task, matched by the base name of the image file."""

import gc
import json
import math
import os
from typing import Any

from trainer.readers.values import number_of, shortened, truth, whole_number
from ymir_adapter.dataset.columns import Classes, Columns, Notes, Status


class CocoDocument:
    """A COCO file by base name of its images. An unusable file makes every image unusable."""

    def __init__(self, data: bytes, classes: Classes, path: str, notes: Notes) -> None:
        self.path = path
        self.columns = Columns()
        self.rows: dict[str, list[int]] = {}  # base name to rows of the columns
        self.status, self.fault = Status.READ, ""
        try:
            content = _parsed(data)
        except (ValueError, RecursionError) as error:
            self.status, self.fault = Status.BROKEN, f"is not JSON ({error})"
            return
        keys = ("images", "annotations")
        if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
            self.status = Status.UNKNOWN
            self.fault = "is JSON, but not COCO; set export_format to det-ark:raw"
            return
        self._fill(content, classes, notes)

    def read(self, owner: int, image: str, columns: Columns, notes: Notes) -> Status:
        """Adds the boxes of one image. Returns MISSING if the file does not contain it."""
        if self.status is Status.BROKEN:
            return notes.broken(self.fault, self.path)
        if self.status is Status.UNKNOWN:
            kind = "annotations of an unknown format"
            notes.add(kind, "error", "removed", self.fault, self.path)
            return self.status
        rows = self.rows.get(os.path.basename(image))
        if rows is None:
            return Status.MISSING
        own = self.columns
        for row in rows:
            box = own.boxes[4 * row : 4 * row + 4]
            columns.add(owner, own.labels[row], box, bool(own.crowd[row]))
        return Status.READ

    def _fill(self, content: dict[str, Any], classes: Classes, notes: Notes) -> None:
        names: dict[Any, str] = {}
        for image in content["images"]:
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                name = os.path.basename(image["file_name"].replace("\\", "/"))
                self.rows[name] = []
                names[_key(image.get("id"))] = name
        names.pop(None, None)
        labels = _category_labels(content.get("categories"), classes)
        for number, row in enumerate(content["annotations"], 1):
            row = row if isinstance(row, dict) else {}
            image, category = names.get(_key(row.get("image_id"))), row.get("category_id")
            own_id = _key(category)
            label = labels.get(own_id, -2)
            if label == -2 and isinstance(own_id, int) and 0 <= own_id < classes.count:
                label = own_id  # the platform's ids are indices of class_names
            box = _xyxy(row.get("bbox"))
            place = f"annotation {number} of image {row.get('image_id')}"
            if image is None:
                notes.skipped("unknown image id", place, self.path)
            elif label < 0:
                notes.skipped("class outside the task", f"{place}: {category}", self.path)
            elif box is None:
                notes.skipped("malformed box", f"{place}: {row.get('bbox')}", self.path)
            elif box[2] <= box[0] or box[3] <= box[1]:
                notes.skipped("box without extent", f"{place}: {row.get('bbox')}", self.path)
            else:
                crowd = truth(row.get("iscrowd"))
                if crowd is None:
                    detail = f"{place}: iscrowd {shortened(row['iscrowd'])}"
                    notes.add("malformed iscrowd", "warning", "read as 0", detail, self.path)
                self.rows[image].append(len(self.columns.labels))
                self.columns.add(0, label, box, bool(crowd))


def _parsed(data: bytes) -> Any:
    """Parses JSON without garbage collection, which would walk millions of live objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(data.removeprefix(b"\xef\xbb\xbf"))
    finally:
        if enabled:
            gc.enable()


def _category_labels(categories: Any, classes: Classes) -> dict[Any, int]:
    """Category id to label, by name; -1 for a class outside the task."""
    rows = categories if isinstance(categories, list) else []
    return {
        _key(row.get("id")): classes.label(row["name"])
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("name"), str)
    }


def _key(value: Any) -> Any:
    """An id as a dictionary key, a number in any spelling as an int; None for what is no id."""
    number = whole_number(value)
    return number if number is not None else value if isinstance(value, str) else None


def _xyxy(bbox: Any) -> tuple[float, float, float, float] | None:
    """xyxy from [x, y, width, height]; None if these are not four finite numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    x, y, width, height = (number_of(number) for number in bbox)
    if not all(map(math.isfinite, (x, y, width, height))):
        return None
    return x, y, x + width, y + height
