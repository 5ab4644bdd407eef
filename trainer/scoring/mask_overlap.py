"""How far masks overlap, for `trainer.scoring.average_precision`: by pycocotools, without
PyTorch."""

from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from trainer.scoring.average_precision import Overlap, starts_of_runs


def overlap_of_masks(
    found: list[dict[str, Any]], objects: list[dict[str, Any]], crowd: np.ndarray
) -> Overlap:
    """Intersection over union of masks as pycocotools takes them, of one image and class at a time;
    over the detection alone where the object is a crowd, bool [M].
    """

    def overlap(detection: np.ndarray, thing: np.ndarray) -> np.ndarray:
        first = np.append(starts_of_runs(detection), len(thing))  # pair of each detection
        # Detections of one image and class begin with the same object.
        bounds = np.append(starts_of_runs(thing[first[:-1]]), len(first) - 1)
        parts = [np.zeros(0)]
        for start, stop in pairwise(bounds.tolist()):
            own = thing[first[start] : first[start + 1]]
            rows = detection[first[start:stop]]
            there = [objects[number] for number in own]
            iou = coco_mask.iou([found[row] for row in rows], there, crowd[own].tolist())
            parts.append(np.asarray(iou).reshape(-1))
        return np.concatenate(parts)

    return overlap
