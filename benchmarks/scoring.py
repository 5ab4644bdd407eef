"""Time to score detections: plain pycocotools, and `trainer.scoring.evaluation`, on the same ones.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --images 500 --classes 20

Both start from what was found, in memory, and end with the COCO numbers, which must be the same to
the last digit. The images, objects and detections are random, about as many as COCO has: some
detections are near objects, the others anywhere.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trainer.readers.samples import SampleTable
from trainer.scoring.average_precision import STATS
from trainer.scoring.evaluation import score_images, summarise
from vidt.predict.detections import Detections

OBJECTS = 7  # of an image, on average
NEAR = 5  # detections of each object
SIZE = (480, 640)


def random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    """xyxy, float32, inside the image."""
    height, width = SIZE
    sides = np.exp(random.uniform(np.log(8), np.log(min(SIZE) - 1), (count, 2)))
    corners = random.uniform(0, 1, (count, 2)) * (np.array([width, height]) - sides)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


def random_table(random: np.random.Generator, images: int, classes: int) -> SampleTable:
    count = images * OBJECTS
    boxes = random_boxes(random, count)
    return SampleTable.from_columns(
        source="random",
        class_names=[str(number) for number in range(classes)],
        category_ids=range(classes),
        paths=[f"{number}.jpg" for number in range(images)],
        image_ids=range(images),
        sizes=np.tile(SIZE, (images, 1)),
        owners=random.integers(0, images, count),
        boxes=boxes,
        labels=random.integers(0, classes, count),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=random.random(count) < 0.01,
        annotation_ids=range(1, count + 1),
    )


def random_detections(
    random: np.random.Generator, table: SampleTable, each: int
) -> dict[int, Detections]:
    """`each` detections of every image, best first."""
    found = {}
    for index, sample in enumerate(table):
        boxes, labels = random_boxes(random, each), random.integers(0, len(table.class_names), each)
        own = np.arange(len(sample.boxes)).repeat(NEAR)[:each]
        sides = np.tile((sample.boxes[:, 2:] - sample.boxes[:, :2]).numpy()[own], 2)
        boxes[: len(own)] = sample.boxes.numpy()[own] + random.normal(0, 0.08, sides.shape) * sides
        labels[: len(own)] = sample.labels.numpy()[own]
        scores = np.concatenate([random.beta(2, 3, len(own)), random.beta(1, 8, each - len(own))])
        order = np.argsort(-scores)
        columns = (scores.astype(np.float32), labels, boxes)
        best_first = [torch.from_numpy(column[order]) for column in columns]
        found[index] = Detections(best_first[0], best_first[1], best_first[2])
    return found


def by_pycocotools(table: SampleTable, rows: np.ndarray) -> list[float]:
    """The twelve numbers of rows [D, 7]: image, x, y, width, height, score, class."""
    truth = COCO()
    owners = table.box_owners.tolist()
    corners = table.boxes.double()
    xywh = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    columns = (owners, xywh, table.labels.tolist(), table.areas.tolist(), table.crowd.tolist())
    truth.dataset = {
        "images": [{"id": index} for index in range(len(table))],
        "categories": [{"id": label, "name": name} for label, name in enumerate(table.class_names)],
        "annotations": [
            {
                "id": number,
                "image_id": owner,
                "bbox": box,
                "category_id": label,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (owner, box, label, area, crowd) in enumerate(zip(*columns, strict=True), 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist()


def rows_of(found: dict[int, Detections]) -> np.ndarray:
    """As pycocotools takes them quickest; boxes are clipped to the image, as here."""
    height, width = SIZE
    parts = []
    for index, each in found.items():
        limits = torch.tensor([width, height] * 2, dtype=torch.float32)
        corners = torch.minimum(each.boxes.clamp(min=0), limits).double()
        image = torch.full((len(corners), 1), index)
        scores, labels = each.scores[:, None], each.labels[:, None]
        sides = corners[:, 2:] - corners[:, :2]
        parts.append(torch.cat([image, corners[:, :2], sides, scores, labels], dim=1))
    return torch.cat(parts).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to score detections.")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="of each image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args()
    if min(given.images, given.detections, given.classes) < 1:
        parser.error("--images, --detections and --classes must be 1 or more")
    random = np.random.default_rng(0)
    table = random_table(random, given.images, given.classes)
    found = random_detections(random, table, given.detections)
    rows = rows_of(found)

    start = time.perf_counter()
    theirs = by_pycocotools(table, rows)
    middle = time.perf_counter()
    numbers = summarise(table, [score_images(table, list(range(len(table))), found)])
    end = time.perf_counter()

    same = [numbers[name] for name in STATS] == theirs
    plain, ours = middle - start, end - middle
    print(f"{given.images} images, {len(rows)} detections, {given.classes} classes: ", end="")
    print(f"map {numbers['map']:.4f}, numbers {'equal' if same else 'DIFFERENT'}")
    print(f"pycocotools {plain:.2f} s, ours {ours:.2f} s, ratio {plain / ours:.1f}")
    if given.json is not None:
        sizes = {"images": given.images, "detections": len(rows), "classes": given.classes}
        times = {"pycocotools": plain, "ours": ours, "ratio": plain / ours, "equal": same}
        given.json.write_text(json.dumps(sizes | times, indent=1))
    if not same:
        parser.exit(1, "error: the numbers differ\n")


if __name__ == "__main__":
    main()
