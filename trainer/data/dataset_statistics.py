"""Statistics of a split: images and boxes, per class, by size and per image.

Crowd regions are counted separately from boxes. K classes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from torchvision.ops import box_iou

from trainer.readers.samples import SampleTable
from trainer.settings.config import TrainConfig
from trainer.settings.plan import Fingerprint, planned, planned_sizes
from vidt.weights.pretrained import imagenet_at_hand

# Areas in pixels at which COCO divides boxes into small, medium and large.
SMALL, MEDIUM = 32, 96  # sides of a square of that area
SIDE_EDGES = 2.0 ** np.arange(1, 12.5, 0.5)  # of the bins in which boxes are counted by size
MOST_BARS = 30  # of boxes in an image
MOST_COMPARED = 500  # images, and boxes of an image, whose overlaps are counted


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one split. The side of a box is the root of its area, in pixels."""

    source: str
    num_images: int
    num_boxes: int
    num_empty: int  # images without a box
    num_crowd: int
    class_names: tuple[str, ...]  # K
    per_class: np.ndarray  # boxes of each class, int64 [K]
    images_per_class: np.ndarray  # images with such a box, int64 [K]
    by_size: tuple[int, int, int]  # small, medium, large, by annotated area as COCO counts
    sides: np.ndarray  # int64, boxes in each bin of SIDE_EDGES
    counts: np.ndarray  # boxes of each image, int64 [N]
    image_sizes: tuple[tuple[int, int], ...]  # the most frequent (height, width), three at most
    num_image_sizes: int


def statistics_of(table: SampleTable) -> Statistics:
    table, num_crowd = table.keep_boxes(~table.crowd), int(table.crowd.sum())
    num_classes = len(table.class_names)
    labels, boxes = table.labels.numpy(), table.boxes.numpy().astype(np.float64)
    areas = table.areas.numpy()
    sides = np.sqrt(np.clip((boxes[:, 2:] - boxes[:, :2]).prod(1), 1e-9, None))
    small, medium = int((areas < SMALL**2).sum()), int((areas < MEDIUM**2).sum())
    pairs = np.unique(table.box_owners.numpy() * num_classes + labels)
    sizes, times = np.unique(table.sizes.numpy(), axis=0, return_counts=True)
    frequent = sizes[np.argsort(-times, kind="stable")[:3]].tolist()
    counts = table.box_counts.numpy()
    return Statistics(
        source=table.source,
        num_images=len(table),
        num_boxes=len(labels),
        num_empty=int((counts == 0).sum()),
        num_crowd=num_crowd,
        class_names=table.class_names,
        per_class=np.bincount(labels, minlength=num_classes),
        images_per_class=np.bincount(pairs % num_classes, minlength=num_classes),
        by_size=(small, medium - small, len(areas) - medium),
        sides=np.histogram(np.clip(sides, SIDE_EDGES[0], SIDE_EDGES[-1]), SIDE_EDGES)[0],
        counts=counts,
        image_sizes=tuple((height, width) for height, width in frequent),
        num_image_sizes=len(sizes),
    )


def plan_of(
    config: TrainConfig,
    model: Mapping[str, Any],
    fixed: Collection[str],
    train_set: SampleTable,
    processes: int = 1,
) -> tuple[TrainConfig, dict[str, Any], str]:
    """The settings of `--preset auto` on this machine for a training split, and the lines that say
    why. The settings named in `fixed` stay.
    """
    pretrained = config.load_from is not None or config.pre_trained != "none"
    if config.pre_trained == "imagenet" and not {"load_from", "pre_trained"} & set(fixed):
        backbone = "swin_tiny" if trains_on_gpu() else "swin_nano"
        pretrained = imagenet_at_hand(
            model["backbone_name"] if "backbone_name" in fixed else backbone
        )
    fingerprint = fingerprint_of(train_set, **machine(config, processes, pretrained))
    return planned(config, model, fixed, fingerprint)


def sizes_of_plan(
    config: TrainConfig,
    model: Mapping[str, Any],
    fixed: Collection[str],
    train_set: SampleTable,
    processes: int = 1,
) -> tuple[int, int]:
    """--det_token_num and --eval_size of `plan_of`. Nothing is fetched."""
    fingerprint = fingerprint_of(train_set, **machine(config, processes, pretrained=False))
    return planned_sizes(config, model, fixed, fingerprint)


def trains_on_gpu() -> bool:
    """Whether a run on this machine would use a GPU: not with `accelerate launch --cpu`."""
    return torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def machine(config: TrainConfig, processes: int, pretrained: bool) -> dict[str, Any]:
    """The fields of a `Fingerprint` that say where and how a run trains."""
    return {
        "gpu": trains_on_gpu(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "pretrained": pretrained,
        "hours": config.hours,
    }


def fingerprint_of(table: SampleTable, **machine: Any) -> Fingerprint:
    """What the rules of `--preset auto` know of a training split; machine: see `machine`."""
    table = table.keep_boxes(~table.crowd)
    sizes, boxes = table.sizes.numpy(), table.boxes.numpy().astype(np.float64)
    sides = np.sqrt(np.clip((boxes[:, 2:] - boxes[:, :2]).prod(1), 0, None))
    relative = sides / sizes.min(1)[table.box_owners.numpy()]
    images = statistics_of(table).images_per_class
    present = images[images > 0]
    return Fingerprint(
        images=len(table),
        classes=len(table.class_names),
        boxes=len(boxes),
        busiest=int(table.box_counts.max()),
        short_side=int(np.median(sizes.min(1))),
        aspect=float((sizes.max(1) / sizes.min(1)).mean()),
        small_object=float(np.quantile(relative, 0.1)) if len(relative) else 1.0,
        rarest=float(present.min() / len(table)) if len(present) else 1.0,
        crowding=crowding(table),
        **machine,
    )


def crowding(table: SampleTable) -> float:
    """Share of the boxes that overlap another box of their image at IoU 0.5 or more: in at most
    MOST_COMPARED images, of the first MOST_COMPARED boxes of each.
    """
    if len(table) > MOST_COMPARED:
        table = table.subset(range(0, len(table), -(-len(table) // MOST_COMPARED)))
    offsets, crowded, compared = table.box_offsets.tolist(), 0, 0
    for start, stop in pairwise(offsets):
        boxes = table.boxes[start : min(stop, start + MOST_COMPARED)]
        crowded += int(((box_iou(boxes, boxes) >= 0.5).sum(1) > 1).sum())
        compared += len(boxes)
    return crowded / max(compared, 1)
