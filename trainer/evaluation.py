"""COCO metrics of a model on a table of samples, shared among processes; every image is scored
exactly once.

The result does not depend on the number of processes or on the batch size: images are resized to
canvases of their own, only equal canvases share a batch, and per-image scores are put back into the
order of the table before they are summed up.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

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
from trainer.data import (
    PREFETCH,
    EvaluationDataset,
    evaluation_batch,
    leave_signals_to_the_parent,
)
from trainer.masks import RunLengths, areas_of, as_coco, encode, rectangle
from trainer.report import COCO_NUMBERS
from trainer.samples import Sample, SampleTable
from vidt.predictor import Detections, decode_for
from vidt.preprocessing import Preprocessing, canvas_batches

# COCOeval.stats in its own order.
STATS = (
    *("map", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)
MASK_PIXELS = 2**26  # drawn at once, of all masks together
# Some images by index, and what pycocotools says of each.
Share: TypeAlias = tuple[list[int], list[dict | None]]


class Interrupted(Exception):
    """A stop was asked for while evaluating, by `signum`; raised on every process alike."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name (-1 where there is nothing to score) and this process's detections by index
    of the sample; their masks too, if masks were scored.
    """

    metrics: dict[str, float]
    detections: dict[int, Detections]
    unreadable: int
    masks: dict[int, list[RunLengths]] = field(default_factory=dict)


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
    """Predicts this process's share, scores it, and puts all shares together. Masks are scored if
    the samples have any and the model predicts them.

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
        collate_fn=evaluation_batch,
        prefetch_factor=PREFETCH if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_parent,
    )
    predicts_masks = accelerator.unwrap_model(model).config.with_vector
    scores_masks = predicts_masks and samples.masks is not None
    detections: dict[int, Detections] = {}
    masks: dict[int, list[RunLengths]] = {}
    signum = 0
    for done, (indices, pixels, padding) in enumerate(loader):
        found = {}
        if indices:
            images, padding = send_to_device((pixels, padding), accelerator.device, True)
            images = preprocessing.normalise(images, padding)
            predicted = predict(model, images, padding, samples.sizes[indices], accelerator)
            found = dict(zip(indices, predicted, strict=True))
        if scores_masks:
            masks |= {index: run_lengths(each) for index, each in found.items()}
        detections |= {index: replace(each, mask_vectors=None) for index, each in found.items()}
        tick((done + 1) / len(mine))
        if signum := stop():
            break
    signum = int(agreement.gather(signum).max())
    if signum:
        raise Interrupted(signum)
    indices = sorted(index for batch in mine for index in batch)
    shares = agreement.gather_objects(score_images(samples, indices, detections))
    metrics = summarise(samples, shares)
    if scores_masks:
        shares = agreement.gather_objects(score_images(samples, indices, detections, masks))
        metrics |= summarise_masks(samples, shares)
    unreadable = int(agreement.gather(len(indices) - len(detections))[:, 0].sum())
    return Evaluation(metrics, detections, unreadable, masks)


@torch.no_grad()
def predict(
    model: nn.Module, images: Tensor, padding: Tensor, sizes: Tensor, accelerator: Accelerator
) -> list[Detections]:
    """Detections of a batch, on the CPU, in pixels of the original images; sizes [B, 2] are theirs,
    (height, width).
    """
    training = model.training
    model.eval()
    with accelerator.autocast():
        outputs = model(images, padding)
    model.train(training)
    decode = decode_for(accelerator.unwrap_model(model).config)
    return on_cpu(decode(outputs, sizes.to(accelerator.device, non_blocking=True)))


def on_cpu(found: list[Detections]) -> list[Detections]:
    """The same in the memory of the CPU, all in one transfer: each would have to be waited for."""
    columns = [
        [each.scores[:, None], each.labels[:, None], each.boxes]
        + ([each.mask_vectors.vectors] if each.mask_vectors else [])
        for each in found
    ]
    # Labels are whole numbers far below 2 ** 24: float32 keeps them.
    rows = torch.cat([torch.cat([part.float() for part in image], dim=1) for image in columns])
    counts = [len(each.scores) for each in found]
    moved = []
    for each, own in zip(found, rows.cpu().split(counts), strict=True):
        masks = each.mask_vectors and replace(each.mask_vectors, vectors=own[:, 6:])
        moved.append(Detections(own[:, 0], own[:, 1].long(), own[:, 2:6], masks))
    return moved


def run_lengths(found: Detections) -> list[RunLengths]:
    """The masks of detections on the CPU, drawn a few at a time: those of a large picture take a
    gigabyte.
    """
    assert found.mask_vectors is not None
    height, width = found.mask_vectors.size
    at_once = max(MASK_PIXELS // (height * width), 1)
    parts = [found[start : start + at_once] for start in range(0, len(found.scores), at_once)]
    return [mask for part in parts for mask in encode(part.masks)]  # type: ignore[arg-type]


def score_images(
    samples: SampleTable,
    indices: list[int],
    detections: dict[int, Detections],
    masks: dict[int, list[RunLengths]] | None = None,
) -> Share:
    """pycocotools' per-image results of some samples, by boxes or, where given, by masks: (indices,
    results in its order class, area range, image).
    """
    evaluator = _evaluator(samples, indices, detections, masks)
    with contextlib.redirect_stdout(io.StringIO()):
        if indices:
            evaluator.evaluate()
    return indices, evaluator.evalImgs if indices else []


def summarise(samples: SampleTable, shares: list[Share]) -> dict[str, float]:
    """All twelve COCO numbers, map50 first, then `ap/CLASS` and `ap50/CLASS`."""
    evaluator = _evaluator(samples, [], {})
    metrics = _accumulated(evaluator, shares)
    precision = evaluator.eval["precision"][
        :, :, :, 0, -1
    ]  # [IoU, recall, class], all areas, 100 detections
    for label, name in enumerate(samples.class_names):
        metrics[f"ap/{name}"] = _mean(precision[:, :, label])
        metrics[f"ap50/{name}"] = _mean(precision[0, :, label])
    return metrics


def summarise_masks(samples: SampleTable, shares: list[Share]) -> dict[str, float]:
    """The twelve COCO numbers of masks: `segm_map50` and so on."""
    numbers = _accumulated(_evaluator(samples, [], {}, {}), shares)
    return {f"segm_{name}": number for name, number in numbers.items()}


def _accumulated(evaluator: COCOeval, shares: list[Share]) -> dict[str, float]:
    """The twelve COCO numbers of all shares, map50 first."""
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
    return {name: numbers[name] for name in COCO_NUMBERS}


def _mean(precision: np.ndarray) -> float:
    scored = precision[precision > -1]
    return float(scored.mean()) if scored.size else -1.0


def _evaluator(
    samples: SampleTable,
    indices: list[int],
    detections: dict[int, Detections],
    masks: dict[int, list[RunLengths]] | None = None,
) -> COCOeval:
    """COCOeval on some samples, of masks if they are given; image ids are indices of the table,
    category ids are labels.
    """
    truth, results = COCO(), COCO()
    categories = [{"id": label, "name": name} for label, name in enumerate(samples.class_names)]
    sizes = samples.sizes[indices].tolist()
    images = [
        {"id": index, "height": height, "width": width}
        for index, (height, width) in zip(indices, sizes, strict=True)
    ]
    for each in (truth, results):
        each.dataset = {"images": images, "categories": categories, "annotations": []}
    for index in indices:
        sample = samples[index]
        _add(truth, index, _truths(sample) if masks is None else _true_masks(sample))
        if index in detections:
            rows = _found(detections[index], sample.size)
            if masks is not None:
                rows = _with_masks(rows, masks[index], sample.size)
            _add(results, index, rows)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results.createIndex()
        evaluator = COCOeval(truth, results, "bbox" if masks is None else "segm")
    evaluator.params.imgIds = indices
    evaluator.params.catIds = list(range(len(samples.class_names)))
    return evaluator


def _truths(sample: Sample) -> list[dict[str, Any]]:
    return [
        _row(label, box, area=area, iscrowd=int(crowd))
        for box, label, area, crowd in zip(
            sample.boxes.tolist(),
            sample.labels.tolist(),
            sample.areas.tolist(),
            sample.crowd.tolist(),
            strict=True,
        )
    ]


def _true_masks(sample: Sample) -> list[dict[str, Any]]:
    """Where an object has no mask nothing is right or wrong: its box is a crowd region."""
    rows = []
    for row, mask, box in zip(
        _truths(sample), sample.masks or (), sample.boxes.tolist(), strict=True
    ):
        shown = as_coco(mask or rectangle(box, sample.size), sample.size)
        rows.append(row | {"segmentation": shown, "iscrowd": row["iscrowd"] if mask else 1})
    return rows


def _found(found: Detections, size: tuple[int, int]) -> list[dict[str, Any]]:
    # As the platform and every file of results have them: nothing beyond the image.
    inside = clip_boxes_to_image(found.boxes, size)
    return [
        _row(
            label,
            box,
            area=max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0),
            score=score,
            iscrowd=0,
        )
        for box, label, score in zip(
            inside.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        )
    ]


def _with_masks(
    rows: list[dict[str, Any]], masks: list[RunLengths], size: tuple[int, int]
) -> list[dict[str, Any]]:
    entries = [as_coco(mask, size) for mask in masks]
    return [
        row | {"segmentation": entry, "area": area}
        for row, entry, area in zip(rows, entries, areas_of(entries), strict=True)
    ]


def _row(label: int, box: list[float], **fields: float) -> dict[str, Any]:
    """An annotation; box is xyxy, COCO wants xywh."""
    x1, y1, x2, y2 = box
    return {"category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], **fields}


def _add(coco: COCO, image: int, rows: list[dict[str, Any]]) -> None:
    """Appends annotations. Ids start at 1: pycocotools takes 0 for "unmatched"."""
    annotations = coco.dataset["annotations"]
    for number, row in enumerate(rows, len(annotations) + 1):
        annotations.append({"id": number, "image_id": image, **row})
