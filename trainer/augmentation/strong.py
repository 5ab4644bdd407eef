"""The strong parts of the augmentation: which of them an image gets, and in what order.

An image that gets any part but the photometric one is first scaled to its canvas, whose short side
is the middle training size. IoU crop comes first and alone decides the canvas's aspect ratio; then
mosaic, mixup, copy-paste, zoom-out, scale jitter and affine; then the released recipe; photometric
distortion comes last, when the image is smallest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from torch import Tensor

from trainer.augmentation.geometry import Geometry
from trainer.augmentation.mixing import CENTRE, copy_paste, mixup, mosaic
from trainer.augmentation.scene import Scene
from trainer.augmentation.single import (
    LEAST_CROP,
    Area,
    affine,
    covering,
    iou_area,
    jittered,
    zoomed_out,
)
from trainer.readers.samples import Sample
from trainer.settings.config import TrainConfig
from trainer.settings.limits import STRONG_PARTS

# Reads the image at an index, or the next readable one, under the geometry drawn for it.
Read: TypeAlias = Callable[[int, Callable[[Sample], Geometry]], Scene]
# The canvas of an area of an image, both (height, width).
Canvas: TypeAlias = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class StrongParts:
    """The probability of each part, and strengths."""

    iou_crop: float = 0.0
    mosaic: float = 0.0
    mixup: float = 0.0
    copy_paste: float = 0.0
    zoom_out: float = 0.0
    scale_jitter: float = 0.0
    affine: float = 0.0
    photometric: float = 0.0
    rotation: float = 5.0  # degrees
    scale_jitter_range: tuple[float, ...] = (0.5, 2.0)
    flip: bool = True  # of the other images of a mosaic, mixup or copy-paste

    @classmethod
    def from_config(cls, config: TrainConfig) -> "StrongParts":
        probabilities = {name: getattr(config, name) for name in STRONG_PARTS}
        return cls(
            **probabilities,
            rotation=config.rotation,
            scale_jitter_range=config.scale_jitter_range,
            flip=config.flip,
        )

    @property
    def on(self) -> dict[str, float]:
        """The parts that images may get, and their probabilities."""
        return {name: getattr(self, name) for name in STRONG_PARTS if getattr(self, name)}

    def draw(self, random: np.random.Generator) -> frozenset[str]:
        """The parts of one image. The same numbers are drawn whatever is on."""
        numbers = random.random(len(STRONG_PARTS)).tolist()
        drawn = zip(STRONG_PARTS, numbers, strict=True)
        return frozenset(name for name, number in drawn if number < getattr(self, name))

    def most_boxes(self, of_one_image: int) -> int:
        """The most boxes that an image can have, if those of the dataset have `of_one_image`."""
        images = (4 if self.mosaic else 1) + bool(self.mixup) + bool(self.copy_paste)
        return of_one_image * images

    def largest_scale(self, side: int, short: int, longest: int) -> float:
        """The largest scale of an image with a short side of `side` pixels: the smallest IoU crop
        fills a canvas whose short side is `short`, and other images cover a canvas, or a field of
        a mosaic, whose aspect ratio is not theirs and whose sides are at most `longest`.
        """
        crop = short / max(int(LEAST_CROP * side), 1) if self.iou_crop else 0.0
        field = 1.0 if self.mixup or self.copy_paste else CENTRE[1] if self.mosaic else 0.0
        return max(crop, field * longest / side)


NO_PARTS = StrongParts()


def area_of(
    parts: frozenset[str], size: tuple[int, int], boxes: Tensor, random: np.random.Generator
) -> Area:
    """The part of an image that its canvas shows. boxes [N, 4] xyxy in pixels of the image, crowd
    regions left out.
    """
    return iou_area(size, boxes, random) if "iou_crop" in parts else (0, 0, *size)


def compose(
    strong: StrongParts,
    parts: frozenset[str],
    wanted: int,
    num_images: int,
    read: Read,
    canvas: Canvas,
    random: np.random.Generator,
) -> Scene:
    """The scene of the image at `wanted` with all of `parts` but the photometric one."""

    def first(sample: Sample) -> Geometry:
        area = area_of(parts, sample.size, sample.boxes[~sample.crowd], random)
        return covering(sample.size, area, canvas(*area[2:]), random)

    def partner(shape: tuple[int, int]) -> Scene:
        flip = strong.flip and random.random() < 0.5
        return read(
            int(random.integers(num_images)),
            lambda sample: covering(sample.size, (0, 0, *sample.size), shape, random, flip=flip),
        )

    scene = read(wanted, first)
    steps: dict[str, Callable[..., Scene]] = {
        "mosaic": partial(mosaic, partner=partner),
        "mixup": partial(mixup, partner=partner),
        "copy_paste": partial(copy_paste, partner=partner),
        "zoom_out": zoomed_out,
        "scale_jitter": partial(jittered, factors=strong.scale_jitter_range),
        "affine": partial(affine, rotation=strong.rotation),
    }
    for name, step in steps.items():
        if name in parts:
            scene = step(scene, random=random)
    return scene
