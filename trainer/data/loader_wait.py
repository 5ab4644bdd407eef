"""How long training waits for its loader, and what to do about it."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from trainer.settings.config import TrainConfig
from vidt.images.batching import available_cores

LONG = 1 / 3  # share of the time above which the loader holds training up
STEADY = 50  # batches over which it must: one slow image does not make a slow loader

Batch = TypeVar("Batch")


class LoaderWait:
    """Measures the time from the moment that the device has nothing left to do to the arrival of
    the next batch: on a GPU the program runs ahead, and what it waits meanwhile costs nothing.

    `clock` gives seconds. `num_processes` counts those that share this machine's cores.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        num_processes: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.device, self.clock = config, device, clock
        self.num_processes = num_processes
        self.since, self.waits = clock(), list[tuple[Any, Any]]()
        self.fresh, self.num_slow, self.advised = True, 0, False

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of a new loader, whose workers have yet to start."""
        self.fresh = True
        source, end = iter(batches), object()
        while True:
            if not self.waits:  # leaves out what happened since the last report, as an evaluation
                self.since = self.clock()
            begun = self._moment()
            batch = next(source, end)
            self.waits.append((begun, self._moment()))
            if batch is end:
                return
            yield batch  # type: ignore[misc]

    def report(self, share_anywhere: Callable[[float], float]) -> tuple[float, str]:
        """The share of the time of the steps since the last report, 0 to 1, that was spent waiting,
        and what to do about it: a line, the first time that the share has been large for a while
        and something can be done. Call it when the device has finished its work.

        `share_anywhere` returns the largest of all processes' shares.
        """
        passed = self.clock() - self.since
        waited = sum(self._seconds(*wait) for wait in self.waits)
        share = share_anywhere(min(waited / max(passed, 1e-9), 1.0))
        # A loader that has just started is still waiting for its workers.
        slow = share > LONG and not self.fresh
        self.num_slow = self.num_slow + len(self.waits) if slow else 0
        self.waits, self.fresh = [], False
        ways = self._ways()
        if self.advised or self.num_slow < STEADY or not ways:
            return share, ""
        self.advised = True
        waits = f"training spends {share:.0%} of its time waiting for the loader"
        return share, f"{waits}: {' or '.join(ways)}"

    def _ways(self) -> list[str]:
        """Workers help if there are cores that neither they nor the training computes on."""
        cores, workers = available_cores(), self.config.num_workers
        computing = torch.get_num_threads() if self.device.type == "cpu" else 0
        ways = []
        if self.num_processes * (workers + computing) < cores:
            processes = f" for {self.num_processes} processes" if self.num_processes > 1 else ""
            ways.append(f"raise --num_workers ({workers} now, {cores} cores here{processes})")
        if self.config.cache_images is None:
            ways.append("pass --cache_images DIR")
        return ways

    def _moment(self) -> Any:
        """Now; on a GPU the moment at which it gets there."""
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begun: Any, ended: Any) -> float:
        if self.device.type != "cuda":
            return float(ended - begun)
        return float(begun.elapsed_time(ended)) / 1000
