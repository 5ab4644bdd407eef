"""Atomic writes: a file is written under a temporary name, then renamed. A reader sees the old file
or the new one, even if the program is killed at any instant. Pipes and devices are written to as
they are, since a file in their place would be no pipe.

Temporary names belong to one process and one write, so that two programs that write one path both
write whole files; the later one stays. Imports nothing heavy, since programs that run without
PyTorch write files too.
"""

import os
import re
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO

# `.START.MACHINE-PROCESS-NUMBER.tmp`; START is the beginning of the file's name.
_TEMPORARY = re.compile(r"\.(.*)\.([0-9a-f]{8})-(\d+)-\d+\.tmp", re.DOTALL)
_START_BYTES = 100  # of the name: file systems allow 255 in all
_numbers = count()


class Unwritable(OSError):
    """A file cannot be written; the message is one line that names it."""


@contextmanager
def unfinished(path: Path, *, tidy: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, which no other process or thread uses. A file that is still
    there at the end of the block is removed. With `tidy`, so is what a kill left of an earlier
    write of `path`, for which the folder is listed.
    """
    start = os.fsdecode(os.fsencode(path.name)[:_START_BYTES])
    temporary = path.with_name(f".{start}.{_machine()}-{os.getpid()}-{next(_numbers)}.tmp")
    if tidy:
        remove_leftovers(path.parent, start)
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
def atomic_file(path: str | Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces `path` when the block ends without an exception; a link
    stays, and its target is replaced. A pipe or device is written to directly. Raises Unwritable.

    durable: flush to the disk before the rename, and the folder after it, so that a power failure
    also leaves the old or the new file. It costs milliseconds; turn it off for many files that can
    be made again.
    """
    named, path = Path(path), Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with naming(named), path.open("wb") as file:
            yield file
        return
    with unfinished(path, tidy=durable) as temporary, naming(named):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            flush(path.parent)


def atomic_write(path: str | Path, data: bytes, *, durable: bool = True) -> None:
    """Writes `data` as the file's whole content, with `atomic_file`."""
    with atomic_file(path, durable=durable) as file:
        file.write(data)


def flush(path: Path) -> None:
    """Flushes a file, or the names in a folder, such as that of a file that was just renamed, to
    the disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, start: str = "", *, alone: bool = False) -> None:
    """Removes the temporary files in a folder that killed processes of this machine left, only
    those of names with that `start` if it is given; with `alone`, when no other machine writes
    there, those of other machines too.
    """
    with suppress(OSError):  # the folder may not exist, or be read-only
        for path in [*folder.iterdir()]:
            match = _TEMPORARY.fullmatch(path.name)
            if match is None or start not in ("", match[1]):
                continue
            here = match[2] == _machine()
            if (not is_running(int(match[3]))) if here else alone:
                path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether this machine has a process with that id."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # the latter: no process has such a number
        return False
    except PermissionError:  # it is another user's
        return True
    return True


@cache
def _machine() -> str:
    """Eight digits for this host and its table of processes: a container has a table of its own."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # only Linux shows it
        parts.append(os.readlink("/proc/self/ns/pid"))
    return f"{zlib.crc32(' '.join(parts).encode()):08x}"
