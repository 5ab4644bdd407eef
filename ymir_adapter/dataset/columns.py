"""Boxes in the making, and what was noted on the way: shared by the readers of all formats."""

from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np

from trainer.readers.findings import Finding, Severity

MOST_NOTES = 100  # of one kind in full; beyond that they are counted


class Status(IntEnum):
    """What became of an image's annotations; UNKNOWN is of a format that is none of ours."""

    READ = 0
    MISSING = 1
    BROKEN = 2
    UNKNOWN = 3


class Notes:
    """Findings in one split, with a limit to each kind."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.kept: dict[str, list[Finding]] = {}
        self.more: dict[str, int] = {}

    def add(self, kind: str, severity: Severity, action: str, detail: str, file: str) -> None:
        found = self.kept.setdefault(kind, [])
        if len(found) < MOST_NOTES:
            found.append(Finding(kind, severity, action, detail, self.source, file))
        else:
            self.more[kind] = self.more.get(kind, 0) + 1

    def skipped(self, kind: str, detail: str, file: str) -> None:
        """A line, or a box, that is left out."""
        self.add(kind, "warning", "dropped", detail, file)

    def broken(self, detail: str, file: str) -> Status:
        """A file that cannot be used at all, and its image with it."""
        self.add("unreadable annotations", "error", "removed", detail, file)
        return Status.BROKEN

    def backgrounds(self, count: int, detail: str) -> None:
        """One finding for all images that are taken to show nothing."""
        kind, action = "image without annotations", "kept, as one without objects"
        self.kept[kind] = [Finding(kind, "warning", action, detail, self.source, count=count)]

    def merge(self, other: "Notes") -> None:
        for kind, found in other.kept.items():
            for one in found:
                self.add(kind, one.severity, one.action, one.detail, one.file)
            if kind in other.more:
                self.more[kind] = self.more.get(kind, 0) + other.more[kind]

    def findings(self) -> list[Finding]:
        """All of them; those beyond the limit as one with their count."""
        result = [one for found in self.kept.values() for one in found]
        for kind, count in self.more.items():
            like = self.kept[kind][0]
            detail = "more of the same"
            result.append(
                Finding(kind, like.severity, like.action, detail, self.source, count=count)
            )
        return result


class Columns:
    """Boxes in the making, flat: their image, label, xyxy in pixels (continuous), crowd or not."""

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
    """The task's classes by name: as they are, else without regard to case and outer blanks."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.count = tuple(names), len(names)
        plain = {self._plain(name): label for label, name in reversed([*enumerate(names)])}
        self._labels = {**plain, **{name: label for label, name in enumerate(names)}}

    def label(self, name: str) -> int:
        """-1 for a class that is not the task's."""
        return self._labels.get(name, self._labels.get(self._plain(name), -1))

    @staticmethod
    def _plain(name: str) -> str:
        return name.strip().lower()


def shown(line: bytes) -> str:
    """A line of any bytes, short enough to be read."""
    return repr(line[:80].decode("utf-8", "backslashreplace"))
