"""Deformable attention for the CPU: sample first, project the sums afterwards.

`grid_sample` copies each level into another layout and writes every sample to memory. Here the four
cells around each sample are looked up as rows of the source, and `embedding_bag` sums them by the
product of their bilinear and attention weights. Because the value projection is linear, it is
applied to the few sums instead of all positions. The result is that of the plain form up to
rounding.

Letters: B batch, Q queries, S positions of all levels, C channels, M heads, D = C / M, L levels, P
points.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    source: Tensor,
    padding: Tensor | None,
    table: Tensor,
    locations: Tensor,
    weights: Tensor,
    value_proj: nn.Linear,
) -> Tensor:
    """Attends to `value_proj(source)`, which counts as zero where padded, without computing it.

    source [B, S, C]; padding [B, S] bool, True = padding; table [L, 3] as in `Levels`; locations
    [B, Q, M, L, P, 2] as (x, y) in 0..1 of the level; weights [B, Q, M, L, P]. Returns [B, Q, C].
    """
    batch, positions, dim = source.shape
    queries, heads = weights.shape[1:3]
    cells, shares = corners(table, locations, weights)
    image = torch.arange(batch, device=source.device)[:, None, None, None]
    rows = (cells + image * positions).flatten(0, 2)  # [B * Q * M, 4 * L * P]
    shares = shares.flatten(0, 2)
    if padding is not None:
        shares = shares * ~padding.flatten()[rows]
    sums = F.embedding_bag(rows, source.flatten(0, 1), mode="sum", per_sample_weights=shares)
    sums = sums.view(batch * queries, heads, dim).transpose(0, 1)  # [M, B * Q, C]
    # The bias counts as often as the weights of a sum add up to.
    total = shares.sum(1).view(batch * queries, heads, 1).transpose(0, 1)
    bias = value_proj.bias.view(heads, 1, -1) * total  # [M, B * Q, D]
    output = torch.baddbmm(bias, sums, value_proj.weight.view(heads, -1, dim).mT)
    return output.transpose(0, 1).reshape(batch, queries, dim)


def corners(table: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around every sample: their positions in the source of an image and their
    shares of the sum, both [B, Q, M, 4 * L * P]. A cell outside its level has the share 0.
    """
    width, start = table[:, 1, None], table[:, 2, None]  # [L, 1]
    size = table[:, None, :2].flip(-1)  # [L, 1, 2] as (x, y)
    sample = locations * size - 0.5
    low = sample.floor()
    beyond = sample - low
    cell = torch.stack([low, low + 1], dim=3).long()  # [B, Q, M, low or high, L, P, x or y]
    inside = cell.clamp(min=0).minimum(size - 1)
    # A product rather than a selection: it leaves NaN where a location is NaN.
    share = torch.stack([1 - beyond, beyond], dim=3) * (inside == cell)
    x, y = inside.unbind(-1)  # [B, Q, M, 2, L, P]
    cells = (start + y * width)[:, :, :, :, None] + x[:, :, :, None]  # [B, Q, M, 2, 2, L, P]
    x_share, y_share = share.unbind(-1)
    shares = (y_share * weights[:, :, :, None])[:, :, :, :, None] * x_share[:, :, :, None]
    return cells.flatten(3), shares.flatten(3)
