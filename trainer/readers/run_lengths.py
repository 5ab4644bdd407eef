"""Instance masks as COCO's compressed run lengths: a few hundred bytes per object at any image
size. NumPy and pycocotools, without PyTorch.

Polygons become run lengths once, when they are read. b"" stands for an object without a mask.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from pycocotools import mask as coco_mask

RunLengths: TypeAlias = bytes


def as_coco(mask: RunLengths, size: tuple[int, int]) -> dict[str, Any]:
    """The dictionary that pycocotools expects."""
    return {"size": list(size), "counts": mask}


def areas_of(entries: list[dict[str, Any]]) -> list[float]:
    """Pixels of each mask; entries as of `as_coco`."""
    # One at a time: with NumPy 2 pycocotools raises OverflowError for more than 255 at once.
    return [float(coco_mask.area(entry)) for entry in entries]


def rectangle(box: Sequence[float], size: tuple[int, int]) -> RunLengths:
    """The mask of a whole box, xyxy in pixels."""
    x1, y1, x2, y2 = box
    return _merged([np.array([x1, y1, x2, y1, x2, y2, x1, y2])], size)


def read_segmentation(segmentation: Any, size: tuple[int, int]) -> RunLengths:
    """Convert the `segmentation` of an object in an image of `size` (height, width): polygons, run
    lengths as numbers, or compressed run lengths. Returns b"" for none, or one without area.

    Raises ValueError with the fault. Every value is checked first: pycocotools' C code does not.
    """
    if not segmentation:
        return b""
    if isinstance(segmentation, list):
        mask = _merged([_polygon(part, size) for part in segmentation], size)
    elif isinstance(segmentation, dict):
        mask = _checked_run_lengths(segmentation, size)
    else:
        raise ValueError("it is neither polygons nor run lengths")
    return mask if mask and coco_mask.area([as_coco(mask, size)])[0] else b""


def _polygon(part: Any, size: tuple[int, int]) -> np.ndarray:
    """x, y, x, y, ... as float64, clipped to one image size around the image."""
    try:
        numbers = np.array(part, np.float64)
    except (TypeError, ValueError, OverflowError):  # the last: an integer of 300 digits
        raise ValueError("a polygon is not a list of numbers") from None
    if numbers.ndim != 1 or len(numbers) % 2 or not np.isfinite(numbers).all():
        raise ValueError("a polygon is not a list of finite x, y, x, y, ...")
    height, width = size
    points = numbers.reshape(-1, 2)
    return points.clip((-width, -height), (2 * width, 2 * height)).reshape(-1)


def _merged(polygons: list[np.ndarray], size: tuple[int, int]) -> RunLengths:
    # pycocotools takes four numbers for a box; fewer than three corners have no area.
    parts = [polygon.tolist() for polygon in polygons if len(polygon) >= 6]
    if not parts:
        return b""
    return coco_mask.merge(coco_mask.frPyObjects(parts, *size))["counts"]


def _checked_run_lengths(segmentation: dict[str, Any], size: tuple[int, int]) -> RunLengths:
    counts, own_size = segmentation.get("counts"), segmentation.get("size")
    if own_size != list(size):
        raise ValueError(f"its run lengths are of size {own_size}, the image's is {list(size)}")
    if isinstance(counts, str) and counts.isascii():
        mask = counts.encode()
        _check_runs(_unpacked(mask), size)
        return mask
    if isinstance(counts, list) and all(type(count) is int and count < 2**31 for count in counts):
        _check_runs(np.array(counts, np.float64), size)
        return coco_mask.frPyObjects({"counts": counts, "size": own_size}, *size)["counts"]
    raise ValueError("its counts are neither a text nor a list of whole numbers")


def _check_runs(runs: np.ndarray, size: tuple[int, int]) -> None:
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError("its run lengths do not add up to the image")


def _unpacked(text: bytes) -> np.ndarray:
    """Decode COCO's compressed run lengths: each character holds five bits, lowest first, and a
    sixth for "more follows"; from the fourth on, a number is the difference to the last but one.
    Raises ValueError for anything else.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if (codes < 0).any() or (codes > 63).any() or not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError("its run lengths are not COCO's")
    if lengths.max() > 7:
        raise ValueError("its run lengths are longer than any image")
    places = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << places, starts)
    numbers -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers
