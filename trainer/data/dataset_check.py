"""Check a dataset before training: repair or leave out what is wrong, and report all of it.

This reads only the header and the end of each image file, so it takes seconds. The loader handles
other damage when it decodes an image. `trainer.data.dataset_advice` looks for what is usable but
implausible.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.readers.coco_columns import judge_boxes, repeated_boxes
from trainer.readers.findings import (
    BadDataset,
    Finding,
    Severity,
    fold,
    hint_at_losses,
    listed,
    num_removed,
)
from trainer.readers.samples import SampleTable
from vidt.errors import UserError, counted
from vidt.images.files import ImageHeader, UnreadableImage, find_turn, probe_images

# Rounding in annotation tools moves boxes beyond the image by less than this many pixels.
_ROUNDING = 1.0
DEEP = "image of more than 8 bits"
_MOST_COMPARED_NAMES = 500  # classes


__all__ = ["BadDataset", "check", "clean", "shared_images"]


def clean(
    table: SampleTable,
    *,
    max_bad_fraction: float = 0.05,
    strict_images: bool = False,
    found: Sequence[Finding] = (),
) -> tuple[SampleTable, list[Finding]]:
    """Return the usable samples, with boxes inside their images, and all findings: those that the
    reader `found` first.

    Removes images that are missing, unreadable or of another size than annotated, and with
    `strict_images` truncated ones; drops boxes that are not finite, have no area, lie outside their
    image or are there twice; clips the others.

    Raises BadDataset if all images are removed, or more than the share `max_bad_fraction`, those
    that the reader removed included.
    """
    cleaned, _, findings = _clean(table, max_bad_fraction, strict_images, found)
    return cleaned, [*found, *findings]


def check(
    train: SampleTable,
    val: SampleTable,
    *,
    num_queries: int | None,
    max_bad_fraction: float = 0.05,
    strict_images: bool = False,
    found: Sequence[Finding] = (),
) -> tuple[SampleTable, SampleTable, list[Finding]]:
    """Clean both splits (see `clean`) and return them with all findings in and between them, after
    those that the reader `found`.

    `num_queries` is the number of [DET] tokens, the most objects that an image can have; with None
    it is not checked.

    Raises BadDataset as `clean` does, or if there is no box to learn from.
    """
    assert train.class_names == val.class_names, "read the validation set with train.class_names"
    train, train_headers, in_train = _clean(train, max_bad_fraction, strict_images, found)
    findings = [*found, *in_train]
    val, val_headers, in_val = _clean(val, max_bad_fraction, strict_images, findings)
    findings += in_val
    if num_queries is not None:
        for table in (train, val):
            findings += crowded_images(table, num_queries)
    findings += _classes_without_boxes(train, val)
    findings += _similar_class_names(train)
    findings += fold(_shared_images(train, train_headers, val, val_headers))
    if bool(train.crowd.all()):
        hint = hint_at_losses(findings, train.source)
        raise BadDataset(f"{train.source}: no image has a box to learn from{hint}", findings)
    return train, val, findings


def _clean(
    table: SampleTable, max_bad_fraction: float, strict_images: bool, found: Sequence[Finding]
) -> tuple[SampleTable, list[ImageHeader], list[Finding]]:
    """The usable samples, the headers of their images, and findings, without those `found`, which
    an error carries too.
    """
    table, headers, findings = _usable_images(table, max_bad_fraction, strict_images, found)
    findings += _file_findings(table, headers)
    table, box_findings = _clean_boxes(table)
    findings += box_findings
    findings += _images_without_boxes(table)
    findings += _crowd_boxes(table)
    return table, headers, findings


def _usable_images(
    table: SampleTable, max_bad_fraction: float, strict_images: bool, found: Sequence[Finding]
) -> tuple[SampleTable, list[ImageHeader], list[Finding]]:
    sizes = table.sizes.tolist()
    kept_sizes: list[tuple[int, int]] = []
    kept: list[int] = []
    headers: list[ImageHeader] = []

    def examined() -> Iterator[Finding]:
        for index, header in enumerate(probe_images(table.paths())):
            if strict_images and isinstance(header, ImageHeader) and header.truncated:
                header = UnreadableImage(f"{table.path(index)}: truncated, and --strict_images")
            finding, size = _examine(table, index, header, (sizes[index][0], sizes[index][1]))
            if size is not None and isinstance(header, ImageHeader):
                kept.append(index)
                headers.append(header)
                kept_sizes.append(size)
            if finding:
                yield finding

    findings = fold(examined())
    removed = num_removed(found, table.source)  # by the reader
    num_bad, total = len(table) - len(kept) + removed, len(table) + removed
    if not kept or num_bad > max_bad_fraction * total:
        findings = [*found, *findings]
        bad = [f for f in findings if f.action == "removed" and f.source == table.source]
        raise BadDataset(
            f"{table.source}: {num_bad} of {counted(total, 'image')} cannot be used, more "
            f"than --max_bad_fraction {max_bad_fraction:g} allows; the first: {bad[0].detail}",
            findings,
        )
    table = replace(table.subset(kept), sizes=torch.tensor(kept_sizes))
    return table, headers, findings


def _examine(
    table: SampleTable, index: int, header: ImageHeader | UnreadableImage, size: tuple[int, int]
) -> tuple[Finding | None, tuple[int, int] | None]:
    """The finding about an image, if any, and the (height, width) to read it at, None to remove."""

    def finding(kind: str, severity: Severity, action: str, detail: str) -> Finding:
        return _image_finding(table, index, kind, severity, action, detail)

    path = table.path(index)
    if isinstance(header, UnreadableImage):
        kind = "unreadable image" if os.path.exists(path) else "missing image"
        return finding(kind, "error", "removed", str(header)), None
    if size == (0, 0):
        detail = "the annotations give no size: that of the file is used"
        if header.orientation != 1:
            detail = (
                f"EXIF orientation {header.orientation} not applied: the annotations give no size, "
                "so that of the stored pixels is used"
            )
            kind, action = "EXIF-rotated image", "kept as stored"
            return finding(kind, "warning", action, detail), header.size
        return finding("size not annotated", "info", "kept", detail), header.size
    try:
        turn = find_turn(path, header.size, header.orientation, size)
    except UserError as error:
        return finding("size mismatch", "error", "removed", str(error)), None
    note = f"EXIF orientation {header.orientation}"
    if turn is not None:
        return finding("EXIF-rotated image", "info", "turned", f"{note}, as annotated"), size
    if header.orientation == 1:
        return None, size
    if header.orientation >= 5 and size[0] != size[1]:
        detail = f"{note} not applied: the annotations have the size of the stored pixels"
        return finding("EXIF-rotated image", "info", "kept as stored", detail), size
    detail = f"{note} not applied: the size does not tell whether the annotations assume it"
    return finding("EXIF-rotated image", "warning", "kept as stored", detail), size


def _image_finding(
    table: SampleTable, index: int, kind: str, severity: Severity, action: str, detail: str = ""
) -> Finding:
    return Finding(
        kind=kind,
        severity=severity,
        action=action,
        detail=detail,
        source=table.source,
        file=table.path(index),
        image_id=int(table.image_ids[index]),
    )


def _file_findings(table: SampleTable, headers: list[ImageHeader]) -> list[Finding]:
    """Of images that are not all there, have several frames, or are not RGB with 8 bits."""

    def found() -> Iterator[Finding]:
        for index, header in enumerate(headers):
            if header.truncated:
                kind, action = "truncated image", "used without its end"
                detail = "the end of the file is missing: rows at the bottom have one colour"
                yield _image_finding(table, index, kind, "warning", action, detail)
            if header.frames:
                kind, action = "image of several frames", "the first is used"
                yield _image_finding(table, index, kind, "info", action)
            if kind := _mode_kind(header.mode):
                detail = f"mode {header.mode}"
                if kind == DEEP:
                    detail += "; values up to 4095 count as 12 bits, others as 16"
                yield _image_finding(table, index, kind, "info", "converted to RGB", detail)

    return fold(found())


def _mode_kind(mode: str) -> str:
    """The kind of finding for a Pillow mode, "" for RGB."""
    if mode.startswith("I") or mode == "F":
        return DEEP
    if mode in ("L", "1"):
        return "grey image"
    if mode == "P":
        return "palette image"
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return "image with alpha"
    return "" if mode == "RGB" else "image in another colour model"


def _clean_boxes(table: SampleTable) -> tuple[SampleTable, list[Finding]]:
    sizes = table.sizes[table.box_owners].numpy()
    judged = judge_boxes(table.boxes.numpy(), table.areas.numpy(), sizes)
    finite, empty, outside = judged.finite, judged.empty, judged.outside
    columns = (table.box_owners, table.labels, table.crowd, table.boxes)
    twice = judged.usable & repeated_boxes(*(column.numpy() for column in columns))
    far, near = judged.excess >= _ROUNDING, judged.excess < _ROUNDING
    sticks_out = judged.usable & ~twice & (judged.excess > 0)
    faults: tuple[tuple[np.ndarray, str, Severity, str], ...] = (
        (~finite, "box with NaN or infinity", "warning", "dropped"),
        (finite & empty, "degenerate box", "warning", "dropped"),
        (finite & ~empty & outside, "box outside the image", "warning", "dropped"),
        (twice, "box twice", "warning", "dropped"),
        (sticks_out & far, "box beyond the image", "warning", "clipped"),
        (sticks_out & near, "box beyond the image by rounding", "info", "clipped"),
    )
    findings: list[Finding] = []
    for where, kind, severity, action in faults:
        findings += _box_findings(table, torch.from_numpy(where), kind, severity, action)
    boxes, areas = torch.from_numpy(judged.boxes), torch.from_numpy(judged.areas)
    table = replace(table, boxes=boxes, areas=areas)
    return table.keep_boxes(torch.from_numpy(judged.usable & ~twice)), findings


def _box_findings(
    table: SampleTable, where: Tensor, kind: str, severity: Severity, action: str
) -> list[Finding]:
    owners = table.box_owners

    def finding(row: int) -> Finding:
        owner = int(owners[row])
        corners = ", ".join(f"{value:g}" for value in table.boxes[row].tolist())
        height, width = table.sizes[owner].tolist()
        detail = f"corners [{corners}] in {width} x {height}"
        of_image = _image_finding(table, owner, kind, severity, action, detail)
        return replace(of_image, annotation_id=int(table.annotation_ids[row]))

    return listed(where.nonzero().squeeze(1).tolist(), finding)


def _images_without_boxes(table: SampleTable) -> list[Finding]:
    indices = (table.box_counts == 0).nonzero().squeeze(1).tolist()
    kind = "image without boxes"
    return listed(indices, lambda index: _image_finding(table, index, kind, "info", "kept"))


def _crowd_boxes(table: SampleTable) -> list[Finding]:
    action = "ignored in training, honoured in scoring"
    return _box_findings(table, table.crowd, "crowd box", "info", action)


def crowded_images(table: SampleTable, num_queries: int) -> list[Finding]:
    """Images with more boxes than the [DET] tokens can find."""
    counts = torch.bincount(table.box_owners[~table.crowd], minlength=len(table))

    def finding(index: int) -> Finding:
        kind = "more boxes than [DET] tokens"
        detail = f"{counts[index]} boxes, but --det_token_num {num_queries}"
        return _image_finding(table, index, kind, "warning", "kept", detail)

    return listed((counts > num_queries).nonzero().squeeze(1).tolist(), finding)


def _classes_without_boxes(train: SampleTable, val: SampleTable) -> list[Finding]:
    findings = []
    for split, table in (("training", train), ("validation", val)):
        counts = torch.bincount(table.labels[~table.crowd], minlength=len(table.class_names))
        for name, count in zip(table.class_names, counts.tolist(), strict=True):
            if not count:
                kind = f"class without {split} boxes"
                findings.append(Finding(kind, "warning", "kept", name, table.source))
    return findings


def _similar_class_names(table: SampleTable) -> list[Finding]:
    """Pairs of classes whose names differ in case, blanks or one letter: often one is misspelt."""
    names = table.class_names if len(table.class_names) <= _MOST_COMPARED_NAMES else ()
    letters = {name: "".join(filter(str.isalnum, name.casefold())) for name in names}
    return [
        Finding("class names that look alike", "warning", "kept", f"{one}, {other}", table.source)
        for one, other in combinations(names, 2)
        if _one_letter_apart(letters[one], letters[other])
    ]


def _one_letter_apart(one: str, other: str) -> bool:
    """Whether two names are equal or differ in one letter, no digit, of five or more."""
    shorter, longer = sorted((one, other), key=len)
    if len(longer) < 5 or len(longer) - len(shorter) > 1:
        return False
    pairs = zip(shorter, longer[: len(shorter)], strict=True)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), len(shorter))
    same_length = len(shorter) == len(longer)
    rests_agree = shorter[start + same_length :] == longer[start + 1 :]
    differing = longer[start : start + 1] + shorter[start : start + same_length]
    return rests_agree and not any(map(str.isdigit, differing))


def shared_images(train: SampleTable, other: SampleTable, part: str) -> list[Finding]:
    """Images of another part that are also training images, both cleaned."""
    headers = [
        [header for header in probe_images(table.paths()) if isinstance(header, ImageHeader)]
        for table in (train, other)
    ]
    return fold(_shared_images(train, headers[0], other, headers[1], part))


def _shared_images(
    train: SampleTable,
    train_headers: list[ImageHeader],
    val: SampleTable,
    val_headers: list[ImageHeader],
    part: str = "validation",
) -> Iterator[Finding]:
    """Images of `val`, which is the part of that name, that are also training images, by path or by
    content.
    """
    train_of_path = {os.path.realpath(path): index for index, path in enumerate(train.paths())}
    alike: dict[tuple[int, int], list[int]] = {}
    for index, header in enumerate(train_headers):
        alike.setdefault(header.fingerprint, []).append(index)

    @cache
    def by_content(fingerprint: tuple[int, int]) -> dict[bytes, int]:
        """The first training image of each content among those of a fingerprint."""
        return {_digest(train.path(i)): i for i in reversed(alike[fingerprint])}

    for index, (path, header) in enumerate(zip(val.paths(), val_headers, strict=True)):
        twin = train_of_path.get(os.path.realpath(path))
        # Files are read in full, once each, only where sizes and last bytes agree.
        if twin is None and header.fingerprint in alike:
            twin = by_content(header.fingerprint).get(_digest(path))
        if twin is not None:
            detail = f"same as {train.path(twin)}, image {int(train.image_ids[twin])} of training"
            kind = f"image in both training and {part}"
            yield _image_finding(val, index, kind, "warning", "kept", detail)


def _digest(path: str) -> bytes:
    return hashlib.blake2b(Path(path).read_bytes()).digest()
