"""Average precision and recall: those of pycocotools to the last digit, on data that has everything
that its rules speak of.
"""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trainer.scoring.average_precision import (
    DetectionColumns,
    DetectionMatches,
    Objects,
    Scores,
    accumulate,
    match,
    overlap_of_boxes,
    starts_of_runs,
)

CLASSES = 5  # nothing is of the last one


def boxes_of(random: np.random.Generator, count: int) -> np.ndarray:
    """xywh, on a grid so coarse that many overlap equally; of all three sizes, borders included."""
    corners = random.integers(0, 10, (count, 2)) * 8
    sides = random.choice([8, 16, 24, 32, 48, 96, 104, 128], (count, 2))
    return np.concatenate([corners, sides], axis=1).astype(np.float64)


def scene(
    seed: int, images: int, objects: int, detections: int
) -> tuple[Objects, DetectionColumns, tuple]:
    """Objects and detections of images, and the boxes of both. Some images have no objects, some no
    detections, some neither; scores are often equal; every other detection is near an object.
    """
    random = np.random.default_rng(seed)
    ids = np.arange(images) * 3
    places = random.choice(ids[ids % 5 != 0], objects)
    truth_boxes = boxes_of(random, objects)
    truth = Objects(
        image=places,
        label=random.integers(0, CLASSES - 1, objects),
        area=truth_boxes[:, 2:].prod(1) * random.choice([1, 0.5], objects),  # as of masks
        crowd=random.random(objects) < 0.15,
    )
    seen = random.integers(0, objects, detections)
    near = random.random(detections) < 0.5
    boxes = boxes_of(random, detections)
    moved = truth_boxes[seen] + random.choice([0, 0, 8], (detections, 4))
    boxes[near] = moved[near]
    found = DetectionColumns(
        image=np.where(near, places[seen], random.choice(ids[ids % 7 != 0], detections)),
        label=np.where(near, truth.label[seen], random.integers(0, CLASSES - 1, detections)),
        area=boxes[:, 2:].prod(1),
        score=random.integers(1, 12, detections) / 12,
    )
    return truth, found, (truth_boxes, boxes)


def by_pycocotools(truth: Objects, found: DetectionColumns, boxes: tuple) -> dict[str, np.ndarray]:
    images = np.union1d(truth.image, found.image).tolist()
    coco = []
    for things, rows in ((truth, boxes[0]), (found, boxes[1])):
        annotations = [
            {
                "id": number + 1,
                "image_id": int(things.image[number]),
                "category_id": int(things.label[number]),
                "bbox": row,
                "area": float(things.area[number]),
                "iscrowd": int(things is truth and truth.crowd[number]),
                "score": float(found.score[number]) if things is found else 0,
            }
            for number, row in enumerate(rows.tolist())
        ]
        made = COCO()
        made.dataset = {
            "images": [{"id": image} for image in images],
            "categories": [{"id": label, "name": str(label)} for label in range(CLASSES)],
            "annotations": annotations,
        }
        coco.append(made)
    with contextlib.redirect_stdout(io.StringIO()):
        for made in coco:
            made.createIndex()
        evaluator = COCOeval(*coco, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval


def scored(truth: Objects, found: DetectionColumns, boxes: tuple) -> DetectionMatches:
    return match(truth, found, overlap_of_boxes(boxes[1], boxes[0], truth.crowd), CLASSES)


def assert_same(scores: Scores, expected: dict[str, np.ndarray]) -> None:
    assert np.array_equal(scores.precision, expected["precision"][..., -1])
    assert np.array_equal(scores.recall, expected["recall"])


def picked(things: Objects | DetectionColumns, which: np.ndarray) -> Objects | DetectionColumns:
    return replace(things, **{name: column[which] for name, column in vars(things).items()})


@pytest.mark.parametrize(
    ("images", "objects", "detections"),
    [(40, 150, 600), (12, 200, 300), (3, 40, 1500), (200, 60, 90), (4, 3, 1), (4, 1, 3)],
)
def test_numbers_are_those_of_pycocotools(images: int, objects: int, detections: int) -> None:
    for seed in range(4):
        truth, found, boxes = scene(seed, images, objects, detections)
        scores = accumulate([scored(truth, found, boxes)])
        assert_same(scores, by_pycocotools(truth, found, boxes))
        assert (scores.precision[:, :, CLASSES - 1] == -1).all()


def test_the_scenes_have_what_the_rules_speak_of() -> None:
    truth, found, boxes = scene(0, 12, 200, 300)
    assert truth.crowd.any()
    assert len(set(found.score.tolist())) < 15
    small, medium = (truth.area < 32**2).sum(), (truth.area < 96**2).sum()
    assert 0 < small < medium < len(truth.area)
    assert {32.0**2, 96.0**2} <= set(found.area.tolist())
    _, many, _ = scene(0, 3, 40, 1500)
    order = np.lexsort((many.image, many.label))
    counts = np.diff(starts_of_runs(many.label[order], many.image[order]))
    assert counts.max() > 100  # more of a class in an image than are counted
    matches = scored(truth, found, boxes)
    assert matches.right.any() and matches.wrong.any()
    assert (~matches.right & ~matches.wrong)[0].any()  # on a crowd


@pytest.mark.parametrize(("objects", "detections"), [(0, 20), (20, 0), (0, 0)])
def test_nothing_there_or_nothing_found(objects: int, detections: int) -> None:
    truth, found, boxes = scene(1, 20, 60, 60)
    kept = np.arange(60)
    truth, found = picked(truth, kept < objects), picked(found, kept < detections)
    boxes = boxes[0][:objects], boxes[1][:detections]
    scores = accumulate([scored(truth, found, boxes)])
    if objects + detections:
        assert_same(scores, by_pycocotools(truth, found, boxes))
    assert (scores.precision == -1).all() == (objects == 0)


def test_shares_of_the_images_add_up() -> None:
    truth, found, boxes = scene(2, 40, 150, 600)
    shares = []
    for share in (2, 0, 1):
        own, seen = truth.image % 9 == 3 * share, found.image % 9 == 3 * share
        parts = boxes[0][own], boxes[1][seen]
        shares.append(scored(picked(truth, own), picked(found, seen), parts))
    assert_same(accumulate(shares), by_pycocotools(truth, found, boxes))
