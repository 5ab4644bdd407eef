"""The MLP of a block of the body.

On the CPU the many tokens of an early stage take it in pieces that stay in the processor's cache,
and training keeps the hidden channels once where autograd would keep them twice.

Letters: R rows (tokens of the whole batch), C channels, H hidden channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vidt.ops.linear import Linear, LinearGELU, is_large, product
from vidt.ops.tracing import is_tracing

PIECE = 2048  # rows; fewer make the products slower
MIN_PIECES = 4  # below, nothing is gained


class Mlp(nn.Module):
    """Two linear layers with GELU between them, named as in timm."""

    def __init__(self, dim: int, *, hidden_features: int) -> None:
        super().__init__()
        self.fc1 = LinearGELU(dim, hidden_features)
        self.fc2 = Linear(hidden_features, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if not _goes_in_pieces(x):
            return self.fc2(self.fc1(x))
        if not torch.is_grad_enabled():
            return _by_pieces(x, lambda piece: self.fc2(self.fc1(piece)))
        return _MlpInPieces.apply(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


def _goes_in_pieces(x: Tensor) -> bool:
    if x.device.type != "cpu" or is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    return x.numel() >= MIN_PIECES * PIECE * x.shape[-1]


class _MlpInPieces(torch.autograd.Function):
    """Keeps what the activation was given; what it returned costs little to have anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
    ) -> Tensor:
        """x [..., C]; weights [H, C] and [C, H], biases [H] and [C] -> [..., C]."""
        # All pieces share what is around them: the whole counts.
        ctx.multiply = multiply = product if is_large(x, weight1) else F.linear
        hidden: list[Tensor] = []

        def of_piece(piece: Tensor) -> Tensor:
            hidden.append(multiply(piece, weight1, bias1))
            return multiply(F.gelu(hidden[-1]), weight2, bias2)

        output = _by_pieces(x, of_piece)
        ctx.save_for_backward(x, weight1, weight2, *hidden)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, weight2, *hidden = ctx.saved_tensors
        shape = grad.shape
        x, grad = (each.reshape(-1, shape[-1]) for each in (x, grad))  # [R, C]
        grad_x = torch.empty_like(x)
        grad_weight1, grad_weight2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        grad_bias1 = weight1.new_zeros(len(weight1))
        for rows, kept in zip(_pieces(len(x)), hidden, strict=True):
            grad_weight2.addmm_(grad[rows].T, F.gelu(kept))
            before = torch.ops.aten.gelu_backward(ctx.multiply(grad[rows], weight2.T), kept)
            grad_weight1.addmm_(before.T, x[rows])
            grad_bias1 += before.sum(0)
            grad_x[rows] = ctx.multiply(before, weight1.T)
        return grad_x.view(shape), grad_weight1, grad_bias1, grad_weight2, grad.sum(0)


def _by_pieces(x: Tensor, of_piece: Callable[[Tensor], Tensor]) -> Tensor:
    """of_piece [R, C] -> [R, C], of some rows of x [..., C] at a time."""
    # Of the shape of x: who adds to a view of what a function returned copies gradients.
    output = x.new_empty(x.shape)
    given, taken = (each.reshape(-1, x.shape[-1]) for each in (x, output))
    for rows in _pieces(len(given)):
        taken[rows] = of_piece(given[rows])
    return output


def _pieces(count: int) -> list[slice]:
    """Rows in pieces of about one size, PIECE at most."""
    size = math.ceil(count / math.ceil(count / PIECE))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
