"""Instance masks as short vectors: ViDT+'s unified query representation (arXiv 2204.07962, section
3.3).

What an object's box holds of its mask, drawn on a square, goes through a cosine transform; the
vector is the lowest frequencies, in JPEG's zig-zag order. The square's side and the vector's length
are the configuration's `gt_mask_len` and `n_keep`.

Letters: n objects, K numbers of a vector, S side of the square, F frequencies that K numbers reach,
H x W image.
"""

from functools import cache

import torch
from torch import Tensor
from torchvision.ops import roi_align

from vidt.images.mask_drawing import pixels_within

_MOST_CELLS = 2**24  # worked on at once: masks are many and pictures may be large


@cache
def zigzag(side: int) -> Tensor:
    """The cells of a square, row by row numbered 0..S*S-1, by frequency: int64 [S * S].

    Diagonals from the corner on; even ones run upwards, odd ones downwards.
    """
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    diagonal = row + column
    along = torch.where(diagonal % 2 == 0, column, row)
    return (diagonal * side + along).flatten().argsort()


@cache  # per device: to carry the tables over each time would wait for it
def _low_frequencies(n_keep: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the square's first n_keep numbers, int64 [K] each, all below F; and the
    first F rows of the orthonormal DCT-II: float64 [F, S].
    """
    cells = zigzag(side)[:n_keep]
    rows, columns = cells // side, cells % side
    frequency = torch.arange(int(max(rows.max(), columns.max())) + 1, dtype=torch.float64)[:, None]
    place = torch.arange(side, dtype=torch.float64) + 0.5
    waves = torch.cos(torch.pi / side * frequency * place) * (2 / side) ** 0.5
    waves[0] /= 2**0.5
    return rows.to(device), columns.to(device), waves.to(device)


def square_masks(masks: Tensor, boxes: Tensor, side: int) -> Tensor:
    """What boxes [n, 4] (xyxy, pixels) hold of masks [n, H, W], drawn on squares: bool [n, S,
    S].
    """
    at_once = max(_MOST_CELLS // max(masks.shape[1] * masks.shape[2], 1), 1)
    drawn = [
        _aligned(part.float(), frame.float(), side)
        for part, frame in zip(masks.split(at_once), boxes.split(at_once), strict=True)
    ]
    return torch.cat(drawn) >= 0.5


def _aligned(masks: Tensor, boxes: Tensor, side: int) -> Tensor:
    number = torch.arange(len(boxes), device=boxes.device)[:, None]
    return roi_align(masks[:, None], torch.cat([number, boxes], dim=1), side, aligned=True)[:, 0]


def encode_squares(squares: Tensor, n_keep: int) -> Tensor:
    """The vectors of squares [n, S, S]: float32 [n, K]."""
    rows, columns, waves = _low_frequencies(n_keep, squares.shape[-1], squares.device)
    return (waves @ squares.to(waves.dtype) @ waves.T)[:, rows, columns].float()


def decode_vectors(vectors: Tensor, side: int) -> Tensor:
    """Vectors [n, K] to squares, bool [n, S, S]: where the cosines' sum is in the upper half of its
    range.
    """
    rows, columns, waves = _low_frequencies(vectors.shape[1], side, vectors.device)
    spectrum = waves.new_zeros(len(vectors), len(waves), len(waves))
    spectrum[:, rows, columns] = vectors.to(waves.dtype)
    heights = waves.T @ spectrum @ waves  # [n, S, S]
    return heights > (heights.amax((1, 2), keepdim=True) + heights.amin((1, 2), keepdim=True)) / 2


def paste_squares(squares: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Squares [n, S, S] drawn into boxes [n, 4] (xyxy, pixels) of an image: bool [n, H, W].

    Interpolated linearly; of a box that sticks out of the image, what is inside it.
    """
    height, width = size
    # Column by column in memory, the order of COCO's run lengths.
    pasted = torch.zeros(len(squares), width, height, dtype=torch.bool, device=squares.device)
    pasted = pasted.transpose(1, 2)
    for image, square, box in zip(pasted, squares.float(), boxes.tolist(), strict=True):
        left, top, right, bottom = box
        rows, columns = pixels_within(top, bottom, size[0]), pixels_within(left, right, size[1])
        drawn = _stretched(square, top, bottom, rows)  # [rows, S]
        drawn = _stretched(drawn.T, left, right, columns)  # [columns, rows]
        image[rows.start : rows.stop, columns.start : columns.stop] = (drawn >= 0.5).T
    return pasted


def _stretched(square: Tensor, low: float, high: float, pixels: range) -> Tensor:
    """Cells [S, X], stretched along S from low to high, at the centres of `pixels`: interpolated
    between the centres of cells, zero beyond. [pixels, X].
    """
    side = len(square)
    centres = torch.arange(pixels.start, pixels.stop, device=square.device) + 0.5
    place = (centres - low) / max(high - low, 1e-6) * side + 0.5  # 1 is the centre of the first
    place = place.clamp(0, side + 1)
    before = place.floor().clamp(max=side)
    bordered = torch.nn.functional.pad(square, (0, 0, 1, 1))
    return torch.lerp(
        bordered[before.long()], bordered[before.long() + 1], (place - before)[:, None]
    )
