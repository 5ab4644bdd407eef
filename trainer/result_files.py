"""Files that are there whole or not at all: written under a temporary name, then renamed.

Not forced onto the disk one by one: results can be made again, and a million of them are many.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def write_result(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a kill at any instant, finds the old or the new one.

    Raises OSError naming the file if it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.tmp")  # what a kill leaves, the next write replaces
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        _remove(unfinished)


class Unwritable(OSError):
    """A result that cannot be written; one line names it."""


@contextmanager
def whole_text(path: Path) -> Iterator[TextIO]:
    """A text file to write to at length; it appears when the block ends well, and does not when it
    raises. Raises OSError naming the file if it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open(
            "w", encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            yield file
        unfinished.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        _remove(unfinished)


def unwritable(path: Path, error: OSError) -> OSError:
    """The same failure in words that name the file; one that names a file already is kept."""
    if isinstance(error, Unwritable):
        return error
    reason = error.strerror or str(error)
    return Unwritable(f"{path} cannot be written ({reason}); choose another place, or make room")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # where not even the folder can be made, there is nothing to remove
        return
