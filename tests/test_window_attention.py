"""Attention inside windows: piece by piece on the CPU, against PyTorch's own over all at once."""

import pytest
import torch
from torch import Tensor, nn

from tests.test_windows import AT_ONCE, BATCH, GRIDS, NUM_DET, NUM_HEADS, random_tokens, windows
from vidt.model.ram import ReconfiguredAttention
from vidt.model.window_attention import _attend, at_once, attend_windows
from vidt.model.windows import Windows, by_piece, collect, deal, whole_mask


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
    rows = _attend(qkv, bias, whole_mask(places)).reshape(-1, qkv.shape[-1])
    return collect(rows, det.unflatten(-1, (3, -1))[:, :, 0], places)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_form_for_the_cpu_is_pytorchs_attention(
    grid: tuple[int, int], shift: int, at_once: int | None, batch: int
) -> None:
    """In training and, to the last bit the same, in prediction."""
    tokens, bias = random_tokens(grid, 4, batch=batch).requires_grad_(), random_bias()
    places = windows(grid, shift, at_once, batch)
    before = bias.clone()
    ours = attended(tokens, bias, places)
    assert torch.equal(bias, before)
    with torch.no_grad():
        assert torch.equal(attended(tokens, bias, places), ours)
    theirs = by_pytorch(tokens, bias, windows(grid, shift, batch=batch))
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


def test_half_precision_rounds_the_gradient_of_the_bias_once() -> None:
    """Not once for each of the 45 pieces."""
    tokens = random_tokens((9, 13), 4).bfloat16().requires_grad_()
    bias = random_bias(torch.bfloat16)
    along = torch.randn(BATCH, 9 * 13 + 2, NUM_HEADS * 4).bfloat16()
    whole, pieces = (
        torch.autograd.grad(attended(tokens, bias, windows((9, 13), 1, at_once)), bias, along)[0]
        for at_once in (None, 1)
    )
    assert torch.allclose(pieces, whole, rtol=2**-7, atol=0)


def test_no_images_give_no_tokens() -> None:
    places = windows((4, 6), 1, 4, batch=0)
    tokens = random_tokens((4, 6), 4, batch=0).requires_grad_()
    with torch.no_grad():
        assert attended(tokens, random_bias(), places).shape == (0, 26, 8)
    attended(tokens, random_bias(), places).sum().backward()


def test_a_graph_takes_all_windows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small pieces are elsewhere: compiled and, as ONNX export does it, exported."""
    monkeypatch.setattr("vidt.model.window_attention.AT_ONCE", 1)
    assert at_once(torch.device("cpu")) == 1 and at_once(torch.device("cuda")) is None
    attention = ReconfiguredAttention(16, 2, window=3, shift=1).eval()
    patches, det = torch.randn(2, 35, 16), torch.randn(2, NUM_DET, 16)

    class OfGrid(nn.Module):
        def forward(self, patches: Tensor, det: Tensor) -> Tensor:
            return attention(patches, det, (5, 7))

    expected = OfGrid()(patches, det)
    compiled = torch.compile(OfGrid(), backend="eager", fullgraph=True, dynamic=False)
    assert torch.allclose(compiled(patches, det), expected, atol=1e-5)
    with torch.no_grad():
        exported = torch.export.export(OfGrid(), (patches, det)).module()
        assert torch.allclose(exported(patches, det), expected, atol=1e-5)
