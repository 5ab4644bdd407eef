"""Windows of a token map (Swin, arXiv 2103.14030, section 3.2): which token lies where, and
attention inside them.

Padding, the cyclic shift and the cut into windows are one table of places, made once for each grid,
so that tokens move once on the way in and once on the way out.

Letters: B batch, H x W grid, N = H * W, Q [DET] tokens, C channels, M heads, D = C / M, T = window
* window, W windows of an image.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vidt.tracing import is_tracing

MASKED = -100.0  # the released value; a masked key keeps a weight near e^-100 rather than none


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the tokens of a grid are in its windows. Windows that the shift brought together from
    different sides of the map come last.
    """

    count: int  # windows of an image
    source: Tensor  # [W * T] the token at each place; num_tokens stands for padding
    places: Tensor  # [N] the place of each token
    padded: Tensor  # [W * T - N] the places that hold padding
    apart: Tensor  # [number of the last windows, T, T] 0 or MASKED

    @property
    def mask(self) -> Tensor:
        """`apart` with the zeros of the windows before: [W, T, T]."""
        return F.pad(self.apart, (0, 0, 0, 0, self.count - len(self.apart), 0))


def windows_of(
    grid: tuple[int, int], window: int, shift: int, num_tokens: int, device: torch.device
) -> Windows:
    """The windows of a grid, zero padded right and below to whole ones, then shifted cyclically.
    num_tokens, N or more: what `Windows.source` holds at padded places.
    """
    if is_tracing():
        return _windows_of(grid, window, shift, num_tokens, device)
    return _cached_windows(grid, window, shift, num_tokens, device)


@lru_cache(maxsize=128)
def _cached_windows(*place: Any) -> Windows:
    with torch.inference_mode(False):  # else training could not use what prediction made
        return _windows_of(*place)


def _windows_of(
    grid: tuple[int, int], window: int, shift: int, num_tokens: int, device: torch.device
) -> Windows:
    height, width = grid
    rows, columns = (-(-side // window) for side in grid)
    tokens = torch.arange(height * width, device=device).view(grid)
    pad = (0, columns * window - width, 0, rows * window - height)
    tokens = F.pad(tokens, pad, value=num_tokens)
    if shift:
        tokens = tokens.roll((-shift, -shift), dims=(0, 1))
    order = _order(rows, columns, device) if shift else slice(None)
    source = _cut(tokens, window)[order].flatten()
    by_token = source.argsort()  # not stable: ONNX knows no other, and padded places are alike
    return Windows(
        count=rows * columns,
        source=source,
        places=by_token[: height * width],
        padded=by_token[height * width :],
        apart=_apart(rows, columns, window, shift, order, device),
    )


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


def deal(tokens: Tensor, windows: Windows, num_det: int) -> tuple[Tensor, Tensor]:
    """tokens [B, N + Q + 1, C]: patches, [DET] tokens and what padded places hold -> the windows
    [B, W * T, C] and the [DET] tokens [B, Q, C].
    """
    return _Deal.apply(tokens, windows, num_det)


def collect(attended: Tensor, det: Tensor, windows: Windows) -> Tensor:
    """The way back: [B, W * T, C] and [B, Q, C] -> [B, N + Q, C]."""
    return _Collect.apply(attended, det, windows)


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens at index [K] of each image: [B, N, C] -> [B, K, C]."""
    batch, count, dim = tokens.shape
    if tokens.device.type != "cpu":
        return tokens.index_select(1, index)
    # Along the first axis a CPU copies whole rows, twice as fast.
    rows = index if batch == 1 else (index + torch.arange(batch)[:, None] * count).flatten()
    return tokens.reshape(batch * count, dim).index_select(0, rows).view(batch, -1, dim)


class _Deal(torch.autograd.Function):
    """A copy each way, where autograd's own would add into zeros."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, windows: Windows, num_det: int) -> tuple[Tensor, Tensor]:
        ctx.windows = windows
        return _pick(tokens, windows.source), tokens[:, -1 - num_det : -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_det: Tensor) -> tuple[Tensor, None, None]:
        windows = ctx.windows
        patches = _pick(grad, windows.places)
        padding = _pick(grad, windows.padded).sum(1, keepdim=True)
        return torch.cat([patches, grad_det, padding], dim=1), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, det: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        return torch.cat([_pick(attended, windows.places), det], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        windows = ctx.windows
        count = len(windows.places)
        # A padded place reads any token, and then nothing.
        attended = _pick(grad, windows.source.clamp(max=count - 1))
        return attended.index_fill_(1, windows.padded, 0), grad[:, count:], None


def attend_windows(qkv: Tensor, bias: Tensor, windows: Windows, num_heads: int) -> Tensor:
    """Softmax attention inside each window.

    qkv [B, W * T, 3 * C]; bias [M, T, T] is added to the scores of every window. Returns [B, W * T,
    C].
    """
    if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        area = bias.shape[-1]
        parts = qkv.view(-1, area, 3, num_heads, qkv.shape[-1] // (3 * num_heads))
        output = _AttentionOnCPU.apply(parts, bias, windows.apart, windows.count)  # [M, B*W, T, D]
        return output.permute(1, 2, 0, 3).reshape(*qkv.shape[:2], -1)
    return _attend(qkv, bias, windows, num_heads)


def _attend(qkv: Tensor, bias: Tensor, windows: Windows, num_heads: int) -> Tensor:
    """Windows and heads side by side as heads, so that one mask serves the whole batch."""
    batch, area = qkv.shape[0], bias.shape[-1]
    parts = qkv.view(batch, windows.count, area, 3, num_heads, -1).permute(3, 0, 1, 4, 2, 5)
    query, keys, values = parts.flatten(2, 3).unbind(0)  # [B, W*M, T, D]
    mask = (bias + windows.mask[:, None]).flatten(0, 1).to(query.dtype)  # [W*M, T, T]
    output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    output = output.unflatten(1, (windows.count, num_heads)).transpose(2, 3)  # [B, W, T, M, D]
    return output.reshape(*qkv.shape[:2], -1)


class _AttentionOnCPU(torch.autograd.Function):
    """Scores in one buffer that is written in place.

    PyTorch's own attention for the CPU is made for long sequences: on windows of 49 tokens it takes
    about half as long again, and wants the mask of every window.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, apart: Tensor, count: int) -> Tensor:
        """qkv [B*W, T, 3, M, D], bias [M, T, T], apart [last of the W windows, T, T] -> [M, B*W, T,
        D].
        """
        total, area, _, heads, dim = qkv.shape
        # Side by side in memory, a product takes the windows of all heads at once: [3, M*B*W, T, D]
        qkv = qkv.permute(2, 3, 0, 1, 4).reshape(3, heads * total, area, dim)
        query, keys, values = qkv.unbind(0)
        scores = bias.repeat_interleave(total, dim=0)
        scores.baddbmm_(query, keys.mT, alpha=dim**-0.5)
        if len(apart):
            scores.view(-1, count, area, area)[:, -len(apart) :].add_(apart)
        weights = scores.softmax(-1)
        ctx.save_for_backward(qkv, weights)
        return torch.bmm(weights, values).view(heads, total, area, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        qkv, weights = ctx.saved_tensors
        heads, total, area, dim = grad.shape
        query, keys, values = qkv.unbind(0)
        grad = grad.reshape(heads * total, area, dim)
        grad_scores = torch._softmax_backward_data(
            torch.bmm(grad, values.mT), weights, -1, weights.dtype
        )
        grads = torch.empty_like(qkv)
        torch.bmm(grad_scores, keys, out=grads[0])
        torch.bmm(grad_scores.mT, query, out=grads[1])
        torch.bmm(weights.mT, grad, out=grads[2])
        grads[:2] *= dim**-0.5
        grad_qkv = grads.view(3, heads, total, area, dim).permute(2, 3, 0, 1, 4).contiguous()
        return grad_qkv, grad_scores.view(heads, total, area, area).sum(1), None, None
