"""A COCO file as columns: each annotation with its image, its label and, if it is left out, the
reason. The trainer and `vidt evaluate` both use this reader. NumPy, without PyTorch.

The file is read part by part: a million annotations are common. Boxes stay as annotated:
`trainer.readers.coco_columns.judge_boxes` judges them.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.readers.classes import ClassMatch, is_text, match_classes
from trainer.readers.coco_columns import AnnotationColumns, Annotations, ImageColumns, Row
from trainer.readers.findings import Finding, listed
from trainer.readers.json_stream import NotJSON, read_members
from trainer.readers.run_lengths import RunLengths, read_segmentation
from trainer.readers.values import existing_name, shortened, whole_number
from vidt.errors import UserError

# Why an annotation is left out; the first reason that applies counts.
UNKNOWN_IMAGE, UNKNOWN_CATEGORY, MALFORMED_BOX, FOREIGN_CLASS, NO_FAULT = range(5)


@dataclass(frozen=True, eq=False)
class CocoFile:
    """N images and M annotations; `source` names the file in messages. `findings` are about values
    that COCO writes otherwise, and images that are there twice.
    """

    path: str
    source: str
    own_names: dict[int, str]  # the file's classes by its own category ids
    classes: ClassMatch
    images: ImageColumns
    annotations: Annotations
    odd: dict[int, Row]  # the first annotations with values that are not numbers, by position
    owners: np.ndarray  # int64 [M], the image, 0..N-1, of each; -1 if unknown
    labels: np.ndarray  # int64 [M], -1 for a class that is not trained, -2 for an unknown one
    faults: np.ndarray  # int64 [M], UNKNOWN_IMAGE to NO_FAULT
    findings: list[Finding] = field(default_factory=list)
    masks: Sequence[RunLengths] | None = None  # of M annotations; None: those of the file `path`


def read_coco_file(
    json_path: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    *,
    source: str | None = None,
    drop_unused_parents: bool = False,
) -> CocoFile:
    """Read a file. Labels follow the sorted category ids, or `class_names`, matched by name.
    Findings name the file as `source`, by default by its own name.

    An image file that is there twice counts once, with the boxes of both entries. With
    `drop_unused_parents`, a category that no annotation has and that others name as their
    supercategory is no class: Roboflow writes one. So it is where its name is used twice.

    Raises UserError, in one line, if the file is missing, is not COCO JSON, has no images, or uses
    an image id or category name twice.
    """
    images, annotations, categories = ImageColumns(), AnnotationColumns(), list[Row]()
    _read(json_path, images, annotations, categories)
    own_names = _category_names(json_path, categories)
    columns = annotations.joined()
    source = source or os.path.basename(json_path)
    parents: list[Finding] = []
    twice = len({*own_names.values()}) < len(own_names)  # Roboflow names a project as its class
    if drop_unused_parents or twice:
        parents = _drop_unused_parents(own_names, categories, columns, source, str(json_path))
    classes = match_classes(str(json_path), own_names, class_names)
    _require_images(json_path, images)
    findings = images.told.findings(source, str(json_path))
    findings += annotations.told.findings(source, str(json_path))
    owners, more = _owners_in_files(columns, images, source)
    labels = _labels(columns, classes)
    faulty = [owners < 0, labels == -2, columns.no_box, labels == -1]
    return CocoFile(
        path=str(json_path),
        source=source,
        own_names=own_names,
        classes=classes,
        images=images,
        annotations=columns,
        odd=annotations.odd,
        owners=owners,
        labels=labels,
        faults=np.select(faulty, list(range(len(faulty))), default=NO_FAULT),
        findings=[*findings, *parents, *more],
    )


def locate_images(file: CocoFile, folder: str) -> None:
    """Replace file names with backslashes, as Windows writes them, by those that exist in `folder`,
    with a finding in `file.findings`.
    """
    names = file.images.names
    found = {i: existing_name(folder, names[i]) for i, name in enumerate(names) if "\\" in name}
    changed = [index for index, name in found.items() if name != names[index]]
    if changed:
        detail = f"backslashes in file names are read as /; the first: {names[changed[0]]}"
        kind, count = "file name with backslashes", len(changed)
        file.findings.append(Finding(kind, "info", "read", detail, file.source, count=count))
    for index in changed:
        names[index] = found[index]


def _read(
    json_path: str | os.PathLike[str],
    images: ImageColumns,
    annotations: AnnotationColumns,
    categories: list[Row],
) -> None:
    add = {"images": images.add, "annotations": annotations.add, "categories": categories.extend}
    present: set[str] = set()
    try:
        for key, rows in read_members(json_path):
            if key not in add:
                continue
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise _needs_list(json_path, key)
            add[key](rows)
            present.add(key)
    except OSError as error:
        raise UserError(f"{json_path}: cannot be read ({error.strerror})") from error
    except NotJSON as error:
        raise UserError(f"{json_path}: not JSON ({error})") from error
    for key in add:
        if key not in present:
            raise _needs_list(json_path, key)
    if not images.num_rows:
        raise UserError(f'{json_path}: empty dataset: its list "images" has no entry')


def _needs_list(json_path: str | os.PathLike[str], key: str) -> UserError:
    return UserError(f'{json_path}: not COCO JSON: it needs a list of objects "{key}"')


def _category_names(json_path: str | os.PathLike[str], categories: list[Row]) -> dict[int, str]:
    names: dict[int, str] = {}
    for category in categories:
        own_id, name = whole_number(category.get("id")), category.get("name")
        if own_id is None or not isinstance(name, str) or own_id in names:
            raise UserError(
                f"{json_path}: category {shortened(category)} needs a name and an integer id of "
                "its own, of 64 bits"
            )
        if not is_text(name):  # half of a surrogate pair
            raise UserError(
                f"{json_path}: category {shortened(category)} has a name that is no text"
            )
        names[own_id] = name
    return names


def _drop_unused_parents(
    own_names: dict[int, str],
    categories: list[Row],
    annotations: Annotations,
    source: str,
    path: str,
) -> list[Finding]:
    """Removes from `own_names` the categories that others name as their supercategory and that no
    annotation has, unless nothing would be left. Returns a finding for each.
    """
    used = {*annotations.category_ids[~annotations.no_category].tolist()}
    unused = [
        own_id
        for own_id, name in own_names.items()
        if own_id not in used
        and any(
            row.get("supercategory") == name and whole_number(row.get("id")) != own_id
            for row in categories
        )
    ]
    if len(unused) == len(own_names):
        return []
    findings = []
    for own_id in unused:
        name = own_names.pop(own_id)
        detail = f"category {own_id}, {name!r}, is a supercategory of others and has no box"
        findings.append(Finding("unused super-category", "info", "no class", detail, source, path))
    return findings


def _require_images(json_path: str | os.PathLike[str], images: ImageColumns) -> None:
    """Raises UserError if no image can be used, or two have the same id."""
    repeated = images.repeated()
    if repeated:
        own_id, first, second = repeated
        raise UserError(
            f"{json_path}: image id {own_id} is used twice ({first}, {second}); ids must differ"
        )
    if not images.ids:
        raise UserError(
            f"{json_path}: no image has an integer id of 64 bits and a file_name; the first is "
            f"{shortened(images.malformed[0], 200)}"
        )


def _owners_in_files(
    annotations: Annotations, images: ImageColumns, source: str
) -> tuple[np.ndarray, list[Finding]]:
    """`_owners`, after images whose file is there twice have become one."""
    owners = _owners(annotations, images.ids)
    ids, names = images.ids, images.names
    dropped = images.drop_repeated()
    if dropped is None:
        return owners, []
    row_of, others = dropped

    def finding(row: int) -> Finding:
        detail = f"the file belongs to image {images.ids[int(row_of[row])]}, too"
        action = "counted once, with the boxes of both"
        return Finding("image twice", "warning", action, detail, source, names[row], ids[row])

    return np.where(owners >= 0, row_of[owners], -1), listed(others, finding)


def _owners(annotations: Annotations, image_ids: list[int]) -> np.ndarray:
    """The image, 0..N-1, of each annotation, -1 if unknown: int64 [M]."""
    ids = np.array(image_ids, np.int64)
    order = ids.argsort()
    ranks = np.searchsorted(ids, annotations.image_ids, sorter=order)
    owners = order[ranks.clip(max=len(ids) - 1)]
    known = (ids[owners] == annotations.image_ids) & ~annotations.no_image
    return np.where(known, owners, -1)


def _labels(annotations: Annotations, classes: ClassMatch) -> np.ndarray:
    """-1 for a class that is not trained, -2 for an unknown category: int64 [M]."""
    used, inverse = np.unique(annotations.category_ids, return_inverse=True)
    labels = np.array([classes.label_of.get(own_id, -2) for own_id in used.tolist()], np.int64)
    return np.where(annotations.no_category, -2, labels[inverse] if len(used) else inverse)


def read_masks(
    file: CocoFile, keep: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, RunLengths, str]]:
    """Yield (row, run lengths, problem) of the annotations where `keep`, bool [M], holds; run
    lengths are b"" for no mask, the problem "" for none. sizes: (height, width) of each image,
    (0, 0) if unknown.

    This reads the file a second time, because images may follow the annotations in it.
    """
    if file.masks is not None:
        yield from ((row, file.masks[row], "") for row in np.flatnonzero(keep).tolist())
        return
    row = -1
    for key, part in read_members(file.path):
        for annotation in part if key == "annotations" else ():
            row += 1
            if not keep[row]:
                continue
            segmentation, size = annotation.get("segmentation"), sizes[int(file.owners[row])]
            if segmentation and size == (0, 0):
                yield row, b"", "the annotations do not give the size of its image"
                continue
            try:
                yield row, read_segmentation(segmentation, size), ""
            except ValueError as error:
                yield row, b"", str(error)
