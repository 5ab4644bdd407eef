"""Deformable attention for the GPU: one Triton kernel forward, one backward.

Triton comes with PyTorch and compiles them at their first use, so there is nothing to build. What
they replace, a `grid_sample` for each level, copies value into another layout, writes every sample
to memory and reads it back to sum it; the kernels read the rows of value in place and keep samples
in registers.

The gradient of value is summed by atomic additions: which of two comes first is not determined, so
its last bits differ from run to run. Outputs and the other gradients are the same every time.

Letters: B batch, Q queries, S positions of all levels together, M heads, D channels of a head, L
levels, P points. A row is one head of one query; there are B * Q * M of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 512  # rows times channels of a program: four for each thread of its four warps
SIZES = ["num_rows", "queries", "positions"]  # they change from batch to batch


@triton.jit
def _cell(at: tl.tensor, size: tl.tensor, FLOAT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The cell above or left of a location in 0..1, and the location's distance from its centre."""
    x = at.to(FLOAT) * size.to(FLOAT) - 0.5
    # Far outside every cell is as good as another, but an int32 has to hold it. NaN remains in the
    # second result.
    near = tl.minimum(tl.maximum(x, -2.0), size.to(FLOAT) + 1.0)
    return tl.floor(near).to(tl.int32), x - tl.floor(x)


@triton.jit
def _share(beyond: tl.tensor, far: tl.constexpr) -> tl.tensor:
    """The bilinear share of the cell itself or, if far, of the next one."""
    if far:
        return beyond
    else:
        return 1.0 - beyond


@triton.jit(do_not_specialize=SIZES)
def _forward(
    value: tl.tensor,
    levels: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    output: tl.tensor,
    num_rows: tl.tensor,
    queries: tl.tensor,
    positions: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FLOAT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    channel = tl.arange(0, CHANNELS)[None, :]
    # Row (b, q, m) reads value[b, :, m].
    first = (row // (HEADS * queries)) * positions * (HEADS * DIM) + (row % HEADS) * DIM
    total = tl.zeros([ROWS, CHANNELS], FLOAT)
    for sample in range(LEVELS * POINTS):
        level = levels + (sample // POINTS) * 3
        height, width, start = tl.load(level), tl.load(level + 1), tl.load(level + 2)
        at = row * (LEVELS * POINTS) + sample
        left, right_share = _cell(tl.load(locations + 2 * at, there, 0.0), width, FLOAT)
        top, low_share = _cell(tl.load(locations + 2 * at + 1, there, 0.0), height, FLOAT)
        weight = tl.load(weights + at, there, 0.0).to(FLOAT)
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                y, x = top + down, left + right
                inside = there & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                cell = value + (first + (start + y * width + x) * (HEADS * DIM))[:, None]
                read = tl.load(cell + channel, inside[:, None] & (channel < DIM), 0.0)
                share = weight * _share(low_share, down) * _share(right_share, right)
                total += read.to(FLOAT) * share[:, None]
    place = output + row[:, None] * DIM + channel
    tl.store(place, total.to(output.dtype.element_ty), there[:, None] & (channel < DIM))


@triton.jit(do_not_specialize=SIZES)
def _backward(
    grad: tl.tensor,
    value: tl.tensor,
    levels: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    grad_value: tl.tensor,
    grad_locations: tl.tensor,
    grad_weights: tl.tensor,
    num_rows: tl.tensor,
    queries: tl.tensor,
    positions: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FLOAT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    channel = tl.arange(0, CHANNELS)[None, :]
    first = (row // (HEADS * queries)) * positions * (HEADS * DIM) + (row % HEADS) * DIM
    place = grad + row[:, None] * DIM + channel
    arrived = tl.load(place, there[:, None] & (channel < DIM), 0.0).to(FLOAT)
    for sample in range(LEVELS * POINTS):
        level = levels + (sample // POINTS) * 3
        height, width, start = tl.load(level), tl.load(level + 1), tl.load(level + 2)
        at = row * (LEVELS * POINTS) + sample
        left, right_share = _cell(tl.load(locations + 2 * at, there, 0.0), width, FLOAT)
        top, low_share = _cell(tl.load(locations + 2 * at + 1, there, 0.0), height, FLOAT)
        weight = tl.load(weights + at, there, 0.0).to(FLOAT)
        slope_x = tl.zeros([ROWS], FLOAT)
        slope_y = tl.zeros([ROWS], FLOAT)
        of_weight = tl.zeros([ROWS], FLOAT)
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                y, x = top + down, left + right
                inside = there & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                mask = inside[:, None] & (channel < DIM)
                cell = (first + (start + y * width + x) * (HEADS * DIM))[:, None] + channel
                read = tl.load(value + cell, mask, 0.0).to(FLOAT)
                match = tl.sum(read * arrived, axis=1)
                share_y, share_x = _share(low_share, down), _share(right_share, right)
                of_weight += match * share_y * share_x
                slope_x += match * share_y * (2 * right - 1)
                slope_y += match * share_x * (2 * down - 1)
                passed = arrived * (weight * share_y * share_x)[:, None]
                tl.atomic_add(grad_value + cell, passed, mask, sem="relaxed")
        slope_x *= weight * width.to(FLOAT)
        slope_y *= weight * height.to(FLOAT)
        tl.store(grad_locations + 2 * at, slope_x.to(grad_locations.dtype.element_ty), there)
        tl.store(grad_locations + 2 * at + 1, slope_y.to(grad_locations.dtype.element_ty), there)
        tl.store(grad_weights + at, of_weight.to(grad_weights.dtype.element_ty), there)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], value: Tensor, weights: Tensor) -> None:
    """Starts the kernel, one program for a few rows each."""
    batch, positions, heads, dim = value.shape
    queries, num_levels, points = weights.shape[1], *weights.shape[3:]
    num_rows = batch * queries * heads
    if num_rows == 0:
        return
    channels = triton.next_power_of_2(dim)
    rows = max(1, LANES // channels)
    exact = tl.float64 if value.dtype == torch.float64 else tl.float32
    sizes = (heads, dim, num_levels, points, rows, channels, exact)
    with torch.cuda.device_of(value):  # not always the current one
        kernel[(triton.cdiv(num_rows, rows),)](
            *(*tensors, num_rows, queries, positions, *sizes),
            enable_fp_fusion=True,  # Triton's default will change, and Triton warns of that
        )


@torch.library.custom_op("vidt::deformable_attention", mutates_args=())
def attend(value: Tensor, levels: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """As `deformable_attention`, on a GPU; levels [L, 3] is the table of `Levels`.

    value of any floating dtype, which is that of the result; sums are in float32, or in float64 if
    value is. No second derivatives.
    """
    batch, _, heads, dim = value.shape
    output = value.new_empty(batch, locations.shape[1], heads * dim)
    inputs = [given.contiguous() for given in (value, levels, locations, weights)]
    _launch(_forward, (*inputs, output), value, weights)
    return output


@torch.library.custom_op("vidt::deformable_attention_backward", mutates_args=())
def attend_backward(
    grad: Tensor, value: Tensor, levels: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights from that of the output, [B, Q, M * D]."""
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    grad_value = torch.zeros(value.shape, dtype=exact, device=value.device)
    grad_locations = locations.new_empty(locations.shape)
    grad_weights = weights.new_empty(weights.shape)
    inputs = [given.contiguous() for given in (grad, value, levels, locations, weights)]
    outputs = (grad_value, grad_locations, grad_weights)
    _launch(_backward, (*inputs, *outputs), value, weights)
    # Where value is float32 this is grad_value itself.
    return grad_value.to(value.dtype), grad_locations, grad_weights


@attend.register_fake
def _(value: Tensor, levels: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, dim = value.shape
    return value.new_empty(batch, locations.shape[1], heads * dim)


@attend_backward.register_fake
def _(
    grad: Tensor, value: Tensor, levels: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    like = (value, locations, weights)
    grad_value, grad_locations, grad_weights = (each.new_empty(each.shape) for each in like)
    return grad_value, grad_locations, grad_weights


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    grad_value, grad_locations, grad_weights = attend_backward(grad, *ctx.saved_tensors)
    return grad_value, None, grad_locations, grad_weights


attend.register_autograd(_gradients, setup_context=_keep)


def try_out(device: torch.device) -> None:
    """Runs both kernels on a tiny input; raises the error that prevents it."""
    with torch.inference_mode(False), torch.enable_grad():
        value = torch.ones(1, 1, 1, 16, device=device, requires_grad=True)
        levels = torch.tensor([[1, 1, 0]], device=device)
        locations = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=device)
        weights = torch.ones(1, 1, 1, 1, 1, device=device)
        (output,) = attend(value, levels, locations, weights)
        output.sum().backward()
        assert value.grad is not None
        if not (output == 1).all() or not (value.grad == 1).all():
            raise RuntimeError(f"a sample of ones is {output.tolist()}")
