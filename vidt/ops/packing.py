"""Packed linear layers: faster prediction on an x86 CPU in float32.

PyTorch computes `nn.Linear` with MKL there. oneDNN, which PyTorch also contains, takes 0.7 to 0.9
of the time on an AMD EPYC if the weights are in its own order. `pack` swaps the linear layers of a
model for layers that hold such a copy beside the weights; `unpack` swaps them back. Parameters,
names and state dict stay the same.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class PackedLinear(nn.Linear):
    """`nn.Linear` with a copy of its weight in oneDNN's order. The copy is used without gradients
    only, in float32 outside autocast and graphs, and only while the weight is the memory, in the
    version, that was packed. It does not notice changes through `.data`, NumPy or other processes.
    """

    _copy: Tensor | None = None

    def __init__(self, linear: nn.Linear) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        with torch.no_grad():
            self._copy = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        self._packed_weight, self._packed_version = linear.weight.detach(), linear.weight._version

    def forward(self, x: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        if self._copy is None or not _computed_now(x) or not self._is_current():
            return F.linear(x, self.weight, self.bias)
        return _product(x, self._copy, self.bias)

    def _is_current(self) -> bool:
        same_version = self.weight._version == self._packed_version
        return same_version and self.weight.is_set_to(self._packed_weight)

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        self._copy = None  # `.to()`, `.half()` and the like
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch can neither pickle nor deepcopy the packed weight.
        return self.__dict__ | {"_copy": None, "_packed_weight": None}


def pack(model: nn.Module) -> None:
    """Swaps the linear layers of a model on a CPU for packed ones, where oneDNN runs. It doubles
    the memory of the weights, and oneDNN caches some 10 MB for each new size of images.
    """
    if not onednn_runs():
        return
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or not _is_plain(layer.weight):
                continue
            if not layer.weight.is_inference():  # such a tensor has no version to compare
                setattr(parent, name, PackedLinear(layer))


def unpack(model: nn.Module) -> None:
    """Swaps packed layers back, which frees the copies."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, PackedLinear):
                bias = layer.bias is not None
                linear = nn.Linear(layer.in_features, layer.out_features, bias=bias, device="meta")
                linear.weight, linear.bias = layer.weight, layer.bias
                setattr(parent, name, linear.train(layer.training))


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """`pack` for the duration of a block. A model that was packed before stays packed."""
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        yield
        return
    pack(model)
    try:
        yield
    finally:
        unpack(model)


def onednn_runs() -> bool:
    """Whether oneDNN can be used; `torch.backends.mkldnn.enabled = False` forbids it."""
    return bool(torch.backends.mkldnn.enabled) and _onednn_ran()


@functools.cache
def _onednn_ran() -> bool:
    """Tries the operators once: they are internal to PyTorch's compiler and may change."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    x, weight, bias = (torch.ones(shape, dtype=torch.float32) for shape in ((2, 3), (4, 3), (4,)))
    try:
        with torch.no_grad():
            result = _product(x, torch.ops.mkldnn._reorder_linear_weight(weight), bias)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("linear layers run without oneDNN: %s", error)
        return False
    return torch.allclose(result, F.linear(x, weight, bias))


def _product(x: Tensor, packed_weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "none")


def _is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


def _computed_now(x: Tensor) -> bool:
    """Whether x is an input that oneDNN takes, outside autograd, autocast and graphs."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if recorded or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return type(x) is Tensor and _is_plain(x) and bool(torch.backends.mkldnn.enabled)
