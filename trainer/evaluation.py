"""COCO metrics of a model on a table of samples, shared among processes; every image is scored
exactly once.

The result does not depend on the number of processes or on the batch size: images are resized to
canvases of their own, only equal canvases share a batch, and per-image scores are put back into the
order of the table before they are summed up.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import clip_boxes_to_image

from trainer.agreement import Agreement
from trainer.data import EvaluationDataset, leave_signals_to_the_parent
from trainer.report import COCO_NUMBERS
from trainer.samples import SampleTable
from vidt.predictor import Detections, decode_top_k
from vidt.preprocessing import Preprocessing, canvas_batches, pad_batch

# COCOeval.stats in its own order.
STATS = (
    *("map", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)


class Interrupted(Exception):
    """A stop was asked for while evaluating, by `signum`; raised on every process alike."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name (-1 where there is nothing to score) and this process's detections by index
    of the sample.
    """

    metrics: dict[str, float]
    detections: dict[int, Detections]
    unreadable: int


def evaluate(
    model: nn.Module,
    samples: SampleTable,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
    agreement: Agreement,
    *,
    batch_size: int,
    num_workers: int,
    tick: Callable[[float], None] = lambda fraction: None,
    stop: Callable[[], int] = lambda: 0,
) -> Evaluation:
    """Predicts this process's share, scores it, and puts all shares together.

    tick gets the share of the work that is done, 0..1. stop is asked between batches; if any
    process is told to, all raise Interrupted.
    """
    canvases = [preprocessing.canvas(height, width) for height, width in samples.sizes.tolist()]
    batches = canvas_batches(canvases, batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    dataset = EvaluationDataset(samples, preprocessing)
    loader = DataLoader(
        dataset,
        batch_sampler=mine,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_the_parent,
    )
    detections: dict[int, Detections] = {}
    signum = 0
    for done, batch in enumerate(loader):
        detections.update(predict_batch(model, batch, samples.sizes, accelerator))
        tick((done + 1) / len(mine))
        if signum := stop():
            break
    signum = int(agreement.gather(signum).max())
    if signum:
        raise Interrupted(signum)
    indices = sorted(index for batch in mine for index in batch)
    shares = agreement.gather_objects(score_images(samples, indices, detections))
    unreadable = int(agreement.gather(len(indices) - len(detections))[:, 0].sum())
    return Evaluation(summarise(samples, shares), detections, unreadable)


@torch.no_grad()
def predict_batch(
    model: nn.Module,
    batch: list[tuple[int, Tensor | None]],
    sizes: Tensor,
    accelerator: Accelerator,
) -> dict[int, Detections]:
    """Detections, in pixels of the original images and on the CPU, of the images that could be
    read.
    """
    indices = [index for index, image in batch if image is not None]
    if not indices:
        return {}
    images, padding = send_to_device(
        pad_batch([image for _, image in batch if image is not None]), accelerator.device
    )
    training = model.training
    model.eval()
    with accelerator.autocast():
        outputs = model(images, padding)
    model.train(training)
    found = decode_top_k(outputs, sizes[indices].to(accelerator.device))
    return {
        index: Detections(each.scores.cpu(), each.labels.cpu(), each.boxes.cpu())
        for index, each in zip(indices, found, strict=True)
    }


def score_images(
    samples: SampleTable, indices: list[int], detections: dict[int, Detections]
) -> tuple[list[int], list[dict | None]]:
    """pycocotools' per-image results of some samples: (indices, results in its order class, area
    range, image).
    """
    evaluator = _evaluator(samples, indices, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        if indices:
            evaluator.evaluate()
    return indices, evaluator.evalImgs if indices else []


def summarise(
    samples: SampleTable, shares: list[tuple[list[int], list[dict | None]]]
) -> dict[str, float]:
    """All twelve COCO numbers, map50 first, then `ap/CLASS` and `ap50/CLASS`."""
    evaluator = _evaluator(samples, [], {})
    params = evaluator.params
    order = np.concatenate([np.asarray(indices, np.int64) for indices, _ in shares])
    groups = len(params.catIds) * len(params.areaRng)
    columns = [
        np.array(results, dtype=object).reshape(groups, len(indices)) for indices, results in shares
    ]
    merged = np.concatenate(columns, axis=1)[:, np.argsort(order)]
    params.imgIds = np.sort(order).tolist()
    evaluator.evalImgs = merged.reshape(-1).tolist()
    evaluator._paramsEval = params
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
        evaluator.summarize()
    numbers = dict(zip(STATS, evaluator.stats.tolist(), strict=True))
    metrics = {name: numbers[name] for name in COCO_NUMBERS}
    precision = evaluator.eval["precision"][
        :, :, :, 0, -1
    ]  # [IoU, recall, class], all areas, 100 detections
    for label, name in enumerate(samples.class_names):
        metrics[f"ap/{name}"] = _mean(precision[:, :, label])
        metrics[f"ap50/{name}"] = _mean(precision[0, :, label])
    return metrics


def _mean(precision: np.ndarray) -> float:
    scored = precision[precision > -1]
    return float(scored.mean()) if scored.size else -1.0


def _evaluator(
    samples: SampleTable, indices: list[int], detections: dict[int, Detections]
) -> COCOeval:
    """COCOeval on some samples; image ids are indices of the table, category ids are labels."""
    truth, results = COCO(), COCO()
    categories = [{"id": label, "name": name} for label, name in enumerate(samples.class_names)]
    images = [{"id": index} for index in indices]
    truth.dataset = {"images": images, "categories": categories, "annotations": []}
    results.dataset = {"images": images, "categories": categories, "annotations": []}
    for index in indices:
        sample = samples[index]
        for box, label, area, crowd in zip(
            sample.boxes.tolist(),
            sample.labels.tolist(),
            sample.areas.tolist(),
            sample.crowd.tolist(),
            strict=True,
        ):
            _add(truth, index, label, box, area=area, iscrowd=int(crowd))
        if index in detections:
            found = detections[index]
            # As the platform and every file of results have them: nothing beyond the image.
            inside = clip_boxes_to_image(found.boxes, sample.size)
            for box, label, score in zip(
                inside.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
            ):
                area = max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
                _add(results, index, label, box, area=area, score=score, iscrowd=0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results.createIndex()
        evaluator = COCOeval(truth, results, "bbox")
    evaluator.params.imgIds = indices
    evaluator.params.catIds = list(range(len(samples.class_names)))
    return evaluator


def _add(coco: COCO, image: int, label: int, box: list[float], **fields: float) -> None:
    """Appends an annotation; box is xyxy, COCO wants xywh. Ids start at 1: pycocotools takes 0 for
    "unmatched".
    """
    annotations = coco.dataset["annotations"]
    x1, y1, x2, y2 = box
    annotations.append(
        {
            "id": len(annotations) + 1,
            "image_id": image,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            **fields,
        }
    )
