"""`Progress`, the events of a run for its observers, and three reports: metrics.csv, TensorBoard
and other trackers.

The trainer calls `report(progress)` on the main process only. A `Report` is any callable that takes
a `Progress`; `trainer.report.console` and `trainer.report.page` have others.
"""

import csv
import io
import logging
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from trainer.loop.clock import without_addresses
from trainer.report.pictures import as_jpeg, joined
from trainer.report.plots import as_picture, confusion_table
from trainer.scoring.average_precision import COCO_NUMBERS
from trainer.scoring.mistakes import Diagnosis, condensed
from trainer.scoring.scores import ScoreCurve
from vidt.atomic import atomic_write
from vidt.errors import UserError, shown

logger = logging.getLogger(__name__)

PROJECT = "vidt"  # of the runs in trackers
TENSORBOARD = "tensorboard"  # the one that `TensorBoard` writes
NUM_THRESHOLDS = 127  # of TensorBoard's precision-recall curves
Pair: TypeAlias = tuple[Image.Image, Image.Image]  # truth, prediction
Event = Literal["start", "step", "evaluating", "evaluation", "saved", "end"]


@dataclass(frozen=True)
class Progress:
    """One event of a run. What `metrics` holds depends on `event`:

    - "start", once: nothing. `step` is 0, or the step from which the run resumes; `settings` are
      all of the run's, with the values that `auto` and --hours stand for.
    - "step", once per log interval: `loss` (the total), its terms `loss_*`, `lr`,
      `grad_norm`, `images_per_second`, `memory_gib`, `loader_wait` (the share of the time, 0 to 1,
      that training waited for images).
    - "evaluating": nothing. Evaluation has begun, or continues (`fraction` moves).
    - "evaluation": the names in `COCO_NUMBERS`, with the prefix `segm_` for masks, `ap/CLASS` and
      `ap50/CLASS`. -1 or NaN: the validation set has no such objects.
    - "saved": nothing.
    - "end": the metrics of the best evaluation, its epoch as `best_epoch`, and those of the best
      weights on the test part, if there is one, with the prefix `test_`. May be empty.
    """

    event: Event
    # Share of the run that is done, 0 to 1. It only falls where a signal interrupts an evaluation.
    fraction: float
    epoch: int  # current epoch, from 0; people see epoch + 1
    step: int  # optimiser steps done
    total_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    total_epochs: int = 0  # 0: unknown
    message: str = ""  # one line for people
    weights: Path | None = None  # the weights file of an "evaluation" or the "end"
    best: bool = False  # this evaluation is the best so far
    pictures: Sequence[Image.Image] = ()  # validation images with boxes drawn on them
    diagnosis: Diagnosis | None = None  # of an "evaluation"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of a "start"
    worst: Sequence[Pair] = ()  # its worst images with boxes, in the order of `diagnosis.worst`


Report = Callable[[Progress], None]


def fan_out(*reports: Report) -> Report:
    """A report that calls all `reports` in order."""

    def report(progress: Progress) -> None:
        for each in reports:
            each(progress)

    return report


def is_score(value: float) -> bool:
    """False for -1 (pycocotools) and NaN (ours), which mean that there are no such objects."""
    return not math.isnan(value) and value >= 0


def class_names_in(metrics: Mapping[str, float]) -> list[str]:
    """The classes that an evaluation scored, in order."""
    return [name.removeprefix("ap/") for name in metrics if name.startswith("ap/")]


class CsvLog:
    """A `Report` that writes `metrics.csv`: a row per evaluation, with the mean of each loss term
    since the evaluation before.

    Epochs count from 1, as on the console. A cell is empty if there was nothing to score. A resumed
    run first drops the rows after the step from which it resumes, a fresh run drops all rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, str]] | None = None  # None until the first event
        self._losses: dict[str, list[tuple[float, int]]] = {}  # means, each of so many steps
        self._rates: dict[str, float] = {}
        self._step = 0  # of the last means

    def __call__(self, progress: Progress) -> None:
        """Raises UserError if a resumed run finds a file that is not ours."""
        if self._rows is None:
            self._rows = self._read_rows(progress.step)
            self._step = progress.step
            if self.path.exists():
                self._write()
        if progress.event == "step":
            self._remember(progress.metrics, progress.step - self._step)
            self._step = progress.step
        elif progress.event == "evaluation":
            row = self._row(progress)
            # A run killed between scoring and saving scores the same step again.
            self._rows = [old for old in self._rows if old["step"] != row["step"]] + [row]
            self._write()

    def _read_rows(self, last_step: int) -> list[dict[str, str]]:
        if last_step == 0 or not self.path.exists():
            return []
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                return [row for row in csv.DictReader(file) if int(row["step"]) <= last_step]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path}: cannot continue this file, it has no readable column 'step'; "
                "move it away and resume again"
            ) from error

    def _remember(self, metrics: Mapping[str, float], steps: int) -> None:
        for name, value in metrics.items():
            if name.startswith("loss"):
                self._losses.setdefault(name, []).append((float(value), max(steps, 1)))
            elif name == "lr":
                self._rates[name] = float(value)

    def _row(self, progress: Progress) -> dict[str, str]:
        row = {"epoch": str(progress.epoch + 1), "step": str(progress.step)}
        for name, means in self._losses.items():
            total = sum(steps for _, steps in means)
            row[name] = f"{sum(mean * steps for mean, steps in means) / total:.6g}"
        row |= {name: f"{rate:.6g}" for name, rate in self._rates.items()}
        self._losses.clear()
        scores = progress.metrics
        order = dict.fromkeys((*COCO_NUMBERS, *scores))  # COCO's first
        shown = {name: float(scores.get(name, math.nan)) for name in order}
        return row | {name: f"{x:.6g}" if is_score(x) else "" for name, x in shown.items()}

    def _write(self) -> None:
        rows = self._rows or []
        text = io.StringIO(newline="")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, columns or ["epoch", "step"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.path, text.getvalue().encode())


class TensorBoard:
    """A `Report` that writes TensorBoard events: `train/` (losses; those of inner decoder layers in
    `train_inner/`), `run/` (learning rates, gradient norm, speed, memory, the wait for the
    loader), `val/`, `val_ap/`, `val_ap50/`, `val_f1/` and `val_threshold/` (the highest F1 and its
    score threshold), `pictures/`, `worst/`, `confusion`, and under PR CURVES `precision_recall/`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._writer: SummaryWriter | None = None
        self._is_broken = False

    def __call__(self, progress: Progress) -> None:
        if self._is_broken:
            return
        try:
            self._write(progress)
        except OSError as error:
            self._give_up(error)

    def _write(self, progress: Progress) -> None:
        if self._writer is None:
            # Hides what a killed run wrote after its last checkpoint, so that no curve doubles
            # back. A fresh run in a used folder hides everything.
            purge_step = progress.step + 1 if progress.step else 0
            _silence_writing_threads()
            self._writer = SummaryWriter(str(self.directory), purge_step=purge_step)
        if progress.event == "step":
            for name, value in progress.metrics.items():
                self._writer.add_scalar(_step_tag(name), float(value), progress.step)
        elif progress.event == "evaluation":
            self._add_evaluation(self._writer, progress)
        elif progress.event == "end":
            self.close()

    def close(self) -> None:
        """Flush; harmless when repeated."""
        if self._writer is None or self._is_broken:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """The results do not depend on the events: a full disk ends them, not the run."""
        self._is_broken = True
        reason = error.strerror or str(error)
        logger.warning(
            f"{self.directory} cannot be written ({reason}); the run goes on without TensorBoard"
        )

    @staticmethod
    def _add_evaluation(writer: SummaryWriter, progress: Progress) -> None:
        for name, value in progress.metrics.items():
            if is_score(float(value)):
                writer.add_scalar(_score_tag(name), float(value), progress.step)
        for number, picture in enumerate(progress.pictures):
            _add_picture(writer, f"pictures/{number:02d}", picture, progress.step)
        for number, pair in enumerate(progress.worst):
            _add_picture(writer, f"worst/{number:02d}", joined(pair, gap=4), progress.step)
        if progress.diagnosis is not None:
            _add_diagnosis(writer, progress.diagnosis, progress.step)
        writer.flush()


class Trackers:
    """A `Report` that sends the numbers of TensorBoard's curves, without the pictures, to trackers
    of accelerate. Every start of a run is a run of its own there. A tracker that fails ends itself,
    not the training.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """The trackers' local files go into `folder`."""
        self._names, self._folder = names, folder
        self._active: dict[str, GeneralTracker] = {}

    def __call__(self, progress: Progress) -> None:
        tags = {"step": _step_tag, "evaluation": _score_tag}
        if progress.event == "start":
            told = without_addresses(progress.settings)
            for name in dict.fromkeys(self._names):
                if name != TENSORBOARD:
                    self._attempt(name, partial(self._start, name, self._folder, told))
        elif progress.event == "end":
            self.close()
        elif progress.event in tags:
            tag, is_step = tags[progress.event], progress.event == "step"
            # As float: accelerate's TensorBoard and others leave NumPy's numbers out.
            numbers = {tag(name): float(value) for name, value in progress.metrics.items()}
            # MLflow refuses other characters, which class names may have.
            scored = {
                re.sub(r"[^\w/.: -]", "_", name): each
                for name, each in numbers.items()
                if is_step or is_score(each)
            }
            for name, tracker in [*self._active.items()]:
                self._attempt(name, partial(tracker.log, scored, step=progress.step))

    def close(self) -> None:
        """Ends the trackers' runs; harmless when repeated."""
        for name, tracker in [*self._active.items()]:
            self._attempt(name, tracker.finish)
        self._active.clear()

    def _start(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = folder.resolve()
        where = (str(folder),) if kind.requires_logging_directory else ()
        named = {"name": folder.name} if name in ("wandb", "trackio") else {}
        tracker = kind(PROJECT, *where, **named)
        tracker.start()
        self._active[name] = tracker
        plain = (bool, int, float, str)
        tracker.store_init_configuration(
            {key: each if isinstance(each, plain) else str(each) for key, each in settings.items()}
        )

    def _attempt(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # each tracker has its own exceptions
            self._active.pop(name, None)
            reason = shown(f"{type(error).__name__}: {error}", 300)
            logger.warning(f"--report_to {name} failed ({reason}); the run goes on without it")


def require_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that accelerate does not know or whose package is missing."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise UserError(f"--report_to {shown(name)}: the trackers are {known}, or none")
        if name in {*map(str, LoggerType)} - {*map(str, get_available_trackers())}:
            package = name.replace("_", "-")
            raise UserError(f"--report_to {name} needs a package; pip install {package}")


@cache
def _silence_writing_threads() -> None:
    """The thread that writes hands its error to the next call, but prints a traceback, too."""
    before = threading.excepthook

    def show(failure: threading.ExceptHookArgs) -> None:
        ours = type(failure.thread).__module__.startswith("tensorboard.")
        if not (ours and issubclass(failure.exc_type, OSError)):
            before(failure)

    threading.excepthook = show


def _step_tag(name: str) -> str:
    if name.startswith("loss"):
        return f"train_inner/{name}" if re.search(r"_\d+$", name) else f"train/{name}"
    return f"run/{name}"


def _score_tag(name: str) -> str:
    return f"val_{name}" if name.startswith(("ap/", "ap50/")) else f"val/{name}"


def _add_diagnosis(writer: SummaryWriter, diagnosis: Diagnosis, step: int) -> None:
    for curve in (*diagnosis.curves, diagnosis.together):
        if curve.best is not None:
            writer.add_scalar(f"val_f1/{curve.name}", curve.best.f1, step)
            writer.add_scalar(f"val_threshold/{curve.name}", curve.best.threshold, step)
    for curve in (*diagnosis.main_curves, diagnosis.together):
        if len(curve.thresholds) and curve.num_truths:
            positives, false, missed, precision, recall = _counts_by_threshold(curve)
            unknown = np.zeros_like(positives)  # true negatives cannot be counted
            tag = f"precision_recall/{curve.name}"
            counts = (positives, false, unknown, missed)
            writer.add_pr_curve_raw(tag, *counts, precision, recall, step, NUM_THRESHOLDS)
    picture = as_picture(confusion_table(*condensed(diagnosis)).figure)
    _add_picture(writer, "confusion", picture, step)


def _counts_by_threshold(curve: ScoreCurve) -> tuple[np.ndarray, ...]:
    """True positives, false positives, false negatives, precision and recall at evenly spaced
    thresholds from 0 to 1, each [NUM_THRESHOLDS].
    """
    thresholds = np.linspace(0, 1, NUM_THRESHOLDS)
    reached = np.searchsorted(-curve.thresholds, -thresholds, side="right")  # points of the curve
    precision = np.concatenate([[1.0], curve.precision])[reached]
    recall = np.concatenate([[0.0], curve.recall])[reached]
    true_positives = (recall * curve.num_truths).round()
    false_positives = (true_positives / np.maximum(precision, 1e-9) - true_positives).round()
    false_negatives = curve.num_truths - true_positives
    return true_positives, false_positives, false_negatives, precision, recall


def _add_picture(writer: SummaryWriter, tag: str, picture: Image.Image, step: int) -> None:
    """As JPEG: SummaryWriter.add_image makes PNG, about twice the size for photographs."""
    image = Summary.Image(
        height=picture.height,
        width=picture.width,
        colorspace=3,
        encoded_image_string=as_jpeg(picture, quality=85),
    )
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    writer.file_writer.add_summary(summary, step)  # type: ignore[attr-defined]
