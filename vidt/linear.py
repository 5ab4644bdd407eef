"""Linear layers. On an x86 CPU some of their float32 products are oneDNN's.

PyTorch leaves them to MKL there. oneDNN, which comes with PyTorch as well and makes its
convolutions, took 0.7 to 0.9 of the time on an AMD EPYC. It is asked where that counts:
- by a model that only predicts. It has an order of its own for weights, into which `pack` puts them
  once, and makes GELU a part of the product;
- for large products, and then for the gradient of the input too.

Letters: C and H channels of input and output.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vidt.tracing import is_tracing

logger = logging.getLogger(__name__)

LARGE = 450_000_000  # multiplications; with fewer, what is around a product costs what it saves


class Linear(nn.Linear):
    """`nn.Linear` by way of oneDNN where that is the faster."""

    _packed: tuple[Tensor, int, int] | None = None  # the copy; address and version of its weight

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """[..., C] -> [..., H]; with `gelu` after GELU."""
        packed = None if torch.is_grad_enabled() else self._valid_pack(x)
        if packed is not None:
            return product(x, packed, self.bias, gelu=gelu)
        output = linear(x, self.weight, self.bias)
        return F.gelu(output) if gelu else output

    def pack(self) -> None:
        """Keeps a copy of the weight in oneDNN's order. It is used until the weight changes."""
        weight = self.weight
        if _is_plain(weight) and not weight.is_inference() and onednn_runs():
            with torch.no_grad():
                copy = torch.ops.mkldnn._reorder_linear_weight(weight)
            self._packed = copy, weight.data_ptr(), weight._version

    def unpack(self) -> None:
        """Lets go of the copy."""
        self._packed = None

    def _valid_pack(self, x: Tensor) -> Tensor | None:
        if not _is_plain(x) or self._packed is None or not torch.backends.mkldnn.enabled:
            return None
        copy, address, version = self._packed
        same = self.weight.data_ptr() == address and self.weight._version == version
        return copy if same else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def pack(model: nn.Module) -> None:
    """Makes a model that is not going to change predict faster on a CPU, for the memory of its
    linear weights once more.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()


def unpack(model: nn.Module) -> None:
    """Gives that memory back."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.unpack()


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """`pack`, for a while."""
    pack(model)
    try:
        yield
    finally:
        unpack(model)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` up to rounding: x [..., C], weight [H, C], bias [H] -> [..., H]."""
    if not is_large(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether to ask oneDNN for their product, one of x [..., C] and weight [H, C]."""
    if not _is_plain(x) or weight.dtype != torch.float32:
        return False
    return x.numel() * len(weight) >= LARGE and onednn_runs()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """oneDNN's, of float32, without a gradient: x [..., C]; weight [H, C], of any strides or
    packed; bias [H] -> [..., H].
    """
    activation = "gelu" if gelu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def onednn_runs() -> bool:
    """Whether products can be oneDNN's; `torch.backends.mkldnn.enabled = False` makes it a no."""
    return bool(torch.backends.mkldnn.enabled) and _onednn_ran()


@functools.cache
def _onednn_ran() -> bool:
    """PyTorch has these operators for its own compiler, and promises them to nobody."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        with torch.no_grad():
            copy = torch.ops.mkldnn._reorder_linear_weight(weight)
            found = product(x, copy, bias), product(x, weight, gelu=True)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("linear layers run without oneDNN: %s", error)
        return False
    expected = torch.full((2, 4), 4.0), F.gelu(torch.full((2, 4), 3.0))
    return all(torch.allclose(*pair) for pair in zip(found, expected, strict=True))


def _is_plain(x: Tensor) -> bool:
    if is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        output = product(x.reshape(-1, x.shape[-1]), weight, bias)
        # No view: to one that a function returned nothing can be added in place.
        return torch.ops.aten._unsafe_view(output, [*x.shape[:-1], len(weight)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            product(grad, weight.T) if needs_x else None,
            # Of these oneDNN's take no less.
            rows.T @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
