"""COCO JSON to a sample table.

The modules import each other in one direction: this one, `coco_file`, `coco_columns`, then
`json_stream`. All but this one work without PyTorch, because `vidt evaluate` reads with them.

Boxes stay as annotated: `trainer.data.dataset_check` repairs them. This reader leaves out only what
a table cannot hold, with a finding for each.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trainer.readers.classes import foreign_class_findings
from trainer.readers.coco_file import (
    FOREIGN_CLASS,
    MALFORMED_BOX,
    NO_FAULT,
    UNKNOWN_CATEGORY,
    UNKNOWN_IMAGE,
    CocoFile,
    locate_images,
    read_coco_file,
    read_masks,
)
from trainer.readers.findings import FilesSeen, Finding, fold, listed
from trainer.readers.masks import MaskColumn
from trainer.readers.run_lengths import RunLengths
from trainer.readers.samples import SampleTable
from trainer.readers.values import shortened
from vidt.errors import UserError

# Kind of finding, the key at fault, and the detail with its value.
_FAULTS = {
    UNKNOWN_IMAGE: ("unknown image id", "image_id", "image_id {} is not among the images"),
    UNKNOWN_CATEGORY: (
        "unknown category id",
        "category_id",
        "category_id {} is not among the categories",
    ),
    MALFORMED_BOX: ("malformed box", "bbox", "bbox {} is not four numbers"),
}


def coco_folder(coco_path: str | os.PathLike[str], split: str) -> tuple[Path, Path]:
    """(JSON file, image folder) of `split`, "train" or "val", in the layout of COCO 2017."""
    root = Path(coco_path)
    json_path = root / "annotations" / f"instances_{split}2017.json"
    image_dir = root / f"{split}2017"
    for path in (json_path, image_dir):
        if not path.exists():
            raise UserError(f"{path}: not found; is --coco_path {root} a folder in COCO's layout?")
    return json_path, image_dir


def read_coco(
    json_path: str | os.PathLike[str],
    image_dir: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    *,
    masks: bool = False,
    seen: FilesSeen | None = None,
    source: str | None = None,
    drop_unused_parents: bool = False,
) -> tuple[SampleTable, list[Finding]]:
    """Read a COCO file and list what was left out.

    Labels follow the sorted category ids, or `class_names` if given, as a validation set takes
    those of its training set. Categories are then matched by name, and boxes of other classes are
    left out with a finding, since the model has no output for them. Segmentations are read only
    with `masks`; an object whose segmentation is unusable keeps its box. Files that are dealt with
    are added to `seen`. Findings and the table name the split as `source`, by default by the JSON
    file's name; two splits need names that differ. `drop_unused_parents` is as in `read_coco_file`.

    Raises UserError, in one line, if the file or folder is missing, is not COCO JSON, has no
    images, or uses an image id or category name twice.
    """
    if not os.path.isdir(image_dir):
        raise UserError(f"{image_dir}: no such image folder")
    file = read_coco_file(
        json_path, class_names, source=source, drop_unused_parents=drop_unused_parents
    )
    images, annotations = file.images, file.annotations
    folder = os.fspath(image_dir)
    locate_images(file, folder)
    findings = [*file.findings, *_image_findings(file), *_fault_findings(file, folder)]
    paths = [os.path.join(folder, name) for name in images.names]
    if seen is not None:
        seen.folders.add(folder)
        seen.files.update(map(os.path.normpath, [*paths, os.fspath(json_path)]))
    foreign = annotations.category_ids[file.faults == FOREIGN_CLASS].tolist()
    names = (file.own_names[own_id] for own_id in foreign)
    findings += foreign_class_findings(file.source, names, file.classes.names)

    keep = file.faults == NO_FAULT
    without_area = int((keep & annotations.no_area).sum())
    if without_area:
        detail = "annotations without area: the area of the box is used"
        findings.append(
            Finding("missing area", "info", "computed", detail, file.source, count=without_area)
        )
    found_masks = None
    if masks:
        found_masks, more = _masks(file, keep, folder)
        findings += more
    table = SampleTable.from_columns(
        source=file.source,
        class_names=file.classes.names,
        category_ids=file.classes.category_ids,
        paths=paths,
        image_ids=images.ids,
        sizes=images.sizes,
        owners=_kept(file.owners, keep),
        boxes=_kept(annotations.boxes, keep),
        labels=_kept(file.labels, keep),
        areas=_kept(annotations.areas, keep),
        crowd=_kept(annotations.crowd, keep),
        annotation_ids=_kept(annotations.ids, keep),
        masks=found_masks,
    )
    return table, findings


def _kept(column: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return column if keep.all() else column[keep]


def _image_findings(file: CocoFile) -> list[Finding]:
    malformed = file.images.malformed

    def finding(row: int) -> Finding:
        needs = "needs an integer id of 64 bits and a valid file_name"
        detail = f"image entry {shortened(malformed[row], 200)} {needs}"
        return Finding("malformed image", "error", "removed", detail, file.source)

    return listed(range(file.images.num_malformed), finding)


def _fault_findings(file: CocoFile, folder: str) -> Iterator[Finding]:
    rows = file.annotations
    columns = {
        "image_id": (rows.image_ids, rows.no_image),
        "category_id": (rows.category_ids, rows.no_category),
        "bbox": (rows.boxes, rows.no_box),
    }

    def finding(row: int) -> Finding:
        kind, key, detail = _FAULTS[int(file.faults[row])]
        numbers, is_odd = columns[key]
        if row in file.odd:
            value = shortened(file.odd[row].get(key), 200)
        else:  # only the values of the first odd rows are stored
            value = "(not shown)" if is_odd[row] else str(numbers[row])
        return _finding(file, folder, row, kind, "dropped", detail.format(value))

    for fault in _FAULTS:
        yield from listed(np.flatnonzero(file.faults == fault).tolist(), finding)


def _finding(file: CocoFile, folder: str, row: int, kind: str, action: str, detail: str) -> Finding:
    """A finding about an annotation."""
    owner = int(file.owners[row])
    return Finding(
        kind=kind,
        severity="warning",
        action=action,
        detail=detail,
        source=file.source,
        file=os.path.join(folder, file.images.names[owner]) if owner >= 0 else "",
        image_id=file.images.ids[owner] if owner >= 0 else None,
        annotation_id=int(file.annotations.ids[row]),
    )


def _masks(
    file: CocoFile, keep: np.ndarray, folder: str
) -> tuple[MaskColumn | None, list[Finding]]:
    """The masks of the rows where `keep` holds, None if no object has one; and the findings."""
    found: list[RunLengths] = []
    num_malformed = 0

    def problems() -> Iterator[Finding]:
        nonlocal num_malformed
        for row, mask, problem in read_masks(file, keep, file.images.sizes):
            found.append(mask)
            if problem:
                num_malformed += 1
                action = "only its box is used"
                yield _finding(file, folder, row, "malformed mask", action, problem)

    findings = fold(problems())
    without = sum(not mask for mask in found) - num_malformed
    if without:
        detail = "objects without a mask: only their boxes are used"
        findings.append(Finding("no mask", "info", "kept", detail, file.source, count=without))
    return MaskColumn.from_run_lengths(found) if any(found) else None, findings
