"""ark files: lines `class, xmin, ymin, xmax, ymax[, quality, angle]`, corners inclusive.

The platform defines no unit for the angle, which is usually 0, so it is ignored.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ymir_adapter.dataset.columns import Classes, Columns, Notes, shown

NUM_FIELDS = 5  # that are read


def read_ark_files(
    files: Sequence[tuple[int, str, bytes]], classes: Classes, columns: Columns, notes: Notes
) -> None:
    """Adds the boxes of files given as (image, path, content)."""
    if not _read_together(files, classes, columns):
        for owner, path, data in files:
            read_ark(data, owner, classes, path, columns, notes)


def _read_together(
    files: Sequence[tuple[int, str, bytes]], classes: Classes, columns: Columns
) -> bool:
    """Reads all files at once, which is several times faster. False, and nothing is added, if any
    line in them is not as the platform writes it.
    """
    lines_of = [data.removesuffix(b"\n").split(b"\n") if data else [] for _, _, data in files]
    lines = [line.decode("latin-1") for some in lines_of for line in some]
    if not lines:
        return True
    if not all(line.strip() for line in lines):  # which loadtxt skips
        return False
    fields: dict[str, Any] = {
        "delimiter": ",",
        "comments": None,
        "usecols": range(NUM_FIELDS),
        "ndmin": 2,
    }
    try:
        numbers = np.loadtxt(lines, **fields)
    except ValueError:
        return False
    labels, boxes = numbers[:, 0], numbers[:, 1:]
    in_task = (labels >= 0) & (labels < classes.count) & (labels == labels.round())
    is_ordered = (boxes[:, 2:] >= boxes[:, :2]).all()
    if not (np.isfinite(numbers).all() and in_task.all() and is_ordered):
        return False
    owners = np.repeat([owner for owner, _, _ in files], [len(some) for some in lines_of])
    columns.add_many(owners, labels, boxes + np.array([0, 0, 1, 1]))
    return True


def read_ark(
    data: bytes, owner: int, classes: Classes, path: str, columns: Columns, notes: Notes
) -> None:
    """Adds the boxes of one file line by line, with a note of each line that is left out."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        parts = line.split(b",", 5)
        try:
            kind, x1, y1, x2, y2 = map(float, parts[:5])
        except ValueError:
            if line.strip():
                text = f"line {number} is not five numbers or more: {shown(line)}"
                notes.skipped("malformed line", text, path)
            continue
        fault = fault_of(kind, classes.count, x1, y1, x2, y2)
        if fault:
            notes.skipped(fault, f"line {number}: {shown(line)}", path)
        else:
            columns.add(owner, int(kind), (x1, y1, x2 + 1, y2 + 1))


def fault_of(kind: float, count: int, x1: float, y1: float, x2: float, y2: float) -> str:
    """The kind of fault of a class index and a box; "" if there is none."""
    if not math.isfinite(kind + x1 + y1 + x2 + y2) or kind != int(kind):
        return "malformed line"
    if not 0 <= kind < count:
        return "class outside the task"
    return "box without extent" if x2 < x1 or y2 < y1 else ""
