"""The size to which a picture is resized, and which pictures share a batch. Does not import
PyTorch, which an exported detector does not need.

Sizes are (height, width) in pixels.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

GRANULE = 16  # sides are rounded down to multiples of this, as released
LARGEST_SIZE = 16_384  # pixels of eval_size: three times the largest canvas that a large GPU holds


def resized_shape(
    height: int, width: int, size: int, max_size: int | None = None
) -> tuple[int, int]:
    """(height, width) after the released resize: short side to `size`, long side at most
    `max_size`, both rounded down to multiples of 16, at least 16.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
    other = int(size * long / short)
    new_height, new_width = (size, other) if height <= width else (other, size)
    return whole_granules(new_height), whole_granules(new_width)


def longest_side(eval_size: int) -> int:
    """The maximum of the long side, in the released proportion to the short one."""
    return eval_size * 1333 // 800


def canvas_of(height: int, width: int, eval_size: int) -> tuple[int, int]:
    """The size to which a picture is resized in evaluation and prediction."""
    return resized_shape(height, width, eval_size, longest_side(eval_size))


def fitted_shape(canvas: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """A canvas shrunk to fit into a frame, in multiples of 16; the canvas itself if it fits."""
    ratio = min(frame[0] / canvas[0], frame[1] / canvas[1])
    if ratio >= 1:
        return canvas
    return whole_granules(int(canvas[0] * ratio)), whole_granules(int(canvas[1] * ratio))


def whole_granules(length: int) -> int:
    """A side of a canvas: rounded down to a multiple of 16, at least 16."""
    return max(length // GRANULE, 1) * GRANULE


def resize(
    image: Image.Image,
    shape: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """Pillow's antialiased bilinear resize to (height, width), as released: of the whole picture,
    or of the part of it in `box`, xyxy.
    """
    return image.resize(shape[::-1], Image.Resampling.BILINEAR, box)


def framed(image: Image.Image, shape: tuple[int, int], frame: tuple[int, int]) -> np.ndarray:
    """RGB picture, resized to `shape` and padded with zeros right and below: uint8 [3, *frame]."""
    pixels = np.zeros((3, *frame), np.uint8)
    pixels[:, : shape[0], : shape[1]] = np.asarray(resize(image, shape)).transpose(2, 0, 1)
    return pixels


def canvas_batches(canvases: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices in batches of equal canvas, so that no image is padded and none depends on its batch
    mates.

    The detector's arithmetic lets padding leak (GroupNorm over padded maps, unmasked window
    padding).
    """
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, canvas in enumerate(canvases):
        groups[canvas].append(index)
    return [
        indices[start : start + batch_size]
        for _, indices in sorted(groups.items())
        for start in range(0, len(indices), batch_size)
    ]
