"""`vidt evaluate`: COCO's numbers of a detector, of weights or of an exported model."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from trainer.coco_file import Truth, read_truth
from trainer.coco_scores import STATS, coco_scores
from trainer.flags import Flags, UsageError, add_detector_flags, note, say
from trainer.prediction_formats import found_in
from trainer.result_files import write_result
from vidt.batching import PENDING_BATCHES, read_ahead, reading_threads
from vidt.images import UnreadableImage, read_image
from vidt.loading import load

SUMMARY = """
Scores a detector on annotated images as COCO does: AP (average precision: 1 is perfect, 0 finds
nothing) for boxes, for each class, and for masks where the model and the file have them. Size and
normalisation are those of the weights; classes are matched by name.
"""
EXAMPLES = """
examples:
  vidt evaluate output/best.safetensors --json data/coco/annotations/instances_val2017.json \\
      --images data/coco/val2017
  vidt evaluate model.onnx --json val.json --images images --out scores.json
      an exported model: run by onnxruntime, without PyTorch

what it prints:
  AP50 counts a box as found if it overlaps the true box by half; AP is the mean over ten stricter
  demands; a - says that there is nothing of the kind to score. --out FILE gets the same as JSON,
  map50, map, ap/CLASS and so on, -1 for nothing to score.

exit code: 0 done, 2 a mistake that the line "error: ..." names.
"""
MAX_BAD = 0.05  # share of images that cannot be read, beyond which no score is given


def flags() -> Flags:
    parser = Flags("evaluate", SUMMARY, EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help=".safetensors, released .pth, or .onnx")
    parser.add_argument("--json", required=True, metavar="FILE", help="annotations in COCO's JSON")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    add_detector_flags(parser, batch_size=8)
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises ValueError and OSError with one line for the user."""
    given = flags().read(argv)
    if given.out is not None and given.out.is_dir():
        raise UsageError(f"--out {given.out} is a folder; name a file")
    detector = load(
        given.weights, device=given.device, precision=given.precision, compile=given.compile
    )
    truth = read_truth(given.json, given.images, detector.class_names)
    found, unread = predict(detector, truth, given.images, given.batch_size)
    num_images = len(truth.images) + len(unread)
    if len(unread) > MAX_BAD * num_images:
        raise ValueError(
            f"--images {given.images}: {len(unread)} of {num_images} images cannot be read; the "
            f"first: {unread[0]}"
        )
    for problem, number in truth.left_out.items():
        note(f"{truth.source}: {number} objects {problem} are left out")
    if unread:
        note(f"{len(unread)} images cannot be read and are left out; the first: {unread[0]}")
    metrics = coco_scores(truth, found, detector.class_names)
    if truth.has_masks and any("segmentation" in row for row in found):
        metrics |= coco_scores(truth, found, detector.class_names, masks=True)
    say(table(metrics, detector.class_names))
    if given.out is not None:
        write_result(given.out, json.dumps(metrics, indent=1).encode())
    return 0


def predict(
    detector: Any, truth: Truth, folder: str, batch_size: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """COCO's results, and why images could not be read; those are taken out of the truth."""
    entries = truth.images.copy()
    pictures = read_ahead(entries, lambda entry: _read(entry, folder), reading_threads())
    found: list[dict[str, Any]] = []
    unread: dict[int, str] = {}
    terminal = sys.stderr.isatty()
    with tqdm(total=len(truth.images), unit="image", disable=not terminal) as bar:
        for window in _windows(pictures, PENDING_BATCHES * batch_size):
            readable = [each for each in window if isinstance(each[1], Image.Image)]
            images = [picture for _, picture in readable]
            for index, detections in detector.stream(images, batch_size=batch_size):
                entry, picture = readable[index]
                found += _rows(entry["id"], picture, detections)
            unread |= {entry["id"]: each for entry, each in window if isinstance(each, str)}
            bar.update(len(window))
    truth.images[:] = [entry for entry in truth.images if entry["id"] not in unread]
    truth.objects[:] = [each for each in truth.objects if each["image_id"] not in unread]
    return sorted(found, key=lambda row: row["image_id"]), list(unread.values())


def _read(entry: dict[str, Any], folder: str) -> tuple[dict[str, Any], Image.Image | str]:
    """The picture, turned by its EXIF only where the annotated size says so; or why not."""
    size = (entry.get("height"), entry.get("width"))
    known = all(isinstance(side, int) and side > 0 for side in size)
    try:
        path = Path(folder) / entry["file_name"]
        return entry, read_image(path, size if known else None)  # type: ignore[arg-type]
    except (UnreadableImage, ValueError) as error:
        return entry, str(error)


def _windows(items: Iterator[Any], length: int) -> Iterator[list[Any]]:
    window: list[Any] = []
    for item in items:
        window.append(item)
        if len(window) == length:
            yield window
            window = []
    if window:
        yield window


def _rows(image_id: int, picture: Image.Image, detections: Any) -> list[dict[str, Any]]:
    size = (picture.height, picture.width)
    found = found_in("", size, detections)
    rows = []
    for row, (x1, y1, x2, y2) in enumerate(np.float32(found.boxes).astype(float).tolist()):
        width, height = x2 - x1, y2 - y1
        entry: dict[str, Any] = {
            "image_id": image_id,
            "category_id": found.labels[row],
            "bbox": [x1, y1, width, height],
            "score": found.scores[row],
            "area": max(width, 0.0) * max(height, 0.0),
        }
        if found.masks is not None:
            entry["segmentation"] = {"size": list(size), "counts": found.masks[row].encode()}
        rows.append(entry)
    return rows


def table(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """The twelve numbers with their meaning, of masks beside boxes, and those of each class."""
    masks = "segm_map" in metrics
    width = max(len(text) for text in STATS.values())
    lines = [f"{'':<{width}}  {'boxes':>6}{'   masks' if masks else ''}"]
    for name, text in STATS.items():
        of_masks = f"  {_shown(metrics[f'segm_{name}'])}" if masks else ""
        lines.append(f"{text:<{width}}  {_shown(metrics[name])}{of_masks}")
    width = max([len(name) for name in names] + [5])
    lines += ["", f"{'class':<{width}}    AP50      AP"]
    for name in names:
        ap50, ap = metrics[f"ap50/{name}"], metrics[f"ap/{name}"]
        lines.append(f"{name:<{width}}  {_shown(ap50)}  {_shown(ap)}")
    text = "\n".join(lines)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _shown(value: float) -> str:
    return f"{value:6.3f}" if value >= 0 else f"{'-':>6}"
