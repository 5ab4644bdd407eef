"""Runs killed by SIGKILL at random instants and resumed end bit for bit as one left alone.

Three kills among the tests; `python tests/test_kill_resume.py --kills 20` for more, a line each.
"""

import fnmatch
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from kill_program import run_kills
from tiny_runs import (
    ROOT,
    command,
    differences,
    end_of,
    environment,
    random_pictures,
    write_coco,
)

# Six steps with dropout in three epochs, loaded by a worker: six checkpoints, three evaluations.
FLAGS = "--max_steps 6 --batch_size 4 --epochs 3 --save_steps 1 --num_workers 1 --denoising 6"
TIMEOUT = 300.0  # seconds that a run may take on a busy machine
PLACES = ("a save", "an epoch", "a clean-up", "the whole run")
LASTS = {"a save": 0.2, "an epoch": 1.0, "a clean-up": 0.02}  # seconds, about
TRACES = {"a save": ".*.unfinished", "a clean-up": ".*.removed", "an epoch": "step-*"}


@dataclass(frozen=True)
class Outcome:
    """Of one run: where it was to be killed, what that left, what is not the same at the end."""

    place: str
    seconds: float  # from the start of the program to its death
    left: list[str]
    faults: list[str]

    def __str__(self) -> str:
        end = f"DIFFERENT: {', '.join(self.faults)}" if self.faults else "bit-identical"
        left = ", ".join(self.left) or "nothing"
        return f"killed in {self.place} after {self.seconds:.2f} s, left {left}; resumed: {end}"


def start(data: Path, output: Path, *flags: str) -> subprocess.Popen:
    words = command(data, output, FLAGS, *flags)
    output.mkdir(exist_ok=True)
    with open(output / "log.txt", "a") as log:
        return subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=log, stderr=log)


def finish(process: subprocess.Popen, output: Path) -> float:
    """Waits for a run to end well; returns the seconds that it took from here."""
    begin = time.monotonic()
    assert process.wait(TIMEOUT) == 0, (output / "log.txt").read_text()
    return time.monotonic() - begin


def kill(data: Path, output: Path, place: str, random: np.random.Generator, length: float) -> float:
    """Starts a run and kills it at the place; returns the seconds that it lived, 0 if it was done
    before.
    """
    process, begin = start(data, output), time.monotonic()
    if place in TRACES:
        wait_for_trace(process, output / "checkpoints", TRACES[place], int(random.integers(1, 5)))
        time.sleep(random.uniform(0, LASTS[place]))
    else:
        time.sleep(random.uniform(0, length))
    process.send_signal(signal.SIGKILL)
    died = process.wait(TIMEOUT) == -signal.SIGKILL
    return time.monotonic() - begin if died else 0.0


def wait_for_trace(process: subprocess.Popen, root: Path, trace: str, times: int) -> None:
    """Until the disk has shown so many different ones of what the place leaves there."""
    seen: set[str] = set()
    while process.poll() is None and len(seen) < times:
        seen |= set(fnmatch.filter(os.listdir(root), trace)) if root.exists() else set()
        time.sleep(0.002)


def kills(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """Each kill is of a run of its own; all are compared with one that was left alone."""
    data = write_coco(folder / "data", random_pictures(8, 0), random_pictures(3, 1))
    whole_output = folder / "whole"
    length = finish(start(data, whole_output), whole_output)
    whole = end_of(whole_output)
    random = np.random.default_rng(seed)
    for number in range(count):
        output, place, lived = folder / f"killed-{number}", PLACES[number % len(PLACES)], 0.0
        while not lived:
            shutil.rmtree(output, ignore_errors=True)
            lived = kill(data, output, place, random, length)
        left = sorted(path.name for path in output.glob("checkpoints/*"))
        finish(start(data, output, "--resume"), output)
        leftovers = [path.name for path in output.rglob(".*")]
        yield Outcome(place, lived, left, [*differences(end_of(output), whole), *leftovers])
        shutil.rmtree(output)


@pytest.mark.slow
def test_three_kills(tmp_path: Path) -> None:
    try:
        for outcome in kills(tmp_path, 3):
            assert outcome.faults == [], str(outcome)
    finally:
        shutil.rmtree(tmp_path)


if __name__ == "__main__":
    run_kills(str(__doc__), kills, "runs ended bit-identical")
