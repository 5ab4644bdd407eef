"""A run on the console: a progress bar on a terminal, plain lines elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trainer.report.progress import Progress, class_names_in, is_score
from vidt.errors import escaped, printable

SCORES_EXPLAINED = (
    "AP50 counts a box as correct if its IoU with a true box is at least 0.5; AP is the mean over\n"
    "IoU 0.5 to 0.95. 1 is perfect; - means that the validation set has no such objects."
)
BAR = "{percentage:3.0f}%|{bar:12}| "  # in tqdm's notation


def duration(seconds: float) -> str:
    """In one or two units: '45s', '12m05s', '3h07m', '2d04h'."""
    whole = max(0, round(seconds))
    for unit, size, below, below_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // below_size:02d}{below}"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def score(value: float) -> str:
    return f"{value:.3f}" if is_score(value) else "-"


def score_table(metrics: Mapping[str, float]) -> str:
    """AP50 and AP of each class and of all classes, as aligned columns."""
    nothing = float("nan")
    rows = [
        (escaped(name), score(metrics.get(f"ap50/{name}", nothing)), score(metrics[f"ap/{name}"]))
        for name in class_names_in(metrics)
    ]
    rows.append(
        ("all classes", score(metrics.get("map50", nothing)), score(metrics.get("map", nothing)))
    )
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {ap50:>6}  {ap:>6}" for name, ap50, ap in rows]
    rule = "-" * (width + 16)
    return "\n".join([f"{'class':<{width}}    AP50      AP", rule, *lines[:-1], rule, lines[-1]])


class PrintableFormatter(logging.Formatter):
    """Escapes what would command the terminal: file and class names are other people's. Drops
    Accelerate's rank where there is one process.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = printable(super().format(record))
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        return line.removeprefix("[RANK 0] ") if alone else line


class Console:
    """A `Report` that writes to `stream` (default: standard output), with a bar if it is a
    terminal.

    `files` names results, {"best weights": path}; those that exist are listed at the end. `clock`
    gives seconds. `best_by` is the metric of the best evaluation. A run that breaks off sends no
    "end": call `close` to leave the terminal clean.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        files: Mapping[str, Path] | None = None,
        clock: Callable[[], float] = time.monotonic,
        best_by: str = "map50",
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._files = dict(files or {})
        self._clock = clock
        self._best_by = best_by
        self._begin: tuple[float, Progress] | None = None  # time and event of the start
        self._bar: tqdm | None = None
        self._bar_exit = ExitStack()
        self._evaluating = False
        self._best: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        if self._begin is None:
            self._start(progress)
        show = {
            "step": self._show_step,
            "evaluating": self._show_evaluating,
            "evaluation": self._show_evaluation,
        }.get(progress.event)
        if progress.message and progress.event != "end":
            self._line(progress.message)
        if show is not None:
            show(progress)
        if progress.event == "end":
            self._show_end(progress)

    def close(self) -> None:
        """Leave the bar as it is; harmless when repeated."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._bar_exit.close()

    def _start(self, progress: Progress) -> None:
        self._begin = (self._clock(), progress)
        if self._stream.isatty() and progress.event != "end":
            # Log records of other modules go above the bar instead of through it.
            self._bar_exit.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(
                total=progress.total_steps,
                initial=progress.step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=BAR + _epoch(progress),
            )

    def _line(self, text: str) -> None:
        """Write a line with date and time, above the bar if there is one."""
        text = f"{time.strftime('%m-%d %H:%M:%S')}  {text}"
        if self._bar is not None:
            tqdm.write(self._writable(text), file=self._stream)
        else:
            self._write(text + "\n")

    def _write(self, text: str) -> None:
        self._stream.write(self._writable(text))
        self._stream.flush()

    def _writable(self, text: str) -> str:
        """A class name that the terminal cannot show must not end a run."""
        encoding = self._stream.encoding or "utf-8"
        return printable(text).encode(encoding, "replace").decode(encoding)

    def _show_step(self, progress: Progress) -> None:
        self._evaluating = False
        steps = f"step {progress.step}/{progress.total_steps}"
        ahead = f"ETA {self._remaining(progress)}"  # early: a narrow terminal cuts the line
        text = "  ".join([_epoch(progress), steps, ahead, *_numbers(progress.metrics)])
        if self._bar is None:
            self._line(text)
        else:
            self._move_bar(progress, text)

    def _show_evaluating(self, progress: Progress) -> None:
        if self._bar is not None:
            text = f"{_epoch(progress)}  evaluating  ETA {self._remaining(progress)}"
            self._move_bar(progress, text)
        elif not self._evaluating:  # one line per evaluation
            self._line(f"{_epoch(progress)}  evaluating")
        self._evaluating = True

    def _show_evaluation(self, progress: Progress) -> None:
        self._evaluating = False
        if progress.best:
            self._best = progress
        names = ("map50", "map", "map75", "segm_map50", "segm_map")
        parts = [f"{n} {score(progress.metrics[n])}" for n in names if n in progress.metrics]
        if progress.best:
            parts.append("* best so far")
        elif self._best is not None:
            best = score(self._best.metrics.get(self._best_by, -1))
            by = "" if self._best_by == "map50" else f"{self._best_by} "
            parts.append(f"(best {by}{best} in epoch {self._best.epoch + 1})")
        self._line("  ".join([_epoch(progress), "validation", *parts]))
        if self._bar is not None:
            self._move_bar(progress, f"{_epoch(progress)}  ETA {self._remaining(progress)}")

    def _move_bar(self, progress: Progress, text: str) -> None:
        assert self._bar is not None
        self._bar.n = progress.step
        self._bar.bar_format = BAR + text  # tqdm's own field for text adds a comma
        self._bar.refresh()

    def _remaining(self, progress: Progress) -> str:
        """Estimated from what this process did; the work before a resume says nothing about
        its speed.
        """
        assert self._begin is not None
        begin, first = self._begin
        done = progress.fraction - first.fraction
        if done <= 0:
            return "-"
        return duration((self._clock() - begin) * (1 - progress.fraction) / done)

    def _show_end(self, progress: Progress) -> None:
        assert self._begin is not None
        if self._bar is not None:
            self._bar.leave = False  # the summary takes its place
        self.close()
        begin, first = self._begin
        state = "finished" if progress.step >= progress.total_steps else "stopped"
        since = f" since resuming after step {first.step}" if first.step else ""
        spent = duration(self._clock() - begin)
        steps = f"step {progress.step} of {progress.total_steps}"
        lines = [f"{state} at {steps}, {_epoch(progress)}, {spent}{since}"]
        if progress.message:
            lines.append(progress.message)
        lines += self._best_lines(progress)
        files = {what: path for what, path in self._files.items() if path.exists()}
        if files:
            width = max(len(what) for what in files)
            lines += ["", *(f"{what:<{width}}  {path}" for what, path in files.items())]
        self._write("\n" + "\n".join(lines) + "\n")

    def _best_lines(self, end: Progress) -> list[str]:
        """The best evaluation that the trainer names, or else the best of this process."""
        metrics = end.metrics or (self._best.metrics if self._best else {})
        if "map50" not in metrics:
            return ["no evaluation"]
        if "best_epoch" in metrics:
            epoch = f" in epoch {int(metrics['best_epoch']) + 1}"
        else:
            epoch = f" in epoch {self._best.epoch + 1}" if self._best else ""
        return [f"best validation{epoch}:", "", score_table(metrics), "", SCORES_EXPLAINED]


def _epoch(progress: Progress) -> str:
    total = f"/{progress.total_epochs}" if progress.total_epochs else ""
    return f"epoch {progress.epoch + 1}{total}"


def _numbers(metrics: Mapping[str, float]) -> list[str]:
    formats = {
        "loss": "loss {:.4g}",
        "lr": "lr {:.2g}",
        "images_per_second": "{:.3g} img/s",
        "memory_gib": "{:.1f} GiB",
    }
    return [form.format(metrics[name]) for name, form in formats.items() if name in metrics]
