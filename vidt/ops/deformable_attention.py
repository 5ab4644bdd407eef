"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equations 2 and 3).

Each query looks at a few learned points on every level of the pyramid instead of at all positions.
The sampling has three forms that give the same up to rounding:
- "grid": plain `grid_sample`, a call for each level. It runs everywhere and is what is exported;
- "gather": for the CPU, see `vidt.ops.deformable_gather`;
- "kernel": for the GPU, in Triton, see `vidt.ops.deformable_triton`.

Letters: B batch, Q queries, S positions of all levels together, C channels, M heads, D = C / M, L
levels, P points.
"""

import functools
import logging
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidt.errors import UserError
from vidt.ops import deformable_gather
from vidt.ops.levels import level_table
from vidt.ops.linear import Linear

logger = logging.getLogger(__name__)

Form = Literal["grid", "gather", "kernel"]


def deformable_attention(
    value: Tensor,
    level_shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    form: Form | None = None,
) -> Tensor:
    """Samples every level at the given points and sums the samples by weight.

    value [B, S, M, D]; level_shapes (height, width) of each level, in the order in which S is laid
    out; locations [B, Q, M, L, P, 2] as (x, y) in 0..1 of the level, outside reads zero; weights
    [B, Q, M, L, P]; form is chosen by `best_form` if None. Value may be of lower precision than the
    rest, which is what is computed in. Returns [B, Q, M * D] in the dtype of value.
    """
    form = form or best_form(value.device)
    if form == "kernel":
        from vidt.ops import deformable_triton

        levels = level_table(level_shapes, value.device)
        return deformable_triton.attend(value, levels, locations, weights)
    exact = value.to(locations.dtype)
    if form == "gather":
        return deformable_gather.attend(exact, level_shapes, locations, weights).to(value.dtype)
    return _attend_by_grid(exact, level_shapes, locations, weights).to(value.dtype)


def best_form(device: torch.device) -> Form:
    """The form to use there.

    On a CPU "gather" was the faster at every size, by `benchmarks/deformable.py`. That a GPU is
    better off with its kernel was not measured yet; the same program tells. An export gets "grid",
    for nobody else knows operators of ours.
    """
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    if exporting or torch.jit.is_tracing():
        return "grid"
    if device.type == "cpu":
        return "gather"
    return "kernel" if device.type == "cuda" and kernel_runs(device) else "grid"


@torch.compiler.assume_constant_result
def kernel_runs(device: torch.device) -> bool:
    """Whether the Triton kernels work there; a warning says why not, once.

    Triton is not made for every platform, nor its compiler for every GPU, and it needs a C compiler
    at hand. Whatever is missing, there is another form.
    """
    return _kernel_ran(device)


@functools.cache
def _kernel_ran(device: torch.device) -> bool:
    try:
        from vidt.ops import deformable_triton

        deformable_triton.try_out(device)
    except torch.OutOfMemoryError:  # passes, and says nothing of the kernel
        raise
    except Exception as error:
        logger.warning("deformable attention runs without its Triton kernel: %s", error)
        return False
    return True


def _attend_by_grid(
    value: Tensor, level_shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [L, B*M, Q, P, 2]
    levels = value.split([height * width for height, width in level_shapes], dim=1)
    samples = [
        F.grid_sample(
            # [B, H*W, M, D] -> [B*M, D, H, W]
            level.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width),
            grid,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for level, grid, (height, width) in zip(levels, grids, level_shapes, strict=True)
    ]
    stacked = torch.cat(samples, dim=-1)  # [B*M, D, Q, L*P]
    samples_of_query = len(level_shapes) * points
    weights = weights.permute(0, 2, 1, 3, 4).reshape(batch * heads, 1, queries, samples_of_query)
    output = (stacked * weights).sum(-1)  # [B*M, D, Q]
    return output.view(batch, heads * dim, queries).transpose(1, 2)


class DeformableAttention(nn.Module):
    """The attention module around the sampling: projections, offsets and weights from the query."""

    def __init__(self, dim: int, *, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"nheads {num_heads} does not divide reduced_dim {dim}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = Linear(dim, dim)
        self.output_proj = Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the start head m looks along direction m, point p at p + 1 cells, with equal
        weights.
        """
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
        level_shapes: list[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """query [B, Q, C]; reference [B, Q, L, 2] as (x, y), or [B, Q, L, 4] as cxcywh, 0..1 of the
        padded level; source [B, S, C]; padding [B, S] bool, True where padded. Returns [B, Q,
        C].
        """
        # Half precision would move a sample by whole hundredths of a cell: places and weights stay
        # in float32.
        with torch.autocast(query.device.type, enabled=False):
            exact = query.to(self.sampling_offsets.weight.dtype)
            shape = (self.num_heads, self.num_levels, self.num_points)
            offsets = self.sampling_offsets(exact).unflatten(-1, (*shape, 2))
            weights = self.attention_weights(exact).unflatten(-1, (shape[0], -1)).softmax(-1)
            weights = weights.unflatten(-1, shape[1:])
            locations = self._locations(reference.to(exact.dtype), offsets, level_shapes)
            if self._samples_first(source, query):
                output = deformable_gather.attend_unprojected(
                    source.to(exact.dtype),
                    padding,
                    level_shapes,
                    locations,
                    weights,
                    self.value_proj,
                )
                return self.output_proj(output)
        value = self.value_proj(source)
        if padding is not None:
            value = value.masked_fill_(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        with torch.autocast(query.device.type, enabled=False):
            output = deformable_attention(value, level_shapes, locations, weights)
        return self.output_proj(output)

    def _samples_first(self, source: Tensor, query: Tensor) -> bool:
        _, positions, dim = source.shape
        return best_form(source.device) == "gather" and deformable_gather.sampling_first_pays(
            positions, dim, query.shape[1] * self.num_heads, self.num_levels * self.num_points
        )

    def _locations(
        self, reference: Tensor, offsets: Tensor, level_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Offsets count cells around a reference point, and half box sizes around a reference
        box.
        """
        centre = self._of_points(reference[..., :2])
        if reference.shape[-1] == 2:
            cells = level_table(level_shapes, offsets.device)[:, :2].flip(1)  # [L, 2], (x, y)
            return centre + offsets / cells[:, None, :]
        return centre + offsets * self._of_points(reference[..., 2:] * (0.5 / self.num_points))

    def _of_points(self, of_level: Tensor) -> Tensor:
        """[B, Q, L, 2] -> [B, Q, 1, L, P, 2]. Copied, for broadcasting along an axis as short as P
        makes an operation several times slower on a CPU; elsewhere the copy is small.
        """
        expanded = of_level[:, :, None, :, None].expand(-1, -1, -1, -1, self.num_points, -1)
        return expanded.contiguous()
