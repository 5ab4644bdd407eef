"""Prediction in tiles: the tiles cover the image, and their detections are merged as documented."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vidt import Detections, Predictor, ViDT
from vidt.errors import UserError
from vidt.images.preprocessing import Preprocessing
from vidt.predict.detections import MaskVectors
from vidt.predict.tiles import Tiling, _touching, merge, merged, tiled, tiling
from vidt.weights.weights_file import WeightsInfo

SIZE = (100, 180)  # with tiles of 100: (0..100) and (80..180), and the whole image
NAMES = ("disc", "square", "star")


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(32, 300),
    st.integers(0, 90).map(lambda each: each / 100),
)
def test_tiles_cover_the_image_exactly(height: int, width: int, tile: int, overlap: float) -> None:
    plan = tiling((height, width), tile, overlap)
    whole, small = plan.boxes[-1], plan.boxes[: max(len(plan.boxes) - 1, 1)]
    assert whole.tolist() == [0, 0, width, height]
    assert set(map(tuple, (small[:, 2:] - small[:, :2]).tolist())) == {
        (min(tile, width), min(tile, height))
    }
    covered = np.zeros((height, width), bool)
    for left, top, right, bottom in small.tolist():
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        covered[top:bottom, left:right] = True
    assert covered.all()
    for axis, (length, reach) in enumerate(zip((width, height), plan.reach, strict=True)):
        starts = np.unique(small[:, axis])
        shared = tile - np.diff(starts)
        assert (len(starts) == 1) == (length <= tile) == math.isinf(reach)
        assert (shared >= min(math.ceil(tile * overlap), tile - 1)).all()
        assert len(shared) == 0 or shared.min() == reach


def parts(*rows: tuple[int, int, float, tuple[float, ...]]) -> list[Detections]:
    """The detections (tile, label, score, box in the image) of the three tiles, in their own
    pixels.
    """
    offsets = tiling(SIZE, 100, 0.2).boxes[:, :2].tolist()
    result = []
    for tile, (x, y) in enumerate(offsets):
        own = [row for row in rows if row[0] == tile]
        boxes = torch.tensor([row[3] for row in own]).reshape(-1, 4) - torch.tensor([x, y, x, y])
        scores = torch.tensor([row[2] for row in own])
        labels = torch.tensor([row[1] for row in own], dtype=torch.int64)
        result.append(Detections(scores, labels, boxes, class_names=NAMES))
    return result


def merge_rows(*rows: tuple[int, int, float, tuple[float, ...]]) -> list[tuple]:
    found = merged(parts(*rows), tiling(SIZE, 100, 0.2))
    scores = [round(score, 4) for score in found.scores.tolist()]
    return list(zip(found.labels.tolist(), scores, map(tuple, found.boxes.tolist()), strict=True))


SMALL = (82.0, 40.0, 98.0, 60.0)  # in the 20 columns that both tiles see


def crowd(seed: int) -> tuple[tuple[np.ndarray, ...], Tiling]:
    """Fifteen detections of two classes in each tile of a large image, many of one object; and the
    plan.
    """
    plan = tiling((900, 900), 100, 0.3)
    generator = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(plan.boxes)), 15)
    centres = generator.integers(0, 900 // 20, (len(owner), 2)) * 20
    tiles = plan.boxes[owner]
    centres = centres % (tiles[:, 2:] - tiles[:, :2]) + tiles[:, :2]
    sides = generator.choice([20, 60, 300], (len(owner), 2)) + generator.integers(0, 4, (2,))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], 1).astype(np.float32)
    scores = generator.random(len(owner)).astype(np.float32)
    return (boxes, generator.integers(0, 2, len(owner)), scores, owner), plan


@pytest.mark.parametrize("seed", range(3))
def test_only_tiles_that_overlap_are_compared(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the result of comparing all with all, at a fraction of the comparisons."""
    compared = 0

    def touching(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(boxes)
        return _touching(boxes, box)

    monkeypatch.setattr("vidt.predict.tiles._touching", touching)
    detections, plan = crowd(seed)
    rows, grown = merge(*detections, plan)
    near, compared = compared, 0
    number = len(plan.boxes)
    monkeypatch.setattr(
        "vidt.predict.tiles._overlapping", lambda _: np.ones((number, number), bool)
    )
    all_rows, all_grown = merge(*detections, plan)
    assert np.array_equal(rows, all_rows) and np.array_equal(grown, all_grown)
    assert len(rows) < len(detections[0]) and (grown != detections[0][rows]).any()
    assert near < compared / 4


def test_an_object_in_two_tiles_counts_once() -> None:
    shifted = (83.0, 40.0, 98.0, 61.0)
    assert merge_rows((0, 1, 0.8, SMALL), (1, 1, 0.9, shifted)) == [(1, 0.9, shifted)]


def test_other_classes_and_other_places_stay() -> None:
    rows = ((0, 1, 0.8, SMALL), (1, 2, 0.7, SMALL), (1, 1, 0.6, (82.0, 5.0, 98.0, 25.0)))
    assert merge_rows(*rows) == [row[1:] for row in rows]


def test_detections_of_one_tile_never_merge() -> None:
    rows = ((0, 1, 0.8, SMALL), (0, 1, 0.7, SMALL))
    assert merge_rows(*rows) == [row[1:] for row in rows]


def test_a_part_is_absorbed_by_the_whole() -> None:
    """Tile 1 sees only the right quarter of an object that tile 0 sees whole."""
    whole, part = (68.0, 40.0, 96.0, 60.0), (80.0, 40.0, 96.0, 60.0)
    assert merge_rows((0, 1, 0.9, whole), (1, 1, 0.7, part)) == [(1, 0.9, whole)]
    # The part scores more: it keeps its score, and its cut side moves to the end of the whole.
    assert merge_rows((0, 1, 0.7, whole), (1, 1, 0.9, part)) == [(1, 0.9, whole)]
    # Less than half the score moves nothing.
    assert merge_rows((0, 1, 0.4, whole), (1, 1, 0.9, part)) == [(1, 0.9, part)]


def test_two_parts_become_one_box() -> None:
    """An object that no tile sees whole."""
    left, right = (50.0, 40.0, 100.0, 60.0), (80.0, 41.0, 130.0, 61.0)
    assert merge_rows((0, 1, 0.8, left), (1, 1, 0.9, right)) == [
        (1, 0.9, (50.0, 41.0, 130.0, 61.0))
    ]


def test_parts_agree_through_the_whole_image() -> None:
    """Three parts without a common area are one object, which the whole image sees, too."""
    plan = tiling((100, 300), 100, 0.0)
    assert len(plan.boxes) == 4
    boxes = np.array(
        [[50, 40, 100, 60], [100, 40, 200, 60], [200, 40, 250, 60], [51, 40, 250, 60]], np.float32
    )
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    rows, grown = merge(boxes, np.zeros(4, int), scores, np.arange(4), plan)
    assert rows.tolist() == [0] and grown.tolist() == [[50, 40, 250, 60]]


def test_the_whole_image_counts_for_large_objects_only() -> None:
    large = (10.0, 10.0, 170.0, 90.0)
    assert merge_rows((2, 1, 0.9, SMALL), (2, 0, 0.8, large)) == [(0, 0.8, large)]


def test_boxes_end_where_their_tile_does_and_masks_stay() -> None:
    """A box that sticks out of the tile is clipped; its mask's square is not."""
    box = torch.tensor([[40.0, 40.0, 130.0, 60.0]])
    empty = torch.zeros(0, 4)
    vectors = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))

    def part(boxes: torch.Tensor, size: tuple[int, int]) -> Detections:
        scores, labels = torch.full((len(boxes),), 0.9), torch.zeros(len(boxes), dtype=torch.int64)
        return Detections(scores, labels, boxes, MaskVectors(vectors[: len(boxes)], 16, size))

    found = merged(
        [part(box, (100, 100)), part(empty, (100, 100)), part(empty, SIZE)], tiling(SIZE, 100, 0.2)
    )
    assert found.boxes.tolist() == [[40.0, 40.0, 100.0, 60.0]]
    expected = part(box, SIZE).masks
    assert found.masks is not None and torch.equal(found.masks, expected)
    assert found.masks.shape == (1, *SIZE)


@pytest.fixture
def predictor(tiny_model: ViDT) -> Predictor:
    return Predictor(tiny_model, WeightsInfo(tiny_model.config, NAMES, Preprocessing(64)))


@pytest.fixture
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(60, 80), (150, 200), (33, 47), (60, 80)]
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]


def test_a_tile_of_the_whole_image_is_plain_prediction(
    predictor: Predictor, pictures: list[Image.Image]
) -> None:
    plain = predictor.predict(pictures, threshold=0.0)
    whole = predictor.predict(pictures, threshold=0.0, tile=200)
    for one, other in zip(plain, whole, strict=True):
        for column in ("scores", "labels", "boxes"):
            assert torch.equal(getattr(one, column), getattr(other, column))


def test_more_detections_than_tokens(
    predictor: Predictor, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """7 tokens and 3 classes give 21 detections in a tile; order and sources are those of the
    images, also where only one of them is divided.
    """
    pictures[1].save(tmp_path / "large.png")
    given = [pictures[0], tmp_path / "large.png", *pictures[2:]]
    found = predictor.predict(given, threshold=0.0, tile=100, overlap=0.1)
    assert [len(each) for each in found[:1] + found[2:]] == [21, 21, 21]
    assert len(found[1]) > 21 and (found[1].scores.diff() <= 0).all()
    assert [each.source for each in found] == given
    assert (found[1].boxes >= 0).all()
    assert (found[1].boxes <= torch.tensor([200, 150, 200, 150])).all()
    (alone,) = predictor.predict(given[1:2], threshold=0.0, tile=100, overlap=0.1)
    assert torch.equal(alone.labels, found[1].labels)


def test_tiles_reach_the_detector_as_they_are_cut() -> None:
    """A detector that reports the mean colour: each tile is the part of the image that the plan
    says.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    seen: list[np.ndarray] = []

    def stream(images: Iterator[Image.Image]) -> Iterator[tuple[int, Detections]]:
        for index, image in enumerate(images):
            seen.append(np.asarray(image))
            yield index, Detections(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 4))

    ((index, found),) = tiled(stream, [pixels], tile=100, overlap=0.2)
    assert index == 0 and len(found) == 0
    expected = [pixels[:, :100], pixels[:, 80:], pixels]
    assert all(np.array_equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize(
    ("given_settings", "named"),
    [({"tile": 8}, "tile"), ({"tile": 64, "overlap": 0.95}, "overlap"), ({"tile": 64.5}, "tile")],
)
def test_settings_out_of_range_are_named(
    predictor: Predictor, pictures: list[Image.Image], given_settings: dict, named: str
) -> None:
    with pytest.raises(UserError, match=f"{named} is"):
        predictor.predict(pictures[0], **given_settings)
