"""One optimiser step: its micro-batches, what all processes agree on about it, its gradients.

Apart from dropout and drop path, whose masks are drawn for each micro-batch and process, gradients
do not depend on how the images of a step are split: all micro-batches have the same canvas and the
same normaliser, the number of boxes in the whole step.
"""

from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from trainer.backward.gradients import gradients
from trainer.backward.memory import more_micro_batches
from trainer.data.loader import DetectionDataset, micro_batches
from trainer.loop.agreement import Agreement
from trainer.loop.set_up import Run
from trainer.loop.stopping import Stopped, StopRequest
from vidt.errors import UserError, counted
from vidt.predict.predictor import is_out_of_memory

logger = get_logger(__name__)


def train_step(run: Run, stop: StopRequest) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """Trains on the images of step `run.state.step`. Returns this process's loss terms, the norm of
    the gradient over all processes (0 if fp16 overflowed), and this process's image ids.

    Raises Stopped, before it touches the weights, if any process got a signal, and OutOfMemory if
    not even one image at a time fits.
    """
    config, state, accelerator = run.config, run.state, run.accelerator
    parameters = list(run.model.parameters())
    batches: list[dict[str, Any]] = []
    repeated = False
    while True:
        if not batches:
            batches = next_batches(run)
            num_boxes, canvas, signum, loaded = agree_on(batches, stop.signum, run.agreement)
            if signum:
                raise Stopped(signum)
            if not loaded:  # on some process; the next try loads them again everywhere
                run.micro_batches, batches = None, []
        # The step number determines all random numbers of a step: no state needs saving.
        set_seed(step_seed(config.seed, state.step, accelerator.process_index))
        terms = summed_gradients(run, batches, canvas, num_boxes) if batches else None
        if terms is not None:
            break
        if repeated:  # every process loads the same images again in smaller micro-batches
            state.n_iter_to_acc = more_micro_batches(config, state.n_iter_to_acc, canvas)
            run.micro_batches, batches = None, []
            logger.warning(
                f"out of memory: --batch_size {config.batch_size} is now split into "
                f"{state.n_iter_to_acc} micro-batches on every process; only dropout masks change. "
                f"Pass --n_iter_to_acc {state.n_iter_to_acc} to start that way"
            )
        else:  # perhaps the memory was only fragmented
            logger.warning(f"out of memory in step {state.step}; retrying the step unchanged")
        repeated = True
    norm = accelerator.clip_grad_norm_(parameters, config.clip_max_norm or float("inf"))
    run.optimizer.step()
    run.optimizer.zero_grad()
    if accelerator.optimizer_step_was_skipped:
        state.skipped_updates += 1
        norm = torch.zeros_like(norm)  # fp16 overflowed; the weights did not change
    elif run.ema is not None:
        run.ema.update(run.model, step=state.step - state.skipped_updates)
    state.step += 1
    return terms, norm, [target["image_id"] for batch in batches for target in batch["targets"]]


def next_batches(run: Run) -> list[dict[str, Any]]:
    """The micro-batches of the step on this process's device; none if memory ran out."""
    if run.micro_batches is None:
        parts, steps = run.state.n_iter_to_acc, range(run.state.step, run.clock.total_steps)
        run.micro_batches = run.loader_wait.timed(
            micro_batches(run.dataset, run.config, parts, steps, run.accelerator)
        )
    try:
        return [next(run.micro_batches) for _ in range(run.state.n_iter_to_acc)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)
    return []


def summed_gradients(
    run: Run, batches: list[dict[str, Any]], canvas: tuple[int, int], num_boxes: float
) -> dict[str, Tensor] | None:
    """Leaves the gradients of a step, summed over all processes, with the parameters, and returns
    this process's loss terms. None, without gradients and with an empty cache, if memory ran out on
    any process.
    """
    terms = gradients(
        run.model,
        run.criterion,
        run.accelerator,
        batches,
        canvas,
        num_boxes,
        teacher=run.teacher,
        denoising_queries=run.config.denoising,
        gradient_sum=run.gradient_sum,
    )
    facts = run.agreement.gather(terms is None, *run.gradient_sum.present())
    failed, *present = facts.any(0).tolist()
    if failed:
        run.optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        return None
    run.gradient_sum.take(present)
    return terms


def agree_on(
    batches: list[dict[str, Any]], signum: int, agreement: Agreement
) -> tuple[float, tuple[int, int], int, bool]:
    """Facts about a step's micro-batches on all processes: the number of boxes (at least 1), the
    (height, width) to pad to, the signal to stop for (0: none), and whether all have batches. One
    exchange between hosts.
    """
    boxes = sum(len(target["labels"]) for batch in batches for target in batch["targets"])
    height = max((batch["images"].shape[2] for batch in batches), default=0)
    width = max((batch["images"].shape[3] for batch in batches), default=0)
    rows = agreement.gather(boxes, height, width, signum, not batches)
    _, height, width, signum, missing = map(int, rows.amax(0))
    return max(rows[:, 0].sum().item(), 1.0), (height, width), signum, not missing


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of dropout and drop path, different for each step and process."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


def report_wait(run: Run) -> dict[str, float]:
    """The share of the time that the processes waited for their loaders since the last report: of
    the one that waited longest. Logs what to do if it is large.
    """
    share, advice = run.loader_wait.report(lambda own: run.agreement.gather(own).max().item())
    if advice:
        logger.warning(advice)
    return {"loader_wait": share}


def check_readable(
    dataset: DetectionDataset, max_bad_fraction: float, agreement: Agreement
) -> None:
    """Logs the images that any process could not read since the check before training, and why any
    process could not cache one.

    Raises UserError if the unreadable ones are more than --max_bad_fraction of all.
    """
    own = dataset.unreadable.nonzero().flatten().tolist()
    problem = "" if dataset.cache is None else dataset.cache.new_problem()
    unread, problems = zip(*agreement.gather_objects((own, problem)), strict=True)
    for line in sorted({*problems} - {""}):
        logger.warning(line)
    unreadable = sorted({index for each in unread for index in each})
    if len(unreadable) == dataset.reported:
        return
    dataset.reported = len(unreadable)
    paths = ", ".join(dataset.samples.path(index) for index in unreadable[:3])
    if len(unreadable) > max_bad_fraction * len(dataset):
        raise UserError(
            f"{len(unreadable)} of {counted(len(dataset), 'training image')} can no longer be "
            f"read, more than --max_bad_fraction {max_bad_fraction:g} allows; such as {paths}"
        )
    logger.warning(
        f"{counted(len(unreadable), 'image')} can no longer be read, and other images replace "
        f"them: {paths}"
    )
