"""SIGTERM and SIGINT as requests: the step in hand is finished, the run is saved, then it ends.

A second signal ends the process at once. Exit codes are the shell's: 128 + the signal's number
(130, 143).
"""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run ended because it was asked to; everything was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopRequest:
    """While entered, notes the first of the two signals in `signum` (0: none)."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, signal.Handlers | int | None] = {}

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
        self.signum = signum
        self._restore()  # the next one acts as if we were not here

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
