"""COCO metrics: those of plain pycocotools, whatever the batch size, and of the saved weights
wherever they are evaluated.
"""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_runs import NAMES, Learnt, cpu, random_pictures, write_split

from trainer.loop.agreement import Agreement
from trainer.readers.coco import read_coco
from trainer.readers.samples import Sample, SampleTable
from trainer.scoring.average_precision import COCO_NUMBERS, STATS
from trainer.scoring.evaluation import Evaluation, evaluate, score_images, summarise
from vidt import Detections, Predictor
from vidt.ops.packing import PackedLinear, onednn_runs
from vidt.weights.checkpoint import load_model
from vidt.weights.weights_file import load_weights

WITH_NEVER = (*NAMES, "never")  # a class that no picture shows
IDS = (7, 900, 3, 12)


@pytest.fixture(scope="module")
def crowded(learnt: Learnt, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four pictures that the detector knows, one box of which is a crowd region now, and five
    that it does not know.
    """
    known, unknown = random_pictures(4, seed=0), random_pictures(5, seed=3)
    first = known[0]
    crowd = (*first.boxes[0][:5], 1)
    pictures = [replace(first, boxes=(crowd, *first.boxes[1:])), *known[1:], *unknown]
    root = tmp_path_factory.mktemp("crowded")
    write_split(root, "val", pictures, ids=IDS, names=WITH_NEVER)
    return root


@pytest.fixture
def samples(learnt: Learnt, crowded: Path) -> SampleTable:
    """The classes of the weights first, as a run that trains on one class more would have them."""
    names = (*load_weights(learnt.weights)[1].class_names, "never")
    return read_coco(crowded / "annotations/instances_val2017.json", crowded / "val2017", names)[0]


def evaluated(weights: Path, samples: SampleTable, **more: Any) -> Evaluation:
    model, info = load_model(weights)
    settings = {"batch_size": 2, "num_workers": 0} | more
    return evaluate(model, samples, info.preprocessing, cpu(), Agreement(cpu()), **settings)


def inside(boxes: torch.Tensor, image: dict[str, Any]) -> torch.Tensor:
    """Clipped to the image, as results are written everywhere."""
    limits = torch.tensor([image["width"], image["height"]] * 2, dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits)


def by_pycocotools(
    weights: Path, root: Path, change: Callable[[dict], None] = lambda document: None
) -> dict[str, float]:
    """The twelve numbers of what the saved weights find in the files, and the AP of each class."""
    predictor = Predictor.from_checkpoint(weights)
    document = json.loads((root / "annotations/instances_val2017.json").read_text())
    change(document)
    truth = COCO()
    truth.dataset = document
    ids = {category["name"]: category["id"] for category in document["categories"]}
    paths = [root / "val2017" / image["file_name"] for image in document["images"]]
    rows = [
        {
            "image_id": image["id"],
            "category_id": ids[predictor.class_names[label]],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image, found in zip(document["images"], predictor(paths), strict=True)
        for (x1, y1, x2, y2), label, score in zip(
            inside(found.boxes, image).tolist(),
            found.labels.tolist(),
            found.scores.tolist(),
            strict=True,
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = dict(zip(STATS, evaluator.stats.tolist(), strict=True))
    for index, category_id in enumerate(evaluator.params.catIds):
        precision = evaluator.eval["precision"][:, :, index, 0, -1]
        name = truth.cats[category_id]["name"]
        for key, values in (("ap", precision), ("ap50", precision[0])):
            scored = values[values > -1]
            metrics[f"{key}/{name}"] = float(scored.mean()) if scored.size else -1.0
    return metrics


def test_the_numbers_are_those_of_pycocotools(
    learnt: Learnt, crowded: Path, samples: SampleTable
) -> None:
    found = evaluated(learnt.weights, samples).metrics
    assert found == pytest.approx(by_pycocotools(learnt.weights, crowded), abs=1e-9)
    assert 0.1 < found["map50"] < 1
    assert list(found)[:12] == list(COCO_NUMBERS) and next(iter(found)) == "map50"


def test_crowd_regions_are_honoured(learnt: Learnt, crowded: Path, samples: SampleTable) -> None:
    """Taken for an object the crowd region gives other numbers: the test above has teeth."""

    def no_crowd(document: dict) -> None:
        for annotation in document["annotations"]:
            annotation["iscrowd"] = 0

    found = evaluated(learnt.weights, samples).metrics
    without = by_pycocotools(learnt.weights, crowded, no_crowd)
    assert abs(found["map"] - without["map"]) > 1e-3


def test_a_class_without_boxes_has_no_score(learnt: Learnt, samples: SampleTable) -> None:
    found = evaluated(learnt.weights, samples).metrics
    assert (found["ap/never"], found["ap50/never"]) == (-1.0, -1.0)
    scored = [found[f"ap50/{name}"] for name in NAMES]
    assert found["map50"] == pytest.approx(np.mean(scored))


def test_nothing_to_score_at_all(learnt: Learnt, samples: SampleTable) -> None:
    bare = samples.keep_boxes(torch.zeros(len(samples.labels), dtype=torch.bool))
    metrics = evaluated(learnt.weights, bare).metrics
    assert set(metrics.values()) == {-1.0}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (5, 0), (2, 2), (100, 1)])
def test_batches_and_workers_do_not_matter(
    learnt: Learnt, samples: SampleTable, batch_size: int, num_workers: int
) -> None:
    assert len({tuple(size) for size in samples.sizes.tolist()}) == 4
    expected = evaluated(learnt.weights, samples).metrics
    more = {"batch_size": batch_size, "num_workers": num_workers}
    assert evaluated(learnt.weights, samples, **more).metrics == pytest.approx(expected, abs=1e-6)


def test_order_of_images_and_ids_do_not_matter(learnt: Learnt, samples: SampleTable) -> None:
    turned = samples.subset(list(reversed(range(len(samples)))))
    expected = evaluated(learnt.weights, samples).metrics
    assert evaluated(learnt.weights, turned).metrics == pytest.approx(expected, abs=1e-6)


def test_an_image_that_cannot_be_read_any_more_counts_as_nothing_found(
    learnt: Learnt, samples: SampleTable, tmp_path: Path
) -> None:
    whole = evaluated(learnt.weights, samples)
    assert whole.unreadable == 0
    path = Path(samples.path(1))
    path.rename(tmp_path / "away.png")
    try:
        without = evaluated(learnt.weights, samples)
    finally:
        (tmp_path / "away.png").rename(path)
    assert without.unreadable == 1 and 1 not in without.detections
    assert without.metrics["map50"] < whole.metrics["map50"]


def test_the_model_is_left_as_it_was(learnt: Learnt, samples: SampleTable) -> None:
    model, info = load_model(learnt.weights)
    model.train()
    progress: list[float] = []

    def is_packed() -> bool:
        return any(isinstance(module, PackedLinear) for module in model.modules())

    def tick(fraction: float) -> None:
        progress.append(fraction)
        assert is_packed() == onednn_runs()

    evaluate(
        model,
        samples,
        info.preprocessing,
        cpu(),
        Agreement(cpu()),
        batch_size=4,
        num_workers=0,
        tick=tick,
    )
    assert model.training and not is_packed()
    assert progress == sorted(progress) and progress[-1] == 1.0


def test_the_saved_weights_predict_what_training_scored(learnt: Learnt) -> None:
    """One preprocessing: the number in the file is the one that its user gets."""
    info = load_weights(learnt.weights)[1]
    assert info.metrics["map50"] > 0.5
    found = by_pycocotools(learnt.weights, learnt.data)
    assert found == pytest.approx(info.metrics, abs=1e-6)
    last = learnt.output / "last.safetensors"
    assert by_pycocotools(last, learnt.data) == pytest.approx(learnt.scores[40], abs=1e-6)


def test_what_lies_beyond_the_image_does_not_count() -> None:
    """The same object, found far beyond the border, and as the image shows it."""
    box = torch.tensor([[10.0, 20.0, 40.0, 50.0]])
    columns = {"labels": torch.tensor([0]), "areas": torch.tensor([900.0])}
    sample = Sample("a.png", 1, (50, 40), box, crowd=torch.tensor([False]), **columns)
    table = SampleTable.from_samples([sample], ["a"])
    found = torch.tensor([[10.0, 20.0, 140.0, 150.0]])
    detections = {0: Detections(torch.tensor([0.9]), torch.tensor([0]), found)}
    assert summarise(table, [score_images(table, [0], detections)])["map"] == pytest.approx(1)
