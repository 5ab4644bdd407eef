"""A folder of data: its files by kind, and the parts, training, validation and test, that the names
of its files tell apart.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
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


def picture_finder(tree: DataFolder) -> Callable[[str], str | None]:
    """A function that finds the picture of an XML file: the one of its name, beside it or nearest
    to it; else the one that the file names.
    """
    by_path: dict[str, list[str]] = {}  # each without its ending
    by_stem: dict[str, list[str]] = {}
    by_name: dict[str, list[str]] = {}
    for path in tree.pictures:
        by_path.setdefault(os.path.splitext(path)[0], []).append(path)
        name = os.path.basename(path)
        by_stem.setdefault(os.path.splitext(name)[0], []).append(path)
        by_name.setdefault(name, []).append(path)

    @cache
    def pieces(folder: str) -> frozenset[str]:
        return frozenset(Path(tree.relative(folder)).parts)

    def find(xml: str) -> str | None:
        stem = os.path.splitext(xml)[0]
        found = by_path.get(stem) or by_stem.get(os.path.basename(stem), [])
        if len(found) != 1:  # a mask may have the stem too: the XML names the picture
            named = _file_name_in(xml)
            found = [path for path in found if os.path.basename(path) == named] or found
            found = found or by_name.get(named, [])
        own = pieces(os.path.dirname(xml))
        return max(found, key=lambda path: len(own & pieces(os.path.dirname(path))), default=None)

    return find


def _file_name_in(xml: str) -> str:
    with open(xml, "rb") as file:
        named = re.search(rb"<filename>\s*([^<]*?)\s*</filename>", file.read(4096))
    return os.path.basename(os.fsdecode(named[1]).replace("\\", "/")) if named else ""
