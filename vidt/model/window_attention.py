"""Softmax attention inside each window of a token map (Swin, arXiv 2103.14030, equations 3 and 4).

The CPU goes piece by piece, so that scores stay in the processor's cache. A GPU and graphs take all
windows at once.

Letters: as in `vidt.model.windows`; b images and w windows of a piece.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vidt.model.windows import Windows, apart_in, by_piece, deal, of_det, whole_mask
from vidt.ops.tracing import is_compiled, is_tracing

AT_ONCE = 192  # scores of a window and head, in all 2 MB; on a CPU


def at_once(device: torch.device) -> int | None:
    """What `attend_windows` wants to be made of windows there, see `windows_of`."""
    return AT_ONCE if device.type == "cpu" and not is_tracing() else None


def attend_windows(qkv: Tensor, bias: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Deals queries, keys and values [B, N + Q + 1, 3 * C], as `vidt.model.windows.deal`, and
    attends in each window.

    bias [M, T, T] is added to the scores of every window; windows were made with `at_once`. Returns
    rows for `collect`, [R, D], and what was dealt to the [DET] tokens, [B, Q, 3 * C].
    """
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if qkv.device.type == "cpu" and not graph:
        if not torch.is_grad_enabled():
            return _predict(qkv, bias, windows), of_det(qkv, windows)
        dealt, det = deal(qkv, windows)
        return _AttentionOnCPU.apply(dealt, bias, windows), det
    assert len(windows.pieces) == 1, "made with `at_once` for a CPU"
    attend = _attend_written_out if qkv.device.type == "cpu" and is_compiled() else _attend
    dealt, det = deal(qkv, windows)
    dim = dealt.shape[-1]
    split = dealt.view(3, -1, windows.num_heads, windows.count, windows.area, dim)
    return attend(split, bias, whole_mask(windows)).reshape(-1, dim), det


def _attend(qkv: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Windows and heads side by side as heads, so that one mask serves the whole batch: qkv [3, B,
    M, W, T, D], bias [M, T, T] and mask [W, T, T] -> [B, M * W, T, D].
    """
    query, keys, values = qkv.flatten(2, 3).unbind(0)
    mask = (bias[:, None] + mask).flatten(0, 1).to(query.dtype)  # [M*W, T, T]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def _attend_written_out(qkv: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """As `_attend`, for `torch.compile` on a CPU, which makes one loop of all that lies between the
    products.
    """
    area, dim = qkv.shape[-2:]
    query, keys, values = qkv.view(3, -1, area, dim).unbind(0)  # [B*M*W, T, D]
    scores = (query * dim**-0.5) @ keys.mT
    scores = scores.view(*qkv.shape[1:4], area, area) + bias[:, None] + mask
    return (scores.softmax(-1).view(-1, area, area) @ values).view(qkv.shape[1], -1, area, dim)


def _attend_in_piece(
    qkv: Tensor, bias: Tensor, apart: Tensor, weights: Tensor, output: Tensor
) -> None:
    """Of a piece: writes weights [1, b, M, w, T, T] and output [1, b, M, w, T, D]; qkv [3, b, M, w,
    T, D], apart as `apart_in` gives it.
    """
    area, dim = qkv.shape[-2:]
    query, keys, values = qkv.view(3, -1, area, dim).unbind(0)
    weights.copy_(bias[:, None])
    scores = weights.view(-1, area, area)
    torch.baddbmm(scores, query, keys.mT, alpha=dim**-0.5, out=scores)
    if len(apart):
        weights[..., -len(apart) :, :, :].add_(apart)
    torch.softmax(scores, -1, out=scores)
    torch.bmm(scores, values, out=output.view(-1, area, dim))


def _predict(qkv: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """Without a gradient nothing of a piece is kept: the next takes its memory."""
    dim, area = qkv.shape[-1] // (3 * windows.num_heads), windows.area
    rows = qkv.reshape(-1, dim)
    output = qkv.new_empty(len(windows.deal) // 3, dim)
    tables, outputs = by_piece(windows.deal, windows, 3), by_piece(output, windows, 1)
    most = max(table.numel() for table in tables)
    dealt, weights = qkv.new_empty(most, dim), qkv.new_empty(most // 3, area)
    for piece, table, into in zip(windows.pieces, tables, outputs, strict=True):
        of_piece = dealt[: table.numel()]
        torch.index_select(rows, 0, table.flatten(), out=of_piece)
        _attend_in_piece(
            of_piece.view(*table.shape, dim),
            bias,
            apart_in(piece, windows),
            weights[: len(of_piece) // 3].view(1, *table.shape[1:], area),
            into,
        )
    return output


class _AttentionOnCPU(torch.autograd.Function):
    """Scores in one buffer that is written in place.

    PyTorch's own attention for the CPU is made for long sequences: on windows of 49 tokens it takes
    about half as long again, and wants the mask of every window.
    """

    @staticmethod
    def forward(ctx: Any, dealt: Tensor, bias: Tensor, windows: Windows) -> Tensor:
        """dealt [3 * R, D], bias [M, T, T] -> [R, D]."""
        num_rows = len(dealt) // 3
        output = dealt.new_empty(num_rows, dealt.shape[1])
        weights = dealt.new_empty(num_rows, windows.area)
        for piece, qkv, of_piece, into in zip(
            windows.pieces,
            by_piece(dealt, windows, 3),
            by_piece(weights, windows, 1),
            by_piece(output, windows, 1),
            strict=True,
        ):
            _attend_in_piece(qkv, bias, apart_in(piece, windows), of_piece, into)
        ctx.windows = windows
        ctx.save_for_backward(dealt, weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        windows = ctx.windows
        dealt, weights = ctx.saved_tensors
        grads = torch.empty_like(dealt)
        exact = torch.promote_types(weights.dtype, torch.float32)  # for the sum over pieces
        grad_bias = weights.new_zeros(windows.num_heads, windows.area, windows.area, dtype=exact)
        for qkv, of_piece, grad_output, into in zip(
            by_piece(dealt, windows, 3),
            by_piece(weights, windows, 1),
            by_piece(grad.contiguous(), windows, 1),
            by_piece(grads, windows, 3),
            strict=True,
        ):
            grad_scores = _write_gradients(qkv, of_piece[0], grad_output[0], into)
            grad_bias += grad_scores.sum((0, 2), dtype=exact)
        return grads, grad_bias.to(weights.dtype), None


def _write_gradients(qkv: Tensor, weights: Tensor, grad: Tensor, into: Tensor) -> Tensor:
    """Of a piece: qkv [3, b, M, w, T, D], weights [b, M, w, T, T] and grad [b, M, w, T, D]. Writes
    the gradients of qkv, returns those of the scores, [b, M, w, T, T].
    """
    area, dim = qkv.shape[-2:]
    query, keys, values = qkv.view(3, -1, area, dim).unbind(0)
    grad_query, grad_keys, grad_values = into.view(3, -1, area, dim).unbind(0)
    shape, weights, grad = weights.shape, weights.view(-1, area, area), grad.view(-1, area, dim)
    grad_scores = torch._softmax_backward_data(
        torch.bmm(grad, values.mT), weights, -1, weights.dtype
    )
    torch.bmm(grad_scores, keys, out=grad_query)
    torch.bmm(grad_scores.mT, query, out=grad_keys)
    torch.bmm(weights.mT, grad, out=grad_values)
    into[:2] *= dim**-0.5
    return grad_scores.view(shape)
