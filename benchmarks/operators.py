"""Operators dispatched in a training step at a canvas never seen before, over those at one seen.

    python benchmarks/operators.py
    python benchmarks/operators.py --backbone_name swin_tiny --seen 480x640 --new 544x736
    python benchmarks/operators.py --backbone_name swin_tiny --casts 16x640x640

A training step is forward, criterion and backward. With the multi-scale recipe nearly every step
has a new canvas; whatever the model prepares and caches for a canvas is computed then, and on a GPU
each operator is a launch. The two canvases should need the same number of windows and levels, so
that the ratio tells of caches alone.

With --casts: bytes that a forward pass under bf16 autocast reads and writes to change precision, as
on a CUDA GPU whose Triton kernel and fused attention run. Tensors are fake: nothing is computed and
no GPU is needed. In the backward pass every cast of an activation has a cast of its gradient.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vidt import ViDT, ViDTConfig
from vidt.losses.criterion import criterion_for
from vidt.model.ram import autocasted
from vidt.ops import deformable_attention

OBJECTS = 8  # boxes of each image


class OperatorCount(TorchDispatchMode):
    """Counts the operators that are dispatched, by name, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.counts[str(op)] += 1
        return op(*args, **(kwargs or {}))


def count_step(model: nn.Module, criterion: nn.Module, canvas: tuple[int, int]) -> Counter[str]:
    """Operators of a training step on two random images of a canvas (height, width)."""
    images = torch.randn(2, 3, *canvas)
    padding = torch.zeros(2, *canvas, dtype=torch.bool)
    targets = [random_objects() for _ in images]
    with OperatorCount() as counting:
        terms = criterion(model(images, padding), targets, len(images) * OBJECTS)
        torch.stack(list(terms.values())).sum().backward()
    return counting.counts


def random_objects() -> dict[str, Tensor]:
    """Labels [N] and boxes [N, 4], cxcywh in 0..1."""
    centres, sides = torch.rand(2, OBJECTS, 2) * 0.4 + 0.1
    return {
        "labels": torch.zeros(OBJECTS, dtype=torch.int64),
        "boxes": torch.cat([centres + 0.2, sides], 1),
    }


def new_over_seen(
    config: ViDTConfig, seen: tuple[int, int], new: tuple[int, int]
) -> tuple[int, int]:
    """Operators at the new canvas and at the seen one. A step at a third canvas comes before, so
    that what is computed once for a process, and gradients that begin, count in neither.
    """
    model, criterion = ViDT(config).train(), criterion_for(config)
    count_step(model, criterion, (64, 64))
    count_step(model, criterion, seen)
    again = count_step(model, criterion, seen)
    first = count_step(model, criterion, new)
    return first.total(), again.total()


class CastBytes(TorchDispatchMode):
    """Sums the bytes read and written by changes of dtype, by (from, to)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[torch.dtype, torch.dtype]] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[op is torch.ops.aten.copy_.default]
            if source.dtype != result.dtype:
                self.bytes[source.dtype, result.dtype] += source.nbytes + result.nbytes
        return result


class FusedAttention(TorchFunctionMode):
    """Attention as one kernel of unknown content; PyTorch chooses none for fake tensors."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        inputs = [autocasted(each) for each in args if isinstance(each, Tensor)]
        return torch.empty_like(inputs[0])


def cast_bytes(config: ViDTConfig, shape: tuple[int, int, int]) -> Counter[Any]:
    """Of a forward pass of images [batch, height, width] in bf16 on CUDA."""
    batch, *canvas = shape
    with (
        FakeTensorMode(),
        torch.device("cuda"),
        mock.patch.object(deformable_attention, "kernel_runs", lambda device: True),
    ):
        model = ViDT(config).train()
        images = torch.empty(batch, 3, *canvas)
        padding = torch.zeros(batch, *canvas, dtype=torch.bool)
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        set_autocast(True, torch.bfloat16)  # `torch.autocast` itself refuses without a GPU
        try:
            with CastBytes() as counting, FusedAttention():
                model(images, padding)
        finally:
            set_autocast(*before)
            torch.clear_autocast_cache()
    return counting.bytes


def set_autocast(enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype)


def cast_table(found: Counter[Any]) -> str:
    rows = [
        f"{str(source)[6:]:>10} to {str(to)[6:]:<10}{size / 1e9:8.3f} GB"
        for (source, to), size in found.most_common()
    ]
    return "\n".join([*rows, f"{'total':>10}{'':<14}{found.total() / 1e9:8.3f} GB"])


def read_shape(text: str) -> tuple[int, int, int]:
    """BxHxW."""
    batch, _, canvas = text.partition("x")
    if not batch.isdecimal() or not int(batch):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be like 16x640x640, BxHxW")
    return int(batch), *read_canvas(canvas)


def read_canvas(text: str) -> tuple[int, int]:
    """HxW."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be like 480x640, HxW")
    return int(height), int(width)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Operators of a training step at a new canvas.")
    parser.add_argument("--backbone_name", default="swin_nano")
    parser.add_argument("--seen", type=read_canvas, default=(256, 320))
    parser.add_argument("--new", type=read_canvas, default=(288, 352))
    parser.add_argument("--casts", type=read_shape, metavar="BxHxW", help="count cast bytes")
    given = parser.parse_args(argv)
    config = ViDTConfig(backbone_name=given.backbone_name)
    if given.casts:
        print(cast_table(cast_bytes(config, given.casts)))
        return
    new, seen = new_over_seen(config, given.seen, given.new)
    print(f"{new} operators at the new canvas, {seen} at the seen one: ratio {new / seen:.3f}")


if __name__ == "__main__":
    main()
