"""ark files: `class, xmin, ymin, xmax, ymax[, quality, angle]` a line, corners inclusive.

The angle's unit is not defined anywhere, and 0 is usual: it is not looked at.
"""

import math
from collections.abc import Sequence

import numpy as np

from ymir_adapter.dataset.columns import Classes, Columns, Notes, shown

COMMA, NEWLINE, BLANK, MINUS, ZERO = b",\n -0"
FIELDS = 5
LONGEST = 7  # digits


def read_ark_files(
    files: Sequence[tuple[int, str, bytes]], classes: Classes, columns: Columns, notes: Notes
) -> None:
    """Adds the boxes of files given as (image, path, content), all at once where all are as the
    platform writes them.
    """
    if not read_plainly(files, classes, columns):
        for owner, path, data in files:
            read_ark(data, owner, classes, path, columns, notes)


def read_plainly(
    files: Sequence[tuple[int, str, bytes]], classes: Classes, columns: Columns
) -> bool:
    """The quick way, a fifth of the time: whole numbers only, nothing to complain about. If there
    is anything else in any of the files: nothing is added, and False.
    """
    contents = [data + b"\n" * (not data.endswith(b"\n")) for _, _, data in files if data]
    raw = np.frombuffer(b"".join(contents), np.uint8)
    ends = np.flatnonzero((raw == COMMA) | (raw == NEWLINE))  # of fields
    last = np.flatnonzero(raw[ends] == NEWLINE)  # field of each line
    first = np.append(0, last[:-1] + 1)
    if not len(last):
        return True
    if (last - first + 1 < FIELDS).any():
        return False
    field = first[:, None] + np.arange(FIELDS)  # [lines, fields]
    start = np.append(-1, ends)[field] + 1
    start += raw[start] == BLANK
    negative = raw[start] == MINUS
    start += negative
    numbers = _digits(raw, start, ends[field])
    if numbers is None:
        return False
    kind, boxes = numbers[:, 0], np.where(negative, -numbers, numbers)[:, 1:]
    ordered = (boxes[:, 2:] >= boxes[:, :2]).all()
    if negative[:, 0].any() or (kind >= classes.count).any() or not ordered:
        return False
    lines = [content.count(b"\n") for content in contents]
    owners = np.repeat([owner for owner, _, data in files if data], lines)
    columns.add_many(owners, kind, boxes + np.array([0, 0, 1, 1]))
    return True


def _digits(raw: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray | None:
    """The numbers in raw[start:end], of the shape of both; None if one has anything but digits."""
    lengths = end - start
    if lengths.min() < 1 or lengths.max() > LONGEST:
        return None
    numbers = np.zeros(start.shape, np.int64)
    for place in range(lengths.max()):
        inside = place < lengths
        digits = raw[np.minimum(start + place, end)].astype(np.int64) - ZERO
        if (inside & ((digits < 0) | (digits > 9))).any():
            return None
        numbers = np.where(inside, numbers * 10 + digits, numbers)
    return numbers


def read_ark(
    data: bytes, owner: int, classes: Classes, path: str, columns: Columns, notes: Notes
) -> None:
    """Line by line, with a note of each that is left out."""
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
    """What is wrong with a line of numbers, "" if nothing is."""
    if not math.isfinite(kind + x1 + y1 + x2 + y2):
        return "malformed line"
    if kind != int(kind):
        return "malformed line"
    if not 0 <= kind < count:
        return "class outside the task"
    return "box without extent" if x2 < x1 or y2 < y1 else ""
