"""Instance masks of a table as one array of run lengths, without Python objects; and conversion
between run lengths and pixels.

n objects of an H x W image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from trainer.readers.run_lengths import RunLengths, as_coco


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
    """Masks bool [n, H, W] on the CPU to run lengths; fastest if stored column by column."""
    columns = np.asfortranarray(masks.numpy().view(np.uint8).transpose(1, 2, 0))
    return [each["counts"] for each in coco_mask.encode(columns)]


def decode(masks: Sequence[RunLengths], size: tuple[int, int]) -> Tensor:
    """Run lengths of an image of `size` (height, width) to bool [n, H, W]; b"" is an empty mask."""
    found = torch.zeros(len(masks), size[1], size[0], dtype=torch.bool)
    present = [index for index, mask in enumerate(masks) if mask]
    if present:
        columns = coco_mask.decode([as_coco(masks[index], size) for index in present])  # [H, W, n]
        found[present] = torch.from_numpy(columns.T).bool()
    return found.transpose(1, 2)
