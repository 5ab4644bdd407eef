"""Instance masks as COCO's compressed run lengths: a few hundred bytes for an object, whatever its
picture's size, and no Python object for any in a table.

Polygons become run lengths once, when they are read. b"" stands for an object without a mask.

n objects of an H x W image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

RunLengths: TypeAlias = bytes


@dataclass(frozen=True, eq=False)
class MaskColumn:
    """The masks of M objects, end to end."""

    data: Tensor  # uint8
    offsets: Tensor  # int64 [M + 1]

    @classmethod
    def from_run_lengths(cls, masks: Sequence[RunLengths]) -> "MaskColumn":
        lengths = np.fromiter((len(mask) for mask in masks), np.int64, len(masks))
        data = np.frombuffer(b"".join(masks), np.uint8).copy()
        offsets = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        return cls(torch.from_numpy(data), torch.from_numpy(offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, which: slice) -> tuple[RunLengths, ...]:
        start, stop, _ = which.indices(len(self))
        offsets = self.offsets[start : stop + 1].tolist()
        data = self.data[offsets[0] : offsets[-1]].numpy().tobytes()
        return tuple(
            data[offsets[i] - offsets[0] : offsets[i + 1] - offsets[0]] for i in range(stop - start)
        )

    @property
    def present(self) -> Tensor:
        """Which objects have a mask: bool [M]."""
        return self.offsets.diff() > 0


def encode(masks: Tensor) -> list[RunLengths]:
    """Masks bool [n, H, W] on the CPU to run lengths; quickest if they lie column by column."""
    columns = np.asfortranarray(masks.numpy().view(np.uint8).transpose(1, 2, 0))
    return [each["counts"] for each in coco_mask.encode(columns)]


def decode(masks: Sequence[RunLengths], size: tuple[int, int]) -> Tensor:
    """Run lengths of an image of `size` (height, width) to bool [n, H, W]; b"" to nothing."""
    found = torch.zeros(len(masks), size[1], size[0], dtype=torch.bool)
    present = [index for index, mask in enumerate(masks) if mask]
    if present:
        columns = coco_mask.decode([as_coco(masks[index], size) for index in present])  # [H, W, n]
        found[present] = torch.from_numpy(columns.T).bool()
    return found.transpose(1, 2)


def as_coco(mask: RunLengths, size: tuple[int, int]) -> dict[str, Any]:
    """As pycocotools takes it."""
    return {"size": list(size), "counts": mask}


def areas_of(entries: list[dict[str, Any]]) -> list[float]:
    """Pixels of each of some masks as pycocotools takes them."""
    return [float(area) for area in coco_mask.area(entries)]


def rectangle(box: Sequence[float], size: tuple[int, int]) -> RunLengths:
    """The mask of a whole box, xyxy in pixels."""
    x1, y1, x2, y2 = box
    return _merged([np.array([x1, y1, x2, y1, x2, y2, x1, y2])], size)


def read_segmentation(segmentation: Any, size: tuple[int, int]) -> RunLengths:
    """What COCO's JSON says of an object in an image of `size` (height, width): polygons, run
    lengths as numbers, or compressed ones. b"" where it says nothing, or nothing of any area.

    Raises ValueError with what is wrong. Nothing goes unexamined to pycocotools, whose C code
    believes what it is told.
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
    """x, y, x, y, ... as float64, at most one image's size away from the image."""
    try:
        numbers = np.array(part, np.float64)
    except (TypeError, ValueError):
        raise ValueError("a polygon is not a list of numbers") from None
    if numbers.ndim != 1 or len(numbers) % 2 or not np.isfinite(numbers).all():
        raise ValueError("a polygon is not a list of finite x, y, x, y, ...")
    height, width = size
    points = numbers.reshape(-1, 2)
    return points.clip((-width, -height), (2 * width, 2 * height)).reshape(-1)


def _merged(polygons: list[np.ndarray], size: tuple[int, int]) -> RunLengths:
    # Four numbers would be taken for a box; fewer than three corners have no area.
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
    """The numbers in COCO's compressed run lengths: five bits a character, the lowest first, a
    sixth that says "more follows", and from the fourth number on the difference to the one before
    the last. Raises ValueError for what is not that.
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
