"""One optimiser step: its micro-batches, what all processes must agree on about it, its gradients.

The gradients of a step are the same however its images are dealt out to processes and
micro-batches: one canvas for all of them, and one normaliser, the boxes of the whole step.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn

from trainer.data.loader import DetectionDataset, noised_batch, pad_to, training_loader, unpacked
from trainer.loop.agreement import Agreement
from trainer.loop.out_of_memory import OutOfMemory, is_out_of_memory
from trainer.settings.config import TrainConfig
from trainer.settings.wording import counted
from vidt.errors import UserError
from vidt.losses.criterion import SetCriterion
from vidt.losses.distillation import TokenMatching
from vidt.losses.softmax_criterion import SoftmaxCriterion

logger = get_logger(__name__)


def micro_batches(
    dataset: DetectionDataset,
    config: TrainConfig,
    n_iter_to_acc: int,
    steps: range,
    accelerator: Accelerator,
) -> Iterator[dict[str, Any]]:
    """This process's micro-batches from the present step to the end of the run, on its device, with
    images float32, normalised.
    """
    loader = training_loader(
        dataset,
        config,
        num_processes=accelerator.num_processes,
        micro_batch=config.batch_size // n_iter_to_acc,
        steps=steps,
    )
    for batch in accelerator.prepare_data_loader(loader):
        images = dataset.preprocessing.normalise(batch["images"], batch["padding"])
        yield {**unpacked(batch), "images": images}


def agree_on(
    window: list[dict[str, Any]], signum: int, agreement: Agreement
) -> tuple[float, tuple[int, int], int]:
    """What a step needs to know of all its micro-batches on all processes: the number of boxes (at
    least 1), the (height, width) to pad to, and the signal to stop by (0: none). One exchange
    between hosts.
    """
    boxes = sum(len(target["labels"]) for batch in window for target in batch["targets"])
    height = max(batch["images"].shape[2] for batch in window)
    width = max(batch["images"].shape[3] for batch in window)
    rows = agreement.gather(boxes, height, width, signum)
    most = rows.amax(0)
    return max(rows[:, 0].sum().item(), 1.0), (int(most[1]), int(most[2])), int(most[3])


def gradients(
    model: nn.Module,
    criterion: SetCriterion | SoftmaxCriterion,
    accelerator: Accelerator,
    window: list[dict[str, Any]],
    canvas: tuple[int, int],
    num_boxes: float,
    teacher: TokenMatching | None = None,
    denoising_queries: int = 1,
) -> dict[str, Tensor] | None:
    """Adds the window's gradients to the parameters; returns its loss terms, or None if memory ran
    out.

    Terms are normalised by the boxes and the images of the whole step, so micro-batches and
    processes simply add up.
    """
    num_images = sum(len(batch["images"]) for batch in window) * accelerator.num_processes
    counts = {"num_boxes": num_boxes, "num_images": num_images}
    wanted = {name: counts[name] for name in criterion.normalised_by}
    names: list[str] = []
    sums: Tensor | None = None
    try:
        for batch in window:
            images, padding = pad_to(batch, canvas)
            targets = batch["targets"]
            outputs = model(images, padding, noised_batch(targets, denoising_queries))
            terms = criterion(outputs, targets, **wanted)
            if teacher is not None:
                terms |= teacher(images, padding, outputs, num_images)
            names, values = list(terms), torch.stack(list(terms.values()))
            accelerator.backward(values.sum())
            sums = values.detach() if sums is None else sums + values.detach()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    assert sums is not None, "a step without micro-batches"
    return dict(zip(names, sums.unbind(), strict=True))


def smaller_portions(config: TrainConfig, n_iter_to_acc: int, canvas: tuple[int, int]) -> int:
    """The next number of micro-batches that divides the batch, at least twice the present one.

    Raises OutOfMemory when a micro-batch is one image already.
    """
    size = config.batch_size
    larger = [n for n in range(2 * n_iter_to_acc, size + 1) if size % n == 0] or [size]
    if n_iter_to_acc == size:
        raise OutOfMemory(
            f"out of memory with one image of {canvas[0]} x {canvas[1]} pixels at a time; "
            "lower --eval_size or --train_max_size, or choose a smaller --backbone_name"
        )
    logger.warning(
        f"out of memory: --batch_size {size} is now computed in {larger[0]} portions on every "
        f"process; the result is the same. Pass --n_iter_to_acc {larger[0]} to start that way"
    )
    return larger[0]


def check_readable(
    dataset: DetectionDataset, max_bad_fraction: float, agreement: Agreement
) -> None:
    """Says how many images went bad since the check before training, on any process.

    Raises UserError when they are more than --max_bad_fraction allows.
    """
    unreadable = int(agreement.gather(int(dataset.unreadable.sum())).max())
    if unreadable > max_bad_fraction * len(dataset):
        raise UserError(
            f"{unreadable} of {counted(len(dataset), 'training image')} can no longer be read, "
            f"more than --max_bad_fraction {max_bad_fraction:g} allows"
        )
    if unreadable > dataset.reported:
        paths = [dataset.samples.path(i) for i in dataset.unreadable.nonzero().flatten().tolist()]
        gone = counted(unreadable, "image")
        logger.warning(f"{gone} can no longer be read, others stand in: {paths[:3]}")
        dataset.reported = unreadable
