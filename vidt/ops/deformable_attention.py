"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equations 2 and 3).

Each query attends to a few learned points on every level of the pyramid instead of all positions.
Three forms give the same result up to rounding:
- "plain": `grid_sample`, one call per level. It runs everywhere and is what gets exported;
- "cpu": see `vidt.ops.deformable_cpu`;
- "triton": for CUDA, see `vidt.ops.deformable_triton`.

Letters: B batch, Q queries, S positions of all levels together, C channels, M heads, D = C / M, L
levels, P points.
"""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from vidt.errors import UserError
from vidt.ops import deformable_cpu

logger = logging.getLogger(__name__)

OfValue = Literal["plain", "triton"]  # forms that take the projected values
Form = Literal[OfValue, "cpu"]


class Levels(NamedTuple):
    """The levels of a pyramid, whose positions are concatenated."""

    shapes: Sequence[tuple[int, int]]  # (height, width) of each
    table: Tensor  # [L, 3] int64: height, width and first position of each

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], device: torch.device) -> "Levels":
        rows, start = [], 0
        for height, width in shapes:
            rows.append([height, width, start])
            start += height * width
        # Non-blocking: the host does not wait for the device.
        return cls(shapes, torch.tensor(rows).to(device, non_blocking=True))


def best_form(device: torch.device, *, sums: int, positions: int) -> Form:
    """The form to use on a device for so many sums (queries times heads) and positions of an image;
    the plain one in an export, which has no custom operators.
    """
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    if exporting or torch.jit.is_tracing():
        return "plain"
    if device.type == "cuda" and kernel_runs(device):
        return "triton"
    # The CPU form saves work on each position and does more for each sum. Learning takes as long by
    # either at 0.5 to 0.65 sums for a position; at 4 it takes twice as long by the CPU form.
    return "cpu" if device.type == "cpu" and 2 * sums <= positions else "plain"


@torch.compiler.assume_constant_result
def kernel_runs(device: torch.device) -> bool:
    """Whether the Triton kernels work on a device. If not, one warning says why.

    Triton does not support every platform and GPU, and it needs a C compiler.
    """
    # Fake tensors have no values to try it out on, and the answer holds for the whole process.
    with unset_fake_temporarily():
        return _kernel_ran(device)


@functools.cache
def _kernel_ran(device: torch.device) -> bool:
    try:
        from vidt.ops import deformable_triton

        deformable_triton.try_out(device)
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as error:
        logger.warning("deformable attention runs without its Triton kernel: %s", error)
        return False
    return True


def deformable_attention(
    value: Tensor, levels: Levels, locations: Tensor, weights: Tensor, form: OfValue = "plain"
) -> Tensor:
    """Samples every level at the given points and sums the samples by weight.

    value [B, S, M, D]; locations [B, Q, M, L, P, 2] as (x, y) in 0..1 of the level, zero outside;
    weights [B, Q, M, L, P]; form "plain" or "triton". Value may have a lower precision; "plain"
    sums in that of the weights, "triton" in float32 or that of value. Returns [B, Q, M * D] in the
    dtype of value.
    """
    if form == "triton":
        from vidt.ops import deformable_triton

        return deformable_triton.attend(value, levels.table, locations, weights)
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [L, B * M, Q, P, 2]
    per_level = value.to(locations.dtype).split(
        [height * width for height, width in levels.shapes], 1
    )
    samples = [
        F.grid_sample(
            # [B, H * W, M, D] -> [B * M, D, H, W]
            level.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width),
            grid,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for level, grid, (height, width) in zip(per_level, grids, levels.shapes, strict=True)
    ]
    weights = weights.transpose(1, 2).flatten(3).flatten(0, 1)[:, None]  # [B * M, 1, Q, L * P]
    output = (torch.cat(samples, dim=-1) * weights).sum(-1)  # [B * M, D, Q]
    return output.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)


class DeformableAttention(nn.Module):
    """Projections around the sampling; offsets and weights are predicted from the query."""

    def __init__(self, dim: int, *, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"nheads {num_heads} does not divide reduced_dim {dim}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initially head m samples along direction m, point p at p + 1 cells, with equal
        weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None, :] * steps[None, None, :, None]  # [M, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        source: Tensor,
        levels: Levels,
        padding: Tensor | None = None,
        form: Form | None = None,
    ) -> Tensor:
        """query [B, Q, C]; reference [B, Q, L, 2] as (x, y), or [B, Q, L, 4] as cxcywh, 0..1 of the
        padded level; source [B, S, C]; padding [B, S] bool, True where padded; form, None for
        `best_form`. Returns [B, Q, C].
        """
        # Outside autocast: half would move a sample by hundredths of a cell.
        with torch.autocast(query.device.type, enabled=False):
            exact = query.to(self.sampling_offsets.weight.dtype)
            shape = (self.num_heads, self.num_levels, self.num_points)
            offsets = self.sampling_offsets(exact).unflatten(-1, (*shape, 2))
            weights = self.attention_weights(exact).unflatten(-1, (shape[0], -1)).softmax(-1)
            weights = weights.unflatten(-1, shape[1:])
            locations = self._locations(reference.to(exact.dtype), offsets, levels)
        if form is None:
            sums, positions = query.shape[1] * self.num_heads, source.shape[1]
            form = best_form(source.device, sums=sums, positions=positions)
        if form == "cpu":
            with torch.autocast(query.device.type, enabled=False):
                output = deformable_cpu.attend(
                    source.to(exact.dtype),
                    padding,
                    levels.table,
                    locations,
                    weights,
                    self.value_proj,
                )
                return self.output_proj(output)
        value = self.value_proj(source)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        with torch.autocast(query.device.type, enabled=False):
            output = deformable_attention(value, levels, locations, weights, form)
        return self.output_proj(output)

    def _locations(self, reference: Tensor, offsets: Tensor, levels: Levels) -> Tensor:
        """Offsets count cells around a reference point, and half box sizes around a reference box:
        [B, Q, M, L, P, 2].
        """
        reference = reference[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
        if reference.shape[-1] == 2:
            return reference + offsets / levels.table[:, None, :2].flip(-1)
        return reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / self.num_points))
