"""Reads annotation files of the platform into columns of boxes.

The content of a file determines its format, not the task's settings. Boxes become
continuous: from pixel 3 to pixel 3, inclusive, is (3, 4). Faulty lines are left out and noted.
"""

import threading
from collections.abc import Sequence

from ymir_adapter.dataset.ark import read_ark_files
from ymir_adapter.dataset.coco import CocoDocument
from ymir_adapter.dataset.columns import Classes, Columns, Notes, Status
from ymir_adapter.dataset.voc import UTF16, read_voc


class AnnotationReader:
    """Reads annotation files, and a COCO file, which all images share, only once. Thread-safe."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.classes = Classes(class_names)
        self._documents: dict[str, CocoDocument] = {}
        self._lock = threading.Lock()

    def read(
        self, first: int, lines: Sequence[tuple[str, str]], columns: Columns, notes: Notes
    ) -> list[Status]:
        """Adds the boxes of lines (image, annotation file or ""), whose images are number `first`,
        `first` + 1, ... of the split. Returns a status for each line.
        """
        statuses = []
        ark_files: list[tuple[int, str, bytes]] = []
        for owner, (image, path) in enumerate(lines, first):
            document = self._documents.get(path)
            if document is None:
                try:
                    data = _content(path)
                except (FileNotFoundError, NotADirectoryError):
                    statuses.append(Status.MISSING)
                    continue
                except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
                    statuses.append(notes.broken(f"cannot be read ({error})", path))
                    continue
                kind = _format(path, data)
                if kind == "ark":
                    ark_files.append((owner, path, data))
                    statuses.append(Status.READ)
                    continue
                if kind == "voc":
                    statuses.append(read_voc(data, owner, self.classes, path, columns, notes))
                    continue
                document = self._document(path, data, notes)
            statuses.append(document.read(owner, image, columns, notes))
        read_ark_files(ark_files, self.classes, columns, notes)
        return statuses

    def _document(self, path: str, data: bytes, notes: Notes) -> CocoDocument:
        with self._lock:  # a thread that waited finds it read
            if path not in self._documents:
                self._documents[path] = CocoDocument(data, self.classes, path, notes)
            return self._documents[path]


def _format(path: str, data: bytes) -> str:
    """ "ark", "voc" or "coco", by the first character, then by the file name."""
    head = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if data[:2] in UTF16 or head == b"<" or (head and path.endswith(".xml")):
        return "voc"
    return "coco" if head in (b"{", b"[") or (head and path.endswith(".json")) else "ark"


def _content(path: str) -> bytes:
    if not path:
        raise FileNotFoundError
    with open(path, "rb", buffering=0) as file:
        return file.readall()
