"""Where the levels of a pyramid lie among the positions of all of them together: L levels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidt.ops.tracing import kept


def level_table(level_shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Height, width and first position of each level: [L, 3] int64."""
    return _level_table(tuple(level_shapes), device)


@kept(256)
def _level_table(level_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    rows, start = [], 0
    for height, width in level_shapes:
        rows.append([height, width, start])
        start += height * width
    return torch.tensor(rows, device=device)
