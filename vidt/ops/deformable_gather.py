"""Deformable attention for the CPU: every corner of every sample is a row that is looked up once.

`grid_sample` wants each level turned to [D, H, W] and then picks D values that lie far apart for a
sample. Here value stays as the projection wrote it, the D values of a position and head are one row
of memory, and `embedding_bag` sums the rows of a query by the product of their bilinear and their
attention weights. `benchmarks/deformable.py` compares the two.

Letters: B batch, Q queries, S positions of all levels together, M heads, D channels of a head, L
levels, P points; N rows of value or source; R sums of K rows each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidt.ops.levels import level_table
from vidt.ops.tracing import kept

LevelShapes = Sequence[tuple[int, int]]


def attend(value: Tensor, level_shapes: LevelShapes, locations: Tensor, weights: Tensor) -> Tensor:
    """As `deformable_attention`, on the CPU. All tensors have one dtype, float32 or float64."""
    batch, positions, heads, dim = value.shape
    index, shares = corners(level_shapes, locations, weights, rows_of_position=heads)
    rows = value.reshape(batch * positions * heads, dim)
    # Summed by corner first: with fewer rounding errors than all in one go.
    output = weighted_rows(rows, index, shares).view(4, batch, locations.shape[1], heads * dim)
    return output.sum(0)


def sampling_first_pays(positions: int, dim: int, num_sums: int, num_samples: int) -> bool:
    """Whether `attend_unprojected` beats a projection of all positions: a multiplication in a
    look-up costs about 8 times what one in a matrix product does, backward pass included.

    num_sums = Q * M sums of an image, num_samples = L * P samples in each.
    """
    return positions * dim > 8 * num_sums * 4 * num_samples


def attend_unprojected(
    source: Tensor,
    padding: Tensor | None,
    level_shapes: LevelShapes,
    locations: Tensor,
    weights: Tensor,
    value_proj: torch.nn.Linear,
) -> Tensor:
    """Attention to `value_proj(source)`, zero where padded, without computing it: a projection of
    the sums is the sum of the projections, and there are fewer sums than positions.

    source [B, S, C]; padding [B, S] bool, True = padding; the rest as in `attend`. Returns [B, Q,
    C].
    """
    batch, _, dim = source.shape
    queries, heads = weights.shape[1:3]
    index, shares = corners(level_shapes, locations, weights, rows_of_position=1)
    # All corners in one sum: it rounds a little more than four, but rows are long here, and there
    # is less to write and, for the gradients, to read.
    index, shares = (
        each.view(4, -1, each.shape[1]).transpose(0, 1).flatten(1) for each in (index, shares)
    )
    if padding is not None:
        seen = padding.logical_not().flatten().index_select(0, index.flatten())
        shares = shares * seen.view_as(shares)
    sums = weighted_rows(source.reshape(-1, dim), index, shares)
    sums = sums.view(batch * queries, heads, dim).transpose(0, 1)
    total = shares.sum(1).view(-1, heads)  # what a bias is taken with
    bias = value_proj.bias.view(heads, 1, -1) * total.T[..., None]  # [M, B*Q, D]
    output = torch.baddbmm(bias, sums, value_proj.weight.view(heads, -1, dim).mT)  # [M, B*Q, D]
    return output.transpose(0, 1).reshape(batch, queries, dim)


@dataclass(frozen=True, eq=False)
class Cells:
    """The levels that samples lie on, and their cells among the rows. All that differs by head,
    level or point is one axis, E = M * L * P: axes of size L and P would cut the work into loops of
    P.
    """

    size: Tensor  # [2, 1, E] width, then height, in the dtype of the locations
    last: Tensor  # [2, 1, E] int32, size - 1
    first: Tensor  # [B * Q, E] int32, row of the first cell
    down: Tensor  # [E] int32, rows from a cell to the one below


@kept(16)  # of 16 images with 300 queries 40 MB in all
def cells_of(
    level_shapes: tuple[tuple[int, int], ...],
    *,
    heads: int,
    points: int,
    batch: int,
    queries: int,
    rows_of_position: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Cells:
    """rows_of_position is M where each head has a row of its own, else 1."""
    levels = level_table(level_shapes, device).int()
    positions = sum(height * width for height, width in level_shapes)

    def along_samples(of_level: Tensor) -> Tensor:
        return of_level[:, None].expand(heads, -1, points).flatten()

    height, width, start = map(along_samples, levels.unbind(1))  # [E] each
    size = torch.stack([width, height])[:, None]
    # 0 where all heads share a row.
    head = torch.arange(heads, dtype=torch.int32, device=device) % rows_of_position
    image = torch.arange(batch, dtype=torch.int32, device=device)
    first = start * rows_of_position + head.repeat_interleave(len(level_shapes) * points)
    image = image * (positions * rows_of_position)
    return Cells(
        size=size.to(dtype),
        last=size - 1,
        first=first + image.repeat_interleave(queries)[:, None],
        down=width * rows_of_position,
    )


def corners(
    level_shapes: LevelShapes, locations: Tensor, weights: Tensor, *, rows_of_position: int
) -> tuple[Tensor, Tensor]:
    """The four cells around every sample: their rows, int32, and their shares of the sum, both
    [4 * B * Q * M, L * P]. A cell outside of the level has the share 0.
    """
    batch, queries, heads, num_levels, points = weights.shape
    cells = cells_of(
        tuple(level_shapes),
        heads=heads,
        points=points,
        batch=batch,
        queries=queries,
        rows_of_position=rows_of_position,
        dtype=locations.dtype,
        device=locations.device,
    )
    samples = batch * queries, heads * num_levels * points  # [B*Q, E]
    places = locations.reshape(*samples, 2).permute(2, 0, 1)
    at = places * cells.size - 0.5  # [2, B*Q, E], one row for x and one for y
    low = at.floor()
    beyond = at - low
    cell = torch.stack([low, low + 1]).int()  # [low or high, x or y, B*Q, E]
    inside = torch.minimum(cell.clamp(min=0), cells.last)
    # A product, not a choice: it leaves NaN where a location is NaN.
    share = torch.stack([1 - beyond, beyond]) * (inside == cell)

    x, y = inside.unbind(1)  # [2, B*Q, E] each
    index = (y * cells.down + cells.first)[:, None] + x * rows_of_position  # [2, 2, B*Q, E]
    x, y = share.unbind(1)
    shares = (y * weights.reshape(samples))[:, None] * x

    sums = (4 * batch * queries * heads, num_levels * points)
    return index.view(sums), shares.view(sums)


@torch.library.custom_op("vidt::weighted_rows", mutates_args=())
def weighted_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sums of K weighted rows: rows [N, D]; index and weights [R, K]. Returns [R, D].

    The operator is `embedding_bag` with a backward pass that is faster than its own.
    """
    return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)


@torch.library.custom_op("vidt::weighted_rows_backward", mutates_args=())
def weighted_rows_backward(
    grad: Tensor, rows: Tensor, index: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights from that of the sums, [R, D]."""
    num_products = index.shape[1]
    # The gradient of a row is a weighted sum too, over the sums that took it.
    taken, order = index.flatten().sort()
    count = torch.bincount(taken, minlength=len(rows))
    grad_rows = F.embedding_bag(
        order // num_products,
        grad,
        count.cumsum(0) - count,
        mode="sum",
        per_sample_weights=weights.flatten().index_select(0, order),
    )
    # What embedding_bag's own backward pass does with its weights.
    sums = torch.arange(len(grad), device=index.device)
    grad_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad,
        rows,
        index.flatten(),
        sums * num_products,
        sums.repeat_interleave(num_products),
        mode=0,  # a sum
    )
    return grad_rows, grad_weights.view_as(weights)


@weighted_rows.register_fake
def _(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(index.shape[0], rows.shape[1])


@weighted_rows_backward.register_fake
def _(grad: Tensor, rows: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    grad_rows, grad_weights = weighted_rows_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_rows, None, grad_weights


weighted_rows.register_autograd(_gradients, setup_context=_keep)
