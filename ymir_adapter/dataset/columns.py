"""Columns of boxes and notes on faults, which the readers of all formats fill."""

from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np

from trainer.readers.findings import Finding, Severity, fold


class Status(IntEnum):
    """Whether the annotations of an image could be read; UNKNOWN: their format is not supported."""

    READ = 0
    MISSING = 1
    BROKEN = 2
    UNKNOWN = 3


class Notes:
    """Findings in one split."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._all: list[Finding] = []

    def add(self, kind: str, severity: Severity, action: str, detail: str, file: str) -> None:
        self._all.append(Finding(kind, severity, action, detail, self.source, file))

    def skipped(self, kind: str, detail: str, file: str) -> None:
        """Notes a line or a box that is left out."""
        self.add(kind, "warning", "dropped", detail, file)

    def broken(self, detail: str, file: str) -> Status:
        """Notes a file that cannot be used; its image is left out."""
        self.add("unreadable annotations", "error", "removed", detail, file)
        return Status.BROKEN

    def findings(self) -> list[Finding]:
        """The first of each kind, and a count of the others."""
        return fold(self._all)


class Columns:
    """Growing columns of boxes: image, label, xyxy in pixels (continuous), crowd."""

    def __init__(self) -> None:
        self.owners, self.labels = array("q"), array("q")
        self.boxes, self.crowd = array("d"), array("b")

    def add(self, owner: int, label: int, box: Iterable[float], crowd: bool = False) -> None:
        self.owners.append(owner)
        self.labels.append(label)
        self.boxes.extend(box)
        self.crowd.append(crowd)

    def add_many(self, owners: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> None:
        """owners and labels [n], boxes [n, 4]; none of them crowd."""
        self.owners.frombytes(owners.astype(np.int64).tobytes())
        self.labels.frombytes(labels.astype(np.int64).tobytes())
        self.boxes.frombytes(boxes.astype(np.float64).tobytes())
        self.crowd.frombytes(bytes(len(owners)))

    def extend(self, other: "Columns") -> None:
        for name, column in vars(self).items():
            column.extend(getattr(other, name))


class Classes:
    """The task's classes by name: the exact name first, else ignoring case and outer blanks."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.count = tuple(names), len(names)
        plain = {self._plain(name): label for label, name in reversed([*enumerate(names)])}
        self._labels = {**plain, **{name: label for label, name in enumerate(names)}}

    def label(self, name: str) -> int:
        """The label, -1 for a class outside the task."""
        return self._labels.get(name, self._labels.get(self._plain(name), -1))

    @staticmethod
    def _plain(name: str) -> str:
        return name.strip().lower()


def shown(line: bytes) -> str:
    """The start of a line of any bytes, for messages."""
    return repr(line[:80].decode("utf-8", "backslashreplace"))
