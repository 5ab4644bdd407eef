"""The program around a series of kills: as many as are asked for, a line each, and how many went
well.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol


class Outcome(Protocol):
    """Of one kill; its text is the line."""

    @property
    def faults(self) -> list[str]:
        """What is not as it should be afterwards."""
        ...


def run_kills(about: str, kills: Callable[[Path, int, int], Iterator[Outcome]], ended: str) -> None:
    """kills(folder, count, seed) of `--kills` and `--seed`; `ended` says what those without faults
    did. The exit code is 1 if there was a fault.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, one in enumerate(kills(Path(folder), options.kills, options.seed), 1):
            print(f"{number:3d}  {one}", flush=True)
            failed += bool(one.faults)
    print(f"{options.kills - failed} of {options.kills} {ended}")
    sys.exit(failed > 0)
