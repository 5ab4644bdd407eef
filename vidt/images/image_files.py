"""Image files of files, folders, patterns and standard input, as a stream of any length."""

import glob
import io
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TextIO
from urllib.parse import unquote, urlparse

from vidt.downloads import is_url
from vidt.errors import UserError, counted
from vidt.images.formats import VIDEO_ENDINGS, ending, is_picture

STANDARD_INPUT = "-"
LONGEST_NAME = 255  # bytes of a file's name, on most file systems
LONGEST_LINE = 65_536  # of standard input


@dataclass(frozen=True)
class ImageFile:
    """`path` is the file, or its address, as the user named it. `name` is the path of its results
    relative to the output folder; `DistinctFiles` makes it unique. `has_twin`: another image
    differs only in its suffix, so that a result named without the suffix would be ambiguous.
    """

    path: str
    name: str
    has_twin: bool = False


@dataclass(frozen=True)
class _Source:
    """One word of the command line; the names of its images start with `prefix`."""

    word: str
    matches: tuple[str, ...] | None = None  # of a pattern
    prefix: str = ""


class ImageFiles:
    """The images that the words of a command line name, in order; those of a folder and its
    subfolders sorted by name. A folder is read when it is reached, and links to folders are
    followed after it, each folder once.

    `avoid` is a folder to skip: the results may lie among the images. `passed_over` tells which
    files were not used.

    Raises UserError for a word that matches nothing, and for standard input that does not hold one
    name a line.
    """

    def __init__(self, words: Sequence[str], stdin: TextIO, avoid: Path | None = None) -> None:
        self._others = Counter[str]()  # files of folders that are no pictures, by ending
        self._results = 0  # listed files in the folder to skip
        self._unread: list[OSError] = []  # of folders
        self._stdin, self._avoid = stdin, None if avoid is None else os.path.realpath(avoid)
        if list(words).count(STANDARD_INPUT) > 1:
            raise UserError("IMAGES - stands for standard input; give it once")
        sources = [_source(word) for word in words]
        names = distinct([_own_name(source.word) for source in sources])
        files = [each.matches is None and _is_one_image(each.word) for each in sources]
        self._sources = [
            _Source(source.word, self._kept(source), name if len(sources) > 1 or file else "")
            for source, name, file in zip(sources, names, files, strict=True)
        ]

    def _kept(self, source: _Source) -> tuple[str, ...] | None:
        """The matches of a pattern, without those in the folder to skip, unless the pattern begins
        in it.
        """
        if source.matches is None or self._is_avoided(_fixed_part(source.word)):
            return source.matches
        return tuple(path for path in source.matches if not self._is_avoided(path))

    def _is_avoided(self, path: str) -> bool:
        return self._avoid is not None and is_inside(path, self._avoid)

    def named(self) -> list[str]:
        """The files and folders of the command line, and those that match its patterns."""
        named: list[str] = []
        for each in self._sources:
            named += [each.word] if each.matches is None else each.matches
        return [path for path in named if path != STANDARD_INPUT and not is_url(path)]

    def passed_over(self) -> list[str]:
        """Which files were not used, and which folders could not be read: lines to tell."""
        kinds = [
            f"{count} {kind or 'without extension'}" for kind, count in self._others.most_common(10)
        ]
        files = counted(
            self._others.total(), "file that is not an image", "files that are not images"
        )
        lines = [f"ignored {files}: {', '.join(kinds)}"] if kinds else []
        if VIDEO_ENDINGS & self._others.keys():
            lines.append("name videos themselves or by a pattern, such as 'clips/*.mp4'")
        if self._results:
            files = counted(self._results, "listed file")
            lines.append(f"ignored {files} in the folder of the results, {self._avoid}")
        return lines + [f"{error.filename}: {error.strerror}" for error in self._unread]

    def __iter__(self) -> Iterator[ImageFile]:
        self._others.clear()
        self._unread.clear()
        self._results = 0
        for source in self._sources:
            if source.word == STANDARD_INPUT:
                yield from self._listed(self._outside(_names(self._stdin)), "", source.prefix)
            elif source.matches is not None:
                images = (path for path in source.matches if is_picture(os.path.basename(path)))
                start = _fixed_part(source.word)
                yield from self._listed(source.matches, start, source.prefix, _twins(images))
            elif os.path.isdir(source.word):
                yield from self._walk(source.word, source.prefix)
            else:
                yield ImageFile(source.word, source.prefix)

    def count(self) -> int | None:
        """The number of images, for a progress bar; None with standard input."""
        if any(source.word == STANDARD_INPUT for source in self._sources):
            return None
        return sum(1 for _ in self)

    def _outside(self, paths: Iterable[str]) -> Iterator[str]:
        """The paths that are not in the folder to skip."""
        for path in paths:
            if not is_url(path) and self._is_avoided(path):
                self._results += 1
            else:
                yield path

    def _listed(
        self, paths: Iterable[str], start: str, prefix: str, twins: frozenset[str] = frozenset()
    ) -> Iterator[ImageFile]:
        for path in paths:
            if is_url(path):
                yield ImageFile(path, os.path.join(prefix, _own_name(path)))
                continue
            # A pattern may climb after its fixed part, as in photos/*/../../*.jpg.
            relative = _harmless(os.path.relpath(path, start) if start else path)
            if os.path.isdir(path):
                yield from self._walk(path, os.path.join(prefix, relative))
            else:
                twin = os.path.splitext(path)[0] in twins
                yield ImageFile(path, os.path.join(prefix, relative), twin)

    def _walk(self, folder: str, prefix: str) -> Iterator[ImageFile]:
        """The images of a folder, its subfolders, and the folders that links in it lead to: these
        last, so that a folder which is there by itself has its own name.
        """
        seen: set[str] = set()  # real paths, since links may lead round in circles
        starts = deque([(folder, prefix)])
        while starts:
            start, prefix = starts.popleft()
            for place, folders, files in os.walk(start, onerror=self._unread.append):
                real = os.path.realpath(place)
                folders[:] = [] if real in seen else self._entered(folder, place, folders)
                if real in seen:
                    continue
                seen.add(real)
                inside = os.path.normpath(os.path.join(prefix, os.path.relpath(place, start)))
                for name in folders:  # `os.walk` passes over links
                    if os.path.islink(path := os.path.join(place, name)):
                        starts.append((path, os.path.join(inside, name)))
                yield from self._images(place, inside, files)

    def _entered(self, start: str, place: str, folders: Sequence[str]) -> list[str]:
        """The subfolders to read: not hidden ones, nor results unless the walk starts in them."""
        shown = sorted(name for name in folders if not name.startswith("."))
        if self._avoid is None or self._is_avoided(start):
            return shown
        return [name for name in shown if not self._is_avoided(os.path.join(place, name))]

    def _images(self, place: str, inside: str, files: Sequence[str]) -> Iterator[ImageFile]:
        """The images among the files of a folder, with names in the folder `inside`."""
        images = sorted(name for name in files if is_picture(name))
        rest = (name for name in files if not is_picture(name) and not name.startswith("."))
        self._others.update(map(ending, rest))
        twins = _twins(images)
        for name in images:
            twin = os.path.splitext(name)[0] in twins
            path = os.path.join(place, name)
            yield ImageFile(path, os.path.normpath(os.path.join(inside, name)), twin)


class DistinctFiles:
    """Renames images whose results would overwrite those of an earlier image: the name keeps its
    suffix if the name without it is taken, or else gets a number.

    `written` returns the files that an image will get, relative to the output folder; those for
    which `is_kept` is true belong to no image. Their short hashes are stored, so that a million
    images need some 100 MB. A collision, one case in 10 ** 7, costs a number that was not needed.
    """

    def __init__(
        self,
        written: Callable[[ImageFile], Sequence[str]],
        is_kept: Callable[[str], bool] = lambda path: False,
    ) -> None:
        self._written, self._is_kept = written, is_kept
        self._taken: set[bytes] = set()
        self._last: dict[bytes, int] = {}  # last number of each repeated name

    def place(self, file: ImageFile) -> ImageFile:
        """The image under its own name, or under the next free one."""
        if self._take(file):
            return file
        file = replace(file, has_twin=True)
        if self._take(file):
            return file
        name = _short(file.name)
        number = self._last.get(name, 1) + 1
        while not self._take(placed := replace(file, name=_numbered(file.name, number))):
            number += 1
        self._last[name] = number
        return placed

    def _take(self, file: ImageFile) -> bool:
        paths = self._written(file)
        names = {_short(os.path.normpath(path)) for path in paths}
        if names & self._taken or any(map(self._is_kept, paths)):
            return False
        self._taken |= names
        return True


def distinct(names: Sequence[str]) -> list[str]:
    """The names, repeated ones with a number: a.jpg, a-2.jpg."""
    files = DistinctFiles(lambda file: [file.name])
    return [files.place(ImageFile(name, name)).name for name in names]


def _numbered(name: str, number: int) -> str:
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{number}{suffix}"


def _short(name: str) -> bytes:
    return blake2b(os.fsencode(name), digest_size=8).digest()


def _twins(names: Iterable[str]) -> frozenset[str]:
    """The stems that two names or more share."""
    stems = Counter(os.path.splitext(name)[0] for name in names)
    return frozenset(stem for stem, count in stems.items() if count > 1)


def _source(word: str) -> _Source:
    if word == STANDARD_INPUT or is_url(word) or os.path.exists(word):
        return _Source(word)
    if glob.has_magic(word):
        matches = tuple(sorted(glob.glob(word, recursive=True)))
        if matches:
            return _Source(word, matches)
        raise UserError(f"IMAGES {word}: no file matches this pattern")
    raise UserError(f"IMAGES {word}: no such file or folder")


def _is_one_image(word: str) -> bool:
    return is_url(word) or os.path.isfile(word)


def _names(lines: TextIO) -> Iterator[str]:
    """Raises UserError for names separated by null bytes, as by find -print0."""
    if isinstance(lines, io.TextIOWrapper):
        lines.reconfigure(errors="surrogateescape")  # names of any bytes, as on the command line
    first = True
    for line in iter(partial(lines.readline, LONGEST_LINE + 1), ""):
        if len(line) > LONGEST_LINE:
            raise UserError(f"IMAGES -: a line is longer than {LONGEST_LINE:,} characters")
        line, first = line.removeprefix("\ufeff") if first else line, False  # a byte order mark
        if "\0" in line:
            raise UserError("IMAGES -: null bytes in it; names are expected one a line")
        if line.strip():
            yield line.rstrip("\r\n")


def _own_name(word: str) -> str:
    if word == STANDARD_INPUT:
        return "stdin"
    if is_url(word):
        return _harmless(os.path.basename(unquote(urlparse(word).path).replace("\0", "")))
    if not os.path.exists(word):
        word = _fixed_part(word)
    return os.path.basename(os.path.abspath(word)) or "root"


def _fixed_part(pattern: str) -> str:
    """The part of a pattern before its first wildcard."""
    parts = Path(pattern).parts
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return str(Path(*parts[:first])) if first else "."


def is_inside(path: str, folder: str) -> bool:
    """Whether a path, without its links, is a folder or in it; the folder's path has none."""
    return Path(os.path.realpath(path)).is_relative_to(folder)


def _harmless(path: str) -> str:
    """The path without its root and its `..`, so that it stays below any folder."""
    parts = [part for part in Path(os.path.normpath(path)).parts if part not in ("/", "..")]
    return os.path.join(*parts) if parts else "image"


def fitting(name: str, suffix: str) -> str:
    """A path with the suffix, its last part shortened to what a file system takes as one name."""
    folder, last = os.path.split(name)
    room = LONGEST_NAME - len(os.fsencode(suffix))
    if len(os.fsencode(last)) > room:
        end = f"-{_short(last).hex()}"
        last = os.fsdecode(os.fsencode(last)[: room - len(end)]) + end
    return os.path.join(folder, last + suffix)
