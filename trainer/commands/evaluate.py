"""`vidt evaluate`: COCO's numbers of a detector, of weights or of an exported model."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from trainer.commands.command_flags import Flags, UsageError, add_detector_flags, note, say
from trainer.commands.result_files import write_result
from trainer.readers.coco_file import CocoFile, read_coco_file
from trainer.scoring.coco_scores import WORDS, box_scores, judge, mask_scores
from trainer.scoring.prediction_formats import ImagePredictions, image_predictions
from vidt.images.batching import PENDING_BATCHES, read_ahead, reading_threads
from vidt.images.files import UnreadableImage, read_image
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
    file = read(given.json, given.images, detector.class_names)
    found, unread = predict(detector, file, given.images, given.batch_size)
    num_images = len(file.images.ids)
    if len(unread) > MAX_BAD * num_images:
        raise ValueError(
            f"--images {given.images}: {len(unread)} of {num_images} images cannot be read; the "
            f"first: {unread[0]}"
        )
    truth = judge(file, found)
    metrics = box_scores(file, truth, found, detector.class_names)
    of_masks, unusable = mask_scores(file, truth, found, detector.class_names)
    for line in remarks(file, truth.left_out, unread, unusable):
        note(line)
    metrics |= of_masks
    say(table(metrics, detector.class_names))
    if given.out is not None:
        write_result(given.out, json.dumps(metrics, indent=1).encode())
    return 0


def read(
    json_path: str, image_dir: str, names: Sequence[str], images_flag: str = "--images"
) -> CocoFile:
    """The truth for a detector of these class names, which are matched with the file's.

    Raises ValueError, in one line, for a file that is not COCO's JSON, has no images, or has no
    class in common with the detector; and for images that are not there.
    """
    if os.path.isdir(json_path):
        raise ValueError(f"--json {json_path} is a folder; name COCO's JSON file in it")
    try:
        file = read_coco_file(json_path, names)
    except ValueError as error:
        raise ValueError(f"--json {error}") from error
    if all(label < 0 for label in file.classes.label_of.values()):
        theirs, ours = (", ".join(list(each)[:5]) for each in (file.own_names.values(), names))
        raise ValueError(
            f"--json {json_path} has no class of the weights: it has {theirs}, the weights know "
            f"{ours}; take weights that were trained on these classes"
        )
    if not os.path.isdir(image_dir):
        raise ValueError(f"{images_flag} {image_dir}: no such folder")
    files = file.images.names
    if not any(os.path.isfile(os.path.join(image_dir, name)) for name in files):
        raise ValueError(
            f"{images_flag} {image_dir} holds none of the {len(files)} images, such as {files[0]}; "
            "name the folder that the file names are relative to"
        )
    return file


def predict(
    detector: Any, file: CocoFile, folder: str, batch_size: int
) -> tuple[dict[int, ImagePredictions], list[str]]:
    """What was found in each image, by its place in the file, and why others cannot be read."""
    entries = zip(file.images.names, file.images.sizes, strict=True)
    pictures = read_ahead(entries, lambda entry: _read(folder, *entry), reading_threads())
    found: dict[int, ImagePredictions] = {}
    unread: list[str] = []
    terminal = sys.stderr.isatty()
    with tqdm(total=len(file.images.ids), unit="image", disable=not terminal) as bar:
        for window in _windows(enumerate(pictures), PENDING_BATCHES * batch_size):
            readable = [each for each in window if isinstance(each[1], Image.Image)]
            images = [picture for _, picture in readable]
            for index, detections in detector.stream(images, batch_size=batch_size):
                place, picture = readable[index]
                found[place] = image_predictions("", (picture.height, picture.width), detections)
            unread += [problem for _, problem in window if isinstance(problem, str)]
            bar.update(len(window))
    return found, unread


def _read(folder: str, name: str, size: tuple[int, int]) -> Image.Image | str:
    """The picture, turned by its EXIF only where the annotated size says so; or why not."""
    try:
        return read_image(Path(folder) / name, None if size == (0, 0) else size)
    except (UnreadableImage, ValueError) as error:
        return str(error)


def remarks(
    file: CocoFile, left_out: Mapping[str, int], unread: Sequence[str], unusable_masks: int
) -> Iterator[str]:
    """What does not count, a line for each reason."""
    malformed = file.images.num_malformed
    if malformed:
        yield f"{file.source}: {malformed} images without a file_name or id are left out"
    for problem, number in left_out.items():
        yield f"{file.source}: {number} objects {problem} are left out"
    if unusable_masks:
        yield f"{file.source}: the masks of {unusable_masks} objects cannot be used"
    if unread:
        yield f"{len(unread)} images cannot be read and are left out; the first: {unread[0]}"


def _windows(items: Iterator[Any], length: int) -> Iterator[list[Any]]:
    window: list[Any] = []
    for item in items:
        window.append(item)
        if len(window) == length:
            yield window
            window = []
    if window:
        yield window


def table(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """The twelve numbers with their meaning, of masks beside boxes, and those of each class."""
    masks = "segm_map" in metrics
    width = max(len(text) for text in WORDS.values())
    lines = [f"{'':<{width}}  {'boxes':>6}{'   masks' if masks else ''}"]
    for name, text in WORDS.items():
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
