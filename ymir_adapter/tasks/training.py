"""One rank of a training task: `accelerate launch -m ymir_adapter.tasks.training`.

Reads the platform's dataset for the trainer, and reports the trainer's progress to the platform.
Only the main process writes: percent, a stage for every evaluation, TensorBoard, log lines.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from trainer.data.load import read_and_log
from trainer.loop.agreement import Agreement
from trainer.loop.launch_check import require_processes
from trainer.loop.start import require_files
from trainer.readers.samples import SampleTable
from trainer.report.console import Console
from trainer.report.progress import CsvLog, Progress, Report, TensorBoard, fan_out
from trainer.settings.config import TrainConfig
from trainer.train import make_accelerator, train
from ymir_adapter.dataset.tables import read_tables
from ymir_adapter.launch import run_rank
from ymir_adapter.protocol.monitor import Monitor
from ymir_adapter.protocol.outputs import TrainingResult
from ymir_adapter.protocol.task import Task, training_settings

LOADING = 0.05  # progress after reading the dataset
ALMOST = 0.99  # progress until all results are written


class Outcome:
    """A report that turns `Progress` into percent and stages."""

    def __init__(self, monitor: Monitor, result: TrainingResult) -> None:
        self.monitor, self.result = monitor, result

    def __call__(self, progress: Progress) -> None:
        if progress.event == "evaluation":
            assert progress.weights is not None
            name = f"epoch_{progress.epoch + 1}"
            self.result.add(name, progress.weights, progress.metrics)
        self.monitor.update(min(LOADING + (1 - LOADING) * progress.fraction, ALMOST))


def train_task(task: Task, monitor: Monitor | None) -> None:
    """Runs a training task. `monitor`: on rank 0 only."""
    config, fields = training_settings(task)
    accelerator = make_accelerator(config.mixed_precision)
    require_processes(accelerator.num_processes)
    agreement = Agreement(accelerator)
    agreement.on_main(lambda: require_files(config))
    train_set, val_set = agreement.on_main(
        lambda: checked_tables(task, config, fields["det_token_num"], monitor)
    )
    with reports(task, config, monitor) as report:
        train(config, fields, train_set, val_set, report, accelerator=accelerator)
    agreement.gather(0)  # no rank can fail from here on
    if monitor is not None:
        monitor.update(1.0)
    accelerator.end_training()


def checked_tables(
    task: Task, config: TrainConfig, num_queries: int, monitor: Monitor | None
) -> tuple[SampleTable, SampleTable]:
    """Reads both splits. The log summarises the findings; `findings.csv` lists them."""
    update = (lambda fraction: None) if monitor is None else monitor.update
    return read_and_log(
        Path(config.output_dir),
        lambda: read_tables(
            task,
            num_queries=num_queries,
            max_bad_fraction=config.max_bad_fraction,
            progress=lambda fraction: update(LOADING * fraction),
        ),
    )


@contextlib.contextmanager
def reports(task: Task, config: TrainConfig, monitor: Monitor | None) -> Iterator[Report]:
    """The reports of the main process; an empty one on other ranks."""
    if monitor is None:
        yield fan_out()
        return
    output = Path(config.output_dir)
    events = TensorBoard(Path(config.tensorboard_dir or task.output.tensorboard_dir))
    with contextlib.closing(Console()) as console, contextlib.closing(events):
        outcome = Outcome(monitor, TrainingResult(task, resumed=config.resume is not None))
        yield fan_out(console, CsvLog(output / "metrics.csv"), events, outcome)


if __name__ == "__main__":
    run_rank(train_task)
