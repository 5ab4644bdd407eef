"""Flip, crop and resize, drawn once and applied to pixels, boxes and masks.

Boxes are xyxy in pixels. Sizes are (height, width).
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidt.images.canvas import resize

# An image is decoded at a fraction of its size as long as it stays SPARE times as large as needed,
# so that the antialiased resize still averages over pixels. Compared with decoding in full,
# photographs differ by 0.1 to 0.35 of 255 on average and by at most 6, less than with another
# resampling filter. Evaluation and prediction decode in full.
SPARE = 2


def covered(size: tuple[int, int], image: Image.Image) -> tuple[float, float]:
    """The (height, width) of the part of `image` that a picture of `size` covers, if it was decoded
    at a whole fraction of `size`, rounded up.
    """
    fraction = round(size[0] / image.height)
    return size[0] / fraction, size[1] / fraction


@dataclass(frozen=True)
class Crop:
    """A part of an image, in pixels, after a resize to `before` (height, width)."""

    before: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> tuple[int, int, int, int]:
        return self.top, self.left, self.height, self.width


@dataclass(frozen=True)
class Geometry:
    """One draw of an augmentation, the same for pixels, boxes and masks: flip, crop, resize from
    `size` to `shape`, both (height, width). The image is decoded `spare` times as large as needed.
    """

    size: tuple[int, int]
    flip: bool
    crop: Crop | None
    shape: tuple[int, int]
    spare: int = SPARE

    @property
    def needed(self) -> tuple[int, int]:
        """The smallest (height, width) at which the image may be decoded."""
        height, width = self.crop.before if self.crop else self.shape
        return self.spare * height, self.spare * width

    @property
    def enlargement(self) -> float:
        """The area of a box that the crop does not cut, as a multiple of its area before."""
        before, part = (self.crop.before, self.crop.area[2:]) if self.crop else (self.size,) * 2
        whole = before[0] * before[1] / (self.size[0] * self.size[1])
        return whole * self.shape[0] * self.shape[1] / (part[0] * part[1])

    def on_image(self, image: Image.Image, *, shrunk: bool = False) -> Image.Image:
        """Transform an image of `size`, or of a half, a quarter or an eighth of it, rounded up;
        with `shrunk` an image that was resized from `size` to any other.

        The flip comes last, when the image is smallest; only the cropped part is resized.
        """
        height, width = (image.height, image.width) if shrunk else covered(self.size, image)
        if self.crop:
            image = resize(image, self.crop.area[2:], self._crop_box(height, width))
            height, width = image.height, image.width
        image = resize(image, self.shape, (0, 0, width, height))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

    def _crop_box(self, height: float, width: float) -> tuple[float, float, float, float]:
        """The crop in the decoded image, xyxy, before resize and flip."""
        assert self.crop is not None
        crop, (before_height, before_width) = self.crop, self.crop.before
        left = before_width - crop.left - crop.width if self.flip else crop.left
        down, right = height / before_height, width / before_width
        return (
            left * right,
            crop.top * down,
            min((left + crop.width) * right, width),
            min((crop.top + crop.height) * down, height),
        )

    def on_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Transform boxes [N, 4] xyxy in pixels; returns the visible ones and bool [N], True for
        each visible box.
        """
        moved = boxes.numpy().copy()  # NumPy is much faster than PyTorch for so few numbers
        kept: np.ndarray = np.ones(len(moved), np.bool_)
        size = self.size
        if self.flip:
            moved[:, [2, 0]] = size[1] - moved[:, [0, 2]]
        if self.crop:
            crop, size = self.crop, (self.crop.height, self.crop.width)
            moved = _scaled(moved, self.size, crop.before)
            moved -= np.array([crop.left, crop.top] * 2, moved.dtype)
            moved = moved.clip(0, np.array([crop.width, crop.height] * 2, moved.dtype))
            kept = np.all(moved[:, 2:] > moved[:, :2], axis=1)
            moved = moved[kept]
        return torch.from_numpy(_scaled(moved, size, self.shape)), torch.from_numpy(kept)

    def on_masks(self, masks: Tensor) -> Tensor:
        """Masks [N, *size] to [N, *shape], by the nearest neighbour of each pixel's centre."""
        rows, columns = (torch.arange(side) for side in self.size)
        if self.flip:
            columns = columns.flip(0)
        if self.crop:
            top, left, height, width = self.crop.area
            rows = _nearest(rows, self.crop.before[0])[top : top + height]
            columns = _nearest(columns, self.crop.before[1])[left : left + width]
        rows, columns = _nearest(rows, self.shape[0]), _nearest(columns, self.shape[1])
        # Masks are stored column by column: pick whole columns first, then whole rows.
        picked = masks.transpose(1, 2).index_select(1, columns).transpose(1, 2).contiguous()
        return picked.index_select(1, rows)


def _scaled(boxes: np.ndarray, before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    """Boxes xyxy of an image resized from `before` to `after`, both (height, width)."""
    ratios = [after[1] / before[1], after[0] / before[0]]
    return boxes * np.array(ratios * 2, boxes.dtype)


def _nearest(positions: Tensor, length: int) -> Tensor:
    """An axis resized to `length`: for each new pixel, the position under its centre."""
    return positions[(2 * torch.arange(length) + 1) * len(positions) // (2 * length)]
