"""COCO JSON to a sample table.

Read by columns, since a million annotations are usual. Boxes stay as annotated, however wrong:
`trainer.dataset_check` repairs them. Left out here, with a finding each, is only what a table
cannot hold.
"""

import gc
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.classes import ClassMatch, foreign_class_findings, match_classes
from trainer.findings import Finding
from trainer.masks import MaskColumn, RunLengths, read_segmentation
from trainer.samples import SampleTable

_FOREIGN = "class not trained"
# Checked in this order; the value formats the annotation's entry under the key.
_FAULTS = {
    "unknown image id": ("image_id", "image_id {} is not among the images"),
    "unknown category id": ("category_id", "category_id {} is not among the categories"),
    "malformed box": ("bbox", "bbox {} is not four numbers"),
}


@dataclass(frozen=True)
class _Columns:
    """Annotations as arrays of M rows: owner -1 for no known image, label -1 for a class that is
    not to be learnt and -2 for an unknown category, areas NaN where there is none."""

    ids: np.ndarray
    owners: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray  # float64 [M, 4], xyxy
    well_formed: np.ndarray  # bool
    areas: np.ndarray
    crowd: np.ndarray


def coco_folder(coco_path: str | os.PathLike[str], split: str) -> tuple[Path, Path]:
    """(JSON file, image folder) of `split`, "train" or "val", in the layout of COCO 2017."""
    root = Path(coco_path)
    json_path = root / "annotations" / f"instances_{split}2017.json"
    image_dir = root / f"{split}2017"
    for path in (json_path, image_dir):
        if not path.exists():
            raise ValueError(f"{path}: not found; is --coco_path {root} a folder in COCO's layout?")
    return json_path, image_dir


def read_coco(
    json_path: str | os.PathLike[str],
    image_dir: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    *,
    masks: bool = False,
) -> tuple[SampleTable, list[Finding]]:
    """Read a COCO file and list what had to be left out.

    Labels follow the sorted category ids, or `class_names` where given (a validation set takes
    those of its training set): categories are then matched by name, and boxes of other classes
    are left out with a finding, since the model has no output for them. Segmentations are read only
    if `masks` are asked for; an object whose own is unusable keeps its box.

    Raises ValueError, in one line, if the file or folder is missing, is not COCO JSON, has no
    images, or uses an image id or category name twice.
    """
    if not os.path.isdir(image_dir):
        raise ValueError(f"{image_dir}: no such image folder")
    source = os.path.basename(json_path)
    document = _load(json_path)
    own_names = _category_names(json_path, document["categories"])
    classes = match_classes(str(json_path), own_names, class_names)
    images, findings = _valid_images(json_path, source, document["images"])
    columns = _columns(document["annotations"], images, classes)

    faults = _faults(columns)
    paths = [os.path.join(image_dir, image["file_name"]) for image in images]
    findings += _fault_findings(source, document["annotations"], images, paths, columns, faults)
    foreign = np.flatnonzero(faults == _FOREIGN).tolist()
    categories = (own_names[document["annotations"][row]["category_id"]] for row in foreign)
    findings += foreign_class_findings(source, categories)

    keep = faults == ""
    num_without_area = int((keep & np.isnan(columns.areas)).sum())
    if num_without_area:
        detail = "annotations without area: that of the box is used"
        findings.append(
            Finding("missing area", "info", "computed", detail, source, count=num_without_area)
        )
    found_masks = None
    if masks:
        annotations = document["annotations"]
        found_masks, more = _masks(source, annotations, images, paths, columns, keep)
        findings += more
    table = SampleTable.from_columns(
        source=source,
        class_names=classes.names,
        category_ids=classes.category_ids,
        paths=paths,
        image_ids=[image["id"] for image in images],
        sizes=[_size(image) for image in images],
        owners=columns.owners[keep],
        boxes=columns.boxes[keep],
        labels=columns.labels[keep],
        areas=np.where(np.isnan(columns.areas), _box_areas(columns.boxes), columns.areas)[keep],
        crowd=columns.crowd[keep],
        annotation_ids=columns.ids[keep],
        masks=found_masks,
    )
    return table, findings


def _load(json_path: str | os.PathLike[str]) -> dict[str, list[dict[str, Any]]]:
    try:
        with _gc_paused():
            document = json.loads(Path(json_path).read_bytes())
    except OSError as error:
        raise ValueError(f"{json_path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{json_path}: not JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        rows = document.get(key) if isinstance(document, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'{json_path}: not COCO JSON: it needs a list of objects "{key}"')
    if not document["images"]:
        raise ValueError(f'{json_path}: empty dataset: its list "images" has no entry')
    return document


@contextmanager
def _gc_paused() -> Iterator[None]:
    """No garbage collection: it would walk the millions of objects of a document again and again
    though none of them is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _category_names(
    json_path: str | os.PathLike[str], categories: list[dict[str, Any]]
) -> dict[int, str]:
    names: dict[int, str] = {}
    for category in categories:
        own_id, name = category.get("id"), category.get("name")
        if not isinstance(own_id, int) or not isinstance(name, str) or own_id in names:
            raise ValueError(
                f"{json_path}: category {category} needs a name and an integer id of its own"
            )
        names[own_id] = name
    return names


def _valid_images(
    json_path: str | os.PathLike[str], source: str, images: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[Finding]]:
    valid: dict[int, dict[str, Any]] = {}
    findings = []
    for image in images:
        own_id, name = image.get("id"), image.get("file_name")
        if not isinstance(own_id, int) or not isinstance(name, str) or not name:
            detail = f"image entry {image} needs an integer id and a file_name"
            findings.append(Finding("malformed image", "error", "removed", detail, source))
        elif own_id in valid:
            raise ValueError(
                f"{json_path}: image id {own_id} is used twice "
                f"({valid[own_id]['file_name']}, {name}); ids must differ"
            )
        else:
            valid[own_id] = image
    if not valid:
        raise ValueError(f"{json_path}: no image has an integer id and a file_name")
    return list(valid.values()), findings


def _columns(
    annotations: list[dict[str, Any]], images: list[dict[str, Any]], classes: ClassMatch
) -> _Columns:
    index_of = {image["id"]: index for index, image in enumerate(images)}
    xywh, well_formed = _box_columns([row.get("bbox") for row in annotations])
    return _Columns(
        ids=np.array(
            [
                row["id"] if isinstance(row.get("id"), int) else position
                for position, row in enumerate(annotations, 1)
            ],
            np.int64,
        ),
        owners=_looked_up(index_of, (row.get("image_id") for row in annotations), -1),
        labels=_looked_up(classes.label_of, (row.get("category_id") for row in annotations), -2),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
        well_formed=well_formed,
        areas=np.array([_number(row.get("area")) for row in annotations], np.float64),
        crowd=np.array([bool(row.get("iscrowd")) for row in annotations], np.bool_),
    )


def _looked_up(numbers: Any, keys: Iterable[Any], default: int) -> np.ndarray:
    # A list or an object in place of an id is as unknown as any number, but cannot be looked up.
    return np.array(
        [numbers.get(key, default) if isinstance(key, int) else default for key in keys], np.int64
    )


def _box_columns(boxes: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """xywh, float64 [M, 4], and which are four numbers; the rest is NaN."""
    well_formed = np.array([isinstance(box, list) and len(box) == 4 for box in boxes], np.bool_)
    missing = [np.nan] * 4
    filled = [box if good else missing for box, good in zip(boxes, well_formed, strict=True)]
    try:
        return np.array(filled, np.float64).reshape(-1, 4), well_formed
    except (TypeError, ValueError):  # something that is no number in some box: look at each value
        xywh = np.array([[_number(value) for value in box] for box in filled]).reshape(-1, 4)
        return xywh, well_formed & np.array(
            [all(isinstance(value, (int, float)) for value in box) for box in filled]
        )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _faults(columns: _Columns) -> np.ndarray:
    """The first reason why each annotation cannot be used, "" for none."""
    faulty = [
        columns.owners < 0,
        columns.labels == -2,
        ~columns.well_formed,
        columns.labels == -1,
    ]
    return np.select(faulty, [*_FAULTS, _FOREIGN], default="")


def _fault_findings(
    source: str,
    annotations: list[dict[str, Any]],
    images: list[dict[str, Any]],
    paths: list[str],
    columns: _Columns,
    faults: np.ndarray,
) -> list[Finding]:
    findings = []
    for row in np.flatnonzero(np.isin(faults, list(_FAULTS))).tolist():
        kind = str(faults[row])
        key, detail = _FAULTS[kind]
        owner = int(columns.owners[row])
        findings.append(
            Finding(
                kind=kind,
                severity="warning",
                action="dropped",
                detail=detail.format(annotations[row].get(key)),
                source=source,
                file=paths[owner] if owner >= 0 else "",
                image_id=images[owner]["id"] if owner >= 0 else None,
                annotation_id=int(columns.ids[row]),
            )
        )
    return findings


def _masks(
    source: str,
    annotations: list[dict[str, Any]],
    images: list[dict[str, Any]],
    paths: list[str],
    columns: _Columns,
    keep: np.ndarray,
) -> tuple[MaskColumn | None, list[Finding]]:
    """The masks of the rows where `keep` holds; None if not one of them has any."""
    found: list[RunLengths] = []
    findings = []
    for row in np.flatnonzero(keep).tolist():
        owner = int(columns.owners[row])
        mask, problem = _mask(annotations[row].get("segmentation"), _size(images[owner]))
        found.append(mask)
        if problem:
            findings.append(
                Finding(
                    kind="malformed mask",
                    severity="warning",
                    action="only its box is used",
                    detail=problem,
                    source=source,
                    file=paths[owner],
                    image_id=images[owner]["id"],
                    annotation_id=int(columns.ids[row]),
                )
            )
    without = sum(not mask for mask in found) - len(findings)
    if without:
        detail = "objects without a mask: only their boxes are used"
        findings.append(Finding("no mask", "info", "kept", detail, source, count=without))
    return MaskColumn.from_run_lengths(found) if any(found) else None, findings


def _mask(segmentation: Any, size: tuple[int, int]) -> tuple[RunLengths, str]:
    """Run lengths, b"" for none, and what is wrong if something is."""
    if segmentation and size == (0, 0):
        return b"", "the annotations do not give the size of its image"
    try:
        return read_segmentation(segmentation, size), ""
    except ValueError as error:
        return b"", str(error)


def _box_areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _size(image: dict[str, Any]) -> tuple[int, int]:
    """(height, width), (0, 0) if not given."""
    height, width = _number(image.get("height")), _number(image.get("width"))
    return (int(height), int(width)) if height > 0 and width > 0 else (0, 0)
