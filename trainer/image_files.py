"""Files, folders, patterns and standard input to a stream of image files, of any length."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
)
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class ImageFile:
    """`path` is the file as it was given. `name` is where its results belong, relative to the
    output folder; no two images of a run share one. `has_twin`: another image of its folder differs
    from it in the ending alone.
    """

    path: str
    name: str
    has_twin: bool = False


@dataclass(frozen=True)
class _Source:
    """One word of the command line; what is in it gets names that start with `prefix`."""

    word: str
    matches: tuple[str, ...] | None = None  # of a pattern
    prefix: str = ""


class ImageFiles:
    """The images that the words of a command line stand for, in their order; those of a folder,
    and of all folders in it, sorted by name. Folders are read as they are reached.

    `avoid` is a folder that is passed over: the results may lie among the images.

    Raises ValueError for a word that stands for nothing.
    """

    def __init__(self, words: Sequence[str], stdin: TextIO, avoid: Path | None = None) -> None:
        self._stdin, self._avoid = stdin, None if avoid is None else os.path.realpath(avoid)
        if list(words).count(STANDARD_INPUT) > 1:
            raise ValueError("IMAGES - stands for standard input; give it once")
        sources = [_source(word) for word in words]
        names = distinct([_own_name(source.word) for source in sources])
        files = [source.matches is None and os.path.isfile(source.word) for source in sources]
        self._sources = [
            _Source(source.word, source.matches, name if len(sources) > 1 or file else "")
            for source, name, file in zip(sources, names, files, strict=True)
        ]

    def __iter__(self) -> Iterator[ImageFile]:
        for source in self._sources:
            if source.word == STANDARD_INPUT:
                lines = (line.rstrip("\r\n") for line in self._stdin)
                yield from self._listed((line for line in lines if line.strip()), "", source.prefix)
            elif source.matches is not None:
                start = _fixed_part(source.word)
                yield from self._listed(source.matches, start, source.prefix)
            elif os.path.isdir(source.word):
                yield from self._walk(source.word, source.prefix)
            else:
                yield ImageFile(source.word, source.prefix)

    def count(self) -> int | None:
        """How many there are, for who wants to show how far it is; None if only reading tells."""
        if any(source.word == STANDARD_INPUT for source in self._sources):
            return None
        return sum(1 for _ in self)

    def _listed(self, paths: Iterable[str], start: str, prefix: str) -> Iterator[ImageFile]:
        for path in paths:
            relative = os.path.relpath(path, start) if start else _harmless(path)
            if os.path.isdir(path):
                yield from self._walk(path, os.path.join(prefix, relative))
            else:
                yield ImageFile(path, os.path.join(prefix, relative))

    def _walk(self, folder: str, prefix: str) -> Iterator[ImageFile]:
        for place, folders, files in os.walk(folder):
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".")
                and os.path.realpath(os.path.join(place, name)) != self._avoid
            )
            images = sorted(name for name in files if _is_image(name))
            stems = Counter(os.path.splitext(name)[0] for name in images)
            inside = os.path.normpath(os.path.join(prefix, os.path.relpath(place, folder)))
            for name in images:
                twin = stems[os.path.splitext(name)[0]] > 1
                path = os.path.join(place, name)
                yield ImageFile(path, os.path.normpath(os.path.join(inside, name)), twin)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, those that have been there before with a number: a.jpg, a-2.jpg."""
    taken = set()
    found = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        number = 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}{suffix}"
        taken.add(name)
        found.append(name)
    return found


def _source(word: str) -> _Source:
    if word == STANDARD_INPUT or os.path.exists(word):
        return _Source(word)
    if glob.has_magic(word):
        matches = tuple(sorted(glob.glob(word, recursive=True)))
        if matches:
            return _Source(word, matches)
        raise ValueError(f"IMAGES {word}: no file matches this pattern")
    raise ValueError(f"IMAGES {word}: no such file or folder")


def _own_name(word: str) -> str:
    if word == STANDARD_INPUT:
        return "stdin"
    if not os.path.exists(word):
        word = _fixed_part(word)
    return os.path.basename(os.path.realpath(word)) or "root"


def _fixed_part(pattern: str) -> str:
    """The folder of a pattern before its first wildcard."""
    parts = Path(pattern).parts
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return str(Path(*parts[:first])) if first else "."


def _harmless(path: str) -> str:
    """A path as one beneath another folder: without its root and steps upwards."""
    parts = [part for part in Path(os.path.normpath(path)).parts if part not in ("/", "..")]
    return os.path.join(*parts) if parts else "image"


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
