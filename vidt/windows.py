"""Windows of a token map (Swin, arXiv 2103.14030, section 3.2): which token lies where, and
attention inside them.

Padding, the cyclic shift, the cut into windows and into heads are one table of places, so that
tokens move once on the way in and once on the way out. Tables are kept for the next images.

Letters: B batch, H x W grid, N = H * W, Q [DET] tokens, C channels, M heads, D = C / M, T = window
* window, W windows of an image.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vidt.tracing import is_compiled, kept

WINDOWS_AT_ONCE = 400  # of all heads, with scores of 4 MB; a single head may have more
MASKED = -100.0  # the released value; a masked key keeps a weight near e^-100 rather than none


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the tokens of a grid are in its windows. Windows that the shift brought together from
    different sides of the map come last.

    A token is rows of D values, one for each part and head, parts being queries, keys and values,
    or the one that attention gives. Rows are copied once, straight to where the products of the
    attention want them, [parts, B, M, W * T, D]. The tables say where each is taken from.
    """

    count: int  # windows of an image
    padded: Tensor  # [W * T - N] the places of an image that hold padding
    apart: Tensor  # [number of the last windows, T, T] 0 or MASKED
    deal: Tensor  # [3, B, M, W * T] rows of [B, N + Q + 1, 3, M]; its last token is for padding
    deal_back: Tensor  # [B, N, 3, M] rows of [3, B, M, W * T]
    collect: Tensor  # [B, N, M] rows of [B, M, W * T]
    collect_back: Tensor  # [B, M, W * T] rows of [B, N + Q, M]; any for padding


@kept(32)  # eight are one size of images: for 16 of 640 pixels, some 150 MB
def windows_of(
    grid: tuple[int, int],
    window: int,
    shift: int,
    *,
    num_det: int,
    num_heads: int,
    batch: int,
    device: torch.device,
) -> Windows:
    """The windows of a grid, zero padded right and below to whole ones, then shifted cyclically."""
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
    source, places = source.int(), by_token[:num_patches].int()

    def steps(count: int, step: int, axis: int) -> Tensor:
        """0, step, 2 * step ... along an axis of four."""
        shape = [1, 1, 1, 1]
        shape[axis] = count
        return (torch.arange(count, dtype=torch.int32, device=device) * step).view(shape)

    def to_places(source: Tensor, parts: int, num_tokens: int) -> Tensor:
        image, head = steps(batch, num_tokens * parts * num_heads, 1), steps(num_heads, 1, 2)
        return steps(parts, num_heads, 0) + image + head + source * (parts * num_heads)

    def to_tokens(parts: int) -> Tensor:
        image, head = steps(batch, num_heads * len(source), 0), steps(num_heads, len(source), 3)
        part = steps(parts, batch * num_heads * len(source), 2)
        return image + places[:, None, None] + part + head

    return Windows(
        count=rows * columns,
        padded=by_token[num_patches:],
        apart=_apart(rows, columns, window, shift, order, device),
        deal=to_places(source, 3, num_tokens + 1),
        deal_back=to_tokens(3),
        collect=to_tokens(1)[:, :, 0],
        collect_back=to_places(source.clamp(max=num_tokens - 1), 1, num_tokens)[0],
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


def deal(tokens: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Queries, keys and values of an image, [B, N + Q + 1, 3 * C]: of patches, of [DET] tokens and
    what padded places hold -> those of the windows, each head by itself, [3, B, M, W * T, D], and
    those of the [DET] tokens, [B, Q, 3 * C].
    """
    return _Deal.apply(tokens, windows)


def collect(attended: Tensor, det: Tensor, windows: Windows) -> Tensor:
    """The way back: [B, M, W * T, D] and [B, Q, C] -> [B, N + Q, C]."""
    return _Collect.apply(attended, det, windows)


def _rows(of: Tensor, table: Tensor, dim: int) -> Tensor:
    """Rows of D = dim values at the places of a table: [*, D]."""
    return of.reshape(-1, dim).index_select(0, table.flatten()).view(*table.shape, dim)


class _Deal(torch.autograd.Function):
    """A copy each way, where autograd's own would add into zeros."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        ctx.windows = windows
        parts, _, num_heads, _ = windows.deal.shape
        num_patches = windows.collect.shape[1]
        split = _rows(tokens, windows.deal, tokens.shape[-1] // (parts * num_heads))
        return split, tokens[:, num_patches:-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_det: Tensor) -> tuple[Tensor, None]:
        windows = ctx.windows
        patches = _rows(grad, windows.deal_back, grad.shape[-1]).flatten(2)
        padding = grad.index_select(3, windows.padded).sum(3)  # [3, B, M, D]
        padding = padding.transpose(0, 1).flatten(1)[:, None]
        return torch.cat([patches, grad_det, padding], dim=1), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, det: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        patches = _rows(attended, windows.collect, attended.shape[-1]).flatten(2)
        return torch.cat([patches, det], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        windows = ctx.windows
        num_patches, num_heads = windows.collect.shape[1:]
        attended = _rows(grad, windows.collect_back, grad.shape[-1] // num_heads)
        return attended.index_fill_(2, windows.padded, 0), grad[:, num_patches:], None


def attend_windows(qkv: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """Softmax attention inside each window.

    qkv [3, B, M, W * T, D]; bias [M, T, T] is added to the scores of every window. Returns [B, M, W
    * T, D].
    """
    on_cpu = qkv.device.type == "cpu"
    if on_cpu and is_compiled():
        return _attend_written_out(qkv, bias, windows)
    if not on_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _attend(qkv, bias, windows)
    if torch.is_grad_enabled():
        return _AttentionOnCPU.apply(qkv, bias, windows.apart, windows.count)
    return _attend_in_pieces(qkv, bias, windows)


def _attend(qkv: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """Windows and heads side by side as heads, so that one mask serves the whole batch."""
    area = bias.shape[-1]
    query, keys, values = qkv.unflatten(3, (-1, area)).flatten(2, 3).unbind(0)  # [B, M*W, T, D]
    mask = (bias[:, None] + _whole_mask(windows)).flatten(0, 1).to(query.dtype)  # [M*W, T, T]
    output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return output.reshape(qkv.shape[1:])


def _attend_written_out(qkv: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """For `torch.compile` on a CPU, which makes one loop of all that lies between the products."""
    batch, heads, _, dim = qkv.shape[1:]
    area = bias.shape[-1]
    query, keys, values = qkv.view(3, -1, area, dim).unbind(0)  # [B*M*W, T, D]
    scores = (query * dim**-0.5) @ keys.mT
    scores = scores.view(batch, heads, -1, area, area) + bias[:, None] + _whole_mask(windows)
    return (scores.softmax(-1).view(-1, area, area) @ values).view(qkv.shape[1:])


def _whole_mask(windows: Windows) -> Tensor:
    """`apart` with the zeros of the windows before: [W, T, T]."""
    return F.pad(windows.apart, (0, 0, 0, 0, windows.count - len(windows.apart), 0))


def _write_weights(into: Tensor, query: Tensor, keys: Tensor, bias: Tensor, apart: Tensor) -> None:
    """Softmax of the scores: into [*, H, W, T, T] of any images and heads, query and keys [*, H, W,
    T, D], bias [H, T, T].
    """
    area, dim = query.shape[-2:]
    into.copy_(bias[:, None])
    scores = into.view(-1, area, area)
    query, keys = query.view(-1, area, dim), keys.view(-1, area, dim)
    torch.baddbmm(scores, query, keys.mT, alpha=dim**-0.5, out=scores)
    if len(apart):
        into[..., -len(apart) :, :, :].add_(apart)
    torch.softmax(into, -1, out=into)


def _attend_in_pieces(qkv: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """Without a gradient no scores are kept: a few heads at a time share one buffer, which stays in
    the processor's cache.
    """
    _, batch, heads, _, dim = qkv.shape
    area, count = bias.shape[-1], windows.count
    output = qkv.new_empty(qkv.shape[1:])
    size = max(1, WINDOWS_AT_ONCE // count)
    buffer = bias.new_empty(min(size, batch * heads), count, area, area)
    per_head = (
        *qkv.view(3, batch * heads, count, area, dim).unbind(0),
        bias.repeat(batch, 1, 1),
        output.view(batch * heads, count, area, dim),
    )
    pieces = zip(*(each.split(size) for each in per_head), strict=True)
    for query, keys, values, of_head, into in pieces:
        weights = buffer[: len(query)]
        _write_weights(weights, query, keys, of_head, windows.apart)
        weights, values = weights.view(-1, area, area), values.view(-1, area, dim)
        torch.bmm(weights, values, out=into.view(-1, area, dim))
    return output


class _AttentionOnCPU(torch.autograd.Function):
    """Scores in one buffer that is written in place.

    PyTorch's own attention for the CPU is made for long sequences: on windows of 49 tokens it takes
    about half as long again, and wants the mask of every window.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, apart: Tensor, count: int) -> Tensor:
        """qkv [3, B, M, W*T, D], bias [M, T, T], apart [last of the W windows, T, T] -> [B, M, W*T,
        D].
        """
        _, batch, heads, _, dim = qkv.shape
        area = bias.shape[-1]
        query, keys, values = qkv.view(3, batch, heads, count, area, dim).unbind(0)
        weights = bias.new_empty(batch, heads, count, area, area)
        _write_weights(weights, query, keys, bias, apart)
        weights = weights.view(-1, area, area)
        ctx.save_for_backward(qkv, weights)
        return torch.bmm(weights, values.view(-1, area, dim)).view(qkv.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        qkv, weights = ctx.saved_tensors
        batch, heads, _, dim = grad.shape
        area = weights.shape[-1]
        query, keys, values = qkv.view(3, -1, area, dim).unbind(0)
        grad = grad.reshape(-1, area, dim)
        grad_scores = torch._softmax_backward_data(
            torch.bmm(grad, values.mT), weights, -1, weights.dtype
        )
        grads = torch.empty_like(qkv)
        grad_query, grad_keys, grad_values = grads.view(3, -1, area, dim).unbind(0)
        torch.bmm(grad_scores, keys, out=grad_query)
        torch.bmm(grad_scores.mT, query, out=grad_keys)
        torch.bmm(weights.mT, grad, out=grad_values)
        grads[:2] *= dim**-0.5
        grad_bias = grad_scores.view(batch, heads, -1, area, area).sum((0, 2))
        return grads, grad_bias, None, None
