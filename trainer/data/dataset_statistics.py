"""Statistics of a split: images and boxes, per class, by size and per image.

Crowd regions are counted separately from boxes. K classes.
"""

from dataclasses import dataclass

import numpy as np

from trainer.readers.samples import SampleTable

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
