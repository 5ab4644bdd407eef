"""Scores of mining: values worked out by hand, and what must not change them."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert

from ymir_adapter.protocol.outputs import DECIMALS
from ymir_adapter.protocol.task import ALGORITHMS
from ymir_adapter.tasks.mining import (
    BASE,
    FLOORS,
    SHARE_UNITS,
    VIEWS,
    aldd_score,
    binary_entropy,
    boxes_in_views,
    boxes_of,
    cald_score,
    class_shares,
    class_weights,
    disagreement,
    entropy_score,
    jensen_shannon,
    random_score,
    ranking,
    rounded,
    view_consistency,
    views,
    weighted,
)

LN2 = math.log(2)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def apart(count: int) -> Tensor:
    """Boxes [N, 4] that do not touch one another."""
    return rows(*([index / 10 + 0.05, 0.5, 0.08, 0.5] for index in range(count)))


def bits(p: float) -> float:
    """Entropy of a coin, by the formula."""
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def test_every_algorithm_that_a_task_may_name_has_a_floor() -> None:
    assert set(FLOORS) == set(ALGORITHMS)


def test_a_random_score_follows_from_seed_and_name_alone() -> None:
    score = random_score(1, "/in/assets/ab/0123.jpg")
    assert 0 <= score < 1
    assert score == random_score(1, "/somewhere/else/0123.jpg")
    assert score != random_score(2, "/in/assets/ab/0123.jpg")
    assert score != random_score(1, "/in/assets/ab/0124.jpg")


def test_random_scores_are_spread_evenly() -> None:
    scores = np.array([random_score(0, f"{index}.jpg") for index in range(4000)])
    counts, _ = np.histogram(scores, bins=10, range=(0, 1))
    assert counts.min() > 300 and counts.max() < 500  # five standard deviations around 400


def test_a_name_that_is_no_text_has_a_score_too() -> None:
    name = b"/in/assets/\xff\xfe.jpg".decode("utf-8", "surrogateescape")
    assert 0 <= random_score(0, name) < 1


def test_entropy_of_scores_by_hand() -> None:
    found = binary_entropy(rows([0.0, 0.25, 0.5, 1.0]))
    # H(1/4) = 1/4 * 2 + 3/4 * log2(4/3)
    expected = rows([0.0, 0.5 + 0.75 * math.log2(4 / 3), 1.0, 0.0])
    assert torch.allclose(found, expected)


def test_entropy_score_by_hand() -> None:
    """Two boxes, best class scores 1/2 and 1/4: H = 1 and 0.8113. The third query is no box."""
    probabilities = rows([0.5, 0.1], [0.0, 0.25], [0.05, 0.09])
    assert entropy_score(probabilities, apart(3), 0.1).item() == pytest.approx((1 + bits(0.25)) / 2)


def test_entropy_score_without_boxes_is_that_of_the_best_query() -> None:
    probabilities = rows([0.01, 0.02], [0.05, 0.03])
    assert entropy_score(probabilities, apart(2), 0.1).item() == pytest.approx(bits(0.05))
    # No gap at the threshold: a hair below it scores like a hair above it.
    doubts = (rows([0.1 + side], [0.0]) for side in (-1e-9, 1e-9))
    below, above = (entropy_score(doubt, apart(2), 0.1) for doubt in doubts)
    assert below.item() == pytest.approx(above.item(), abs=1e-6)


def test_of_duplicates_the_surest_counts() -> None:
    """The second lies on the first; the third does too, but is of another class; the fourth not."""
    probabilities = rows([0.9, 0.0], [0.5, 0.0], [0.0, 0.25], [0.25, 0.0])
    boxes = rows([0.5, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.1] * 4)
    assert boxes_of(probabilities, boxes, 0.1).tolist() == [True, False, True, True]
    expected = (bits(0.9) + 2 * bits(0.25)) / 3
    assert entropy_score(probabilities, boxes, 0.1).item() == pytest.approx(expected)


def test_disagreement_by_hand() -> None:
    """One member says 0, the other 1: the mean is a coin (1 bit), each is sure (0 bits). Members
    that agree, however unsure, do not disagree.
    """
    members = torch.tensor([[[0.0], [0.5], [0.25]], [[1.0], [0.5], [0.75]]], dtype=torch.float64)
    expected = [1.0, 0.0, 1 - bits(0.25)]
    assert disagreement(members).tolist() == pytest.approx(expected)


def test_aldd_score_by_hand() -> None:
    """Two boxes in one region and one in another: the mean over the regions of their largest."""
    first = rows([0.9], [0.4], [0.8], [0.0])
    second = rows([0.9], [0.8], [0.4], [0.02])
    boxes = rows([0.1, 0.1, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1], [0.6] * 4)
    one = bits(0.6) - (bits(0.4) + bits(0.8)) / 2
    # Regions are quarters of each side: (0.1, 0.1) and (0.2, 0.2) share the first.
    assert aldd_score(torch.stack([first, second]), boxes, 0.1).item() == pytest.approx(one)
    settled = first.clone()
    settled[2] = 0.4
    members = torch.stack([settled, second])
    assert aldd_score(members, boxes, 0.1).item() == pytest.approx(one / 2)


def test_jensen_shannon_by_hand() -> None:
    first, second = (
        rows([1.0, 0.0], [0.5, 0.5], [1.0, 0.0]),
        rows([0.0, 1.0], [0.5, 0.5], [0.5] * 2),
    )
    # Last: M = (3/4, 1/4); H(M) - H(1/2)/2 in bits, times ln 2.
    expected = [LN2, 0.0, (bits(0.25) - 0.5) * LN2]
    assert jensen_shannon(first, second).tolist() == pytest.approx(expected)


def test_consistency_of_a_view_by_hand() -> None:
    """Reference 1: IoU 1/3 with a view's box of other classes. Reference 2: IoU 1, same classes."""
    boxes = rows([0.0, 0.0, 0.2, 0.1], [0.5, 0.5, 0.9, 0.9])
    view_boxes = rows([0.5, 0.5, 0.9, 0.9], [0.1, 0.0, 0.3, 0.1])
    scores, view_scores = rows([0.6, 0.0], [0.3, 0.1]), rows([0.6, 0.2], [0.0, 0.4])
    far = abs(1 / 3 + (0.6 + 0.4) / 2 * (1 - LN2) - 1.3)
    near = abs(1.0 + (0.3 + 0.6) / 2 * (1 - 0.0) - 1.3)
    assert near == pytest.approx(0.15) and far > near
    found = view_consistency(scores, boxes, view_scores, view_boxes)
    assert found.item() == pytest.approx(near)
    alone = view_consistency(scores[:1], boxes[:1], view_scores, view_boxes)
    assert alone.item() == pytest.approx(far)


def test_where_nothing_overlaps_the_surest_box_is_compared() -> None:
    boxes, view_boxes = rows([0.0, 0.0, 0.1, 0.1]), rows([0.5, 0.5, 0.6, 0.6], [0.7, 0.7, 0.8, 0.8])
    found = view_consistency(rows([0.5]), boxes, rows([0.2], [0.7]), view_boxes)
    assert found.item() == pytest.approx(abs(0.6 - 1.3))
    turned = view_consistency(rows([0.5]), boxes, rows([0.7], [0.2]), view_boxes)
    assert turned.item() == pytest.approx(found.item())


def test_boxes_without_an_area_do_not_spoil_the_score() -> None:
    point = rows([0.3, 0.3, 0.3, 0.3])
    assert view_consistency(rows([0.5]), point, rows([0.5]), point).item() == pytest.approx(0.8)


def test_cald_score_by_hand() -> None:
    """One box of score 0.8 in the middle. Each view finds it exactly where it went, with score 0.8,
    0.4, 0.06 and 0.6: m = 1 + 0.8, 1 + 0.6, 1 + 0.43, 1 + 0.7. 0.06 is below the threshold, yet the
    best of its view.
    """
    canvas, box = (100, 100), rows([0.5, 0.5, 0.2, 0.2])
    moved = boxes_in_views(box, canvas)[:, 0]
    found = box_convert(torch.cat([box_convert(box, "cxcywh", "xyxy"), moved]), "xyxy", "cxcywh")
    probabilities = rows([0.8], [0.8], [0.4], [0.06], [0.6])
    expected = -(0.5 + 0.3 + 0.13 + 0.4) / 4
    score = cald_score(probabilities[:, None], found[:, None], canvas, 0.1)
    assert score.item() == pytest.approx(expected)


def test_cald_score_without_boxes_is_that_of_the_best_query() -> None:
    """The best query of an empty picture and of its views, which see it in the same place: one of
    score 0.05, m = 1.05, beside a worse one. No gap at the threshold.
    """
    canvas, box = (100, 100), rows([0.5, 0.5, 0.2, 0.2])
    moved = boxes_in_views(box, canvas)[:, 0]
    found = box_convert(torch.cat([box_convert(box, "cxcywh", "xyxy"), moved]), "xyxy", "cxcywh")
    boxes = torch.stack([found, torch.full_like(found, 0.1)], 1)

    def score(best: float, threshold: float = 0.1) -> float:
        probabilities = torch.tensor([[best], [0.01]], dtype=torch.float64).expand(5, 2, 1)
        return cald_score(probabilities, boxes, canvas, threshold).item()

    assert score(0.05) == pytest.approx(-0.25)
    assert score(0.02) == pytest.approx(-0.28)
    assert score(0.1 - 1e-9) == pytest.approx(score(0.1 + 1e-9), abs=1e-6)


@pytest.mark.parametrize("canvas", [(64, 96), (96, 48), (80, 80)])
def test_boxes_go_where_the_views_move_the_pixels(canvas: tuple[int, int]) -> None:
    """A bright rectangle on the mean colour is found again in every view by its pixels."""
    height, width = canvas
    x1, y1, x2, y2 = width // 4, height // 2, width // 2, height * 3 // 4
    image = torch.zeros(3, height, width)
    image[:, y1:y2, x1:x2] = 1.0
    box = rows([x1 / width, y1 / height, x2 / width, y2 / height])
    moved = boxes_in_views(box_convert(box, "xyxy", "cxcywh"), canvas)[:, 0]
    for view, expected, name in zip(
        views(image, 0, "a.jpg"), moved, ("mirrored", "cut", "small", "turned"), strict=True
    ):
        if name == "cut":  # the patches may hide the rectangle
            continue
        y, x = (view[0] > 0.5).nonzero().unbind(1)
        found = [x.min() / width, y.min() / height, (x.max() + 1) / width, (y.max() + 1) / height]
        pixels = [
            (a - b) * side for a, b, side in zip(found, expected, [width, height] * 2, strict=True)
        ]
        assert max(abs(float(gap)) for gap in pixels) <= 1.5, name


def test_views_follow_from_seed_and_name() -> None:
    image = torch.rand(3, 48, 64)
    first, again = views(image, 1, "x/a.jpg"), views(image.clone(), 1, "y/a.jpg")
    assert first.shape == (VIEWS, 3, 48, 64)
    assert torch.equal(first, again)
    other = views(image, 2, "x/a.jpg")
    differing = [not torch.equal(a, b) for a, b in zip(first, other, strict=True)]
    assert differing == [False, True, False, False]


def test_views_of_the_smallest_canvas() -> None:
    assert views(torch.rand(3, 16, 16), 0, "a.jpg").isfinite().all()


def crowd(copies: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Committee [3, Q, K], five sets of boxes [5, Q, 4] and of scores [5, Q, K]; every query is
    there `copies` times.
    """
    generator = torch.Generator().manual_seed(seed)
    members = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64)
    scores = torch.rand(5, 4, 2, generator=generator, dtype=torch.float64)
    boxes = torch.rand(5, 4, 4, generator=generator, dtype=torch.float64) * 0.3 + 0.2
    return members.repeat(1, copies, 1), boxes.repeat(1, copies, 1), scores.repeat(1, copies, 1)


def test_scores_do_not_grow_with_the_number_of_boxes() -> None:
    """Ten times the same boxes are as informative as one time."""

    def scores_of(copies: int, seed: int) -> list[float]:
        members, boxes, scores = crowd(copies, seed)
        return [
            entropy_score(scores[0], boxes[0], 0.1).item(),
            aldd_score(members, boxes[0], 0.1).item(),
            cald_score(scores, boxes, (64, 64), 0.1).item(),
        ]

    for seed in range(5):
        assert scores_of(10, seed) == pytest.approx(scores_of(1, seed)), seed


@pytest.mark.parametrize("extreme", [None, 0.0, 1.0])
def test_scores_are_finite_and_within_their_bounds(extreme: float | None) -> None:
    for seed, threshold in itertools.product(range(20), (0.0, 0.1, 0.9)):
        members, boxes, scores = crowd(3, seed)
        if extreme is not None:
            members, scores = torch.full_like(members, extreme), torch.full_like(scores, extreme)
        assert 0 <= entropy_score(scores[0], boxes[0], threshold).item() <= 1
        assert 0 <= aldd_score(members, boxes[0], threshold).item() <= 1
        assert -BASE <= cald_score(scores, boxes, (64, 48), threshold).item() <= 0


def test_class_shares_by_hand() -> None:
    """Best scores of the classes among the boxes: 0.6, 0.2, 0.0; the last query is none."""
    probabilities = rows([0.6, 0.1, 0.0], [0.2, 0.2, 0.0], [0.0, 0.0, 0.05])
    shares = class_shares(probabilities, 0.1)
    assert shares.tolist() == [SHARE_UNITS * 3 // 4, SHARE_UNITS // 4, 0]
    assert class_shares(probabilities, 0.7).tolist() == [0, 0, 0]


def test_class_weights_by_hand() -> None:
    """Three images of class one and one of class two: (1, 0) and (0, 1) against (3/4, 1/4)."""
    shares = torch.tensor([[4, 0], [4, 0], [4, 0], [0, 4], [0, 0]])
    common = bits(1 / 8) - bits(1 / 4) / 2
    rare = bits(3 / 8) - bits(1 / 4) / 2
    expected = [(1 + common) / 2] * 3 + [(1 + rare) / 2, 1.0]
    assert class_weights(shares, shares.sum(0)).tolist() == pytest.approx(expected)
    assert rare > 3 * common


@pytest.mark.parametrize("algorithm", FLOORS)
def test_weights_bring_scores_nearer_to_the_floor(algorithm: str) -> None:
    floor = FLOORS[algorithm]
    scores = floor + torch.tensor([0.0, 0.4, 0.8])
    found = weighted(scores, torch.tensor([0.5, 0.5, 1.0]), floor)
    assert found.tolist() == pytest.approx([floor, floor + 0.2, floor + 0.8])


def test_ranking_is_stable() -> None:
    assert ranking([0.5, 0.9, 0.5, -1.0, 0.9]) == [1, 4, 0, 2, 3]


def test_rounding_hides_the_order_of_additions() -> None:
    assert rounded(0.123449) == rounded(0.123351) == 0.1234
    assert math.copysign(1, rounded(-0.0)) == math.copysign(1, rounded(-1e-9)) == 1
    assert DECIMALS == 4
