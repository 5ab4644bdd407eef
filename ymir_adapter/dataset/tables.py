"""Reads the platform's index files and their annotations into sample tables.

A line that cannot be used is left out and noted. The task fails only if nothing is left to learn
from.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.dataset_check import BadDataset, check
from trainer.readers.findings import Finding, fold
from trainer.readers.samples import SampleTable
from ymir_adapter.dataset.annotations import AnnotationReader
from ymir_adapter.dataset.columns import Columns, Notes, Status
from ymir_adapter.protocol.errors import Code, TaskError
from ymir_adapter.protocol.task import Task

BLANKS = " \t\r\n\v\f\ufeff"  # stripped from a line; blanks inside belong to the path
FILES_AT_ONCE = 512  # in one thread
THREADS = 8  # they wait for the disk or the network
NOT_REPORTED = "size not annotated"  # true of every image: sizes are read from the image files


def read_index(path: Path, root: Path) -> list[tuple[str, str]]:
    """(image, annotation file) of each line, "" for no annotation file. Relative paths are below
    `root`.

    Raises TaskError if the index is missing or empty.
    """
    prefix = os.fspath(root)
    fields = ([field.strip(BLANKS) for field in row] for row in _rows(path))
    return [
        (_below(prefix, image), _below(prefix, rest[0]) if rest and rest[0] else "")
        for image, *rest in fields
    ]


def candidates(task: Task) -> list[str]:
    """The images of a mining or inference task as the index spells them, in its order, without
    duplicates. Raises TaskError as `read_index` does.
    """
    images = (row[0].strip(BLANKS) for row in _rows(task.input.candidate_index_file))
    return list(dict.fromkeys(images))


def locate(task: Task, asset: str) -> str:
    """The file of an asset of the index. Links are not resolved: results must name the path that
    the platform wrote.
    """
    return _below(os.fspath(task.input.root_dir), asset)


def read_tables(
    task: Task,
    *,
    num_queries: int | None,
    max_bad_fraction: float = 1.0,
    strict_images: bool = False,
    progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[SampleTable, SampleTable, list[Finding]]:
    """The usable training and validation samples, and the findings about all of them.

    `num_queries` is the number of [DET] tokens, None if that is not known yet. `progress` receives
    the share of annotation files that are read. Raises TaskError if nothing is left to learn from
    or to score with.
    """
    paths = (task.input.training_index_file, task.input.val_index_file)
    lines = [_training_lines(task, path) for path in paths]
    share = len(lines[0]) / (len(lines[0]) + len(lines[1]))
    reader = AnnotationReader(task.class_names)
    train = read_split(paths[0].name, lines[0], reader, lambda f: progress(f * share))
    val = read_split(paths[1].name, lines[1], reader, lambda f: progress(share + f * (1 - share)))
    _require_annotations(task, train, scored=False)
    _require_annotations(task, val, scored=True)
    findings = [*train.findings, *val.findings]
    try:
        train_set, val_set, checked = check(
            train.table,
            val.table,
            num_queries=num_queries,
            max_bad_fraction=max_bad_fraction,
            strict_images=strict_images,
            found=findings,
        )
    except BadDataset as error:
        raise _as_task_error(error, train, val) from error
    return train_set, val_set, [one for one in checked if one.kind != NOT_REPORTED]


@dataclass(frozen=True)
class Split:
    """The images of an index whose annotations are readable or missing, and all statuses."""

    table: SampleTable
    findings: list[Finding]
    num_lines: int
    statuses: Counter[Status]


def read_split(
    source: str,
    lines: Sequence[tuple[str, str]],
    reader: AnnotationReader,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Split:
    """The lines of an index as a table; image ids count its non-blank lines from 1.

    An image without an annotation file has no objects. An image whose file is unreadable is left
    out, because its objects are unknown.
    """
    columns, statuses = Columns(), bytearray()
    findings: list[Finding] = []

    def read(start: int) -> tuple[Columns, list[Finding], bytes]:
        some, notes = Columns(), Notes(source)
        read_statuses = reader.read(start, lines[start : start + FILES_AT_ONCE], some, notes)
        return some, notes.findings(), bytes(read_statuses)

    with ThreadPoolExecutor(THREADS) as pool:
        for some, more, read_statuses in pool.map(read, range(0, len(lines), FILES_AT_ONCE)):
            columns.extend(some)
            findings = fold([*findings, *more])
            statuses += read_statuses
            progress(len(statuses) / len(lines))
    counts = Counter(Status(status) for status in statuses)
    missing = statuses.find(Status.MISSING)
    if missing >= 0:
        first = lines[missing][1] or f"none named for {lines[missing][0]}"
        kind, action = "image without annotations", "kept, as one without objects"
        detail, count = f"no annotation file: {first}", counts[Status.MISSING]
        findings.append(Finding(kind, "warning", action, detail, source, count=count))
    table = _table(source, lines, columns, np.frombuffer(statuses, np.uint8), reader)
    return Split(table, findings, len(lines), counts)


def _table(
    source: str,
    lines: Sequence[tuple[str, str]],
    columns: Columns,
    statuses: np.ndarray,
    reader: AnnotationReader,
) -> SampleTable:
    """Sizes are (0, 0), so that `check` reads them from the files: the stored pixels count."""
    kept = statuses <= Status.MISSING
    boxes = np.frombuffer(columns.boxes, np.float64).reshape(-1, 4)
    position = np.cumsum(kept) - 1  # of a line among those that are kept
    return SampleTable.from_columns(
        source=source,
        class_names=reader.classes.names,
        category_ids=range(1, reader.classes.count + 1),
        paths=[image for (image, _), keep in zip(lines, kept.tolist(), strict=True) if keep],
        image_ids=np.flatnonzero(kept) + 1,
        sizes=np.zeros((int(kept.sum()), 2), np.int64),
        owners=position[np.frombuffer(columns.owners, np.int64)],
        boxes=boxes,
        labels=np.frombuffer(columns.labels, np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=np.frombuffer(columns.crowd, np.bool_),
        annotation_ids=np.arange(1, len(boxes) + 1),
    )


def _rows(path: Path) -> Iterator[list[str]]:
    """The fields of each non-blank line. Bytes that are not UTF-8 become surrogates."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise TaskError(Code.DATASET, f"{path} cannot be read: {error.strerror}") from error
    rows = (line.strip(BLANKS) for line in text.split("\n"))
    empty = True
    for row in rows:
        if row:
            empty = False
            yield row.split("\t")
    if empty:
        raise TaskError(Code.DATASET, f"{path} names no image; choose a dataset that has some")


def _below(root: str, path: str) -> str:
    return path if path.startswith("/") or not path else os.path.join(root, path)


def _training_lines(task: Task, path: Path) -> list[tuple[str, str]]:
    """Without annotations the platform exports an empty index; `export_format` then shows why."""
    try:
        return read_index(path, task.input.root_dir)
    except TaskError as error:
        raise TaskError(error.code, f"{error}{_exported(task)}") from error


def _exported(task: Task) -> str:
    given = task.config.get("export_format")
    return f" (export_format is {given!r}; det-ark:raw works best)" if given else ""


def _require_annotations(task: Task, split: Split, *, scored: bool) -> None:
    """Raises TaskError if no image is left, or nothing to learn from."""
    if split.statuses[Status.READ] or (scored and split.statuses[Status.MISSING]):
        return
    first = split.findings[0]
    reason = f"{first.file} {first.detail}".strip()
    if split.statuses[Status.UNKNOWN]:
        raise TaskError(Code.CONFIG, f"{split.table.source}: no annotations to use: {reason}")
    raise TaskError(
        Code.DATASET,
        f"{split.table.source}: none of {split.num_lines} images has annotations that can be "
        f"read; the first: {reason}{_exported(task)}",
    )


def _as_task_error(error: BadDataset, train: Split, val: Split) -> TaskError:
    """The error code of a rejected dataset, and the first reason."""
    for split in (train, val):
        name, total = split.table.source, len(split.table)
        own = [one for one in error.findings if one.source == name and one not in split.findings]
        gone = [one for one in own if one.action == "removed"]
        if sum(one.count for one in gone) >= total:
            message = f"{name}: none of {total} images can be read; the first: {gone[0].detail}"
            return TaskError(Code.IMAGE_FORMAT, message)
    return TaskError(Code.DATASET, str(error))
