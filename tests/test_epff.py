"""The pyramid on its way to the decoder."""

import pytest
import torch
from torch import Tensor

from vidt.model.epff import EPFF, LevelProjections

CHANNELS, DIM = (8, 16, 24, 4), 32
GRIDS = ((9, 13), (5, 7), (3, 4), (1, 1))


def maps() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, c, *grid) for c, grid in zip(CHANNELS, GRIDS, strict=True)]


@pytest.mark.parametrize(("pyramid", "step"), [(LevelProjections, 1), (EPFF, -1)])
def test_levels_and_their_order(pyramid: type, step: int) -> None:
    """EPFF gives them coarse to fine, as the released decoder expects them."""
    levels = pyramid(CHANNELS, DIM)(maps())
    assert [tuple(level.shape[2:]) for level in levels] == list(GRIDS[::step])
    assert all(level.shape[:2] == (2, DIM) for level in levels)


def test_a_level_receives_all_coarser_ones_and_no_finer_one() -> None:
    fuse, given = EPFF(CHANNELS, DIM), maps()
    before = fuse(given)
    for changed in range(4):
        moved = [level + (index == changed) for index, level in enumerate(given)]
        moved[changed] = torch.randn_like(moved[changed])
        same = [torch.equal(a, b) for a, b in zip(before, fuse(moved), strict=True)]
        assert same[::-1] == [level > changed for level in range(4)]


def test_every_parameter_takes_part() -> None:
    fuse = EPFF(CHANNELS, DIM)
    torch.stack([level.square().sum() for level in fuse(maps())]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fuse.parameters())


def test_the_maps_given_are_left_alone() -> None:
    given = maps()
    kept = [level.clone() for level in given]
    EPFF(CHANNELS, DIM)(given)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
