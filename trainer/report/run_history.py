"""The history of a run, for its page: losses and speed of this start, evaluations of all starts,
and where the time went.
"""

import csv
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.report.progress import Progress


@dataclass
class RunHistory:
    """A `Report` that remembers. `steps` of a resumed run begin where it resumes."""

    clock: Callable[[], float] = time.monotonic  # seconds
    first_step: int = 0
    steps: list[int] = field(default_factory=list)  # of the log lines
    numbers: dict[str, list[float]] = field(default_factory=dict)  # of each log line, by name
    seconds_evaluating: float = 0.0
    num_evaluations: int = 0
    last: Progress | None = None
    _began: float | None = None
    _evaluating_since: float | None = None

    def __call__(self, progress: Progress) -> None:
        if self._began is None:
            self._began, self.first_step = self.clock(), progress.step
        if progress.event == "evaluating" and self._evaluating_since is None:
            self._evaluating_since = self.clock()
        if progress.event == "evaluation":
            self.num_evaluations += 1
            if self._evaluating_since is not None:
                self.seconds_evaluating += self.clock() - self._evaluating_since
                self._evaluating_since = None
        if progress.event == "step":
            self._add_step(progress.step, progress.metrics)
        self.last = progress

    @property
    def seconds(self) -> float:
        """Since this start."""
        return 0.0 if self._began is None else self.clock() - self._began

    def of(self, name: str) -> list[float]:
        """A value for each of `steps`, NaN where a log line lacks it; empty if all lack it."""
        return self.numbers.get(name, [])

    def known(self, name: str) -> list[float]:
        """The values of `of` that are not NaN."""
        return [value for value in self.of(name) if not math.isnan(value)]

    def _add_step(self, step: int, metrics: Mapping[str, float]) -> None:
        for name in {*self.numbers, *metrics}:
            column = self.numbers.setdefault(name, [math.nan] * len(self.steps))
            column.append(float(metrics.get(name, math.nan)))
        self.steps.append(step)


def evaluations_in(path: Path) -> list[dict[str, float]]:
    """The rows of `metrics.csv`, those of earlier starts too; NaN where a cell is empty."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: float(value) if value else math.nan for name, value in row.items()}
            for row in csv.DictReader(file)
        ]
