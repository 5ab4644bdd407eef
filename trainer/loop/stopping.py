"""SIGTERM and SIGINT as requests: the run finishes its step, saves, and ends.

A second signal ends the process; repeats within SAME_REQUEST are ignored, since a launcher forwards
a signal that the terminal has already sent. Exit codes are the shell's: 128 + the number
of the signal (130, 143).
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST = 2.0  # seconds
INTERRUPTED = 128 + signal.SIGINT


class Stopped(Exception):
    """The signal `signum` asked a run to stop. Every process raises it at the same step."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum
        self.evaluated = False  # whether the run has weights to predict with


class StoppedBySignal(KeyboardInterrupt):
    """SIGTERM, where it ends a program as Ctrl-C does."""

    exit_code = 128 + signal.SIGTERM


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises StoppedBySignal; Python allows this in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise StoppedBySignal

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """While entered, notes the first of the two signals in `signum` (0: none)."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Python allows handlers on the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST:
            self._restore()
            if signum == signal.SIGTERM:  # ends the process even where Python does not get to run
                signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)  # now with the handler from before

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
