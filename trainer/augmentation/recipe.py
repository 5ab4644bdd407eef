"""The augmentation of a training: the released recipe of flipping, cropping and resizing, after the
strong parts if there are any.

Sizes are (height, width) in pixels.
"""

import math
from dataclasses import dataclass

import numpy as np

from trainer.augmentation.geometry import Crop, Geometry
from trainer.augmentation.strong import NO_PARTS, StrongParts
from trainer.settings.config import TrainConfig
from vidt.images.canvas import GRANULE, resized_shape

RELEASED_EVAL_SIZE = 800  # the released scales are stated for this evaluation size
RELEASED_SIZES = (480, 800)  # least and largest short side, in steps of 16
RELEASED_CROP_RESIZE = (400, 500, 600)  # short sides before a crop
RELEASED_CROP = (384, 600)  # sides of the crop


@dataclass(frozen=True)
class Augmentation:
    """The released recipe: flip; then half the time resize, half the time resize, crop and
    resize. `strong` comes before it; see `trainer.augmentation.strong`.
    """

    sizes: tuple[int, ...]
    max_size: int
    flip: bool = True
    crop: bool = True
    crop_resize: tuple[int, ...] = RELEASED_CROP_RESIZE
    crop_range: tuple[int, int] = RELEASED_CROP
    strong: StrongParts = NO_PARTS

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
            strong=StrongParts.from_config(config),
        )

    def draw(
        self, size: tuple[int, int], random: np.random.Generator, short_side: int | None = None
    ) -> Geometry:
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
    ) -> tuple[bool, Crop | None]:
        """The first part of `draw`, which determines the aspect ratio."""
        flip = self.flip and random.random() < 0.5
        if not self.crop or random.random() >= 0.5:
            return flip, None
        before = resized_shape(*size, _one_of(self.crop_resize, random))
        return flip, Crop(before, *self._crop_area(before, random))

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """The size at which an image, or a crop of it, meets the strong parts."""
        return resized_shape(height, width, self._middle, self.max_size)

    @property
    def _middle(self) -> int:
        return sorted(self.sizes)[len(self.sizes) // 2]

    def largest(self, size: tuple[int, int]) -> tuple[int, int]:
        """The largest (height, width) to which `draw` or a strong part may resize a whole image of
        `size`.
        """
        shapes = [resized_shape(*size, max(self.sizes), self.max_size)]
        if self.crop:
            shapes.append(resized_shape(*size, max(self.crop_resize)))
        scale = self.strong.largest_scale(min(size), self._middle, self.max_size)
        shapes.append((math.ceil(scale * size[0]), math.ceil(scale * size[1])))
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
