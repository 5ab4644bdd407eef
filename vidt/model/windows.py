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

from vidt.ops.tracing import kept

MASKED = -100.0  # the released value; a masked key keeps a weight near e^-100 rather than none


class Piece(NamedTuple):
    """All heads of some windows of some images: what the attention is given at once."""

    image: int  # the first
    images: int
    first: int  # of the windows of each of these images
    end: int


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the tokens of a grid are in its windows. Windows that the shift brought together from
    different sides of the map come last.

    A token is rows of D values, one for each part and head, parts being queries, keys and values,
    or the one that attention gives. Rows are copied once, straight to where the products of the
    attention want them: piece after piece, each [parts, images, M, windows, T], P in short. A table
    holds the numbers of the rows that are to be copied: from tokens, which are counted through as
    the shape says, or from P. Where nothing belongs, it names any row.
    """

    num_patches: int  # N
    num_heads: int  # M
    count: int  # W
    area: int  # T
    pieces: tuple[Piece, ...]
    apart: Tensor  # [number of the last windows, T, T] 0 or MASKED
    deal: Tensor  # [3 * R] of tokens [B, N + Q + 1, 3, M]; the last of them is for padding
    deal_back: Tensor  # [B, N + Q + 1, 3, M] of P; nothing but patches belongs
    dealt_padding: Tensor  # [B, W * T - N, 3, M] of P
    collect: Tensor  # [B, N + Q, M] of P; nothing but patches belongs
    collect_back: Tensor  # [R] of tokens [B, N + Q, M]; nothing belongs into padding
    collected_padding: Tensor  # [B * (W * T - N) * M] of P, int64, which alone may be filled by


@dataclass(frozen=True)
class _Layout:
    """How P, the rows of all pieces, and the rows of tokens are counted through."""

    batch: int
    num_heads: int
    count: int
    area: int
    pieces: tuple[Piece, ...]

    def rows_of_tokens(self, source: Tensor, parts: int, num_tokens: int) -> Tensor:
        """In the order of P, the rows that are there: [parts * R] of [B, num_tokens, parts, M].
        source [W * T]: which token is at each place of an image's windows.
        """
        token = parts * self.num_heads
        image = _steps(self.batch, num_tokens * token, 1, source.device)
        part = _steps(parts, self.num_heads, 0, source.device)
        head = _steps(self.num_heads, 1, 2, source.device)
        rows = part + image + head + source * token  # [parts, B, M, W * T]
        pieces = []
        for piece in self.pieces:
            of_images = rows[:, piece.image : piece.image + piece.images]
            pieces.append(of_images[..., piece.first * self.area : piece.end * self.area].flatten())
        return torch.cat(pieces)

    def rows_of_pieces(self, places: Tensor, parts: int) -> Tensor:
        """Which rows of P belong to places [n] of each image's windows: [B, n, parts, M]."""
        device, heads = places.device, self.num_heads
        # All pieces are as large as the first, but the last images and the last windows.
        images, width = self.pieces[0].images, self.pieces[0].end * self.area
        all_places = self.count * self.area
        image, place = _steps(self.batch, 1, 0, device), places.view(1, -1, 1, 1)
        first_image, first_place = image // images * images, place // width * width
        num_images = (self.batch - first_image).clamp(max=images)  # in the piece
        of_head = (all_places - first_place).clamp(max=width)  # rows in the piece
        before = first_image * all_places + num_images * first_place  # rows of a head and part
        row = parts * heads * before + (image - first_image) * heads * of_head
        part = _steps(parts, 1, 2, device) * (num_images * heads * of_head)
        return (row + place - first_place) + part + _steps(heads, 1, 3, device) * of_head


def _steps(number: int, step: int, axis: int, device: torch.device) -> Tensor:
    """0, step, 2 * step ... along an axis of four, int32."""
    shape = [1, 1, 1, 1]
    shape[axis] = number
    return (torch.arange(number, dtype=torch.int32, device=device) * step).view(shape)


def _pieces(batch: int, count: int, num_heads: int, at_once: int | None) -> tuple[Piece, ...]:
    """Whole images where they are small enough, else windows of one. None is larger than the
    first.
    """
    if at_once is None or batch == 0:
        return (Piece(0, batch, 0, count),)
    most = max(at_once // num_heads, 1)  # windows
    images = max(min(most // count, batch), 1)
    windows = math.ceil(count / math.ceil(count / most))
    return tuple(
        Piece(image, min(images, batch - image), first, min(first + windows, count))
        for image in range(0, batch, images)
        for first in range(0, count, windows)
    )


@kept(32)  # eight are one size of images: for 16 of 640 pixels, some 160 MB
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

    at_once: how many scores [T, T] of a window and head a piece may have, but it has all heads of a
    window at least; None puts all windows of all images into one.
    """
    height, width = grid
    num_patches = height * width
    num_tokens = num_patches + num_det
    down, across = (-(-side // window) for side in grid)
    count, area = down * across, window**2
    tokens = torch.arange(num_patches, device=device).view(grid)
    pad = (0, across * window - width, 0, down * window - height)
    tokens = F.pad(tokens, pad, value=num_tokens)
    if shift:
        tokens = tokens.roll((-shift, -shift), dims=(0, 1))
    order = _order(down, across, device) if shift else slice(None)
    source = _cut(tokens, window)[order].flatten()  # the token at each place
    by_token = source.argsort()  # not stable: ONNX knows no other, and padded places are alike
    source, places, padding = (
        each.int() for each in (source, by_token[:num_patches], by_token[num_patches:])
    )
    pieces = _pieces(batch, count, num_heads, at_once)
    layout = _Layout(batch, num_heads, count, area, pieces)
    return Windows(
        num_patches=num_patches,
        num_heads=num_heads,
        count=count,
        area=area,
        pieces=pieces,
        apart=_apart(down, across, window, shift, order, device),
        deal=layout.rows_of_tokens(source, 3, num_tokens + 1),
        deal_back=F.pad(layout.rows_of_pieces(places, 3), (0, 0, 0, 0, 0, num_det + 1)),
        dealt_padding=layout.rows_of_pieces(padding, 3),
        collect=F.pad(layout.rows_of_pieces(places, 1)[:, :, 0], (0, 0, 0, num_det)),
        collect_back=layout.rows_of_tokens(source.clamp(max=num_tokens - 1), 1, num_tokens),
        collected_padding=layout.rows_of_pieces(padding, 1).flatten().long(),
    )


def _order(down: int, across: int, device: torch.device) -> Tensor:
    """Windows row by row, but those of the last row and the last column at the end."""
    numbers = torch.arange(down * across, device=device).view(down, across)
    return torch.cat([numbers[:-1, :-1].flatten(), numbers[:-1, -1], numbers[-1]])


def _cut(tokens: Tensor, window: int) -> Tensor:
    """A map of whole windows [H, W] -> [windows, T]."""
    down, across = (side // window for side in tokens.shape)
    return tokens.view(down, window, across, window).transpose(1, 2).reshape(down * across, -1)


def _apart(
    down: int, across: int, window: int, shift: int, order: Any, device: torch.device
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

    regions = region(down)[:, None] * 3 + region(across)
    last = _cut(regions, window)[order][(down - 1) * (across - 1) :]
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


# What follows are no methods of `Windows`: `torch.compile` holds it as a constant, and of those it
# calls none.


def of_det(qkv: Tensor, windows: Windows) -> Tensor:
    """[B, N + Q + 1, 3 * C] -> [B, Q, 3 * C]."""
    return qkv[:, windows.num_patches : -1]


def whole_mask(windows: Windows) -> Tensor:
    """`Windows.apart` with the zeros of the windows before: [W, T, T]."""
    return F.pad(windows.apart, (0, 0, 0, 0, windows.count - len(windows.apart), 0))


def apart_in(piece: Piece, windows: Windows) -> Tensor:
    """`Windows.apart` of the last windows of a piece, as many as are in it."""
    before = windows.count - len(windows.apart)
    return windows.apart[max(piece.first - before, 0) : max(piece.end - before, 0)]


def by_piece(rows: Tensor, windows: Windows, parts: int) -> list[Tensor]:
    """[parts * R, *] -> of each piece [parts, images, M, windows, T, *]."""
    shapes = [
        (parts, piece.images, windows.num_heads, piece.end - piece.first, windows.area)
        for piece in windows.pieces
    ]
    pieces = rows.split([math.prod(shape) for shape in shapes])
    return [
        piece.view(*shape, *rows.shape[1:]) for piece, shape in zip(pieces, shapes, strict=True)
    ]


def _pick_rows(of: Tensor, table: Tensor, dim: int) -> Tensor:
    """Rows of D = dim values, as a table says: [*, D]."""
    return of.reshape(-1, dim).index_select(0, table.flatten()).view(*table.shape, dim)


class _Deal(torch.autograd.Function):
    """A copy each way, where autograd's own would add into zeros."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        ctx.windows = windows
        dim = qkv.shape[-1] // (3 * windows.num_heads)
        return _pick_rows(qkv, windows.deal, dim), of_det(qkv, windows).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_det: Tensor) -> tuple[Tensor, None]:
        windows = ctx.windows
        dim = grad.shape[-1]
        grad_qkv = _pick_rows(grad, windows.deal_back, dim).flatten(2)
        grad_qkv[:, windows.num_patches : -1] = grad_det
        grad_qkv[:, -1] = _pick_rows(grad, windows.dealt_padding, dim).sum(1).flatten(1)
        return grad_qkv, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, det: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        output = _pick_rows(attended, windows.collect, attended.shape[-1]).flatten(2)
        output[:, windows.num_patches :] = det
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        windows = ctx.windows
        dim = grad.shape[-1] // windows.num_heads
        attended = _pick_rows(grad, windows.collect_back, dim)
        attended.index_fill_(0, windows.collected_padding, 0)
        return attended, grad[:, windows.num_patches :], None
