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
from vidt.weights.checkpoint import read_start
from vidt.weights.pretrained import imagenet_at_hand
from vidt.weights.published import local_weights, published_for

# Areas in pixels at which COCO divides boxes into small, medium and large.
SMALL, MEDIUM = 32, 96  # sides of a square of that area
SIDE_EDGES = 2.0 ** np.arange(1, 12.5, 0.5)  # of the bins in which boxes are counted by size
MOST_BARS = 30  # of boxes in an image
MOST_COMPARED = 2000  # images in which overlaps are counted


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


def settled(
    config: TrainConfig, model: Mapping[str, Any], fixed: Collection[str]
) -> tuple[TrainConfig, dict[str, Any], frozenset[str]]:
    """What `--preset auto` takes from elsewhere than the data, and the names that are then fixed:
    the settings of the run to resume, or the architecture of the weights to start from. Raises
    UserError for weights that cannot be read.
    """
    if config.resume is not None:
        folder = Path(config.output_dir if config.resume == "auto" else config.resume)
        for saved in (folder / "config.yaml", folder.parent.parent / "config.yaml"):
            if saved.is_file():
                config, fields = repeated(config, model, fixed, saved)
                return config, fields, frozenset({*vars(config), *fields})
    source = config.load_from
    if source is None and config.pre_trained == "coco":
        source = published_for(
            model["backbone_name"], method=model["method"], epff=model["epff"]
        ).url
    if source is None:
        return config, dict(model), frozenset(fixed)
    _, architecture, _ = read_start(local_weights(source, allow_http=config.allow_http))
    own = {**vars(architecture), "num_classes": model["num_classes"]}  # classes are the data's
    fields = {name: model[name] if name in fixed else own[name] for name in model}
    return config, fields, frozenset({*fixed, *fields})


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
    gpu = torch.accelerator.is_available()
    pretrained = config.load_from is not None or config.pre_trained not in ("none", "imagenet")
    if config.pre_trained == "imagenet" and not pretrained:
        backbone = "swin_tiny" if gpu else "swin_nano"
        pretrained = imagenet_at_hand(
            model["backbone_name"] if "backbone_name" in fixed else backbone
        )
    fingerprint = fingerprint_of(train_set, **machine(config, processes, pretrained))
    return planned(config, model, fixed, fingerprint)


def planned_eval_size(
    config: TrainConfig,
    model: Mapping[str, Any],
    fixed: Collection[str],
    train_set: SampleTable,
    processes: int = 1,
) -> int:
    """The --eval_size of `plan_of`, which does not depend on the start; nothing is fetched."""
    fingerprint = fingerprint_of(train_set, **machine(config, processes, pretrained=False))
    return planned(config, model, fixed, fingerprint)[0].eval_size


def machine(config: TrainConfig, processes: int, pretrained: bool) -> dict[str, Any]:
    """The fields of a `Fingerprint` that say where and how a run trains."""
    return {
        "gpu": torch.accelerator.is_available(),
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
    """Share of the boxes that overlap another box of their image at IoU 0.5 or more, in at most
    MOST_COMPARED images.
    """
    if len(table) > MOST_COMPARED:
        table = table.subset(range(0, len(table), -(-len(table) // MOST_COMPARED)))
    offsets, boxes = table.box_offsets.tolist(), table.boxes
    crowded = 0
    for start, stop in pairwise(offsets):
        overlaps = box_iou(boxes[start:stop], boxes[start:stop]) >= 0.5
        crowded += int((overlaps.sum(1) > 1).sum())
    return crowded / max(len(boxes), 1)
