"""`--hours`: how many steps fit into a time, by a trial before the first one."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from torch.optim import Optimizer

from trainer.data.loader import DetectionDataset, micro_batches
from trainer.loop.agreement import Agreement
from trainer.loop.clock import TRAIN_WORK
from trainer.loop.resume import Checkpoint
from trainer.settings.config import TrainConfig
from vidt.errors import UserError, counted

logger = get_logger(__name__)

TRIAL = 0.03  # share of the time for the trial, beyond its first step and two more
WHOLE_STEP = 1.1  # margin for clipping, AdamW and the moving average, which a trial leaves out
MOST_TRIED = 1000  # steps
RESERVE = 0.08  # share of the time for the report, saving, and steps slower than those tried
EVALUATING = 0.05  # largest share of the time for evaluations
MOST_EVALUATIONS = 10


@dataclass(frozen=True)
class Length:
    """The length of a run, as its settings say it."""

    epochs: int
    max_steps: int
    eval_interval: int


_counted_from: float | None = None


def count_from_now() -> None:
    """Counts the time of `--hours` from now on, instead of from the start of this process."""
    global _counted_from
    _counted_from = time.time()


def seconds_left(hours: float) -> float:
    """Of `hours` since this process started, or `count_from_now` was called."""
    began = psutil.Process().create_time() if _counted_from is None else _counted_from
    return hours * 3600 - (time.time() - began)


@dataclass(frozen=True)
class StepTimer:
    """Times the first steps of a run on all processes, and leaves no trace of them."""

    dataset: DetectionDataset
    learn: Callable[..., dict[str, Tensor] | None]  # `gradients` but for batches and canvas
    optimizer: Optimizer
    accelerator: Accelerator
    agreement: Agreement

    def mean(self, config: TrainConfig, n_iter_to_acc: int, seconds: float) -> float:
        """The mean time of a step, loading included, by those that fit into `seconds`: at least
        two, after a first that does not count. Raises UserError if memory runs out.
        """
        steps, device = range(MOST_TRIED), self.accelerator.device
        batches = micro_batches(self.dataset, config, n_iter_to_acc, steps, self.accelerator)
        times: list[float] = []
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            while len(times) < 3 or (sum(times) < seconds and len(times) < MOST_TRIED):
                began = time.monotonic()
                done = self._step([next(batches) for _ in range(n_iter_to_acc)])
                own = time.monotonic() - began if done else math.inf
                # That of the slowest process, so that all try as many steps.
                times.append(self.agreement.gather(own).max().item())
                if times[-1] == math.inf:
                    raise UserError(
                        "--hours: a step does not fit into memory; lower --batch_size or raise "
                        "--n_iter_to_acc"
                    )
        return WHOLE_STEP * sum(times[1:]) / (len(times) - 1)

    def _step(self, batches: list[dict[str, Any]]) -> bool:
        """Whether the gradients of a step fit into memory."""
        shapes = [batch["images"].shape[2:] for batch in batches]
        heights, widths = zip(*shapes, strict=True)
        done = self.learn(batches, (max(heights), max(widths)))
        self.optimizer.zero_grad()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return done is not None


def fitting_length(
    seconds: float,
    step: float,
    per_epoch: int,
    step_images: int,
    val_images: int,
    test_images: int = 0,
    *,
    eval_interval: int | None = None,
    max_steps: int | None = None,
) -> Length:
    """The longest run of at most `max_steps` steps of `step` seconds each that takes `seconds` with
    its evaluations, which are every `eval_interval` epochs; None: as many as EVALUATING allows. The
    test images are evaluated once.

    Raises UserError if not even one step fits.
    """
    image = step / step_images / TRAIN_WORK  # seconds to evaluate one
    seconds = seconds * (1 - RESERVE) - test_images * image
    evaluation = val_images * image
    wanted = int(min(max(EVALUATING * seconds / max(evaluation, 1e-9), 1), MOST_EVALUATIONS))
    if eval_interval is None:
        steps = int((seconds - wanted * evaluation) / step)
    else:  # one evaluation is at the end
        share = evaluation / (per_epoch * eval_interval)
        steps = int((seconds - evaluation) / (step + share))
    if steps < 1:
        raise UserError(
            f"--hours is too short: a step takes {step:.2g} s, an evaluation {evaluation:.2g} s, "
            f"and {max(seconds, 0):.0f} s are left; give more time or a smaller --eval_size"
        )
    steps = min(steps, max_steps or steps)
    epochs = math.ceil(steps / per_epoch)
    interval = eval_interval or math.ceil(epochs / min(wanted, max(epochs // 2, 1)))
    return Length(epochs, steps, interval)


def within_hours(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    timer: StepTimer,
    *,
    n_iter_to_acc: int,
    per_epoch: int,
    val_images: int,
    test_images: int,
) -> TrainConfig:
    """The settings with the length that `--hours` stands for: that of the checkpoint, else what a
    trial finds, at most --max_steps. Intervals other than the defaults stay. Raises UserError if
    not even one step fits.
    """
    hours = config.hours
    if hours is None:
        return config
    if checkpoint is not None:
        saved = checkpoint.state.settings
        names = ("epochs", "max_steps", "eval_interval", "save_interval")
        epochs = counted(saved["epochs"], "epoch")
        logger.info(f"--hours {hours:g}: a resumed run keeps its length, {epochs}")
        return replace(config, **{name: saved[name] for name in names})

    def left() -> float:
        return timer.agreement.gather(seconds_left(hours)).min().item()

    logger.info(f"--hours {hours:g}: timing a few steps")
    step = timer.mean(config, n_iter_to_acc, TRIAL * left())
    images = config.batch_size * timer.accelerator.num_processes
    kept = config.eval_interval
    length = fitting_length(
        left(),
        step,
        per_epoch,
        images,
        val_images,
        test_images,
        eval_interval=None if kept == TrainConfig.eval_interval else kept,
        max_steps=config.max_steps,
    )
    intervals: dict[str, Any] = {"eval_interval": length.eval_interval}
    if config.save_interval == TrainConfig.save_interval:
        intervals["save_interval"] = length.eval_interval
    replaced = f", in place of --epochs {config.epochs}" * (config.epochs != TrainConfig.epochs)
    config = replace(config, epochs=length.epochs, max_steps=length.max_steps, **intervals)
    logger.info(
        f"--hours {hours:g}{replaced}: a step takes {step:.3g} s, so "
        f"{counted(length.max_steps, 'step')} ({counted(length.epochs, 'epoch')}) fit, with an "
        "evaluation every "
        f"{counted(config.eval_interval, 'epoch')}"
    )
    return config
