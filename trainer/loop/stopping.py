"""SIGTERM and SIGINT as requests: the step in hand is finished, the run is saved, then it ends.

A second signal ends the process at once; one that follows within a moment is the same request (a
launcher forwards what the terminal has sent already). Exit codes are the shell's: 128 + the
signal's number (130, 143).
"""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST = 2.0  # seconds


class Stopped(Exception):
    """A run ended because it was asked to; everything was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopRequest:
    """While entered, notes the first of the two signals in `signum` (0: none)."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # elsewhere Python refuses handlers
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
            signal.raise_signal(signum)  # as if we were not here

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
