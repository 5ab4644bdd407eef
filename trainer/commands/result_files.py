"""What the command line leaves behind: files that are there whole or not at all.

Not forced onto the disk one by one: results can be made again, and a million of them are many.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from vidt.atomic import atomic_file, atomic_write


def write_result(path: Path, data: bytes) -> None:
    """Raises OSError naming the file if it cannot be written."""
    atomic_write(path, data, durable=False)


@contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """A text file to write to at length; it appears when the block ends well, and does not when it
    raises. Raises OSError naming the file if it cannot be written.
    """
    with atomic_file(path, durable=False) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield text
        text.flush()
        text.detach()  # which would close the file else
