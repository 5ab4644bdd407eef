"""Memory: the largest step of a run is tried before the run, what does not fit is split, and
activations can be computed again instead of being kept.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from trainer.augmentation.recipe import Augmentation
from trainer.augmentation.single import LONGEST_ASPECT
from trainer.data.loader import DetectionDataset
from trainer.settings.config import TrainConfig
from vidt.errors import UserError
from vidt.images.canvas import resized_shape
from vidt.model.vidt import BLOCKS
from vidt.predict.predictor import is_out_of_memory

logger = get_logger(__name__)

MOST_IMAGES = 64  # per process that --batch_size auto tries
# From 2.9 on, PyTorch reads the first name; a later release warns of the second.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class OutOfMemory(UserError):
    """Not even one image at a time fits into memory; the message says what reduces it."""


def use_expandable_segments() -> None:
    """Lets PyTorch grow its blocks of GPU memory: canvases of many sizes would fragment it. Call it
    before CUDA starts; what the user set stays.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        new = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
        os.environ[ALLOCATOR_SETTINGS[0 if new else 1]] = "expandable_segments:True"


def largest_canvas(
    augmentation: Augmentation, sizes: Iterable[Sequence[int]], *, mixed: bool
) -> tuple[int, int]:
    """The largest (height, width) to which a step may be padded, of images of `sizes`, (height,
    width) too. mixed: images of any aspect ratios share a step; otherwise similar ones do, and only
    a few steps, in which wide images meet tall ones, need more.
    """
    areas = {(int(height), int(width)) for height, width in sizes}
    short, longest = max(augmentation.sizes), augmentation.max_size
    aspects = [float(LONGEST_ASPECT)] if augmentation.strong.iou_crop else []
    if augmentation.crop:
        low, high = augmentation.crop_range
        aspects.append(high / low)  # of the crops, the least square ones
    for aspect in aspects:
        # A longer area is no larger: --train_max_size shrinks both of its sides.
        long = max(min(int(short * aspect), longest), short)
        areas |= {(short, long), (long, short)}
    shapes = [resized_shape(*area, short, longest) for area in areas]
    if mixed:
        heights, widths = zip(*shapes, strict=True)
        return max(heights), max(widths)
    return max(shapes, key=lambda shape: (shape[0] * shape[1], shape))


def largest_batch(
    dataset: DetectionDataset, images: int, canvas: tuple[int, int], device: torch.device
) -> dict[str, Any]:
    """A batch of grey images as large as the canvas, each with as many boxes as any target of the
    dataset can have, in the form that `trainer.data.loader.unpacked` returns. No images share
    memory.
    """
    (height, width), objects = canvas, dataset.most_boxes
    boxes = torch.full((objects, 4), 0.5)
    target: dict[str, Any] = {"labels": torch.zeros(objects, dtype=torch.int64), "boxes": boxes}
    if dataset.with_masks:
        target |= {
            "masks": torch.ones(objects, height, width, dtype=torch.bool),
            "mask_boxes": boxes.new_tensor([0, 0, width, height]).expand(objects, 4),
            "has_mask": torch.ones(objects, dtype=torch.bool),
        }
    target |= dataset.denoising.of_target(boxes, target["labels"], np.random.default_rng(0))
    return {
        "images": torch.zeros(images, 3, height, width, device=device),
        "padding": torch.zeros(images, height, width, dtype=torch.bool, device=device),
        "targets": [
            {name: tensor.to(device, copy=True) for name, tensor in target.items()}
            | {"image_id": number}
            for number in range(images)
        ],
    }


def missing_moments(optimizer: Optimizer) -> list[Tensor]:
    """Memory for the two moments of AdamW, which its first step allocates."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [torch.empty_like(p) for p in parameters if p not in optimizer.state for _ in range(2)]


@dataclass(frozen=True)
class Probe:
    """Tries a run's largest step on all processes together, and leaves no trace: weights, the
    optimiser, the moving average and random numbers stay as they are.

    Only a GPU is probed. A CPU that is short of memory raises no error: the system swaps, or ends
    the process.
    """

    dataset: DetectionDataset
    optimizer: Optimizer
    canvas: tuple[int, int]  # (height, width) in pixels
    device: torch.device
    # The gradients of micro-batches: their loss terms, None if memory ran out.
    gradients: Callable[[list[dict[str, Any]]], dict[str, Tensor] | None]
    true_anywhere: Callable[[bool], bool]

    def possible(self) -> bool:
        return self.device.type != "cpu"

    def fits(self, images: int, micro_batches: int = 1) -> bool:
        """Whether a step of micro-batches of `images` largest images fits on every process, beside
        the optimiser's state.
        """
        with torch.random.fork_rng([] if self.device.type == "cpu" else [self.device]):
            fits = self._try(images, micro_batches)
        self.optimizer.zero_grad()
        failed = self.true_anywhere(not fits)
        if failed:  # otherwise the cache keeps blocks that the steps of the run can use
            clear_device_cache(garbage_collection=True)
        if self.device.type == "cuda":  # the log shows the peak of the run
            torch.cuda.reset_peak_memory_stats(self.device)
        return not failed

    def _try(self, images: int, micro_batches: int) -> bool:
        batches: list[dict[str, Any]] = []
        moments: list[Tensor] = []
        try:
            moments += missing_moments(self.optimizer)
            for _ in range(micro_batches):  # a step holds all of them at once
                batches.append(largest_batch(self.dataset, images, self.canvas, self.device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batches.clear()
        # Without a batch too: the other processes wait for this one's part in the sums.
        return self.gradients(batches) is not None


def fitting_micro_batches(probe: Probe, config: TrainConfig, n_iter_to_acc: int) -> int:
    """The number of micro-batches, `n_iter_to_acc` or more, with which the largest step fits.
    Raises OutOfMemory if no number does.
    """
    fitting = n_iter_to_acc
    while not probe.fits(config.batch_size // fitting, fitting):
        fitting = more_micro_batches(config, fitting, probe.canvas)
    if fitting > n_iter_to_acc:
        height, width = probe.canvas
        logger.warning(
            f"--batch_size {config.batch_size} is split into {fitting} micro-batches on every "
            f"process, so that images of {height} x {width} pixels fit into memory; only dropout "
            f"masks change. Pass --n_iter_to_acc {fitting} to start that way"
        )
    return fitting


def fitting_batch_size(probe: Probe, most: int) -> int:
    """The largest power of two, up to MOST_IMAGES and `most`, of images per process that fit.
    Raises OutOfMemory if not even one does.
    """
    if not probe.fits(1):
        raise one_image_is_too_much(probe.canvas)
    images = 1
    while 2 * images <= min(MOST_IMAGES, most) and probe.fits(2 * images):
        images *= 2
    return images


def more_micro_batches(config: TrainConfig, n_iter_to_acc: int, canvas: tuple[int, int]) -> int:
    """The next number of micro-batches that divides the batch, at least twice the present one.

    Raises OutOfMemory if a micro-batch is already one image.
    """
    size = config.batch_size
    if n_iter_to_acc == size:
        raise one_image_is_too_much(canvas)
    return next((n for n in range(2 * n_iter_to_acc, size + 1) if size % n == 0), size)


def one_image_is_too_much(canvas: tuple[int, int]) -> OutOfMemory:
    return OutOfMemory(
        f"out of memory with one image of {canvas[0]} x {canvas[1]} pixels at a time; "
        "lower --eval_size or --train_max_size, or choose a smaller --backbone_name"
    )


def checkpoint_activations(model: nn.Module) -> None:
    """Blocks of the backbone and layers of the decoder keep their inputs only, and are computed
    again in the backward pass: less memory for a third more time.

    This replaces their `forward` instead of wrapping them, so that weights keep their names. A copy
    of the model made afterwards would run the blocks of the original.
    """
    for module in model.modules():
        if isinstance(module, BLOCKS):
            module.forward = _checkpointed(module.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A function of ours rather than a partial of PyTorch's: `torch.compile` compiles this one.
    def recomputed(*inputs: Any) -> Tensor:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return recomputed
