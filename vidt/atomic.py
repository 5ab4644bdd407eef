"""Files that are there whole or not at all: written under a temporary name, then renamed. A reader,
or a kill at any instant, finds the old file or the new one.

Imports nothing heavy: what only watches a run, and what runs without PyTorch, write them too.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


class Unwritable(OSError):
    """A file that cannot be written; one line names it."""


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Where a file lies until it is whole, beside `path`; what is still there in the end is
    removed. What a kill leaves, the next one replaces.
    """
    place = path.with_name(f".{path.name}.tmp")
    try:
        yield place
    finally:
        with suppress(OSError):  # where there is no folder, there is nothing to remove
            place.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raises Unwritable, which names `path`, for an OSError inside; one that names a file already
    is kept.
    """
    try:
        yield
    except Unwritable:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise Unwritable(
            f"{path} cannot be written ({reason}); choose another place, or make room"
        ) from error


@contextmanager
def atomic_file(path: str | Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the block ends well. Raises
    Unwritable.

    durable: on the disk before it has its name, so that a power failure leaves the old or the new
    one too. Costs milliseconds, and is not worth them where there are many that can be made again.
    """
    path = Path(path)
    with unfinished(path) as place, naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        place.replace(path)


def atomic_write(path: str | Path, data: bytes, *, durable: bool = True) -> None:
    """Replaces a file by one that holds `data`. As `atomic_file`."""
    with atomic_file(path, durable=durable) as file:
        file.write(data)
