"""A program for a series of kills: prints a line for each and how many ended well."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol


class Outcome(Protocol):
    """The outcome of one kill; its text is the printed line."""

    @property
    def faults(self) -> list[str]:
        """Descriptions of what is wrong afterwards."""
        ...


def run_kills(about: str, kills: Callable[[Path, int, int], Iterator[Outcome]], ended: str) -> None:
    """Run `kills(folder, count, seed)` with the values of `--kills` and `--seed`.

    `ended` completes the sentence about the kills without faults. Exits with 1 if there was one.
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
