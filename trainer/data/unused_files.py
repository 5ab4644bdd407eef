"""Files in the folders of a dataset that nothing uses: pictures that no list or annotation names,
annotation files without a picture, and files whose ending is not one of a picture's.
"""

import os
from collections.abc import Iterator

from trainer.readers.findings import FilesSeen, Finding, fold
from trainer.readers.values import walk
from vidt.images.formats import ending, is_picture

ANNOTATIONS = (".txt", ".xml", ".json")
# Files that tools leave in such folders: names, and endings of caches.
BY_PRODUCTS = frozenset(("classes.txt", "notes.json", "Thumbs.db", "desktop.ini"))
CACHES = (".cache", ".npy", ".yaml", ".yml")


def unused_files(seen: FilesSeen) -> list[Finding]:
    """Findings about the files in the folders of `seen` that are not among its files."""
    return fold(_unused(seen))


def _unused(seen: FilesSeen) -> Iterator[Finding]:
    unused: list[str] = []
    beside: set[str] = set()  # pictures, without their ending
    for path in _files(seen.folders):
        if is_picture(os.path.basename(path)):
            beside.add(os.path.splitext(path)[0])
        if path not in seen.files and not _is_by_product(os.path.basename(path)):
            unused.append(path)
    pictures = filter(is_picture, map(os.path.basename, unused))
    stems = {os.path.splitext(name)[0] for name in pictures}
    for path in unused:
        stem = os.path.splitext(path)[0]
        yield _finding(path, stem in beside or os.path.basename(stem) in stems)


def _files(folders: set[str]) -> Iterator[str]:
    """The files in the folders and the folders inside, each once."""
    visited: set[str] = set()
    for folder in sorted(folders):
        for top, names in walk(folder):
            top = os.path.normpath(top)
            if top not in visited:
                visited.add(top)
                yield from (os.path.join(top, name) for name in sorted(names))


def _is_by_product(name: str) -> bool:
    readme = name.lower().startswith("readme")
    return name.startswith(".") or name in BY_PRODUCTS or ending(name) in CACHES or readme


def _finding(path: str, has_picture: bool) -> Finding:
    """has_picture: whether one of this name lies beside the file, or in no split either."""
    name = os.path.basename(path)
    if is_picture(name):
        detail = "no list, annotation or label file of either split names it"
        return Finding("picture without a split", "info", "not used", detail, file=path)
    if ending(name) in ANNOTATIONS and has_picture:
        detail = "neither split reads it"
        return Finding("annotation file without a split", "info", "not used", detail, file=path)
    if ending(name) in ANNOTATIONS:
        detail = "no picture of either split belongs to it"
        return Finding(
            "annotation file without a picture", "warning", "not used", detail, file=path
        )
    detail = f"extension {ending(name)}" if ending(name) else "no extension"
    return Finding("not an image file", "warning", "not used", detail, file=path)
