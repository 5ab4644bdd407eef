"""One rank of a training task: `accelerate launch -m ymir_adapter.tasks.training`.

Reads the platform's dataset for the trainer, and reports the trainer's progress to the platform.
Only the main process writes: percent, a stage for every evaluation, TensorBoard, log lines.
"""

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from trainer.data.dataset_check import crowded_images
from trainer.data.dataset_statistics import plan_of, sizes_of_plan
from trainer.data.load import read_and_log
from trainer.loop.agreement import Agreement
from trainer.loop.launch import require_processes
from trainer.loop.start import require_files, settled
from trainer.readers.findings import Finding
from trainer.readers.samples import SampleTable
from trainer.report.console import Console
from trainer.report.progress import CsvLog, Progress, Report, TensorBoard, fan_out
from trainer.scoring.scores import ScoreCurve
from trainer.settings.config import TrainConfig
from trainer.train import make_accelerator, train
from ymir_adapter.dataset.tables import read_tables
from ymir_adapter.launch import run_rank
from ymir_adapter.protocol.errors import one_line
from ymir_adapter.protocol.monitor import Monitor
from ymir_adapter.protocol.outputs import TrainingResult
from ymir_adapter.protocol.task import Task, fixed_fields, training_settings, wants_onnx

logger = logging.getLogger(__name__)

LOADING = 0.05  # progress after reading the dataset
ALMOST = 0.99  # progress until all results are written


class Outcome:
    """A report that turns `Progress` into percent and stages, with an ONNX model in each stage if
    `with_onnx`.
    """

    def __init__(
        self, monitor: Monitor, result: TrainingResult, *, with_onnx: bool = False
    ) -> None:
        self.monitor, self.result, self.with_onnx = monitor, result, with_onnx

    def __call__(self, progress: Progress) -> None:
        if progress.event == "evaluation":
            assert progress.weights is not None
            name = f"epoch_{progress.epoch + 1}"
            model = exported(progress.weights, name) if self.with_onnx else None
            self.result.add(name, progress.weights, progress.metrics, [model] if model else [])
            if model is not None:
                model.unlink()
            if progress.best and progress.diagnosis is not None:
                logger.info(best_thresholds(progress.diagnosis.curves))
        self.monitor.update(min(LOADING + (1 - LOADING) * progress.fraction, ALMOST))


def best_thresholds(curves: Sequence[ScoreCurve]) -> str:
    """One line: the score threshold with the highest F1 of each class. The protocol has no place
    for it in a result.
    """
    points = [(curve.name, curve.best) for curve in curves]
    told = [
        f"{name} {best.threshold:.3f} (F1 {best.f1:.3f})" if best else f"{name} - (nothing right)"
        for name, best in points
    ]
    return f"thresholds with the highest F1 at IoU 0.5: {', '.join(told)}"


def exported(weights: Path, name: str) -> Path | None:
    """The weights as an ONNX model beside them, which gives boxes, scores and labels; None, with a
    warning, if the export fails: a training must not end for that.
    """
    path = weights.with_suffix(".onnx")
    try:
        with torch.random.fork_rng(devices=[]):  # a detector is initialised before it is loaded
            report = import_module("vidt.onnx.export").export(weights, path, with_decode=True)
        reason = "; ".join(report.failures)
        if not report.ok:
            Path(report.file).unlink()
    except Exception as error:  # torch, onnx and onnxruntime raise many types
        reason = one_line(error)
    if reason:
        logger.warning(f"stage {name} has no ONNX model: {reason}")
    return None if reason else path


def train_task(task: Task, monitor: Monitor | None) -> None:
    """Runs a training task. `monitor`: on rank 0 only."""
    config, fields = training_settings(task)
    wants_onnx(task)  # first: it may raise
    accelerator = make_accelerator(config.mixed_precision)
    require_processes(accelerator.num_processes)
    agreement = Agreement(accelerator)
    agreement.on_main(lambda: require_files(config))
    planned, fixed = config.preset == "auto", fixed_fields(task)
    if planned:
        config, fields, fixed = agreement.on_main(lambda: settled(config, fields, fixed))
    processes = accelerator.num_processes
    train_set, val_set = agreement.on_main(
        lambda: checked_tables(task, config, fields, fixed, processes, monitor)
    )
    if planned:
        config, fields, plan = agreement.on_main(
            lambda: plan_of(config, fields, fixed, train_set, processes)
        )
        logger.info(plan)
    with reports(task, config, monitor) as report:
        train(config, fields, train_set, val_set, report, accelerator=accelerator)
    agreement.gather(0)  # no rank can fail from here on
    if monitor is not None:
        monitor.update(1.0)
    accelerator.end_training()


def checked_tables(
    task: Task,
    config: TrainConfig,
    fields: Mapping[str, Any],
    fixed: Collection[str],
    processes: int,
    monitor: Monitor | None,
) -> tuple[SampleTable, SampleTable]:
    """Reads both splits. The log summarises the findings; `findings.csv` lists them."""
    update = (lambda fraction: None) if monitor is None else monitor.update
    planned = config.preset == "auto"

    def read() -> tuple[SampleTable, SampleTable, list[Finding]]:
        train_set, val_set, findings = read_tables(
            task,
            num_queries=None if planned else fields["det_token_num"],
            max_bad_fraction=config.max_bad_fraction,
            strict_images=config.strict_images,
            progress=lambda fraction: update(LOADING * fraction),
        )
        if planned:
            tokens, _ = sizes_of_plan(config, fields, fixed, train_set, processes)
            for table in (train_set, val_set):
                findings += crowded_images(table, tokens)
        return train_set, val_set, findings

    return read_and_log(Path(config.output_dir), read)


@contextlib.contextmanager
def reports(task: Task, config: TrainConfig, monitor: Monitor | None) -> Iterator[Report]:
    """The reports of the main process; an empty one on other ranks."""
    if monitor is None:
        yield fan_out()
        return
    output = Path(config.output_dir)
    events = TensorBoard(Path(config.tensorboard_dir or task.output.tensorboard_dir))
    with contextlib.closing(Console()) as console, contextlib.closing(events):
        result = TrainingResult(task, resumed=config.resume is not None)
        outcome = Outcome(monitor, result, with_onnx=wants_onnx(task))
        yield fan_out(console, CsvLog(output / "metrics.csv"), events, outcome)


if __name__ == "__main__":
    run_rank(train_task)
