"""Attention inside windows: piece by piece on the CPU, against PyTorch's own over all at once."""

import pytest
import torch
from torch import Tensor

from tests.test_windows import AT_ONCE, BATCH, GRIDS, NUM_HEADS, random_tokens, windows
from vidt.window_attention import _attend, _whole_mask, attend_windows
from vidt.windows import Windows, by_piece, collect, deal


def random_bias(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(NUM_HEADS, 9, 9, dtype=dtype, requires_grad=True)


def attended(tokens: Tensor, bias: Tensor, places: Windows) -> Tensor:
    """Patches and the queries of [DET] tokens, [B, N + Q, C]."""
    rows, det = attend_windows(tokens, bias, places)
    return collect(rows, det.unflatten(-1, (3, -1))[:, :, 0], places)


def by_pytorch(tokens: Tensor, bias: Tensor, places: Windows) -> Tensor:
    """As `attended`, of all windows as one piece."""
    dealt, det = deal(tokens, places)
    (qkv,) = by_piece(dealt, places, 3)
    rows = _attend(qkv, bias, _whole_mask(places)).reshape(-1, qkv.shape[-1])
    return collect(rows, det.unflatten(-1, (3, -1))[:, :, 0], places)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("at_once", AT_ONCE)
def test_the_form_for_the_cpu_is_pytorchs_attention(
    grid: tuple[int, int], shift: int, at_once: int | None
) -> None:
    """In training and, to the last bit the same, in prediction."""
    tokens, bias = random_tokens(grid, 4).requires_grad_(), random_bias()
    before = bias.clone()
    ours = attended(tokens, bias, windows(grid, shift, at_once))
    assert torch.equal(bias, before)
    with torch.no_grad():
        assert torch.equal(attended(tokens, bias, windows(grid, shift, at_once)), ours)
    theirs = by_pytorch(tokens, bias, windows(grid, shift))
    assert torch.allclose(ours, theirs, atol=1e-5)
    along = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (tokens, bias), along),
        torch.autograd.grad(theirs, (tokens, bias), along),
        strict=True,
    ):
        assert torch.allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("at_once", [None, 3])
def test_gradient_of_the_form_for_the_cpu(at_once: int | None) -> None:
    places = windows((2, 4), 1, at_once)
    tokens = random_tokens((2, 4), 1, torch.float64).requires_grad_()
    bias = random_bias(torch.float64)
    assert torch.autograd.gradcheck(lambda *given: attended(*given, places), (tokens, bias))


def test_compiled_graphs_of_several_grids_hold_their_tables() -> None:
    """Made by nobody else, and found by who comes later."""

    def of_grid(tokens: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
        return attended(tokens, bias, windows(grid, 1))

    bias = random_bias()
    compiled = torch.compile(of_grid, backend="eager", fullgraph=True, dynamic=False)
    for grid in ((4, 7), (5, 2), (4, 7)):
        tokens = random_tokens(grid, 4).requires_grad_()
        ours, theirs = compiled(tokens, bias, grid), of_grid(tokens, bias, grid)
        assert len(ours) == BATCH and torch.allclose(ours, theirs, atol=1e-5)
        along = torch.randn_like(ours)
        mine, other = (torch.autograd.grad(each, tokens, along)[0] for each in (ours, theirs))
        assert torch.allclose(mine, other, atol=1e-5)
        assert windows(grid, 1) is windows(grid, 1)
