"""COCO JSON to a sample table.

Read part by part into columns, since a million annotations are usual. Boxes stay as annotated,
however wrong: `trainer.dataset_check` repairs them. Left out here, with a finding each, is only
what a table cannot hold.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.classes import ClassMatch, foreign_class_findings, match_classes
from trainer.coco_columns import AnnotationColumns, Annotations, ImageColumns, Row
from trainer.findings import Finding
from trainer.json_stream import NotJSON, read_members
from trainer.masks import MaskColumn, RunLengths, read_segmentation
from trainer.samples import SampleTable

# Why an annotation is left out; checked in this order. The value formats what it has under the key.
_FAULTS = (
    ("unknown image id", "image_id", "image_id {} is not among the images"),
    ("unknown category id", "category_id", "category_id {} is not among the categories"),
    ("malformed box", "bbox", "bbox {} is not four numbers"),
)
_FOREIGN = len(_FAULTS)  # a class that is not to be learnt
_NO_FAULT = _FOREIGN + 1


@dataclass(frozen=True, eq=False)
class _Document:
    """A file's lists; `source` and `image_dir` as in the table."""

    source: str
    image_dir: str
    categories: list[Row]
    images: ImageColumns
    annotations: Annotations
    odd: dict[int, Row]  # annotations with something else than numbers, by place

    def path(self, image: int) -> str:
        return os.path.join(self.image_dir, self.images.names[image])


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
    document = _load(json_path, os.fspath(image_dir))
    own_names = _category_names(json_path, document.categories)
    classes = match_classes(str(json_path), own_names, class_names)
    findings = _image_findings(json_path, document)

    annotations, images = document.annotations, document.images
    owners = _owners(annotations, images.ids)
    labels = _labels(annotations, classes)
    faults = _faults(annotations, owners, labels)
    findings += _fault_findings(document, owners, faults)
    foreign = annotations.category_ids[faults == _FOREIGN].tolist()
    findings += foreign_class_findings(document.source, (own_names[own_id] for own_id in foreign))

    keep = faults == _NO_FAULT
    without_area = int((keep & annotations.no_area).sum())
    if without_area:
        detail = "annotations without area: that of the box is used"
        findings.append(
            Finding("missing area", "info", "computed", detail, document.source, count=without_area)
        )
    found_masks = None
    if masks:
        found_masks, more = _masks(json_path, document, owners, keep)
        findings += more
    table = SampleTable.from_columns(
        source=document.source,
        class_names=classes.names,
        category_ids=classes.category_ids,
        paths=(document.path(image) for image in range(len(images.ids))),
        image_ids=images.ids,
        sizes=images.sizes,
        owners=_kept(owners, keep),
        boxes=_kept(annotations.boxes, keep),
        labels=_kept(labels, keep),
        areas=_kept(annotations.areas, keep),
        crowd=_kept(annotations.crowd, keep),
        annotation_ids=_kept(annotations.ids, keep),
        masks=found_masks,
    )
    return table, findings


def _load(json_path: str | os.PathLike[str], image_dir: str) -> _Document:
    images, annotations, categories = ImageColumns(), AnnotationColumns(), list[Row]()
    add = {"images": images.add, "annotations": annotations.add, "categories": categories.extend}
    missing = dict.fromkeys(add)
    try:
        for key, rows in read_members(json_path):
            if key not in add:
                continue
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                missing = {key: None}
                break
            add[key](rows)
            missing.pop(key, None)
    except OSError as error:
        raise ValueError(f"{json_path}: cannot be read ({error.strerror})") from error
    except NotJSON as error:
        raise ValueError(f"{json_path}: not JSON ({error})") from error
    for key in missing:
        raise ValueError(f'{json_path}: not COCO JSON: it needs a list of objects "{key}"')
    if not images.num_rows:
        raise ValueError(f'{json_path}: empty dataset: its list "images" has no entry')
    source = os.path.basename(json_path)
    columns = annotations.joined()
    return _Document(source, image_dir, categories, images, columns, annotations.odd)


def _category_names(
    json_path: str | os.PathLike[str], categories: list[Row]
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


def _image_findings(json_path: str | os.PathLike[str], document: _Document) -> list[Finding]:
    """Raises ValueError if no image is left, or two have the same id."""
    images = document.images
    repeated = images.repeated()
    if repeated:
        own_id, first, second = repeated
        raise ValueError(
            f"{json_path}: image id {own_id} is used twice ({first}, {second}); ids must differ"
        )
    if not images.ids:
        raise ValueError(f"{json_path}: no image has an integer id and a file_name")
    detail = "image entry {} needs an integer id and a file_name"
    return [
        Finding("malformed image", "error", "removed", detail.format(row), document.source)
        for row in images.malformed
    ]


def _owners(annotations: Annotations, image_ids: list[int]) -> np.ndarray:
    """The image, 0..N-1, of each annotation, -1 for none that is known: int64 [M]."""
    ids = np.array(image_ids, np.int64)
    order = ids.argsort()
    places = np.searchsorted(ids, annotations.image_ids, sorter=order)
    owners = order[places.clip(max=len(ids) - 1)]
    known = (ids[owners] == annotations.image_ids) & ~annotations.no_image
    return np.where(known, owners, -1)


def _labels(annotations: Annotations, classes: ClassMatch) -> np.ndarray:
    """-1 for a class that is not to be learnt, -2 for an unknown category: int64 [M]."""
    used, places = np.unique(annotations.category_ids, return_inverse=True)
    labels = np.array([classes.label_of.get(own_id, -2) for own_id in used.tolist()], np.int64)
    return np.where(annotations.no_category, -2, labels[places] if len(used) else places)


def _faults(annotations: Annotations, owners: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The first reason why each annotation cannot be used, as a place in _FAULTS, _FOREIGN or
    _NO_FAULT: int64 [M]."""
    faulty = [owners < 0, labels == -2, annotations.no_box, labels == -1]
    return np.select(faulty, list(range(len(faulty))), default=_NO_FAULT)


def _kept(column: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return column if keep.all() else column[keep]


def _fault_findings(document: _Document, owners: np.ndarray, faults: np.ndarray) -> list[Finding]:
    annotations, images = document.annotations, document.images
    findings = []
    for row in np.flatnonzero(faults < len(_FAULTS)).tolist():
        kind, key, detail = _FAULTS[faults[row]]
        owner = int(owners[row])
        ids = {"image_id": annotations.image_ids, "category_id": annotations.category_ids}
        entry = document.odd.get(row) or {key: int(ids[key][row])}
        findings.append(
            Finding(
                kind=kind,
                severity="warning",
                action="dropped",
                detail=detail.format(entry.get(key)),
                source=document.source,
                file=document.path(owner) if owner >= 0 else "",
                image_id=images.ids[owner] if owner >= 0 else None,
                annotation_id=int(annotations.ids[row]),
            )
        )
    return findings


def _masks(
    json_path: str | os.PathLike[str], document: _Document, owners: np.ndarray, keep: np.ndarray
) -> tuple[MaskColumn | None, list[Finding]]:
    """The masks of the rows where `keep` holds; None if not one of them has any. They are read a
    second time: before, sizes of images that come later in the file were not known.
    """
    images = document.images
    found: list[RunLengths] = []
    findings = []
    row = -1
    for key, part in read_members(json_path):
        for annotation in part if key == "annotations" else ():
            row += 1
            if not keep[row]:
                continue
            owner = int(owners[row])
            mask, problem = _mask(annotation.get("segmentation"), images.sizes[owner])
            found.append(mask)
            if problem:
                findings.append(
                    Finding(
                        kind="malformed mask",
                        severity="warning",
                        action="only its box is used",
                        detail=problem,
                        source=document.source,
                        file=document.path(owner),
                        image_id=images.ids[owner],
                        annotation_id=int(document.annotations.ids[row]),
                    )
                )
    without = sum(not mask for mask in found) - len(findings)
    if without:
        detail = "objects without a mask: only their boxes are used"
        findings.append(Finding("no mask", "info", "kept", detail, document.source, count=without))
    return MaskColumn.from_run_lengths(found) if any(found) else None, findings


def _mask(segmentation: Any, size: tuple[int, int]) -> tuple[RunLengths, str]:
    """Run lengths, b"" for none, and what is wrong if something is."""
    if segmentation and size == (0, 0):
        return b"", "the annotations do not give the size of its image"
    try:
        return read_segmentation(segmentation, size), ""
    except ValueError as error:
        return b"", str(error)
