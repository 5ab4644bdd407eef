"""Atomic writes: a file is written under a temporary name, then renamed. A reader sees the old file
or the new one, even if the program is killed at any instant.

Imports nothing heavy, since programs that run without PyTorch write files too.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


class Unwritable(OSError):
    """A file cannot be written; the message is one line that names it."""


@contextmanager
def unfinished(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`. A file that is still there at the end of the block is
    removed. If a kill leaves one behind, the next write replaces it.

    shared: several processes may write `path` at once. Each has a temporary path of its own, and
    what a kill leaves behind stays.
    """
    own = f".{uuid.uuid4().hex}" if shared else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    try:
        yield temporary
    finally:
        with suppress(OSError):  # the folder may not exist
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into an Unwritable that names `path`."""
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
def atomic_file(
    path: str | Path, *, durable: bool = True, shared: bool = False
) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces `path` when the block ends without an exception. Raises
    Unwritable.

    durable: flush to the disk before the rename, so that a power failure also leaves the old or the
    new file. It costs milliseconds; turn it off for many files that can be made again.
    shared: several processes may write `path` at once; the last one counts.
    """
    path = Path(path)
    with unfinished(path, shared=shared) as temporary, naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)


def atomic_write(
    path: str | Path, data: bytes, *, durable: bool = True, shared: bool = False
) -> None:
    """Writes `data` as the file's whole content, with `atomic_file`."""
    with atomic_file(path, durable=durable, shared=shared) as file:
        file.write(data)
