"""Runs split into named parts: what a meter gained while each part went on."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn

REST = "rest"  # what belongs to no part
Gains = dict[str, float]  # by part, in the order in which the parts began


class Meter(Protocol):
    """Something that grows while work is done."""

    def read(self) -> Any: ...

    def gained(self, first: Any, second: Any) -> float: ...


class Clock:
    """Seconds; on a GPU those of its own time line, so that nothing has to wait in between. There
    they can be told once the device has caught up.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def read(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def gained(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) / 1000 if self.on_gpu else second - first


class Laps:
    """Parts may lie inside one another: each has only what no part inside it has."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._open = [REST]
        self._marks: list[tuple[Any, str]] = []  # readings, and the part that each begins

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        yield
        self.leave()

    def enter(self, name: str) -> None:
        self._open.append(name)
        self._mark()

    def leave(self) -> None:
        self._open.pop()
        self._mark()

    def turn_into(self, name: str) -> None:
        """The part that goes on is another one from here to its end."""
        self._open[-1] = name
        self._mark()

    def _mark(self) -> None:
        self._marks.append((self.meter.read(), self._open[-1]))

    def gains(self) -> Gains:
        gains: Gains = {}
        for (first, part), (second, _) in pairwise(self._marks):
            gains[part] = gains.get(part, 0.0) + self.meter.gained(first, second)
        return gains

    def reading_after(self, part: str) -> Any:
        """What the meter showed when the part ended, for the last time if it did more than once."""
        ends = [second for (_, name), (second, _) in pairwise(self._marks) if name == part]
        return ends[-1]


@dataclass(frozen=True)
class Contestant:
    """Work that is timed: `how` is eager or compiled; `run` tells the laps which part it is at.
    `prepare` comes before each run and is not timed: what others would do once for many runs.
    """

    work: str
    how: str
    module: nn.Module
    learns: bool
    run: Callable[[Laps], None]
    prepare: Callable[[], None] = lambda: None

    @property
    def name(self) -> tuple[str, str]:
        return self.work, self.how

    def go(self, meter: Meter) -> Laps:
        """Runs once, as in training or as in prediction."""
        self.module.train(self.learns)
        self.prepare()
        laps = Laps(meter)
        with torch.inference_mode(not self.learns):
            self.run(laps)
        return laps

    def seconds(self, device: torch.device) -> Gains:
        """Of each part of one run, with nothing left to do on the device."""
        wait_for(device)
        laps = self.go(Clock(device))
        wait_for(device)
        return laps.gains()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(
    contestants: Sequence[Contestant],
    device: torch.device,
    *,
    least: int,
    most: int,
    seconds: float,
) -> dict[tuple[str, str], list[Gains]]:
    """Seconds of each contestant in each round, by part: what disturbs the machine for a while
    falls on all alike. At least `least` rounds, at most `most`, and none begins after `seconds`.
    """
    rounds: dict[tuple[str, str], list[Gains]] = {each.name: [] for each in contestants}
    start = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - start > seconds:
            break
        for each in contestants:
            rounds[each.name].append(each.seconds(device))
    return rounds


def medians(rounds: Sequence[Gains]) -> Gains:
    """Of each part."""
    return {part: statistics.median(each.get(part, 0.0) for each in rounds) for part in rounds[0]}
