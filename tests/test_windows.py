"""Where tokens lie in windows, against timm's cutting and rolling."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vidt.model.windows import (
    MASKED,
    Piece,
    Windows,
    apart_in,
    by_piece,
    collect,
    deal,
    whole_mask,
    windows_of,
)

WINDOW, NUM_DET, NUM_HEADS, BATCH = 3, 2, 2, 3
GRIDS = [(6, 9), (5, 7), (3, 3), (2, 1)]  # whole windows, padded, one window, less than one
# All at once; one window; some windows; more than some of the images have, and than all have.
AT_ONCE = [None, 1, 5, 16, 24]


def windows(
    grid: tuple[int, int], shift: int, at_once: int | None = None, batch: int = BATCH
) -> Windows:
    return windows_of(
        grid,
        WINDOW,
        shift,
        num_det=NUM_DET,
        num_heads=NUM_HEADS,
        batch=batch,
        at_once=at_once,
        device=torch.device("cpu"),
    )


def random_tokens(
    grid: tuple[int, int], dim: int, dtype: torch.dtype = torch.float32, batch: int = BATCH
) -> Tensor:
    """Queries, keys and values of a batch, what padded places hold among them."""
    return torch.randn(batch, grid[0] * grid[1] + NUM_DET + 1, 3 * NUM_HEADS * dim, dtype=dtype)


def queries_of(rows: Tensor, places: Windows) -> Tensor:
    """Of the three parts that were dealt, the first: [3 * R, D] -> [R, D]."""
    return torch.cat([each[0].flatten(0, 3) for each in by_piece(rows, places, 3)])


def by_tokens(rows: Tensor, places: Windows, parts: int) -> Tensor:
    """Rows of the pieces -> [B, W * T, parts * C]."""
    dim = rows.shape[-1]
    tokens = rows.new_zeros(BATCH, places.count, places.area, parts, NUM_HEADS, dim)
    for piece, each in zip(places.pieces, by_piece(rows, places, parts), strict=True):
        images = slice(piece.image, piece.image + piece.images)
        tokens[images, piece.first : piece.end] = each.permute(1, 3, 4, 0, 2, 5)
    return tokens.flatten(3).flatten(1, 2)


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
@pytest.mark.parametrize("at_once", AT_ONCE)
def test_windows_hold_what_swin_puts_there(
    grid: tuple[int, int], shift: int, at_once: int | None
) -> None:
    places = windows(grid, shift, at_once)
    tokens = random_tokens(grid, 2)
    tokens[:, -1] = 0
    rows, det = deal(tokens, places)
    ours = by_tokens(rows, places, 3).unflatten(1, (places.count, WINDOW**2))
    theirs = released(tokens[:, : grid[0] * grid[1]].unflatten(1, grid), shift)
    masks = region_mask(grid, shift) if shift else torch.zeros(places.count, 9, 9)
    # The same windows with the same masks, in whatever order.
    order = [next(i for i, w in enumerate(theirs[0]) if torch.equal(w, mine)) for mine in ours[0]]
    assert sorted(order) == list(range(places.count))
    assert torch.equal(ours, theirs[:, order]) and torch.equal(whole_mask(places), masks[order])
    assert torch.equal(det, tokens[:, -1 - NUM_DET : -1])
    back = collect(queries_of(rows, places), det.unflatten(-1, (3, -1))[:, :, 0], places)
    assert torch.equal(back, tokens[:, :-1].unflatten(-1, (3, -1))[:, :, 0])


def test_pieces_are_whole_images_or_windows_of_one() -> None:
    """Three images of six windows with two heads, at most so many windows of heads in a piece."""
    grid = (6, 9)
    assert windows(grid, 0).pieces == (Piece(0, 3, 0, 6),)
    assert windows(grid, 0, 40).pieces == (Piece(0, 3, 0, 6),)
    assert windows(grid, 0, 24).pieces == (Piece(0, 2, 0, 6), Piece(2, 1, 0, 6))
    assert windows(grid, 0, 12).pieces == tuple(Piece(image, 1, 0, 6) for image in range(3))
    halves = tuple(Piece(image, 1, at, at + 3) for image in range(3) for at in (0, 3))
    assert windows(grid, 0, 11).pieces == halves  # not 5 windows and 1
    assert windows(grid, 0, 1).pieces[:2] == (Piece(0, 1, 0, 1), Piece(0, 1, 1, 2))


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_a_piece_has_the_masks_of_its_windows(at_once: int | None) -> None:
    places = windows((6, 9), 1, at_once)
    whole = whole_mask(places)
    for piece in places.pieces:
        apart, masks = apart_in(piece, places), whole[piece.first : piece.end]
        before = len(masks) - len(apart)
        assert torch.equal(apart, masks[before:]) and not masks[:before].any()


@pytest.mark.parametrize("grid", [(5, 7), (3, 3)])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("at_once", [None, 4])
def test_tokens_that_move_take_their_gradient_along(
    grid: tuple[int, int], shift: int, at_once: int | None
) -> None:
    places = windows(grid, shift, at_once)
    tokens = random_tokens(grid, 1, torch.float64).requires_grad_()
    attended = torch.randn(len(places.collect_back), 2, dtype=torch.float64, requires_grad=True)
    det = torch.randn(BATCH, NUM_DET, 2 * NUM_HEADS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tokens: deal(tokens, places), tokens)
    assert torch.autograd.gradcheck(lambda *given: collect(*given, places), (attended, det))

    rows, det_qkv = deal(tokens, places)
    queries, det_queries = queries_of(rows, places), det_qkv.unflatten(-1, (3, -1))[:, :, 0]
    back = collect(queries * queries.detach().cos(), det_queries, places)
    (grad,) = torch.autograd.grad(back.square().sum(), tokens)
    assert grad[:, :-1].unflatten(-1, (3, -1))[:, :, 0].abs().min() > 0


def test_what_prediction_leaves_in_the_cache_serves_training() -> None:
    with torch.inference_mode():
        places = windows((4, 4), 1)
    assert windows((4, 4), 1) is places
    assert not any(each.is_inference() for each in vars(places).values() if torch.is_tensor(each))
    deal(random_tokens((4, 4), 1).requires_grad_(), places)[0].sum().backward()


def test_nothing_of_a_recording_is_kept() -> None:
    with FakeTensorMode():
        assert isinstance(windows((4, 6), 1).deal, FakeTensor)
    assert not isinstance(windows((4, 6), 1).deal, FakeTensor)
    with FakeTensorMode():
        assert isinstance(windows((4, 6), 1).deal, FakeTensor)
