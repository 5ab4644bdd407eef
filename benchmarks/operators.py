"""Operators dispatched in a training step at a canvas never seen before, over those at one seen.

    python benchmarks/operators.py
    python benchmarks/operators.py --backbone_name swin_tiny --seen 480x640 --new 544x736

A training step is forward, criterion and backward. With the multi-scale recipe nearly every step
has a new canvas; whatever the model prepares and caches for a canvas is computed then, and on a GPU
each operator is a launch. The two canvases should need the same number of windows and levels, so
that the ratio tells of caches alone.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vidt import ViDT, ViDTConfig
from vidt.losses.criterion import criterion_for

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
    given = parser.parse_args(argv)
    new, seen = new_over_seen(ViDTConfig(backbone_name=given.backbone_name), given.seen, given.new)
    print(f"{new} operators at the new canvas, {seen} at the seen one: ratio {new / seen:.3f}")


if __name__ == "__main__":
    main()
