"""`vidt evaluate`: COCO's metrics of a detector, from weights or from an exported model."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.commands.check import annotation_files
from trainer.commands.command_flags import (
    Stages,
    add_data,
    add_detector_flags,
    add_tile_flags,
    check_result,
    command_parser,
    findings_of_refused_data,
    load_detector,
    note,
    progress_bar,
    say,
    tile_settings,
    write_json,
)
from trainer.commands.predictions import predict_files, read_file
from trainer.readers.classes import ClassMatch
from trainer.readers.coco_columns import Annotations, ImageColumns
from trainer.readers.coco_file import NO_FAULT, CocoFile, locate_images, read_coco_file
from trainer.readers.findings import Finding, format_findings
from trainer.readers.values import shortened
from trainer.scoring.coco_scores import WORDS, best_thresholds, box_scores, judge, mask_scores
from trainer.scoring.prediction_formats import ImagePredictions
from trainer.settings.config import TrainConfig
from vidt.arguments import OneLineParser
from vidt.errors import UserError, counted, escaped
from vidt.images.image_files import ImageFile
from vidt.weights.published import is_remote

SUMMARY = """
Scores a detector on annotated images as COCO does: AP (average precision: 1 is perfect, 0 finds
nothing) for boxes, for each class, and for masks if the model and the file have them. Image size
and normalisation are those of the weights; classes are matched by name.
"""
EXAMPLES = """
examples:
  vidt evaluate output/best.safetensors --json data/coco/annotations/instances_val2017.json \\
      --images data/coco/val2017
  vidt evaluate output/best.safetensors --data photos --split test
  vidt evaluate output/best.safetensors --json val.json --images images --tile 640 --save_thresholds
      as vidt predict --tile 640, and stores the best threshold of each class
  vidt evaluate model.onnx --json val.json --images images --out scores.json
      an exported model, which onnxruntime runs without PyTorch

output:
  AP50 counts a box as found if its IoU with the true box is 0.5 or more; AP is the mean over ten
  IoU thresholds from 0.5 to 0.95; - means that there is nothing to score. --out FILE gets the same
  as JSON: map50, map, ap/CLASS and so on, -1 for nothing to score.

exit code: 0 done, 2 a mistake that the line "error: ..." names.
"""
MAX_BAD = 0.05  # share of unreadable images above which there is no score


def flags() -> OneLineParser:
    parser = command_parser("evaluate", SUMMARY, EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help=".safetensors, released .pth, or .onnx")
    add_data(parser)
    parser.add_argument("--json", metavar="FILE", help="annotations in COCO's JSON")
    parser.add_argument("--images", metavar="DIR", help="folder of the images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument(
        "--save_thresholds",
        action="store_true",
        help="store the best threshold of each class in WEIGHTS, for vidt predict --threshold best",
    )
    add_tile_flags(parser)
    add_detector_flags(parser, batch_size=8)
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    given = flags().parse_args(argv)
    require_one_truth(given.data, given.json, given.images, "--images")
    check_result("--out", given.out, [Path(given.weights), Path(given.json or given.data)])
    if given.data is not None:
        check_result("--out", given.out, annotation_files(given.data))
    tiles = tile_settings(given)
    if given.save_thresholds and is_remote(given.weights):
        raise UserError(
            f"--save_thresholds writes into a file of this machine, and WEIGHTS is {given.weights}"
            "; save the download under a name of your own first"
        )
    if given.save_thresholds and Path(given.weights).suffix != ".safetensors":
        raise UserError(
            f"--save_thresholds writes into a .safetensors file, and WEIGHTS is {given.weights}; "
            "convert a .pth by python -m vidt.convert, or evaluate the weights and export again"
        )
    detector = load_detector(given)
    folder = given.images or ""
    with Stages() as tell:
        tell(f"reading {given.data or given.json}")
        if given.data is None:
            file, line = read(given.json, folder, detector.class_names), ""
        else:
            file, line = read_data(
                given.data, given.split, given.val_fraction, detector.class_names
            )
    if line:
        note(line)
    if given.out is not None:
        images = (Path(folder, name) for name in file.images.names)
        resolved = given.out.resolve()
        check_result("--out", given.out, (e for e in images if e.name == resolved.name))
    found, unread = predict(detector, file, folder, given.batch_size, **tiles)
    num_images, malformed = len(file.images.ids), file.images.num_malformed
    if len(unread) + malformed > MAX_BAD * (num_images + malformed):
        for line in remarks(file, {}, [], 0):  # the error tells of the unreadable ones
            note(line)
        first = unread[0] if unread else f"{file.source}: {shortened(file.images.malformed[0])}"
        raise UserError(
            f"{'--data' if given.data else '--images'} {given.data or given.images}: "
            f"{len(unread) + malformed} of {num_images + malformed} "
            f"images cannot be read; the first: {first}"
        )
    with Stages() as tell:
        tell(f"scoring {counted(len(found), 'image')}")
        truth = judge(file, found)
        metrics = box_scores(file, truth, found, detector.class_names)
        of_masks, unusable = mask_scores(file, truth, found, detector.class_names)
    for line in remarks(file, truth.left_out, unread, unusable):
        note(line)
    metrics |= of_masks
    say(table(metrics, detector.class_names))
    write_json(given.out, metrics)
    if given.save_thresholds:
        from vidt.weights.weights_file import store_thresholds  # an .onnx model needs no PyTorch

        best = best_thresholds(file, truth, found, detector.class_names)
        store_thresholds(given.weights, best)
        note(f"stored the best threshold of each class in {given.weights}")
    return 0


def require_one_truth(
    data: str | None, json_path: object, images: object, images_flag: str, *, needed: bool = True
) -> None:
    """Raises UserError unless --data is given, or --json and the folder of its images; not both."""
    both = f"--json and {images_flag}"
    given = [flag for flag, value in (("--json", json_path), (images_flag, images)) if value]
    if data is not None and given:
        raise UserError(f"--data and {given[0]} exclude each other; drop one")
    if len(given) == 1 or (needed and data is None and not given):
        raise UserError(f"{both}: give both, or {'--data' if needed else 'neither'}")


def read_data(
    data: str, split: str, val_fraction: float, names: Sequence[str], *, masks: bool = True
) -> tuple[CocoFile, str]:
    """The ground truth of a split of --data as a COCO file whose images are paths, and the line on
    what was recognised. Raises UserError as `trainer.data.load.read_split` does, and if no object
    has a class of the detector.
    """
    # Imported here: reading a COCO file needs no PyTorch.
    from trainer.data.load import read_split

    config = TrainConfig(dataset_file="auto", data=data, val_fraction=val_fraction)
    with findings_of_refused_data():
        table, findings, line = read_split(config, split, names, masks=masks)
    if not len(table.labels):
        foreign = [each.text for each in findings if each.kind == "class not trained"]
        why = foreign[0] if foreign else "it has no boxes"
        raise UserError(f"--data {data}: the {split} part has no object of the weights; {why}")
    return coco_file_of(table, findings), line


def coco_file_of(table: Any, findings: Sequence[Finding]) -> CocoFile:
    """A sample table in the form of a COCO file."""
    columns = {name: getattr(table, name).numpy() for name in ("boxes", "areas", "crowd", "labels")}
    owners, num_boxes = table.box_owners.numpy(), len(table.labels)
    nothing = np.zeros(num_boxes, np.bool_)
    sizes = [(height, width) for height, width in table.sizes.tolist()]
    own_ids = dict(enumerate(table.class_names))
    return CocoFile(
        path="",
        source=table.source,
        own_names=own_ids,
        classes=ClassMatch(table.class_names, tuple(own_ids), {label: label for label in own_ids}),
        images=ImageColumns(table.image_ids.tolist(), list(table.paths()), sizes),
        annotations=Annotations(
            ids=table.annotation_ids.numpy(),
            image_ids=table.image_ids.numpy()[owners],
            category_ids=columns["labels"],
            no_image=nothing,
            no_category=nothing,
            boxes=columns["boxes"],
            no_box=nothing,
            areas=columns["areas"],
            no_area=nothing,
            crowd=columns["crowd"],
        ),
        odd={},
        owners=owners,
        labels=columns["labels"],
        faults=np.full(num_boxes, NO_FAULT),
        findings=list(findings),
        masks=table.masks[:] if table.masks is not None else (b"",) * num_boxes,
    )


def read(
    json_path: str, image_dir: str, names: Sequence[str], images_flag: str = "--images"
) -> CocoFile:
    """The ground truth for a detector with these class names, matched with the file's by name.

    Raises UserError for a file that is not COCO's JSON, has no images, or has no class in common
    with the detector, and for a folder that holds none of the images.
    """
    if os.path.isdir(json_path):
        raise UserError(f"--json {json_path} is a folder; name COCO's JSON file in it")
    try:
        file = read_coco_file(json_path, names)
    except UserError as error:
        raise UserError(f"--json {error}") from error
    if all(label < 0 for label in file.classes.label_of.values()):
        theirs, ours = (", ".join(list(each)[:5]) for each in (file.own_names.values(), names))
        raise UserError(
            f"--json {json_path} has no class of the weights: it has {theirs}, the weights know "
            f"{ours}; take weights that were trained on these classes"
        )
    if not os.path.isdir(image_dir):
        raise UserError(f"{images_flag} {image_dir}: no such folder")
    locate_images(file, image_dir)
    files = file.images.names
    if not any(os.path.isfile(os.path.join(image_dir, name)) for name in files):
        raise UserError(
            f"{images_flag} {image_dir} holds none of the {len(files)} images, such as {files[0]}; "
            "name the folder that the file names are relative to"
        )
    return file


def predict(
    detector: Any, file: CocoFile, folder: str, batch_size: int, **tiles: Any
) -> tuple[dict[int, ImagePredictions], list[str]]:
    """The detections in each image, by its position in the file, and why others are unreadable.

    An image is rotated by its EXIF only where the annotated size says so.
    """
    files = [ImageFile(os.path.join(folder, name), name) for name in file.images.names]
    sizes = [None if size == (0, 0) else size for size in file.images.sizes]
    found: dict[int, ImagePredictions] = {}
    unread: list[str] = []
    with progress_bar(len(files), "image") as bar:
        predicted = predict_files(
            detector,
            zip(files, sizes, strict=True),
            least=0.0,
            batch_size=batch_size,
            read=lambda entry: read_file(*entry),
            **tiles,
        )
        for position, each in enumerate(predicted):
            if each.picture is None:
                unread.append(each.found.problem)
            else:
                found[position] = each.found
            bar.update()
    return found, unread


def remarks(
    file: CocoFile, left_out: Mapping[str, int], unread: Sequence[str], unusable_masks: int
) -> Iterator[str]:
    """A line for each reason why something does not count, or counts in another way."""
    if file.findings:
        yield from format_findings(file.findings).splitlines()
    malformed = file.images.num_malformed
    if malformed:
        first = shortened(file.images.malformed[0])
        yield (
            f"{file.source}: {counted(malformed, 'image')} without a file_name or an id of 64 bits "
            f"left out; the first: {first}"
        )
    for problem, number in left_out.items():
        yield f"{file.source}: {counted(number, 'object')} {problem} left out"
    if unusable_masks:
        yield f"{file.source}: the masks of {counted(unusable_masks, 'object')} cannot be used"
    if unread:
        yield f"left out {counted(len(unread), 'unreadable image')}; the first: {unread[0]}"


def table(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """The twelve COCO metrics, of masks beside those of boxes, and the AP of each class."""
    masks = "segm_map" in metrics
    width = max(len(text) for text in WORDS.values())
    lines = [f"{'':<{width}}  {'boxes':>6}{'   masks' if masks else ''}"]
    for name, text in WORDS.items():
        of_masks = f"  {_shown(metrics[f'segm_{name}'])}" if masks else ""
        lines.append(f"{text:<{width}}  {_shown(metrics[name])}{of_masks}")
    width = max([len(escaped(name)) for name in names] + [5])
    lines += ["", f"{'class':<{width}}    AP50      AP"]
    for name in names:
        ap50, ap = metrics[f"ap50/{name}"], metrics[f"ap/{name}"]
        lines.append(f"{escaped(name):<{width}}  {_shown(ap50)}  {_shown(ap)}")
    text = "\n".join(lines)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _shown(value: float) -> str:
    return f"{value:6.3f}" if value >= 0 else f"{'-':>6}"
