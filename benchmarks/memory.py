"""Peak memory, each contestant in a process of its own so that none inherits another's.

On a CPU it is the most that the process ever held, Python and PyTorch included; on a GPU what
PyTorch allocated there.
"""

import resource
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from contestants import (
    FLOOR_FORWARD,
    FLOOR_LEARNING,
    FORWARD,
    LEARNING,
    TRAINING,
    Case,
    Detector,
    Floor,
)
from laps import Contestant

EMPTY = "empty process"
Peaks = dict[str, float]  # GiB by work


class PeakMeter:
    """GiB that this process held at most so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def read(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return _most_resident() / 2**30

    def gained(self, first: float, second: float) -> float:
        return second - first


def peak_memory(case: Case) -> Peaks:
    """Of all that is raced, eager. What a process was killed for is missing."""
    peaks: Peaks = {}
    for measure in (detector_peaks, floor_peaks):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                peaks |= pool.submit(measure, case).result()
            except (BrokenProcessPool, torch.OutOfMemoryError):
                continue
    return peaks


def detector_peaks(case: Case) -> Peaks:
    """Each kind of work needs more than those before it, so one process tells them all. The
    optimiser's state is there from the second step on.
    """
    torch.set_num_threads(case.threads)
    meter = PeakMeter(torch.device(case.device))
    empty = meter.read()
    forward, training = Detector(case).eager()
    return {
        EMPTY: empty,
        FORWARD: _reading(forward, meter, "forward"),
        LEARNING: _reading(training, meter, "backward"),
        TRAINING: _reading(training, meter, "EMA"),
    }


def floor_peaks(case: Case) -> Peaks:
    torch.set_num_threads(case.threads)
    meter = PeakMeter(torch.device(case.device))
    forward, learning = Floor(case).eager()
    return {
        FLOOR_FORWARD: _reading(forward, meter, "forward"),
        FLOOR_LEARNING: _reading(learning, meter, "backward"),
    }


def _most_resident() -> int:
    """Bytes. Linux tells those of the parent as well if it is asked by `getrusage`."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def _reading(contestant: Contestant, meter: PeakMeter, part: str) -> float:
    """After that part of one run."""
    return contestant.go(meter).reading_after(part)
