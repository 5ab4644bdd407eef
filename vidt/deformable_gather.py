"""Deformable attention for the CPU: every corner of every sample is a row that is looked up once.

`grid_sample` wants each level turned to [D, H, W] and then picks D values that lie far apart for a
sample. Here value stays as the projection wrote it, the D values of a position and head are one row
of memory, and `embedding_bag` sums the rows of a query by the product of their bilinear and their
attention weights. `benchmarks/deformable.py` compares the two.

Letters: B batch, Q queries, S positions of all levels together, M heads, D channels of a head, L
levels, P points; N rows = B * S * M; R sums, K = L * P rows in each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(value: Tensor, levels: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """As `deformable_attention`, on the CPU; levels [L, 3] is its `level_table`. All but it have
    one dtype, float32 or float64.
    """
    batch, positions, heads, dim = value.shape
    index, shares = corners(levels, positions, locations, weights)
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
    levels: Tensor,
    locations: Tensor,
    weights: Tensor,
    value_proj: torch.nn.Linear,
) -> Tensor:
    """Attention to `value_proj(source)`, zero where padded, without computing it: a projection of
    the sums is the sum of the projections, and there are fewer sums than positions.

    source [B, S, C]; padding [B, S] bool, True = padding; the rest as in `attend`. Returns [B, Q,
    C].
    """
    batch, positions, dim = source.shape
    queries, heads = weights.shape[1:3]
    index, shares = corners(levels, positions, locations, weights)
    index = index.div(heads, rounding_mode="floor")  # rows of [B * S, C]
    if padding is not None:
        seen = padding.logical_not().flatten().index_select(0, index.flatten())
        shares = shares * seen.view_as(shares)
    sums = weighted_rows(source.reshape(-1, dim), index, shares)
    sums = sums.view(4, batch * queries, heads, dim).sum(0).transpose(0, 1)
    total = shares.view(4, batch * queries, heads, -1).sum((0, 3))  # what a bias is taken with
    bias = value_proj.bias.view(heads, 1, -1) * total.T[..., None]  # [M, B*Q, D]
    output = torch.baddbmm(bias, sums, value_proj.weight.view(heads, -1, dim).mT)  # [M, B*Q, D]
    return output.transpose(0, 1).reshape(batch, queries, dim)


def corners(
    levels: Tensor, positions: int, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The four cells around every sample: their rows in [B * S * M, D] as int32 and their shares
    of the sum, both [R, K] with R = 4 * B * Q * M. A cell outside of the level has the share 0.
    """
    batch, queries, heads, num_levels, points = weights.shape

    # Axes of size L and P would cut the work into loops of P. All that differs by head, level or
    # point becomes one axis, E = M * L * P.
    def along_samples(of_level: Tensor) -> Tensor:
        return of_level[:, None].expand(heads, -1, points).flatten()

    height, width, start = map(along_samples, levels.int().unbind(1))  # [E] each
    size = torch.stack([width, height])[:, None]  # [2, 1, E]
    places = locations.reshape(batch * queries, len(start), 2).permute(2, 0, 1)
    at = places * size.to(places.dtype) - 0.5  # [2, B*Q, E], one row for x and one for y
    low = at.floor()
    beyond = at - low
    cell = torch.stack([low, low + 1]).int()  # [low or high, x or y, B*Q, E]
    inside = torch.minimum(cell.clamp(min=0), size - 1)
    # A product, not a choice: it leaves NaN where a location is NaN.
    share = torch.stack([1 - beyond, beyond]) * (inside == cell)

    head = torch.arange(heads, dtype=torch.int32, device=levels.device)
    image = torch.arange(batch, dtype=torch.int32, device=levels.device)
    base = start * heads + head.repeat_interleave(num_levels * points)  # [E]
    base = base + (image * (positions * heads)).repeat_interleave(queries)[:, None]  # [B*Q, E]
    x, y = inside.unbind(1)  # [2, B*Q, E] each
    index = (y * (width * heads) + base)[:, None] + x * heads  # [2, 2, B*Q, E]
    x, y = share.unbind(1)
    shares = (y * weights.reshape(batch * queries, len(start)))[:, None] * x

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
