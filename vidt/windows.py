"""Windows of a token map (Swin, arXiv 2103.14030, section 3.2): which token lies where.

Padding, the cyclic shift, the cut into windows and into heads are one table of places, so that
tokens move once on the way in and once on the way out. Tables are kept for the next images.

Letters: B batch, H x W grid, N = H * W, Q [DET] tokens, C channels, M heads, D = C / M, T = window
* window, W windows of an image; R = B * M * W * T rows of D values.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vidt.tracing import kept

MASKED = -100.0  # the released value; a masked key keeps a weight near e^-100 rather than none


class Piece(NamedTuple):
    """All heads of some windows of some images: what the attention is given at once."""

    images: int
    first: int  # of the windows of each of these images
    end: int


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the tokens of a grid are in its windows. Windows that the shift brought together from
    different sides of the map come last.

    A token is rows of D values, one for each part and head, parts being queries, keys and values,
    or the one that attention gives. Rows are copied once, straight to where the products of the
    attention want them: piece after piece, each [parts, images, M, windows, T, D]. The tables say
    where each is taken from.
    """

    num_patches: int  # N
    count: int  # W
    pieces: tuple[Piece, ...]
    apart: Tensor  # [number of the last windows, T, T] 0 or MASKED
    deal: Tensor  # [3 * R] rows of [B, N + Q + 1, 3, M]; its last token is for padding
    deal_back: Tensor  # [B, N + Q + 1, 3, M] rows of the pieces; any where no patch is
    dealt_padding: Tensor  # [B, W * T - N, 3, M] rows of the pieces
    collect: Tensor  # [B, N + Q, M] rows of the pieces; any where no patch is
    collect_back: Tensor  # [R] rows of [B, N + Q, M]; any for padding
    collected_padding: Tensor  # [B * (W * T - N) * M] rows of the pieces


@kept(32)  # eight are one size of images: for 16 of 640 pixels, some 150 MB
def windows_of(
    grid: tuple[int, int],
    window: int,
    shift: int,
    *,
    num_det: int,
    num_heads: int,
    batch: int,
    at_once: int | None,
    device: torch.device,
) -> Windows:
    """The windows of a grid, zero padded right and below to whole ones, then shifted cyclically.

    at_once: how many windows of single heads make a piece; None puts all into one.
    """
    height, width = grid
    num_patches = height * width
    num_tokens = num_patches + num_det
    rows, columns = (-(-side // window) for side in grid)
    tokens = torch.arange(num_patches, device=device).view(grid)
    pad = (0, columns * window - width, 0, rows * window - height)
    tokens = F.pad(tokens, pad, value=num_tokens)
    if shift:
        tokens = tokens.roll((-shift, -shift), dims=(0, 1))
    order = _order(rows, columns, device) if shift else slice(None)
    source = _cut(tokens, window)[order].flatten()  # the token at each place
    by_token = source.argsort()  # not stable: ONNX knows no other, and padded places are alike
    source, places, padded = (
        each.int() for each in (source, by_token[:num_patches], by_token[num_patches:])
    )
    pieces = _pieces(batch, rows * columns, num_heads, at_once)

    def steps(count: int, step: int, axis: int) -> Tensor:
        """0, step, 2 * step ... along an axis of four."""
        shape = [1, 1, 1, 1]
        shape[axis] = count
        return (torch.arange(count, dtype=torch.int32, device=device) * step).view(shape)

    def rows_of_tokens(source: Tensor, parts: int, num_tokens: int) -> Tensor:
        """[parts, B, M, W * T]"""
        image, head = steps(batch, num_tokens * parts * num_heads, 1), steps(num_heads, 1, 2)
        return steps(parts, num_heads, 0) + image + head + source * (parts * num_heads)

    def rows_of_pieces(places: Tensor, parts: int) -> Tensor:
        """[B, number of places, parts, M]"""
        shape = parts, batch, num_heads, len(source)
        numbers = torch.arange(math.prod(shape), dtype=torch.int32, device=device)
        if len(pieces) > 1:
            laid = _in_pieces(numbers.view(shape), pieces, window**2).long()
            numbers = torch.empty_like(numbers).index_copy_(0, laid, numbers)
        return numbers.view(shape).index_select(3, places).permute(1, 3, 0, 2)

    return Windows(
        num_patches=num_patches,
        count=rows * columns,
        pieces=pieces,
        apart=_apart(rows, columns, window, shift, order, device),
        deal=_in_pieces(rows_of_tokens(source, 3, num_tokens + 1), pieces, window**2),
        deal_back=F.pad(rows_of_pieces(places, 3), (0, 0, 0, 0, 0, num_det + 1)),
        dealt_padding=rows_of_pieces(padded, 3),
        collect=F.pad(rows_of_pieces(places, 1)[:, :, 0], (0, 0, 0, num_det)),
        collect_back=_in_pieces(
            rows_of_tokens(source.clamp(max=num_tokens - 1), 1, num_tokens), pieces, window**2
        ),
        collected_padding=rows_of_pieces(padded, 1).flatten().long(),
    )


def _pieces(batch: int, count: int, num_heads: int, at_once: int | None) -> tuple[Piece, ...]:
    """Whole images where they are small enough, else windows of one, in equal pieces."""
    if at_once is None:
        return (Piece(batch, 0, count),)
    size = max(at_once // num_heads, 1)  # windows
    images = min(max(size // count, 1), batch)
    windows = _even(count, size)
    return tuple(
        Piece(min(images, batch - image), first, min(first + windows, count))
        for image in range(0, batch, images)
        for first in range(0, count, windows)
    )


def _even(count: int, most: int) -> int:
    """The size of pieces of about one size, `most` at most."""
    return math.ceil(count / math.ceil(count / most))


def _in_pieces(table: Tensor, pieces: tuple[Piece, ...], area: int) -> Tensor:
    """[parts, B, M, W * T] -> [parts * R], piece after piece."""
    flat, image = [], 0
    for piece in pieces:
        images = table[:, image : image + piece.images]
        flat.append(images[..., piece.first * area : piece.end * area].flatten())
        if piece.end * area == table.shape[3]:
            image += piece.images
    return torch.cat(flat)


def _order(rows: int, columns: int, device: torch.device) -> Tensor:
    """Windows row by row, but those of the last row and the last column at the end."""
    numbers = torch.arange(rows * columns, device=device).view(rows, columns)
    return torch.cat([numbers[:-1, :-1].flatten(), numbers[:-1, -1], numbers[-1]])


def _cut(tokens: Tensor, window: int) -> Tensor:
    """A map of whole windows [H, W] -> [windows, T]."""
    rows, columns = (side // window for side in tokens.shape)
    return tokens.view(rows, window, columns, window).transpose(1, 2).reshape(rows * columns, -1)


def _apart(
    rows: int, columns: int, window: int, shift: int, order: Any, device: torch.device
) -> Tensor:
    """Keeps tokens apart that a shift brought together: [windows of the last row and column, T, T],
    0 or MASKED.
    """
    if not shift:
        return torch.zeros(0, window**2, window**2, device=device)

    def region(count: int) -> Tensor:
        place = torch.arange(count * window, device=device)
        end = count * window
        return (place >= end - window).long() + (place >= end - shift).long()

    regions = region(rows)[:, None] * 3 + region(columns)
    last = _cut(regions, window)[order][(rows - 1) * (columns - 1) :]
    return (last[:, None, :] != last[:, :, None]) * MASKED


def deal(qkv: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Queries, keys and values of an image, [B, N + Q + 1, 3 * C]: of patches, of [DET] tokens and
    what padded places hold -> those of the windows in rows, [3 * R, D], and those of the [DET]
    tokens, [B, Q, 3 * C].
    """
    return _Deal.apply(qkv, windows)


def collect(attended: Tensor, det: Tensor, windows: Windows) -> Tensor:
    """The way back: [R, D] and [B, Q, C] -> [B, N + Q, C]."""
    return _Collect.apply(attended, det, windows)


# Functions, not methods: of a constant, `torch.compile` calls none.


def of_det(qkv: Tensor, windows: Windows) -> Tensor:
    """[B, N + Q + 1, 3 * C] -> [B, Q, 3 * C]."""
    return qkv[:, windows.num_patches : -1]


def head_dim(tokens: Tensor, windows: Windows, parts: int) -> int:
    """D of tokens [*, parts * C]."""
    return tokens.shape[-1] // (parts * windows.collect.shape[2])


def apart_in(piece: Piece, windows: Windows) -> Tensor:
    """`Windows.apart` of the last windows of a piece, as many as are in it."""
    before = windows.count - len(windows.apart)
    return windows.apart[max(piece.first - before, 0) : max(piece.end - before, 0)]


def by_piece(rows: Tensor, windows: Windows, parts: int) -> list[Tensor]:
    """[parts * R, *] -> of each piece [parts, images, M, windows, T, *]."""
    num_heads, area = windows.collect.shape[2], windows.apart.shape[-1]
    sizes = [
        parts * piece.images * num_heads * (piece.end - piece.first) * area
        for piece in windows.pieces
    ]
    return [
        of_piece.view(parts, piece.images, num_heads, -1, area, *rows.shape[1:])
        for of_piece, piece in zip(rows.split(sizes), windows.pieces, strict=True)
    ]


def pick_rows(of: Tensor, table: Tensor, dim: int) -> Tensor:
    """Rows of D = dim values at the places of a table: [*, D]."""
    return of.reshape(-1, dim).index_select(0, table.flatten()).view(*table.shape, dim)


class _Deal(torch.autograd.Function):
    """A copy each way, where autograd's own would add into zeros."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        ctx.windows = windows
        return pick_rows(qkv, windows.deal, head_dim(qkv, windows, 3)), of_det(qkv, windows).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_det: Tensor) -> tuple[Tensor, None]:
        windows = ctx.windows
        dim = grad.shape[-1]
        grad_qkv = pick_rows(grad, windows.deal_back, dim).flatten(2)
        grad_qkv[:, windows.num_patches : -1] = grad_det
        grad_qkv[:, -1] = pick_rows(grad, windows.dealt_padding, dim).sum(1).flatten(1)
        return grad_qkv, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, det: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        output = pick_rows(attended, windows.collect, attended.shape[-1]).flatten(2)
        output[:, windows.num_patches :] = det
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        windows = ctx.windows
        attended = pick_rows(grad, windows.collect_back, head_dim(grad, windows, 1))
        attended.index_fill_(0, windows.collected_padding, 0)
        return attended, grad[:, windows.num_patches :], None
