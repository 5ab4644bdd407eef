"""What the machine can do at most, and what is asked of it: every time is a fraction of a limit."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from laps import Clock, wait_for

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices that are multiplied
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes
LEAST = 3  # runs
SECONDS = 1.0  # for each


@dataclass(frozen=True)
class Ceiling:
    """Per second: operations of a large matrix product at the precision; bytes of a large copy or
    of a product in place, whichever is quicker, each byte read and written.
    """

    flops: float
    bytes: float


class FlopMeter:
    """Floating point operations as torch counts them: those of matrix products, convolutions and
    attention, a multiplication and an addition apart.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter

    def read(self) -> int:
        return self.counter.get_total_flops()

    def gained(self, first: int, second: int) -> float:
        return second - first


def measure_ceiling(device: torch.device, dtype: torch.dtype, *, scale: int = 1) -> Ceiling:
    """Matrices have sides, and memory bytes, a scale-th of the usual."""
    side = SIDE[device.type] // scale
    first, second = torch.randn(2, side, side, device=device).to(dtype)
    product = torch.empty_like(first)
    source = torch.ones(COPIED[device.type] // scale // 4, device=device)
    target = torch.empty_like(source)
    multiply = _fastest(lambda: torch.mm(first, second, out=product), device)
    copy = _fastest(lambda: target.copy_(source), device)
    in_place = _fastest(lambda: target.mul_(1.0), device)  # a CPU need not fetch what it overwrites
    return Ceiling(2 * side**3 / multiply, 2 * source.nbytes / min(copy, in_place))


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run, after one that is not counted."""
    run()
    clock, start = Clock(device), time.perf_counter()
    times: list[float] = []
    while len(times) < LEAST or time.perf_counter() - start < SECONDS:
        wait_for(device)
        before = clock.read()
        run()
        after = clock.read()
        wait_for(device)
        times.append(clock.gained(before, after))
    return min(times)
