"""One run at a time in an output folder: a file `.run.lock` names the host and the process.

The process holds a POSIX lock on the file, which ends with it, however it ends: what a killed run
leaves is taken over. Where the file system has no locks, creating the file exclusively stands in,
and the run of a process that this host no longer has is taken over.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.loop.agreement import Agreement
from vidt.atomic import is_running, naming, remove_leftovers
from vidt.errors import UserError

NAME = ".run.lock"
_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES)
_held: set[Path] = set()  # by this process, which POSIX locks do not stop


@contextmanager
def only_run_in(folder: Path, agreement: Agreement) -> Iterator[None]:
    """Holds the folder for this run, on the main process; the folder is created. Inside another
    such block it does nothing. Raises UserError, on every process, if another run holds it.
    """
    with ExitStack() as stack:
        agreement.on_main(lambda: stack.enter_context(held(folder)))
        yield


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """As `only_run_in`, for one process. Temporary files of killed runs are removed."""
    if folder.resolve() in _held:
        yield
        return
    path = folder / NAME
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    _held.add(folder.resolve())
    try:
        remove_leftovers(folder, alone=True)
        yield
    finally:
        _held.discard(folder.resolve())
        with suppress(OSError):  # the folder may be gone
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """The descriptor of the locked file. Raises UserError if another process has the lock."""
    while True:
        try:
            descriptor, is_ours = _create(path), True
        except FileExistsError:
            descriptor, is_ours = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), False
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if is_ours and error.errno not in _HELD_ELSEWHERE:
                _sign(descriptor)
                return descriptor
            owner = _owner(descriptor)
            os.close(descriptor)
            if error.errno in _HELD_ELSEWHERE:
                raise _in_use(path, owner) from None
            return _acquire_by_name(path)
        if _is_still(path, descriptor):
            _sign(descriptor)
            return descriptor
        os.close(descriptor)  # its owner removed it between the two calls


def _create(path: Path) -> int:
    """Raises FileExistsError if another process has created the file."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)


def _acquire_by_name(path: Path) -> int:
    """The same without locks: whoever creates the file has it, even before it has signed."""
    for _ in range(2):
        try:
            descriptor = _create(path)
        except FileExistsError:
            owner = _read_owner(path)
            if owner.get("host") != socket.gethostname() or is_running(owner.get("process", 0)):
                break
            path.unlink(missing_ok=True)
        else:
            _sign(descriptor)
            return descriptor
    raise _in_use(path, _read_owner(path), f"; if that run has ended, delete {path}")


def _sign(descriptor: int) -> None:
    owner = {"host": socket.gethostname(), "process": os.getpid()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _read_owner(path: Path) -> dict[str, Any]:
    with suppress(OSError), path.open("rb") as file:
        return _owner(file.fileno())
    return {}


def _owner(descriptor: int) -> dict[str, Any]:
    """Host and process; {} if the file does not say, or not yet."""
    with suppress(ValueError):
        owner = json.loads(os.pread(descriptor, 1000, 0))
        if isinstance(owner, dict) and isinstance(owner.get("process"), int):
            return owner
    return {}


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(path: Path, owner: dict[str, Any], more: str = "") -> UserError:
    who = f"process {owner['process']} on {owner.get('host')}" if owner else "another process"
    return UserError(
        f"--output_dir {path.parent} is in use by {who}; wait for that run, stop it, or name "
        f"another folder{more}"
    )
