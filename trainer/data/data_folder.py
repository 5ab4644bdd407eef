"""A folder of data: its files by kind, and the parts, training, validation and test, that the names
of its files tell apart.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from trainer.readers.values import walk
from vidt.images.formats import ending, is_picture

PARTS = ("train", "val", "test")
PART_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_MOST_NAMED = 3  # files that a message names


@dataclass(frozen=True)
class CocoPart:
    """A COCO file and the folder of its images."""

    json_path: str
    image_dir: str


@dataclass(frozen=True)
class VocPart:
    """A list in ImageSets/Main of a Pascal VOC folder."""

    root: str
    list_name: str  # without .txt


@dataclass(frozen=True)
class XmlPart:
    """Pictures and the XML file of each, wherever both are."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class YoloPart:
    """A split of a YAML file, or, for a folder without one, of the entries that stand for it."""

    root_or_yaml: str
    split: str
    config: Mapping[str, Any] | None = None


Part: TypeAlias = CocoPart | VocPart | XmlPart | YoloPart


@dataclass(frozen=True)
class Recognised:
    """What a path holds: `parts` by their names, of `PARTS`; a part that is not there is missing.
    `notes` say what is there and not used, or not there though named.
    """

    path: str
    layout: str
    parts: Mapping[str, Part]
    notes: tuple[str, ...] = ()

    def source(self, part: str) -> str:
        """The name of a part in messages: that of its file, where it has one of its own."""
        where = self.parts[part]
        if isinstance(where, CocoPart):
            root = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
            return os.path.relpath(where.json_path, root)
        name = Path(self.path).resolve().name
        return f"{name} {part}" if len(self.parts) > 1 else name


@dataclass
class DataFolder:
    """The files of a folder, by kind, as paths; those of dot folders are left out."""

    root: str
    files: dict[str, list[str]] = field(default_factory=dict)  # by ending
    pictures: list[str] = field(default_factory=list)

    def of(self, *endings: str) -> list[str]:
        return [path for each in endings for path in self.files.get(each, [])]

    def relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)


def scan(root: str) -> DataFolder:
    """All files below `root`, in order of their folders and names."""
    tree = DataFolder(os.path.normpath(root))
    for top, names in walk(tree.root):
        for name in sorted(names):
            path = os.path.normpath(os.path.join(top, name))
            if is_picture(name):
                tree.pictures.append(path)
            elif not name.startswith(".") and os.path.isfile(path):  # no pipe, which would block
                tree.files.setdefault(ending(name), []).append(path)
    return tree


def names_of(tree: DataFolder, files: Sequence[str]) -> str:
    """The names of the first few files and the number of the others, for a message."""
    more = f" and {len(files) - _MOST_NAMED} more" if len(files) > _MOST_NAMED else ""
    return ", ".join(tree.relative(each) for each in files[:_MOST_NAMED]) + more


def part_of(relative: str) -> str | None:
    """The part that a path names: by its last piece that names just one."""
    for piece in reversed(Path(relative).parts):
        words = re.split(r"[_\-.\d]+", piece.lower())
        named = {PART_WORDS[word] for word in words if word in PART_WORDS}
        if len(named) == 1:
            return named.pop()
    return None


def grouped_by_part(
    tree: DataFolder, pairs: Sequence[tuple[str, str]]
) -> dict[str, list[tuple[str, str]]]:
    """(Picture, annotations) by the part that a folder of either names; what no folder names is for
    training.
    """
    by_part: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        named = (part_of(os.path.dirname(tree.relative(path))) for path in pair)
        part = next((each for each in named if each), "train")
        by_part.setdefault(part, []).append(pair)
    return {part: by_part[part] for part in PARTS if part in by_part}
