"""Instance masks as short vectors: ViDT+'s unified query representation (arXiv 2204.07962, section
3.3).

The mask is cropped to its box, resized to a square and DCT-transformed; the vector holds the lowest
frequencies, in JPEG's zig-zag order. The square's side and the vector's length
are the configuration's `gt_mask_len` and `n_keep`.

`vidt.images.mask_drawing` decodes vectors to pixels.

Letters: n objects, K numbers of a vector, S side of the square, F frequencies that K numbers reach,
H x W image.
"""

from functools import cache

import torch
from torch import Tensor
from torchvision.ops import roi_align

from vidt.images.mask_drawing import zigzag

_MOST_CELLS = 2**24  # mask pixels cropped at once: limits memory


@cache  # per device: copying the tables each time would synchronise
def _low_frequencies(n_keep: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the square's first n_keep numbers, int64 [K] each, all below F; and the
    first F rows of the orthonormal DCT-II: float64 [F, S].
    """
    cells = torch.from_numpy(zigzag(side)[:n_keep])
    rows, columns = cells // side, cells % side
    frequency = torch.arange(int(max(rows.max(), columns.max())) + 1, dtype=torch.float64)[:, None]
    position = torch.arange(side, dtype=torch.float64) + 0.5
    waves = torch.cos(torch.pi / side * frequency * position) * (2 / side) ** 0.5
    waves[0] /= 2**0.5
    return rows.to(device), columns.to(device), waves.to(device)


def square_masks(masks: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Crops masks [n, H, W] to boxes [n, 4] (xyxy, pixels) and resizes them: bool [n, S, S]."""
    at_once = max(_MOST_CELLS // max(masks.shape[1] * masks.shape[2], 1), 1)
    squares = [
        _cropped(some_masks.float(), some_boxes.float(), side)
        for some_masks, some_boxes in zip(masks.split(at_once), boxes.split(at_once), strict=True)
    ]
    return torch.cat(squares) >= 0.5


def _cropped(masks: Tensor, boxes: Tensor, side: int) -> Tensor:
    number = torch.arange(len(boxes), device=boxes.device)[:, None]
    return roi_align(masks[:, None], torch.cat([number, boxes], dim=1), side, aligned=True)[:, 0]


def encode_squares(squares: Tensor, n_keep: int) -> Tensor:
    """The vectors of squares [n, S, S]: float32 [n, K]."""
    rows, columns, waves = _low_frequencies(n_keep, squares.shape[-1], squares.device)
    return (waves @ squares.to(waves.dtype) @ waves.T)[:, rows, columns].float()
