"""Resize, normalisation and padding: from a picture to the detector's input.

Training, evaluation, prediction and export share this definition, and its settings are saved with
the weights. Pictures stay 8-bit until they are on the device: a quarter of the memory and transfer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidt.errors import UserError, shown
from vidt.images.canvas import LARGEST_SIZE, canvas_of, longest_side, resize


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of evaluation and prediction; saved with the weights. Raises UserError for
    invalid values.
    """

    eval_size: int = 800
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not 1 <= self.eval_size <= LARGEST_SIZE:
            raise UserError(
                f"eval_size is {shown(self.eval_size)}; it must be from 1 to {LARGEST_SIZE}"
            )
        finite = all(math.isfinite(each) for each in (*self.mean, *self.std))
        if not finite or not len(self.mean) == len(self.std) == 3 or min(self.std) <= 0:
            raise UserError(
                f"mean is {shown(self.mean)} and std {shown(self.std)}; they must be three numbers "
                "each, of std above 0"
            )

    @property
    def max_size(self) -> int:
        """Longest side, in the released proportion to the short one."""
        return longest_side(self.eval_size)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) to which an image of this size is resized."""
        return canvas_of(height, width, self.eval_size)

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> [3, h, w] float32, resized to its canvas and normalised."""
        return self.normalise(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """RGB picture -> uint8 [3, h, w], resized to its canvas."""
        return to_pixels(resize(image, self.canvas(image.height, image.width)))

    def normalise(self, images: Tensor, padding: Tensor | None = None) -> Tensor:
        """uint8 [..., 3, H, W] -> float32 of that shape, 0 where padding [..., H, W] is True. The
        result is a new tensor, also for floats of 0 to 255.
        """
        mean, std = (_per_channel(each, images.device) for each in (self.mean, self.std))
        values = images.to(torch.float32, copy=True).mul_(1 / 255).sub_(mean).div_(std)
        return values if padding is None else values.masked_fill_(padding.unsqueeze(-3), 0.0)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1]; copied to a device once, since every copy synchronises."""
    with torch.inference_mode(False):  # cached, so it may later be used with autograd
        return torch.tensor(values, device=device)[:, None, None]


def to_pixels(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 [3, H, W]."""
    planes = np.empty((3, image.height, image.width), np.uint8)
    for plane, band in zip(planes, image.split(), strict=True):  # faster than transposing [H, W, 3]
        plane[...] = np.asarray(band)
    return torch.from_numpy(planes)


def pad_batch(
    images: Sequence[Tensor], canvas: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Images [3, h, w] of any sizes -> images [B, 3, H, W], zero padded right and below, and
    padding [B, H, W] bool, True where padded. H x W is `canvas`, or the largest height and
    width.
    """
    height, width = canvas or (max(i.shape[1] for i in images), max(i.shape[2] for i in images))
    batch = images[0].new_zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool, device=images[0].device)
    for index, image in enumerate(images):
        batch[index, :, : image.shape[1], : image.shape[2]] = image
        padding[index, : image.shape[1], : image.shape[2]] = False
    return batch, padding
