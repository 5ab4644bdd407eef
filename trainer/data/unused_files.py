"""Files in the folders of a dataset that nothing uses: pictures that no list or annotation names,
annotation files without a picture, and files whose ending is not one of a picture's.
"""

import os
from collections.abc import Iterator

from trainer.readers.findings import FilesSeen, Finding, fold
from vidt.images.formats import ending, is_picture

ANNOTATIONS = (".txt", ".xml", ".json")
# Files that tools leave in such folders: names, and endings of caches.
BY_PRODUCTS = frozenset(("classes.txt", "notes.json", "Thumbs.db", "desktop.ini"))
CACHES = (".cache", ".npy", ".yaml", ".yml")


def unused_files(seen: FilesSeen) -> list[Finding]:
    """Findings about the files in the folders of `seen` that are not among its files."""
    return fold(_unused(seen))


def _unused(seen: FilesSeen) -> Iterator[Finding]:
    visited: set[str] = set()
    for folder in sorted(seen.folders):
        for top, _, names in os.walk(folder):
            top = os.path.normpath(top)
            if top in visited:
                continue
            visited.add(top)
            for name in sorted(names):
                path = os.path.normpath(os.path.join(top, name))
                if path not in seen.files and not _is_by_product(name):
                    yield _finding(path, name)


def _is_by_product(name: str) -> bool:
    readme = name.lower().startswith("readme")
    return name.startswith(".") or name in BY_PRODUCTS or ending(name) in CACHES or readme


def _finding(path: str, name: str) -> Finding:
    if is_picture(name):
        detail = "neither split names it"
        return Finding("picture without a split", "info", "not used", detail, file=path)
    if ending(name) in ANNOTATIONS:
        detail = "no picture of either split belongs to it"
        return Finding(
            "annotation file without a picture", "warning", "not used", detail, file=path
        )
    detail = f"{ending(name) or 'no ending'}: the names of pictures end otherwise"
    return Finding("file of unknown ending", "warning", "not used", detail, file=path)
