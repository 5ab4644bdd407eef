"""COCO metrics of a model on a table of samples. The images are split among the processes; each is
scored exactly once.

The result does not depend on the number of processes or on the batch size, up to rounding of the
precision: each image has its own canvas, only images of equal canvas share a batch, TF32 is off,
and scoring uses the order of the table.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainer.backward.memory import OutOfMemory
from trainer.data.loader import (
    PREFETCH,
    EvaluationDataset,
    evaluation_batch,
    leave_signals_to_the_parent,
)
from trainer.loop.agreement import Agreement
from trainer.loop.stopping import Stopped
from trainer.readers.masks import encode
from trainer.readers.run_lengths import RunLengths, areas_of, as_coco, rectangle
from trainer.readers.samples import SampleTable
from trainer.scoring.average_precision import (
    COCO_NUMBERS,
    DetectionColumns,
    DetectionMatches,
    Objects,
    Scores,
    accumulate,
    class_numbers,
    coco_numbers,
    match,
    overlap_of_boxes,
    overlap_of_masks,
    xywh,
)
from trainer.scoring.mistakes import Diagnosis, diagnose
from vidt.images.batching import overlapped
from vidt.images.canvas import canvas_batches
from vidt.images.preprocessing import Preprocessing
from vidt.ops.packing import packed
from vidt.ops.precision import full_float32
from vidt.predict.detections import Detections, copy_to_cpu, decode_for
from vidt.predict.predictor import is_out_of_memory

MASK_PIXELS = 2**26  # of masks that are encoded together
Finish: TypeAlias = Callable[[], list[Detections]]  # waits for the detections in a batch


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name (-1: nothing to score), the same on all processes; this process's detections
    by sample index, and their masks if masks were scored.
    """

    metrics: dict[str, float]
    detections: dict[int, Detections]
    unreadable: int
    diagnosis: Diagnosis
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
    """Predicts and scores this process's images, and joins the scores of all processes. Masks are
    scored if the samples have masks and the model predicts them.

    tick receives the finished share of the work, 0..1. stop returns a signal number, 0 for none,
    and is called after each batch; if it does so on any process, all raise Stopped.
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
    exact = accelerator.mixed_precision == "no"
    with full_float32(accelerator.device), packed(model) if exact else nullcontext():
        predicted = predict_batches(model, loader, samples.sizes, preprocessing, accelerator)
        for done, found in enumerate(predicted):
            if scores_masks:
                masks |= {index: run_lengths(each) for index, each in found.items()}
            detections |= {index: replace(each, mask_vectors=None) for index, each in found.items()}
            tick((done + 1) / len(mine))
            if signum := stop():
                break
    signum = int(agreement.gather(signum).max())
    if signum:
        raise Stopped(signum)
    indices = sorted(index for batch in mine for index in batch)
    shares = agreement.gather_objects(score_images(samples, indices, detections))
    metrics = summarise(samples, shares)
    diagnosis = diagnose(samples, indices, detections, masks, shares, agreement)
    if scores_masks:
        shares = agreement.gather_objects(score_images(samples, indices, detections, masks))
        metrics |= summarise_masks(shares)
    unreadable = int(agreement.gather(len(indices) - len(detections))[:, 0].sum())
    return Evaluation(metrics, detections, unreadable, diagnosis, masks)


def predict_batches(
    model: nn.Module,
    batches: Iterable[tuple[list[int], Tensor | None, Tensor | None]],
    sizes: Tensor,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
) -> Iterator[dict[int, Detections]]:
    """Detections by sample index of each batch of `evaluation_batch`, on the CPU, in pixels of the
    original images, whose (height, width) are sizes [samples, 2]. A GPU computes a batch while the
    results of the batch before it are unpacked and used.
    """

    def start(batch: tuple[list[int], Tensor | None, Tensor | None]) -> Finish:
        indices, *on_host = batch
        if not indices:
            return lambda: []
        pixels, padding = send_to_device(on_host, accelerator.device, True)
        images = preprocessing.normalise(pixels, padding)
        return predict(model, images, padding, sizes[indices], accelerator)

    ahead = int(accelerator.device.type != "cpu")
    for (indices, *_), predicted in overlapped(batches, start, ahead):
        yield dict(zip(indices, predicted, strict=True))


def predict(
    model: nn.Module, images: Tensor, padding: Tensor, sizes: Tensor, accelerator: Accelerator
) -> Finish:
    """Starts to detect in a batch of images of sizes [B, 2], or, if memory runs out, in half of the
    batch at a time. Returns the function that waits for the detections.

    Raises OutOfMemory if one image does not fit.
    """
    try:
        return _predict(model, images, padding, sizes, accelerator)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # After the handler nothing refers to the tensors of the failed attempt.
    half = len(images) // 2
    if not half:
        height, width = images.shape[-2:]
        raise OutOfMemory(
            f"out of memory with one image of {height} x {width} pixels at evaluation; lower "
            "--eval_size, or choose a smaller --backbone_name"
        )
    clear_device_cache(garbage_collection=True)
    halves = [
        predict(model, images[part], padding[part], sizes[part], accelerator)
        for part in (slice(half), slice(half, None))
    ]
    return lambda: [detections for finish in halves for detections in finish()]


@torch.no_grad()
def _predict(
    model: nn.Module, images: Tensor, padding: Tensor, sizes: Tensor, accelerator: Accelerator
) -> Finish:
    training = model.training
    model.eval()
    try:
        with accelerator.autocast():
            outputs = model(images, padding, detections_only=True)
    finally:
        model.train(training)
    decode = decode_for(accelerator.unwrap_model(model).config)
    return copy_to_cpu(decode(outputs, sizes))  # sizes are also needed on the CPU


def run_lengths(found: Detections) -> list[RunLengths]:
    """The masks of detections on the CPU. A few are encoded at a time: all masks of a large image
    take a gigabyte.
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
) -> DetectionMatches:
    """Matches the detections in some samples by boxes, or by `masks` if given."""
    truth = samples.subset(indices)
    image = np.asarray(indices, np.int64)[truth.box_owners.numpy()]
    found, boxes = _found(samples, [index for index in indices if index in detections], detections)
    crowd, areas = truth.crowd.numpy(), truth.areas.numpy().astype(np.float64)
    overlap = overlap_of_boxes(boxes, xywh(truth.boxes.numpy()), crowd)
    if masks is not None:
        # The box of an object without a mask is a crowd region: nothing in it is right or wrong.
        crowd = crowd | ~truth.masks.present.numpy()  # type: ignore[union-attr]
        entries = _mask_entries(samples, found.image, masks)
        found = replace(found, area=np.array(areas_of(entries), np.float64))
        overlap = overlap_of_masks(entries, _true_masks(truth), crowd)
    objects = Objects(image, truth.labels.numpy(), areas, crowd)
    return match(objects, found, overlap, len(samples.class_names))


def summarise(samples: SampleTable, shares: list[DetectionMatches]) -> dict[str, float]:
    """The twelve COCO metrics, map50 first, then `ap/CLASS` and `ap50/CLASS`."""
    scores = accumulate(shares)
    return _map50_first(scores) | class_numbers(scores, samples.class_names)


def summarise_masks(shares: list[DetectionMatches]) -> dict[str, float]:
    """The twelve COCO metrics of masks: `segm_map50` and so on."""
    return {f"segm_{name}": number for name, number in _map50_first(accumulate(shares)).items()}


def _map50_first(scores: Scores) -> dict[str, float]:
    numbers = coco_numbers(scores)
    return {name: numbers[name] for name in COCO_NUMBERS}


def _found(
    samples: SampleTable, indices: list[int], detections: dict[int, Detections]
) -> tuple[DetectionColumns, np.ndarray]:
    """The detections in samples, and their boxes [D, 4] xywh, clipped to the images as in all
    result files.
    """
    own = [detections[index] for index in indices]
    counts = torch.tensor([len(each.scores) for each in own], dtype=torch.int64)
    image = torch.tensor(indices, dtype=torch.int64).repeat_interleave(counts)
    corners = torch.cat([torch.zeros(0, 4), *(each.boxes for each in own)])
    limits = samples.sizes[image].flip(1).repeat(1, 2)
    boxes = xywh(torch.minimum(corners.clamp(min=0), limits).numpy())
    labels = torch.cat([image[:0], *(each.labels for each in own)])
    scores = torch.cat([corners[:0, 0], *(each.scores for each in own)])
    areas = boxes[:, 2].clip(0) * boxes[:, 3].clip(0)
    return DetectionColumns(image.numpy(), labels.numpy(), areas, scores.double().numpy()), boxes


def _mask_entries(
    samples: SampleTable, image: np.ndarray, masks: dict[int, list[RunLengths]]
) -> list[dict[str, Any]]:
    """The masks of detections in pycocotools' form; image [D] is the sample of each detection."""
    indices = list(dict.fromkeys(image.tolist()))
    sizes = samples.sizes[indices].tolist()
    return [
        as_coco(mask, (height, width))
        for index, (height, width) in zip(indices, sizes, strict=True)
        for mask in masks[index]
    ]


def _true_masks(truth: SampleTable) -> list[dict[str, Any]]:
    return [
        as_coco(mask or rectangle(box, sample.size), sample.size)
        for sample in truth
        for mask, box in zip(sample.masks or (), sample.boxes.tolist(), strict=True)
    ]
