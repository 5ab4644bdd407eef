"""`vidt evaluate`'s reading and scoring: pycocotools' numbers, from files however wrong, and no
traceback.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_runs import call

from trainer.commands.evaluate import predict, read
from trainer.scoring.coco_scores import WORDS, box_scores, judge, mask_scores
from trainer.scoring.prediction_formats import ImagePredictions, run_lengths
from vidt.onnx.detector import OnnxDetections

NAMES = ("red", "green", "blue", "none of it")
IDS = {"red": 7, "green": 900, "blue": 3}
SIZE = (120, 160)


def random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    """xyxy inside the image, on a grid that makes many overlaps equal; of all of COCO's sizes."""
    corners = random.integers(0, 5, (count, 2)) * 4.0
    sides = random.choice([8, 16, 28, 36, 60, 100], (count, 2))
    return np.concatenate([corners, corners + sides], 1)


def drawn(boxes: np.ndarray) -> np.ndarray:
    """An ellipse in each box: bool [n, H, W]."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    centre = boxes[:, :2] + half
    dx = (x - centre[:, 0, None, None]) / half[:, 0, None, None]
    dy = (y - centre[:, 1, None, None]) / half[:, 1, None, None]
    return dx**2 + dy**2 <= 1


def scene(seed: int, images: int = 12) -> tuple[dict[str, Any], dict[int, ImagePredictions]]:
    """A COCO document, its image ids in no order, and what was found in its images, by place.
    Scores are often equal, so that the order in which they are looked at matters.
    """
    random = np.random.default_rng(seed)
    ids = random.permutation(images) * 10 + 5
    document: dict[str, Any] = {
        "images": [
            {"id": int(own), "file_name": f"{own}.png", "height": SIZE[0], "width": SIZE[1]}
            for own in ids
        ],
        "categories": [{"id": own, "name": name} for name, own in IDS.items()],
        "annotations": [],
    }
    found = {}
    for place, own in enumerate(ids.tolist()):
        boxes = random_boxes(random, int(random.integers(0, 9)))
        labels = random.integers(0, 3, len(boxes))
        masks = run_lengths(drawn(boxes))
        for box, label, mask in zip(boxes.tolist(), labels.tolist(), masks, strict=True):
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": own,
                    "category_id": IDS[NAMES[label]],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": float((box[2] - box[0]) * (box[3] - box[1]) * random.choice([1, 0.7])),
                    "iscrowd": int(random.random() < 0.15),
                    "segmentation": {"size": list(SIZE), "counts": mask},
                }
            )
        near = boxes + random.choice([0, 0, 4], boxes.shape)
        guesses = np.concatenate([near, random_boxes(random, 30)])
        found[place] = ImagePredictions(
            "",
            SIZE,
            guesses,
            [*labels.tolist(), *random.integers(0, 4, 30).tolist()],
            scores=(random.integers(1, 9, len(guesses)) / 9).tolist(),
            masks=run_lengths(drawn(guesses)),
        )
    return document, found


def by_pycocotools(document: dict[str, Any], found: dict[int, ImagePredictions], kind: str) -> dict:
    """The twelve numbers, and precision [IoU, recall, class] of the three classes."""
    label_of = {own: NAMES.index(name) for name, own in IDS.items()}
    truth = [
        each | {"category_id": label_of[each["category_id"]]} for each in document["annotations"]
    ]
    rows = [
        {
            "image_id": document["images"][place]["id"],
            "category_id": each.labels[row],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": each.scores[row],
            "segmentation": {"size": list(SIZE), "counts": each.masks[row]},  # type: ignore[index]
        }
        for place, each in found.items()
        for row, (x1, y1, x2, y2) in enumerate(each.boxes.tolist())
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        categories = [{"id": label} for label in range(len(NAMES))]
        index.dataset = document | {"categories": categories, "annotations": truth}
        index.createIndex()
        # Given both, pycocotools would take the areas of boxes for those of masks.
        other = "segmentation" if kind == "bbox" else "bbox"
        rows = [{k: v for k, v in row.items() if k != other} for row in rows]
        evaluator = COCOeval(index, index.loadRes(rows), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    numbers = dict(zip(WORDS, evaluator.stats.tolist(), strict=True))
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    for label, name in enumerate(NAMES):
        for key, part in (("ap", precision[:, :, label]), ("ap50", precision[0, :, label])):
            numbers[f"{key}/{name}"] = float(part.mean())  # all are -1 where there is nothing
    return numbers


def written(folder: Path, document: Any) -> Path:
    """The file; one of its images lies beside it."""
    path = folder / "some.json"
    path.write_text(json.dumps(document))
    Image.new("RGB", SIZE[::-1]).save(folder / document["images"][0]["file_name"])
    return path


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_those_of_pycocotools(seed: int, tmp_path: Path) -> None:
    document, found = scene(seed)
    file = read(str(written(tmp_path, document)), str(tmp_path), NAMES)
    truth = judge(file, found)
    assert truth.left_out == {}
    numbers = box_scores(file, truth, found, NAMES)
    wanted = by_pycocotools(document, found, "bbox")
    assert list(numbers) == list(wanted)
    assert numbers == pytest.approx(wanted, abs=1e-12)
    of_masks, unusable = mask_scores(file, truth, found, NAMES)
    wanted = by_pycocotools(document, found, "segm")
    assert of_masks == pytest.approx({f"segm_{k}": wanted[k] for k in WORDS}, abs=1e-12)
    assert unusable == 0 and 0.05 < numbers["map"] != of_masks["segm_map"] < 0.9


def test_images_that_cannot_be_read_take_their_objects_along(tmp_path: Path) -> None:
    document, found = scene(1)
    gone = {0, 5}
    found = {place: each for place, each in found.items() if place not in gone}
    file = read(str(written(tmp_path, document)), str(tmp_path), NAMES)
    ids = {document["images"][place]["id"] for place in gone}
    rest = [each for each in document["annotations"] if each["image_id"] not in ids]
    wanted = by_pycocotools(document | {"annotations": rest}, found, "bbox")
    numbers = box_scores(file, judge(file, found), found, NAMES)
    assert numbers == pytest.approx(wanted, abs=1e-12)


def test_the_same_image_twice_is_refused(tmp_path: Path) -> None:
    document, _ = scene(0)
    document["images"].append(dict(document["images"][3], file_name="other.png"))
    path = written(tmp_path, document)
    with pytest.raises(ValueError, match=r"--json .*some\.json: image id \d+ is used twice"):
        read(str(path), str(tmp_path), NAMES)


HUGE = 10**400


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"category_id": [1]}, "of an unknown category"),
        ({"category_id": HUGE}, "of an unknown category"),
        ({"image_id": {"a": 1}}, "of an unknown image"),
        ({"image_id": HUGE}, "of an unknown image"),
        ({"bbox": None}, "whose box is not four numbers"),
        ({"bbox": [1, 2, HUGE, 4]}, "whose box is not four numbers"),
        ({"bbox": [1, 2, float("nan"), 4]}, "whose box is not four numbers"),
        ({"bbox": [1, 2, 0, 4]}, "whose box has no area in its image"),
        ({"bbox": [-9, 2, 9, 4]}, "whose box has no area in its image"),
        ({"area": HUGE}, None),
        ({"area": "wide"}, None),
        ({"iscrowd": [0]}, None),
        ({"segmentation": [[HUGE] * 6]}, None),
    ],
    ids=range(13),
)
def test_what_is_wrong_with_an_annotation_is_told(
    tmp_path: Path, change: dict[str, Any], reason: str | None
) -> None:
    document, found = scene(2)
    document["annotations"][4].update(change)
    file = read(str(written(tmp_path, document)), str(tmp_path), NAMES)
    truth = judge(file, found)
    assert truth.left_out == ({reason: 1} if reason else {})
    assert len(truth.rows) == len(document["annotations"]) - bool(reason)
    assert np.isfinite(truth.areas).all()
    numbers = box_scores(file, truth, found, NAMES)
    of_masks, unusable = mask_scores(file, truth, found, NAMES)
    assert numbers["map"] > 0 < of_masks["segm_map"]
    assert unusable == ("segmentation" in change)


class Nothing:
    """A detector that finds one box in whatever it is given."""

    class_names = NAMES

    def stream(self, images: list[Image.Image], *, batch_size: int) -> Any:
        box = np.array([[2, 2, 400, 50]], np.float32)
        for index, image in enumerate(images):
            size = (image.height, image.width)
            score, label = np.ones(1, np.float32), np.zeros(1, np.int64)
            yield index, OnnxDetections(score, label, box, NAMES, size)


@pytest.mark.parametrize("height", [None, HUGE, -1, "high"], ids=["none", "huge", "-1", "text"])
def test_a_size_that_is_not_told_is_that_of_the_picture(tmp_path: Path, height: Any) -> None:
    image = {"id": 1, "file_name": "1.png", "height": height, "width": 160}
    row = {"image_id": 1, "category_id": 7, "bbox": [2, 2, 1000, 48]}
    document = {
        "images": [image],
        "annotations": [row],
        "categories": [{"id": 7, "name": "red"}],
    }
    file = read(str(written(tmp_path, document)), str(tmp_path), NAMES)
    found, unread = predict(Nothing(), file, str(tmp_path), 1)
    truth = judge(file, found)
    assert not unread and truth.boxes.tolist() == [[2, 2, 160, 50]]
    assert truth.areas.tolist() == [158 * 48]
    assert box_scores(file, truth, found, NAMES)["map"] == pytest.approx(1)


def test_no_masks_no_numbers_of_masks(tmp_path: Path) -> None:
    document, found = scene(3)
    for each in document["annotations"]:
        each["segmentation"] = []
    file = read(str(written(tmp_path, document)), str(tmp_path), NAMES)
    assert mask_scores(file, judge(file, found), found, NAMES) == ({}, 0)


def test_objects_without_a_mask_are_no_mistake(tmp_path: Path) -> None:
    """pycocotools has no number for such a file; here those count that have a mask."""
    document, _ = scene(3)
    things = document["annotations"]
    found = {
        place: ImagePredictions("", SIZE, np.zeros((0, 4)), masks=[])
        for place in range(len(document["images"]))
    }
    place_of = {each["id"]: place for place, each in enumerate(document["images"])}
    first, second = things[:2]
    first["iscrowd"] = second["iscrowd"] = 0
    second.pop("segmentation")
    document["annotations"] = [first, second]
    x, y, w, h = first["bbox"]
    label = NAMES.index(next(name for name, own in IDS.items() if own == first["category_id"]))
    mask = first["segmentation"]["counts"]
    box = np.array([[x, y, x + w, y + h]])
    place = place_of[first["image_id"]]
    found[place] = ImagePredictions("", SIZE, box, [label], scores=[0.9], masks=[mask])
    file = read(str(written(tmp_path, document)), str(tmp_path), NAMES)
    numbers, unusable = mask_scores(file, judge(file, found), found, NAMES)
    assert numbers["segm_map"] == pytest.approx(1) and unusable == 0


def test_it_needs_neither_pytorch_nor_the_evaluator_of_pycocotools() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'pycocotools.cocoeval'): sys.modules[name] = None\n"
        "import trainer.scoring.coco_scores, trainer.commands.evaluate\n"
    )
    done = call([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
