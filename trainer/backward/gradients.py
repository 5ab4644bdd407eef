"""The gradients of a step's micro-batches on one process, or the news that memory ran out."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.augmentation.denoising import denoising_inputs
from trainer.backward.gradient_sum import GradientSum
from trainer.data.loader import pad_to
from vidt.losses.criterion import SetCriterion
from vidt.losses.distillation import TokenMatching
from vidt.losses.softmax_criterion import SoftmaxCriterion
from vidt.predict.predictor import is_out_of_memory


def gradients(
    model: nn.Module,
    criterion: SetCriterion | SoftmaxCriterion,
    accelerator: Accelerator,
    batches: list[dict[str, Any]],
    canvas: tuple[int, int],
    num_boxes: float,
    teacher: TokenMatching | None = None,
    denoising_queries: int = 1,
    *,
    gradient_sum: GradientSum,
) -> dict[str, Tensor] | None:
    """Adds the gradients of a step's micro-batches to the parameters, and their sum over all
    processes to `gradient_sum`. Returns the loss terms, or None if memory ran out, here or before
    any batch could be made.

    Terms are divided by the boxes and the images of the whole step, so micro-batches and processes
    simply add up.
    """
    num_images = sum(len(batch["images"]) for batch in batches) * accelerator.num_processes
    counts = {"num_boxes": num_boxes, "num_images": num_images}
    normalisers = {name: counts[name] for name in criterion.normalised_by}
    names: list[str] = []
    sums: Tensor | None = None
    try:
        for number, batch in enumerate(batches, start=1):
            images, padding = pad_to(batch, canvas)
            targets = batch["targets"]
            outputs = model(images, padding, **denoising_inputs(targets, denoising_queries))
            terms = criterion(outputs, targets, **normalisers)
            if teacher is not None:
                terms |= teacher(images, padding, outputs, num_images)
            names, values = list(terms), torch.stack(list(terms.values()))
            if number == len(batches):
                gradient_sum.begin()
            accelerator.backward(values.sum())
            sums = values.detach() if sums is None else sums + values.detach()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sums = None
    gradient_sum.finish()
    return None if sums is None else dict(zip(names, sums.unbind(), strict=True))
