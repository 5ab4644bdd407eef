"""Detections in the forms of other libraries. Works on NumPy arrays, without PyTorch.

Letters: N detections of one image of H x W pixels.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from vidt.errors import UserError


def as_supervision(
    scores: np.ndarray,
    labels: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    masks: np.ndarray | None,
) -> Any:
    """A `supervision.Detections`: boxes as xyxy, labels as class_id, names in its data."""
    return _library("supervision").Detections(
        xyxy=boxes.reshape(-1, 4),
        mask=masks,
        confidence=scores,
        class_id=labels,
        data={"class_name": np.array(names, dtype=str)},
    )


def as_pandas(
    scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray, names: Sequence[str]
) -> Any:
    """A `pandas.DataFrame` of N rows: name, label, score, x1, y1, x2, y2."""
    corners = dict(zip(("x1", "y1", "x2", "y2"), boxes.reshape(-1, 4).T, strict=True))
    columns = {"name": list(names), "label": labels, "score": scores, **corners}
    return _library("pandas").DataFrame(columns)


def as_coco(
    image_id: int,
    category_ids: Sequence[int] | None,
    scores: np.ndarray,
    labels: np.ndarray,
    boxes: np.ndarray,
    masks: np.ndarray | None,
) -> list[dict[str, Any]]:
    """N results as COCO's API reads them: boxes as x, y, width, height in pixels, masks as run
    lengths without compression. category_ids: of the classes; None: label + 1.
    """
    results = [
        {
            "image_id": image_id,
            "category_id": int(category_ids[label]) if category_ids is not None else label + 1,
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        for score, label, (left, top, right, bottom) in zip(
            scores.tolist(), labels.tolist(), boxes.tolist(), strict=True
        )
    ]
    for result, mask in zip(results, () if masks is None else masks, strict=masks is not None):
        result["segmentation"] = {"size": list(mask.shape), "counts": run_lengths(mask)}
    return results


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths of a mask, bool [H, W]: column by column, zeros first."""
    flat = np.concatenate([[False], mask.T.ravel()])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(starts, prepend=0, append=mask.size).tolist()


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs {name}, which cannot be imported ({error}); pip install {name}"
        ) from error
