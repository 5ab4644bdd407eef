"""Predictions as JSON, COCO results, YOLO, CSV or text for people.

A format is three functions, so that results can be written one image at a time: the text before the
first image, of each image, and after the last. NumPy and the standard library suffice; only masks
need pycocotools.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import numpy as np

from trainer.readers.findings import csv_cell
from vidt.errors import escaped

MASK_PIXELS = 2**26  # drawn at once, of all masks together


@dataclass(frozen=True, eq=False)
class ImagePredictions:
    """N detections in one image file, best first, or why it could not be read (`problem`).

    `size` is (height, width) of the stored pixels. `boxes` are xyxy in pixels, clipped to the
    image. `masks` are COCO's compressed run lengths.
    """

    file: str
    size: tuple[int, int] = (0, 0)
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # [N, 4]
    labels: Sequence[int] = ()
    names: Sequence[str] = ()
    scores: Sequence[float] = ()
    masks: Sequence[str] | None = None
    problem: str = ""
    time: float = 0.0  # of a video's frame, in seconds since the first one


def image_predictions(file: str, size: tuple[int, int], detections: Any) -> ImagePredictions:
    """The detections of a PyTorch or ONNX detector in an image of `size` (height, width)."""
    boxes = np.asarray(detections.boxes, np.float64).reshape(-1, 4)
    labels = np.asarray(detections.labels).astype(int).tolist()
    return ImagePredictions(
        file=file,
        size=size,
        boxes=np.clip(boxes, 0, [size[1], size[0], size[1], size[0]]),
        labels=labels,
        names=list(detections.names),
        scores=np.asarray(detections.scores, np.float64).tolist(),
        masks=_run_lengths_of(detections, size),
    )


def _run_lengths_of(detections: Any, size: tuple[int, int]) -> list[str] | None:
    """Encodes a few masks at a time: all masks of a large image take a gigabyte."""
    if detections[:0].masks is None:
        return None
    at_once = max(MASK_PIXELS // (size[0] * size[1]), 1)
    starts = range(0, len(detections.scores), at_once)
    parts = [run_lengths(np.asarray(detections[i : i + at_once].masks)) for i in starts]
    return [mask for part in parts for mask in part]


def run_lengths(masks: np.ndarray) -> list[str]:
    """Masks bool [N, H, W] as COCO's compressed run lengths."""
    from pycocotools import mask as coco_mask

    columns = np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0))
    return [each["counts"].decode() for each in coco_mask.encode(columns)]


@dataclass(frozen=True)
class Format:
    """`record` gets the number of the image, from 0, and its predictions."""

    begin: Callable[[], str]
    record: Callable[[int, ImagePredictions], str]
    end: Callable[[int], str]  # gets the number of images


def json_format(about: dict[str, Any]) -> Format:
    """One object: `about`, then `images`, a line for each."""
    head = json.dumps(about, indent=1).removesuffix("}").rstrip()

    def record(number: int, found: ImagePredictions) -> str:
        entry: dict[str, Any] = {"file": found.file}
        if found.problem:
            entry["error"] = found.problem
        else:
            entry |= {"height": found.size[0], "width": found.size[1]}
            entry["detections"] = [_detection(found, row) for row in range(len(found.labels))]
        return (",\n" if number else "\n") + json.dumps(entry)

    return Format(lambda: f'{head},\n "images": [', record, lambda images: "\n]}\n")


def _detection(found: ImagePredictions, row: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "label": found.labels[row],
        "name": found.names[row],
        "score": round(found.scores[row], 5),
        "box": [round(value, 2) for value in found.boxes[row].tolist()],
    }
    if found.masks is not None:
        entry["mask"] = {"size": list(found.size), "counts": found.masks[row]}
    return entry


def coco_format(category_ids: Sequence[int]) -> Format:
    """COCO's results: one list of objects. The image id is the file name without its suffix, as an
    integer if it has only digits; `category_ids[label]` is the id of a class.
    """
    written = 0

    def record(number: int, found: ImagePredictions) -> str:
        nonlocal written
        stem = PurePath(found.file).stem
        rows = []
        for row, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
            entry: dict[str, Any] = {
                "image_id": int(stem) if stem.isascii() and stem.isdigit() else stem,
                "category_id": category_ids[found.labels[row]],
                "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(found.scores[row], 5),
            }
            if found.masks is not None:
                entry["segmentation"] = {"size": list(found.size), "counts": found.masks[row]}
            rows.append((",\n" if written else "\n") + json.dumps(entry))
            written += 1
        return "".join(rows)

    return Format(lambda: "[", record, lambda images: "\n]\n")


DETECTION_COLUMNS = ("label", "name", "score", "x1", "y1", "x2", "y2")
CSV_COLUMNS = ("file", *DETECTION_COLUMNS)


def csv_format() -> Format:
    """A row for each detection, with corners in pixels."""

    def record(number: int, found: ImagePredictions) -> str:
        file = csv_cell(found.file)
        return "".join(_csv_row(file, *_cells(found, row)) for row in range(len(found.labels)))

    return Format(lambda: _csv_row(*CSV_COLUMNS), record, lambda images: "")


def _cells(found: ImagePredictions, row: int) -> tuple[object, ...]:
    """The cells of a detection below DETECTION_COLUMNS."""
    box = (f"{value:.2f}" for value in found.boxes[row].tolist())
    name = csv_cell(found.names[row])
    return found.labels[row], name, f"{found.scores[row]:.5f}", *box


def frames_json_format() -> Format:
    """JSON lines: a line for each frame of a video, also for one without detections."""

    def record(number: int, found: ImagePredictions) -> str:
        detections = [_detection(found, row) for row in range(len(found.labels))]
        frame = {"frame": number, "time": round(found.time, 6), "detections": detections}
        return json.dumps(frame) + "\n"

    return Format(lambda: "", record, lambda frames: "")


def frames_csv_format() -> Format:
    """A row for each detection in the frames of a video."""

    def record(number: int, found: ImagePredictions) -> str:
        frame = (number, f"{found.time:.6f}")
        return "".join(_csv_row(*frame, *_cells(found, row)) for row in range(len(found.labels)))

    return Format(lambda: _csv_row("frame", "time", *DETECTION_COLUMNS), record, lambda frames: "")


def frames_text_format() -> Format:
    """A line for each detection in the frames of a video, for people."""
    lines = text_format()

    def record(number: int, found: ImagePredictions) -> str:
        name = f"{found.file} frame {number} at {found.time:.3f} s"
        return lines.record(number, replace(found, file=name))

    return Format(lambda: "", record, lambda frames: "")


def _csv_row(*values: object) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def text_format() -> Format:
    """A line for each detection, for people."""

    def record(number: int, found: ImagePredictions) -> str:
        if found.problem:
            return ""
        if not len(found.labels):
            return f"{escaped(found.file)}: nothing\n"
        return "".join(
            f"{escaped(found.file)}: {escaped(found.names[row])} {found.scores[row]:.2f} at "
            f"{' '.join(f'{value:.0f}' for value in found.boxes[row].tolist())}\n"
            for row in range(len(found.labels))
        )

    return Format(lambda: "", record, lambda images: "")


def yolo_text(found: ImagePredictions) -> str:
    """The lines of an image's file: label, centre and size in 0..1 of the image, score."""
    height, width = found.size
    scale = np.array([width, height, width, height], np.float64)
    lines = []
    for row, box in enumerate(found.boxes / scale):
        centre, extent = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        numbers = " ".join(f"{value:.6f}" for value in (*centre, *extent, found.scores[row]))
        lines.append(f"{found.labels[row]} {numbers}\n")
    return "".join(lines)
