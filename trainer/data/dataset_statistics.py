"""Statistics of a split: images and boxes, per class, by size and per image.

Crowd regions are counted separately from boxes. K classes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from trainer.readers.samples import SampleTable
from trainer.settings.config import TrainConfig
from trainer.settings.plan import Fingerprint, planned, repeated
from vidt.weights.pretrained import imagenet_at_hand
from vidt.weights.weights_file import read_info

# Areas in pixels at which COCO divides boxes into small, medium and large.
SMALL, MEDIUM = 32, 96  # sides of a square of that area
SIDE_EDGES = 2.0 ** np.arange(1, 12.5, 0.5)  # of the bins in which boxes are counted by size
MOST_BARS = 30  # of boxes in an image


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
    config: TrainConfig, model: Mapping[str, Any], fixed: Collection[str], train_set: SampleTable
) -> tuple[TrainConfig, dict[str, Any], str]:
    """The settings of `--preset auto` on this machine for a training split, and the lines that say
    why. The settings named in `fixed` stay, the architecture of weights of ours to start from too.
    A run that is resumed keeps its plan.
    """
    if config.resume is not None:
        folder = config.output_dir if config.resume == "auto" else config.resume
        saved = Path(folder) / "config.yaml"
        if saved.is_file():
            return *repeated(config, model, fixed, saved), f"plan: as in {saved}"
    if config.load_from is not None and Path(config.load_from).suffix == ".safetensors":
        own = vars(read_info(Path(config.load_from)).config)
        fixed = {*fixed, "num_classes"}  # those of the data
        model = {name: value if name in fixed else own[name] for name, value in model.items()}
        fixed = {*fixed, *model}
    fingerprint = fingerprint_of(
        train_set,
        gpu=torch.accelerator.is_available(),
        threads=torch.get_num_threads(),
        pretrained=config.pre_trained != "none" and imagenet_at_hand("swin_nano"),
        hours=config.hours,
    )
    return planned(config, model, fixed, fingerprint)


def fingerprint_of(table: SampleTable, **machine: Any) -> Fingerprint:
    """What the rules of `--preset auto` know of a training split; machine: the fields about the
    machine and the run.
    """
    table = table.keep_boxes(~table.crowd)
    sizes, boxes = table.sizes.numpy(), table.boxes.numpy().astype(np.float64)
    owners, labels = table.box_owners.numpy(), table.labels.numpy()
    sides = np.sqrt(np.clip((boxes[:, 2:] - boxes[:, :2]).prod(1), 0, None))
    relative = sides / sizes.min(1)[owners]
    pairs = np.unique(owners * len(table.class_names) + labels)
    images = np.bincount(pairs % len(table.class_names), minlength=len(table.class_names))
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
    """Share of the boxes that overlap another box of their image at IoU 0.5 or more."""
    offsets, boxes = table.box_offsets.tolist(), table.boxes
    crowded = 0
    for start, stop in pairwise(offsets):
        overlaps = box_iou(boxes[start:stop], boxes[start:stop]) >= 0.5
        crowded += int((overlaps.sum(1) > 1).sum())
    return crowded / max(len(boxes), 1)
