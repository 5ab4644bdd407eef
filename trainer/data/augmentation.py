"""Augmentation of training images: the released recipe of flipping, cropping and resizing, drawn
once and applied to pixels, boxes and masks.

Boxes are xyxy in pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.settings.config import TrainConfig
from vidt.images.canvas import GRANULE, resize, resized_shape

RELEASED_EVAL_SIZE = 800  # the released scales are stated for this evaluation size
RELEASED_SIZES = (480, 800)  # least and largest short side, in steps of 16
RELEASED_CROP_RESIZE = (400, 500, 600)  # short sides before a crop
RELEASED_CROP = (384, 600)  # sides of the crop
# An image is decoded at a fraction of its size as long as it stays SPARE times as large as needed,
# so that the antialiased resize still averages over pixels. Compared with decoding in full,
# photographs differ by 0.1 to 0.35 of 255 on average and by at most 6, less than with another
# resampling filter. Evaluation and prediction decode in full.
SPARE = 2


@dataclass(frozen=True)
class Augmentation:
    """The released recipe: flip; then half the time resize, half the time resize, crop and
    resize.
    """

    sizes: tuple[int, ...]
    max_size: int
    flip: bool = True
    crop: bool = True
    crop_resize: tuple[int, ...] = RELEASED_CROP_RESIZE
    crop_range: tuple[int, int] = RELEASED_CROP

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Augmentation":
        """The released scales in proportion to eval_size; train_sizes and train_max_size override
        them.
        """
        ratio = config.eval_size / RELEASED_EVAL_SIZE
        low, high = (max(round(side * ratio / GRANULE), 1) * GRANULE for side in RELEASED_SIZES)
        return cls(
            sizes=config.train_sizes or tuple(range(low, high + 1, GRANULE)),
            max_size=config.train_max_size or config.eval_size * 1333 // RELEASED_EVAL_SIZE,
            flip=config.flip,
            crop=config.crop,
            crop_resize=tuple(max(round(side * ratio), GRANULE) for side in RELEASED_CROP_RESIZE),
            crop_range=(round(RELEASED_CROP[0] * ratio), round(RELEASED_CROP[1] * ratio)),
        )

    def draw(
        self, size: tuple[int, int], random: np.random.Generator, short_side: int | None = None
    ) -> "Geometry":
        """Draw the geometry for an image of `size` (height, width); if `short_side` is None, draw
        that too.
        """
        flip, crop = self.draw_flip_and_crop(size, random)
        area = crop.area[2:] if crop else size
        if short_side is None:
            short_side = _one_of(self.sizes, random)
        return Geometry(size, flip, crop, resized_shape(*area, short_side, self.max_size))

    def draw_flip_and_crop(
        self, size: tuple[int, int], random: np.random.Generator
    ) -> tuple[bool, "Crop | None"]:
        """The first part of `draw`, which determines the aspect ratio."""
        flip = self.flip and random.random() < 0.5
        if not self.crop or random.random() >= 0.5:
            return flip, None
        before = resized_shape(*size, _one_of(self.crop_resize, random))
        return flip, Crop(before, *self._crop_area(before, random))

    def largest(self, size: tuple[int, int]) -> tuple[int, int]:
        """The largest (height, width) to which `draw` may resize a whole image of `size`."""
        shapes = [resized_shape(*size, max(self.sizes), self.max_size)]
        if self.crop:
            shapes.append(resized_shape(*size, max(self.crop_resize)))
        heights, widths = zip(*shapes, strict=True)
        return max(heights), max(widths)

    def _crop_area(
        self, size: tuple[int, int], random: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop from an image of `size`."""
        low, high = self.crop_range
        height, width = (int(random.integers(min(low, side), min(high, side) + 1)) for side in size)
        top = int(random.integers(0, size[0] - height + 1))
        left = int(random.integers(0, size[1] - width + 1))
        return top, left, height, width


def _one_of(sizes: tuple[int, ...], random: np.random.Generator) -> int:
    return sizes[int(random.integers(len(sizes)))]


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
    `size` to `shape`, both (height, width).
    """

    size: tuple[int, int]
    flip: bool
    crop: Crop | None
    shape: tuple[int, int]

    @property
    def needed(self) -> tuple[int, int]:
        """The smallest (height, width) at which the image may be decoded."""
        height, width = self.crop.before if self.crop else self.shape
        return SPARE * height, SPARE * width

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
