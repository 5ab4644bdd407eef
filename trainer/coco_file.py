"""What COCO's JSON says of images and their boxes, for scoring: NumPy, and no table of tensors.

Boxes are judged as `trainer.dataset_check` judges them, so that a score here is that of a training
run: dropped without area or outside their image, clipped where they stick out.
"""

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.classes import match_classes


@dataclass(frozen=True)
class Truth:
    """The images and objects of a file.

    `images` are COCO's own entries, `objects` its annotations with `category_id` a label of the
    detector and boxes clipped. `left_out`: why objects are missing, and how many.
    """

    source: str
    images: list[dict[str, Any]]
    objects: list[dict[str, Any]]
    left_out: dict[str, int]
    has_masks: bool


def read_truth(
    json_path: str | os.PathLike[str], image_dir: str | os.PathLike[str], names: Sequence[str]
) -> Truth:
    """The truth for a detector of these class names, which are matched with the file's.

    Raises ValueError, in one line, for a file that is not COCO's JSON, has no images, or has no
    class in common with the detector; and for images that are not there.
    """
    document = _document(json_path)
    images = {image["id"]: image for image in document["images"] if _is_image(image)}
    if not images:
        raise ValueError(f"--json {json_path}: no image has an integer id and a file_name")
    label_of = _labels(json_path, document["categories"], names)
    _require_images(image_dir, list(images.values()))
    objects: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for entry in document["annotations"]:
        found, problem = _object(entry, images, label_of)
        if found is not None:
            objects.append(found | {"id": len(objects) + 1})
        else:
            left_out[problem] = left_out.get(problem, 0) + 1
    has_masks = any(each.get("segmentation") for each in objects)
    name = os.path.basename(json_path)
    return Truth(name, list(images.values()), objects, left_out, has_masks)


def _document(json_path: str | os.PathLike[str]) -> dict[str, list[dict[str, Any]]]:
    if os.path.isdir(json_path):
        raise ValueError(f"--json {json_path} is a folder; name COCO's JSON file in it")
    enabled = gc.isenabled()
    gc.disable()  # it would walk the millions of objects of a document again and again
    try:
        document = json.loads(Path(json_path).read_bytes())
    except OSError as error:
        raise ValueError(f"--json {json_path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--json {json_path} is not JSON: {error}") from error
    finally:
        if enabled:
            gc.enable()
    for key in ("images", "annotations", "categories"):
        rows = document.get(key) if isinstance(document, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(
                f'--json {json_path} is not COCO\'s JSON: it needs a list of objects "{key}"'
            )
    return document


def _is_image(image: dict[str, Any]) -> bool:
    name = image.get("file_name")
    return isinstance(image.get("id"), int) and isinstance(name, str) and bool(name)


def _labels(
    json_path: str | os.PathLike[str], categories: list[dict[str, Any]], names: Sequence[str]
) -> dict[int, int]:
    """Category id to label; -1 for a class that the detector does not know."""
    own = {each.get("id"): each.get("name") for each in categories}
    if not all(isinstance(key, int) and isinstance(name, str) for key, name in own.items()):
        raise ValueError(f"--json {json_path}: every category needs a name and an integer id")
    match = match_classes(f"--json {json_path}", own, tuple(names))  # type: ignore[arg-type]
    if all(label < 0 for label in match.label_of.values()):
        theirs, ours = (", ".join(list(each)[:5]) for each in (map(str, own.values()), names))
        raise ValueError(
            f"--json {json_path} has no class of the weights: it has {theirs}, the weights know "
            f"{ours}; take weights that were trained on these classes"
        )
    return dict(match.label_of)


def _require_images(image_dir: str | os.PathLike[str], images: list[dict[str, Any]]) -> None:
    if not os.path.isdir(image_dir):
        raise ValueError(f"--images {image_dir}: no such folder")
    there = sum(os.path.isfile(os.path.join(image_dir, each["file_name"])) for each in images)
    if not there:
        first = images[0]["file_name"]
        raise ValueError(
            f"--images {image_dir} holds none of the {len(images)} images, such as {first}; name "
            "the folder that the file names are relative to"
        )


def _object(
    entry: dict[str, Any], images: dict[int, dict[str, Any]], label_of: dict[int, int]
) -> tuple[dict[str, Any] | None, str]:
    """The annotation as it counts, or why it does not."""
    image_id, category = entry.get("image_id"), entry.get("category_id")
    image = images.get(image_id) if isinstance(image_id, int) else None
    label = label_of.get(category) if isinstance(category, int) else None
    if image is None:
        return None, "of an unknown image"
    if label is None:
        return None, "of an unknown category"
    box = _numbers(entry.get("bbox"))
    if box is None:
        return None, "whose box is not four numbers"
    if label < 0:
        return None, "of a class that the weights do not know"
    corners = np.concatenate([box[:2], box[:2] + box[2:]]).astype(np.float32)
    size = np.array([_side(image, "width"), _side(image, "height")], np.float32)
    inside = np.minimum(np.maximum(corners, 0), np.tile(size, 2))
    if not (box[2:] > 0).all() or not (inside[2:] > inside[:2]).all():
        return None, "whose box has no area in its image"
    extent = inside[2:] - inside[:2]
    area = entry.get("area")
    own = float(area) if isinstance(area, int | float) and area > 0 else np.inf
    return {
        "image_id": image_id,
        "category_id": label,
        "bbox": [*inside[:2].tolist(), *extent.tolist()],
        "area": min(own, float(extent.prod())),
        "iscrowd": int(bool(entry.get("iscrowd"))),
        "segmentation": entry.get("segmentation"),
    }, ""


def _side(image: dict[str, Any], name: str) -> float:
    """In pixels; infinite where the file does not say."""
    value = image.get(name)
    return float(value) if isinstance(value, int | float) and value > 0 else np.inf


def _numbers(box: Any) -> np.ndarray | None:
    """Four finite numbers, float64 [4]."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(value, int | float) for value in box):
        return None
    numbers = np.array(box, np.float64)
    return numbers if np.isfinite(numbers).all() else None
