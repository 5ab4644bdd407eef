"""Linear layers. On an x86 CPU some of their float32 products are oneDNN's.

PyTorch leaves them to MKL there. oneDNN, which comes with PyTorch as well and makes its
convolutions, took 0.7 to 0.9 of the time on an AMD EPYC; on others it was not measured. It is asked
where that counts:
- by a model that only predicts. It has an order of its own for weights, into which `pack` puts them
  once, and makes GELU a part of the product;
- for large products, and then for the gradient of the input too.

Letters: C and H channels of input and output.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vidt.ops.tracing import is_tracing

logger = logging.getLogger(__name__)

LARGE = 450_000_000  # multiplications; with fewer, what is around a product costs what it saves


class Packed(NamedTuple):
    """A weight in oneDNN's order, and what it was made from: that memory, at that version."""

    copy: Tensor
    weight: Tensor
    version: int


class Linear(nn.Linear):
    """`nn.Linear`, which may be packed, and learns by `linear`."""

    _packed: Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., H]."""
        copy = self.valid_copy(x)
        if copy is not None:
            return product(x, copy, self.bias)
        return linear(x, self.weight, self.bias)

    def valid_copy(self, x: Tensor) -> Tensor | None:
        """What may be multiplied x with in place of the weight, if there is such a thing."""
        packed = self._packed
        if torch.is_grad_enabled() or not _is_plain(x) or packed is None:
            return None
        same = self.weight.is_set_to(packed.weight) and self.weight._version == packed.version
        return packed.copy if same and torch.backends.mkldnn.enabled else None

    def pack(self) -> None:
        """See `pack`."""
        weight = self.weight
        if _is_plain(weight) and not weight.is_inference() and onednn_runs():
            with torch.no_grad():
                copy = torch.ops.mkldnn._reorder_linear_weight(weight)
            self._packed = Packed(copy, weight.detach(), weight._version)

    def unpack(self) -> None:
        """Lets go of the copy."""
        self._packed = None

    def _apply(self, *args: Any, **kwargs: Any) -> "Linear":
        self.unpack()  # by `.to()`, `.half()` and the like
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch can neither pickle nor deepcopy the copy.
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class LinearGELU(Linear):
    """With GELU after it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., H]."""
        copy = self.valid_copy(x)
        if copy is not None:
            return product(x, copy, self.bias, gelu=True)
        return F.gelu(linear(x, self.weight, self.bias))


def pack(model: nn.Module) -> None:
    """Makes a model faster that is going to predict on a CPU, in float32 and outside of compiled
    graphs.

    It costs the memory of the weights once more, and some 10 MB for each new size of images, for
    the code that oneDNN makes and keeps. A layer whose weight was changed does without its copy; it
    can't notice changes through `.data`, NumPy or another process.
    """
    for layer in _layers(model):
        layer.pack()


def unpack(model: nn.Module) -> None:
    """Gives the memory of the copies back."""
    for layer in _layers(model):
        layer.unpack()


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """`pack`, for a while. What was packed before stays so."""
    layers = [layer for layer in _layers(model) if layer._packed is None]
    pack(model)
    try:
        yield
    finally:
        for layer in layers:
            layer.unpack()


def _layers(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` up to rounding: x [..., C], weight [H, C], bias [H] -> [..., H]. Of large products
    there is no second derivative.
    """
    if not is_large(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _LargeProduct.apply(x, weight, bias)
    return product(x, weight, bias)


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x [..., C] and weight [H, C] is worth asking oneDNN, which can be
    asked.
    """
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
    """Whether oneDNN can be asked; `torch.backends.mkldnn.enabled = False` forbids it."""
    return bool(torch.backends.mkldnn.enabled) and _onednn_ran()


@functools.cache
def _onednn_ran() -> bool:
    """Tries it once. PyTorch has these operators for its own compiler and promises them to
    nobody.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False

    def full(*shape: int, value: float) -> Tensor:
        return torch.full(shape, value, dtype=torch.float32, device="cpu")

    x, weight, bias = full(2, 3, value=1), full(4, 3, value=1), full(4, value=1)
    try:
        with torch.no_grad():
            copy = torch.ops.mkldnn._reorder_linear_weight(weight)
            found = product(x, copy, bias), product(x, weight, gelu=True)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("linear layers run without oneDNN: %s", error)
        return False
    expected = full(2, 4, value=4), F.gelu(full(2, 4, value=3))
    return all(torch.allclose(*pair) for pair in zip(found, expected, strict=True))


def _is_plain(x: Tensor) -> bool:
    """Whether it is what oneDNN would be given here: computed now, and as it is."""
    if is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


class _LargeProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        output = product(x.reshape(-1, x.shape[-1]), weight, bias)
        # Not a view: to one that a function returns autograd lets nobody add, as the blocks do.
        return torch.ops.aten._unsafe_view(output, [*x.shape[:-1], len(weight)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            product(grad, weight.T) if needs_x else None,
            # For this one oneDNN is no faster.
            rows.T @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
