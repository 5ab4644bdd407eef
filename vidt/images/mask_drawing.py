"""Instance masks decoded from their vectors, in NumPy, for detectors that run without PyTorch.
`vidt.losses.mask_vectors` encodes masks and defines the vectors.

Letters: n objects, K numbers of a vector, S side of the square, H x W image.
"""

from functools import cache
from typing import NamedTuple

import numpy as np


class Patch(NamedTuple):
    """The part of a mask inside its box; the image has nothing of it elsewhere."""

    left: int  # pixels of the image
    top: int
    mask: np.ndarray  # bool [h, w]


def decode_vectors(vectors: np.ndarray, side: int) -> np.ndarray:
    """Turn vectors [n, K] into squares, bool [n, S, S]: True where the sum of the cosines lies in
    the upper half of its range.
    """
    cells = zigzag(side)[: vectors.shape[1]]
    spectrum = np.zeros((len(vectors), side, side))
    spectrum[:, cells // side, cells % side] = vectors
    position = np.arange(side) + 0.5
    waves = np.cos(np.pi / side * np.arange(side)[:, None] * position) * (2 / side) ** 0.5
    waves[0] /= 2**0.5
    heights = waves.T @ spectrum @ waves
    middle = (heights.max((1, 2), keepdims=True) + heights.min((1, 2), keepdims=True)) / 2
    return heights > middle


@cache
def zigzag(side: int) -> np.ndarray:
    """The cells of a square, numbered row by row 0..S*S-1, in the order of their frequency: int64
    [S * S].

    Diagonals start at the corner; even ones run upwards, odd ones downwards.
    """
    row, column = np.indices((side, side))
    diagonal = row + column
    along = np.where(diagonal % 2 == 0, column, row)
    return (diagonal * side + along).ravel().argsort()


def paste_squares(squares: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draw squares [n, S, S] into boxes [n, 4] (xyxy, pixels) of an image: bool [n, H, W]."""
    # Column by column in memory, the order of COCO's run lengths.
    pasted = np.zeros((len(squares), *size[::-1]), bool).transpose(0, 2, 1)
    for image, square, box in zip(pasted, squares, boxes, strict=True):
        left, top, mask = patch_of(square, box, size)
        image[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return pasted


def patch_of(square: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> Patch:
    """Stretch a square [S, S] to a box [4] (xyxy, pixels) of an image of `size` (height, width).

    Interpolates linearly and crops to the image.
    """
    left, top, right, bottom = box.tolist()
    rows, columns = _pixels_within(top, bottom, size[0]), _pixels_within(left, right, size[1])
    drawn = _stretched(square.astype(np.float32), top, bottom, rows)  # [rows, S]
    drawn = _stretched(drawn.T, left, right, columns)  # [columns, rows]
    return Patch(columns.start, rows.start, (drawn >= 0.5).T)


def _pixels_within(low: float, high: float, length: int) -> range:
    """The pixels of an axis whose centres may lie between low and high; none for NaN."""
    if not low < high:
        return range(0)
    start = min(max(low - 1, 0), length)
    return range(int(start), int(max(min(high + 1, length), start)))


def _stretched(square: np.ndarray, low: float, high: float, pixels: range) -> np.ndarray:
    """Stretch cells [S, X] along S from low to high and sample them at the centres of `pixels`,
    linearly between the centres of cells, zero beyond: [pixels, X].
    """
    side = len(square)
    centres = np.arange(pixels.start, pixels.stop, dtype=np.float32) + np.float32(0.5)
    position = (centres - np.float32(low)) / np.float32(max(high - low, 1e-6)) * side + 0.5
    position = position.clip(0, side + 1).astype(np.float32)
    before = np.minimum(np.floor(position), side)
    bordered = np.pad(square, ((1, 1), (0, 0)))
    lower, upper = bordered[before.astype(int)], bordered[before.astype(int) + 1]
    return lower + (upper - lower) * (position - before)[:, None]
