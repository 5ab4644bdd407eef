"""Findings: what is wrong with a dataset, or worth knowing, and what was done about it."""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from vidt.atomic import atomic_file
from vidt.errors import UserError, counted, escaped, shown

Severity = Literal["error", "warning", "info"]
MOST_SHOWN = 500  # characters of a finding inside a message
GRAVEST_FIRST = ("error", "warning", "info")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a spreadsheet's formula may start
MOST_OF_A_KIND = 300  # listed one by one; the rest of a kind is one finding


@dataclass(frozen=True)
class Finding:
    """One finding; `count` is above 1 only where it covers several boxes or images.

    `source` is the split (`SampleTable.source`). `action` says what was done: kept, dropped (a
    box), removed (an image), clipped, turned, computed, read.
    """

    kind: str
    severity: Severity
    action: str
    detail: str = ""
    source: str = ""
    file: str = ""
    image_id: int | None = None
    annotation_id: int | None = None
    count: int = 1

    @property
    def text(self) -> str:
        """The kind and the detail."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind

    def line(self) -> str:
        """One line: the place and the detail."""
        place = [self.source, self.file]
        place += [] if self.image_id is None else [f"image {self.image_id}"]
        place += [] if self.annotation_id is None else [f"annotation {self.annotation_id}"]
        parts = (", ".join(filter(None, place)), self.detail)
        return escaped(": ".join(part for part in parts if part))


class BadDataset(UserError):
    """A dataset that is unfit for training; `findings` give the details."""

    def __init__(self, message: str, findings: Sequence[Finding]) -> None:
        super().__init__(message)
        self.findings = list(findings)


class FindingList:
    """The findings about one split, in the order in which its reader reports them."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.findings: list[Finding] = []

    def report(
        self,
        kind: str,
        severity: Severity,
        action: str,
        detail: str,
        file: str,
        image_id: int | None = None,
    ) -> None:
        self.findings.append(Finding(kind, severity, action, detail, self.source, file, image_id))


@dataclass(frozen=True)
class FilesSeen:
    """What a reader has dealt with: the folders of a dataset, and the files in them that it used or
    has a finding about. `trainer.data.unused_files` reports the others.
    """

    folders: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)


def num_removed(findings: Iterable[Finding], source: str) -> int:
    """Images of a split that are left out."""
    return sum(f.count for f in findings if f.action == "removed" and f.source == source)


def hint_at_losses(findings: Iterable[Finding], source: str) -> str:
    """The end of a message: the gravest finding of a split, else how many boxes were left out and
    why the first; "" for neither.
    """
    ours = [finding for finding in findings if finding.source == source]
    grave = [finding for finding in ours if finding.severity == "error"]
    lost = [finding for finding in ours if finding.action == "dropped"]
    if grave:
        return f"; {shown(grave[0].text, MOST_SHOWN)}"
    count = counted(sum(finding.count for finding in lost), "box", "boxes")
    return f"; {count} left out, the first: {shown(lost[0].text, MOST_SHOWN)}" if lost else ""


def listed(rows: Sequence[int], finding: Callable[[int], Finding]) -> list[Finding]:
    """Findings of one kind: one for each of the first rows, and one for all others."""
    found = [finding(row) for row in rows[:MOST_OF_A_KIND]]
    return [*found, *_others(found, len(rows) - len(found))]


def fold(findings: Iterable[Finding]) -> list[Finding]:
    """The first findings of each kind, and one for all others of it; no more are held in memory."""
    first: dict[tuple[str, ...], list[Finding]] = {}
    others = Counter[tuple[str, ...]]()
    for finding in findings:
        key = finding.kind, finding.severity, finding.action, finding.source
        group = first.setdefault(key, [])
        if len(group) < MOST_OF_A_KIND:
            group.append(finding)
        else:
            others[key] += finding.count
    return [each for key, group in first.items() for each in (*group, *_others(group, others[key]))]


def _others(group: list[Finding], count: int) -> list[Finding]:
    """One finding for `count` more, or none."""
    if not count:
        return []
    like, detail = group[0], f"{count} more of the same"
    return [Finding(like.kind, like.severity, like.action, detail, like.source, count=count)]


def format_findings(findings: Iterable[Finding], limit: int = 10, info_limit: int = 3) -> str:
    """Findings by kind, gravest first: a count, and at most `limit` lines for each kind, or
    `info_limit` for severity "info".
    """
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind, finding.action), []).append(finding)
    lines = []
    for severity, kind, action in sorted(groups, key=lambda key: GRAVEST_FIRST.index(key[0])):
        group = groups[severity, kind, action]
        shown = info_limit if severity == "info" else limit
        lines.append(f"{severity}: {kind}, {action}: {sum(f.count for f in group)}")
        lines += [f"    {finding.line()}" for finding in group[:shown]]
        more = sum(finding.count for finding in group[shown:])
        lines += [f"    and {more} more"] if more else []
    # File names need not be valid text; printed text must be.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def write_findings(path: str | os.PathLike[str], findings: Iterable[Finding]) -> None:
    """Write all findings as CSV, a header line first, atomically."""
    with atomic_file(Path(path)) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        writer = csv.DictWriter(text, [field.name for field in fields(Finding)])
        writer.writeheader()
        for finding in findings:
            row = asdict(finding)
            writer.writerow({name: csv_cell(row[name]) for name in row})
        text.flush()
        text.detach()  # otherwise the wrapper closes the file


def read_findings(path: str | os.PathLike[str]) -> list[Finding]:
    """Read a file that `write_findings` wrote."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [_finding(row) for row in csv.DictReader(file)]


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet computes: a text that starts like a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def _text_of(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _is_formula(cell) else cell


def _is_formula(text: str) -> bool:
    """Apostrophes aside, so that `_text_of` can tell ours from the text's own."""
    return text.lstrip("'").startswith(FORMULA)


def _finding(row: dict[str, Any]) -> Finding:
    row = {name: _text_of(cell) for name, cell in row.items()}
    for name in ("image_id", "annotation_id"):
        row[name] = int(row[name]) if row[name] else None
    return Finding(**row | {"count": int(row["count"])})
