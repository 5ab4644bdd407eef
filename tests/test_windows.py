"""Windows against timm's cutting and rolling, and attention inside them against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vidt.windows import (
    MASKED,
    Windows,
    _attend,
    _whole_mask,
    attend_windows,
    collect,
    deal,
    windows_of,
)

WINDOW, NUM_DET, NUM_HEADS, BATCH = 3, 2, 2, 2
GRIDS = [(6, 9), (5, 7), (3, 3), (2, 1)]  # whole windows, padded, one window, less than one


def windows(grid: tuple[int, int], shift: int, batch: int = BATCH) -> Windows:
    return windows_of(
        grid,
        WINDOW,
        shift,
        num_det=NUM_DET,
        num_heads=NUM_HEADS,
        batch=batch,
        device=torch.device("cpu"),
    )


def by_tokens(split: Tensor) -> Tensor:
    """[parts, B, M, W * T, D] -> [B, W * T, parts * C]."""
    return split.permute(1, 3, 0, 2, 4).flatten(2)


def random_split(places: Windows, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*places.deal.shape, dim, dtype=dtype, requires_grad=True)


def released(patches: Tensor, shift: int) -> Tensor:
    """A map [B, H, W, C] as Swin pads, rolls and cuts it: [B, W, T, C]."""
    height, width = patches.shape[1:3]
    padded = F.pad(patches, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
    rolled = padded.roll((-shift, -shift), dims=(1, 2))
    return window_partition(rolled, (WINDOW, WINDOW)).flatten(1, 2).unflatten(0, (len(patches), -1))


def region_mask(grid: tuple[int, int], shift: int) -> Tensor:
    """Swin's mask [W, T, T], by numbering the nine regions of the padded map."""
    height, width = (-(-side // WINDOW) * WINDOW for side in grid)
    regions = torch.zeros(1, height, width, 1)
    cuts = [slice(0, -WINDOW), slice(-WINDOW, -shift), slice(-shift, None)]
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        regions[:, rows, columns] = number
    cut = window_partition(regions, (WINDOW, WINDOW)).flatten(1)
    return (cut[:, None] != cut[:, :, None]) * MASKED


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shift", [0, 1])
def test_windows_hold_what_swin_puts_there(grid: tuple[int, int], shift: int) -> None:
    places = windows(grid, shift)
    tokens = torch.randn(BATCH, grid[0] * grid[1] + NUM_DET + 1, 3 * NUM_HEADS * 2)
    tokens[:, -1] = 0
    split, det = deal(tokens, places)
    ours = by_tokens(split).unflatten(1, (places.count, WINDOW**2))
    theirs = released(tokens[:, : grid[0] * grid[1]].unflatten(1, grid), shift)
    masks = region_mask(grid, shift) if shift else torch.zeros(places.count, 9, 9)
    # The same windows with the same masks, in whatever order.
    order = [next(i for i, w in enumerate(theirs[0]) if torch.equal(w, mine)) for mine in ours[0]]
    assert sorted(order) == list(range(places.count))
    assert torch.equal(ours, theirs[:, order]) and torch.equal(_whole_mask(places), masks[order])
    assert torch.equal(det, tokens[:, -1 - NUM_DET : -1])
    queries, det_queries = split[0], det.unflatten(-1, (3, -1))[:, :, 0]
    back = collect(queries, det_queries, places)
    assert torch.equal(back, tokens[:, :-1].unflatten(-1, (3, -1))[:, :, 0])


@pytest.mark.parametrize("grid", [(5, 7), (3, 3)])
@pytest.mark.parametrize("shift", [0, 1])
def test_tokens_that_move_take_their_gradient_along(grid: tuple[int, int], shift: int) -> None:
    places = windows(grid, shift)
    count = grid[0] * grid[1] + NUM_DET
    tokens = torch.randn(BATCH, count + 1, 3 * NUM_HEADS, dtype=torch.float64, requires_grad=True)
    attended = random_split(places, 2, torch.float64)[0]
    det = torch.randn(BATCH, NUM_DET, 2 * NUM_HEADS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tokens: deal(tokens, places), tokens)
    assert torch.autograd.gradcheck(lambda *given: collect(*given, places), (attended, det))

    split, det_qkv = deal(tokens, places)
    queries, det_queries = split[0], det_qkv.unflatten(-1, (3, -1))[:, :, 0]
    back = collect(queries * queries.detach().cos(), det_queries, places)
    (grad,) = torch.autograd.grad(back.square().sum(), tokens)
    assert grad[:, :-1].unflatten(-1, (3, -1))[:, :, 0].abs().min() > 0


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_form_for_the_cpu_is_pytorchs_attention(
    grid: tuple[int, int], shift: int, batch: int
) -> None:
    places = windows(grid, shift, batch)
    qkv = random_split(places, 4)
    bias = torch.randn(NUM_HEADS, 9, 9, requires_grad=True)
    before = bias.clone()
    ours = attend_windows(qkv, bias, places)
    assert torch.equal(bias, before)
    theirs = _attend(qkv, bias, places)
    assert torch.allclose(ours, theirs, atol=1e-5)
    along = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (qkv, bias), along),
        torch.autograd.grad(theirs, (qkv, bias), along),
        strict=True,
    ):
        assert torch.allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3, 100])
def test_pieces_of_any_number_of_heads_give_what_training_computes(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two images' four heads. A piece of three crosses from one to the other."""
    places = windows((4, 6), 1)
    monkeypatch.setattr("vidt.windows.WINDOWS_AT_ONCE", heads * places.count)
    qkv, bias = random_split(places, 4), torch.randn(NUM_HEADS, 9, 9)
    learning = attend_windows(qkv, bias, places)
    with torch.no_grad():
        assert torch.equal(attend_windows(qkv, bias, places), learning)


def test_compiled_graphs_of_several_grids_hold_their_tables() -> None:
    """Made by nobody else, and found by who comes later."""

    def attended(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        places = windows(grid, 1)
        qkv, det = deal(tokens, places)
        return collect(attend_windows(qkv, bias, places), det[..., : det.shape[-1] // 3], places)

    bias = torch.randn(NUM_HEADS, 9, 9)
    compiled = torch.compile(attended, backend="eager", fullgraph=True, dynamic=False)
    for grid in ((4, 7), (5, 2), (4, 7)):
        count = grid[0] * grid[1] + NUM_DET + 1
        tokens = torch.randn(BATCH, count, 3 * NUM_HEADS * 4, requires_grad=True)
        ours, theirs = compiled(tokens, grid), attended(tokens, grid)
        assert torch.allclose(ours, theirs, atol=1e-5)
        along = torch.randn_like(ours)
        mine, other = (torch.autograd.grad(each, tokens, along)[0] for each in (ours, theirs))
        assert torch.allclose(mine, other, atol=1e-5)
        assert windows(grid, 1) is windows(grid, 1)


def test_gradient_of_the_form_for_the_cpu() -> None:
    places = windows((2, 4), 1)
    qkv = random_split(places, 2, torch.float64)
    bias = torch.randn(NUM_HEADS, 9, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, b: attend_windows(q, b, places), (qkv, bias))


def test_what_prediction_leaves_in_the_cache_serves_training() -> None:
    with torch.inference_mode():
        windows((4, 4), 1)
    tokens = torch.randn(BATCH, 16 + NUM_DET + 1, 3 * NUM_HEADS, requires_grad=True)
    deal(tokens, windows((4, 4), 1))[0].sum().backward()


def test_nothing_of_a_recording_is_kept() -> None:
    with FakeTensorMode():
        assert isinstance(windows((4, 6), 1).deal, FakeTensor)
    assert not isinstance(windows((4, 6), 1).deal, FakeTensor)
    with FakeTensorMode():
        assert isinstance(windows((4, 6), 1).deal, FakeTensor)
