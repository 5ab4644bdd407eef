"""Token labels: what every cell of a level should show, by hand, and what the branch looks at."""

import math

import pytest
import torch
from torch import Tensor

from vidt.losses.token_labels import (
    object_masks,
    shown_columns,
    token_label_losses,
    token_truth,
)
from vidt.model.token_head import TokenHead, inside

FEW = 3  # classes


def target(labels: list[int], *places: tuple[slice, slice], size: tuple[int, int] = (8, 8)) -> dict:
    """Objects whose masks fill the (rows, columns) given."""
    masks = torch.zeros(len(labels), *size, dtype=torch.bool)
    for mask, place in zip(masks, places, strict=True):
        mask[place] = True
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.rand(len(labels), 4),
        "masks": masks,
    }


def truth_of(one: dict, *, shift: bool, canvas: tuple[int, int] = (8, 8)) -> Tensor:
    """[2, 2, columns] of a canvas in four cells, of which the image is all."""
    logits = [torch.zeros(1, 2, 2, FEW + int(shift))]
    padding = torch.zeros(1, *canvas, dtype=torch.bool)
    return token_truth(padding, [one], logits, shift=shift)[0][0]


def test_cells_show_the_share_that_each_class_covers() -> None:
    """Class 0 fills the left upper cell, class 2 half of the right one."""
    one = target([0, 2], (slice(4), slice(4)), (slice(4), slice(4, 6)))
    truth = truth_of(one, shift=True)
    assert truth[0, 0].tolist() == [1, 1, 0, 0]
    assert truth[0, 1].tolist() == [0.5, 0, 0, 0.5]
    assert truth[1].abs().max() == 0


def test_the_released_rule_takes_class_0_for_background() -> None:
    one = target([0, 2], (slice(4), slice(4)), (slice(4), slice(4, 6)))
    truth = truth_of(one, shift=False)
    assert truth[0, 0].tolist() == [0, 0, 0]
    assert truth[0, 1].tolist() == [0.5, 0, 0.5]


def test_earlier_objects_cover_later_ones() -> None:
    everything = (slice(None), slice(None))
    assert truth_of(target([1, 2], everything, everything), shift=True)[0, 0].tolist() == [
        1,
        0,
        1,
        0,
    ]
    assert truth_of(target([2, 1], everything, everything), shift=True)[0, 0].tolist() == [
        1,
        0,
        0,
        1,
    ]


def test_objects_of_one_class_share_its_column() -> None:
    one = target([1, 1], (slice(4), slice(2)), (slice(4), slice(2, 4)))
    assert truth_of(one, shift=True)[0, 0].tolist() == [1, 0, 1, 0]


def test_the_padding_of_an_image_is_background() -> None:
    one = target([1], (slice(None), slice(None)), size=(4, 4))
    truth = truth_of(one, shift=True)
    assert truth[0, 0].tolist() == [1, 0, 1, 0]
    assert truth.sum() == 2


def test_an_image_without_objects_shows_nothing() -> None:
    shown = shown_columns(
        torch.zeros(0, 8, 8, dtype=torch.bool), torch.zeros(0).long(), 4, [(2, 2)]
    )
    assert shown[0].shape == (4, 2, 2) and shown[0].abs().max() == 0


@pytest.mark.parametrize("known", ["no masks", "one mask"])
def test_objects_without_mask_are_rectangles(known: str) -> None:
    """On a canvas of 8 x 8 pixels, of which the image is 4 high and 8 wide."""
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]])
    one = {"labels": torch.tensor([0, 1]), "boxes": boxes}
    if known == "one mask":
        one["masks"] = torch.zeros(2, 4, 8, dtype=torch.bool)
        one["masks"][0, 0, 0] = True
        one["has_mask"] = torch.tensor([True, False])
    masks = object_masks(one, (8, 8), torch.tensor([4, 8]))
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    if known == "one mask":
        expected[0, 0, 0] = True
    else:
        expected[0, :4, :4] = True
    expected[1, 1:3, 2:6] = True
    assert torch.equal(masks, expected)


def test_the_losses_by_hand() -> None:
    """One level of one cell; four columns at probability 1/2, of which two are true."""
    one = target([1], (slice(None), slice(None)))
    padding = torch.zeros(1, 8, 8, dtype=torch.bool)
    focal, dice = token_label_losses(
        [torch.zeros(1, 1, 1, 4)], padding, [one], shift=True, focal_alpha=0.25
    )
    assert focal.item() == pytest.approx((2 * 0.25 + 2 * 0.75) * 0.25 * math.log(2))
    assert dice.item() == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))


def test_images_add_up() -> None:
    torch.manual_seed(1)
    some = [
        target([1], (slice(3), slice(5))),
        target([0, 2], (slice(8), slice(2)), (slice(2),) * 2),
    ]
    padding = torch.zeros(2, 8, 8, dtype=torch.bool)
    logits = [torch.randn(2, 4, 4, 4), torch.randn(2, 2, 2, 4)]
    rule = {"shift": True, "focal_alpha": 0.25}
    together = token_label_losses(logits, padding, some, **rule)
    alone = [
        token_label_losses([level[i : i + 1] for level in logits], padding[:1], [some[i]], **rule)
        for i in range(2)
    ]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.allclose(whole, sum(parts))


def test_the_head_does_not_see_padding_nor_the_very_edge() -> None:
    """A map of 120 places in a row, of which 100 are image: the edge is a hundredth of them."""
    padding = torch.zeros(1, 3, 120, dtype=torch.bool)
    padding[:, :, 100:] = True
    seen = inside(padding)
    assert seen[0, 1].nonzero().flatten().tolist() == list(range(1, 99))
    head, level = TokenHead(32, 4), torch.randn(1, 32, 3, 120)
    changed = torch.where(seen[:, None], level, level + 1)
    assert torch.equal(*(head([some], [padding])[0] for some in (level, changed)))
