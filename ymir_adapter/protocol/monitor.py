"""`monitor.txt`: the record that shows the platform that a task is alive, and its progress.

task id TAB seconds TAB percent TAB state [TAB code [TAB message]]
"""

import contextlib
import fcntl
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

RUNNING, FAILED = 2, 4  # only the platform writes states 1 and 3
HEARTBEAT = 2.0  # seconds
SHORTEST_PAUSE = 0.5  # seconds between two writes
MOST_LINES = 100  # that the platform stores
LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Record:
    """The first four columns of the file."""

    task_id: str
    timestamp: float
    fraction: float
    state: int


class Monitor:
    """Writes the task's record. Several processes may hold a monitor at the same time: the fraction
    and the time in the file never decrease, and an error is final.

    As a context manager it rewrites the record every two seconds from a thread, so that the task
    does not look dead during a long phase.
    """

    def __init__(self, path: str | Path, task_id: str) -> None:
        self.path = Path(path)
        self.task_id = " ".join(task_id.split())
        self._fraction = 0.0
        self._ended = False
        self._since = time.time()
        self._written: tuple[float, float] | None = None  # (monotonic seconds, fraction)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Monitor":
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def update(self, fraction: float) -> None:
        """Sets the share of the task that is done. The first and the last value are written at
        once, others at most twice a second; the heartbeat writes what was held back.
        """
        with self._lock:
            if not math.isnan(fraction):
                self._fraction = max(self._fraction, min(fraction, 1.0))
            written = self._written[1] if self._written else 0.0
            is_last = self._fraction == 1.0 and written < 1.0
            if is_last or not self._wrote_recently():
                self._write_running()

    def error(self, code: int, message: str, traceback: str = "") -> None:
        """Writes the record of a failure, the last one."""
        with self._lock:
            self._ended = True
            words = " ".join(message.split())[:LONGEST_MESSAGE]
            stack = traceback.strip("\n").splitlines()[-(MOST_LINES - 1) :]
            with self._locked():
                first = self._line(self._read(), 1.0, FAILED, str(int(code)), words)
                self._replace("\n".join([first, *stack]) + "\n")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with self._lock:
                if not self._wrote_recently():
                    self._write_running()

    def _wrote_recently(self) -> bool:
        return self._written is not None and time.monotonic() - self._written[0] < SHORTEST_PAUSE

    def _write_running(self) -> None:
        with self._locked():
            last = self._read()
            if last is not None:
                # An older record may be of an earlier task with the same name.
                self._ended |= last.state == FAILED and last.timestamp >= self._since
                if last.state == RUNNING:
                    self._fraction = max(self._fraction, last.fraction)
            if not self._ended:
                self._replace(self._line(last, self._fraction, RUNNING) + "\n")
                self._written = (time.monotonic(), self._fraction)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes from writing between our reading and our replacing the record."""
        try:
            folder = os.open(self.path.parent, os.O_RDONLY)
        except OSError:
            yield  # writing the record makes the folder, or reports that it cannot
            return
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _line(self, last: Record | None, fraction: float, state: int, *more: str) -> str:
        now = max(time.time(), last.timestamp if last else 0.0)
        percent = math.floor(fraction * 100 + 1e-9) / 100  # rounded down: 1.00 means done
        return "\t".join([self.task_id, f"{now:.6f}", f"{percent:.2f}", str(state), *more])

    def _read(self) -> Record | None:
        """The current record of this task, of any writer; None if there is none."""
        try:
            line = self.path.read_bytes().partition(b"\n")[0].decode(errors="replace")
            task_id, timestamp, fraction, state = line.split("\t")[:4]
            record = Record(task_id, float(timestamp), float(fraction), int(state))
        except (OSError, ValueError):
            return None
        sane = math.isfinite(record.timestamp) and 0 <= record.fraction <= 1
        return record if sane and record.task_id == self.task_id else None

    def _replace(self, text: str) -> None:
        """Replaces the record by a rename, or, if the file itself is mounted, by one write over the
        old text. If both fail the task goes on.
        """
        data = text.encode("utf-8", "backslashreplace")
        # Named by process: two may write at once.
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(data)
            os.replace(unfinished, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            self._overwrite(data)

    def _overwrite(self, data: bytes) -> None:
        """Writes before it truncates, so that a reader finds the old record or the new one."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, data)
                os.ftruncate(descriptor, len(data))
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning(f"{self.path} cannot be written: {error.strerror}")
