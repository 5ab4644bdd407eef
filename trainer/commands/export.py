"""`vidt export`: weights to an ONNX model, which is compared with them before it counts as done."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.commands.check import annotation_files
from trainer.commands.command_flags import (
    Stages,
    add_allow_http,
    add_data,
    check_result,
    command_parser,
    note,
    say,
    side,
    weights_file,
    write_json,
)
from trainer.commands.evaluate import read as read_truth
from trainer.commands.evaluate import read_data, require_one_truth
from trainer.readers.coco_file import CocoFile
from trainer.scoring.coco_scores import judge, map50
from trainer.scoring.prediction_formats import ImagePredictions
from vidt.arguments import OneLineParser
from vidt.errors import UserError
from vidt.images.files import probe_image, read_image
from vidt.images.image_files import ImageFiles

SUMMARY = """
Writes a detector as an ONNX model that onnxruntime runs without PyTorch, and verifies it: both
detectors predict on the same images, and the report shows how much they differ. The
model contains the class names and the preprocessing, so that vidt predict and vidt evaluate accept
it.
"""
EXAMPLES = """
examples:
  vidt export output/best.safetensors model.onnx
  vidt export output/best.safetensors model.onnx --size 640 640 --images photos/
  vidt export output/best.safetensors model.onnx --dynamic batch --with_decode
  vidt export output/best.safetensors half.onnx --fp16 --data photos
  vidt export output/best.safetensors half.onnx --fp16 --json val.json --coco_images images

another runner, such as TensorRT:
  vidt export output/best.safetensors model.onnx --images photos/ --write_inputs inputs.npz
      also writes what the model takes for each image: images/0, padding/0, images/1, ...
  vidt export output/best.safetensors model.onnx --images photos/ --prove outputs.npz
      exports nothing; compares what the runner gave for these inputs: pred_logits/0, pred_boxes/0

exit code: 0 exported, and both agree; 1 they differ, see the report; 2 a mistake that the line
"error: ..." names. --with-decode and --with_decode mean the same.
"""
AXES = ("batch", "size")


def flags() -> OneLineParser:
    parser = command_parser("export", SUMMARY, EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help="weights to export")
    parser.add_argument("output", metavar="MODEL", type=Path, help="the .onnx file to write")
    parser.add_argument(
        "--size",
        nargs=2,
        type=side,
        metavar=("H", "W"),
        help="height and width of the model's input; default: that of most images of the "
        "verification, or else the size of the weights, square",
    )
    parser.add_argument(
        "--dynamic",
        default="",
        metavar="AXES",
        help="batch: the model takes any number of images (size is not possible); default: one",
    )
    parser.add_argument(
        "--fp16",
        action="store_true",
        help="half precision: half the file size; with --prove, what it may differ by",
    )
    parser.add_argument(
        "--with_decode",
        action="store_true",
        help="the model returns boxes, labels and scores instead of the raw outputs",
    )
    add_allow_http(parser)
    proof = parser.add_argument_group("verification")
    proof.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders; default: noise",
    )
    add_data(proof)
    proof.add_argument("--json", type=Path, metavar="FILE", help="COCO file: map50 of both")
    proof.add_argument("--coco_images", type=Path, metavar="DIR", help="folder of its images")
    proof.add_argument(
        "--write_inputs", type=Path, metavar="FILE", help="write the inputs as .npz, for --prove"
    )
    proof.add_argument(
        "--prove",
        type=Path,
        metavar="FILE",
        help="export nothing; verify the outputs of another runner of MODEL, an .npz file",
    )
    proof.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON")
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    given = flags().parse_args(argv)
    dynamic = tuple(word for word in given.dynamic.split(",") if word)
    unknown = [word for word in dynamic if word not in AXES]
    if unknown:
        raise UserError(f"--dynamic {given.dynamic}: {unknown[0]} is neither batch nor size")
    require_one_truth(given.data, given.json, given.coco_images, "--coco_images", needed=False)
    if given.prove or given.write_inputs:
        check_other_runner(given)
    if given.output.suffix != ".onnx":
        raise UserError(f"MODEL {given.output}: name it something.onnx")
    weights = weights_file(given.weights, given.allow_http)
    if given.output.is_dir() or not given.output.absolute().parent.is_dir():
        raise UserError(f"MODEL {given.output}: there is no folder for it")
    images = [Path(file.path) for file in ImageFiles(given.images, sys.stdin)]
    read = [weights, *images, *([given.json] if given.json else [])]
    read += annotation_files(given.data) if given.data else []
    check_result("MODEL", given.output, read)
    written = [given.output, *([given.prove] if given.prove else [])]
    check_result("--report", given.report, [*read, *written])
    reports = [given.report] if given.report else []
    check_result("--write_inputs", given.write_inputs, [*read, given.output, *reports])
    try:
        onnx_export = import_module("vidt.onnx.export")
    except ImportError as error:
        raise UserError(
            f"vidt export needs onnx and onnxruntime ({error}); pip install 'vidt[export]'"
        ) from None
    same: dict[str, Any] = {
        "half": given.fp16,
        "images": images,
        "dataset_for": proof_data(given),
    }
    with Stages() as tell:
        if given.prove:
            report = onnx_export.prove(weights, given.output, given.prove, **same, tell=tell)
        else:
            report = onnx_export.export(
                weights,
                given.output,
                size=tuple(given.size) if given.size else None,
                dynamic=dynamic,
                with_decode=given.with_decode,
                inputs=given.write_inputs,
                **same,
                tell=tell,
            )
    say(report.text())
    write_json(given.report, report.as_dict())
    return 0 if report.ok else 1


def check_other_runner(given: Namespace) -> None:
    """Raises UserError for flags that do not go with --write_inputs and --prove."""
    flag = "--prove" if given.prove else "--write_inputs"
    if given.images and (given.data or given.json):
        raise UserError(
            f"{flag}: --images and {'--data' if given.data else '--json'} exclude each "
            "other; drop one"
        )
    if not given.prove:
        return
    exports = ("size", "dynamic", "with_decode", "write_inputs")
    surplus = next((name for name in exports if getattr(given, name)), None)
    if surplus:
        raise UserError(f"--prove exports nothing; drop --{surplus}")
    for what, path in (("MODEL", given.output), ("--prove", given.prove)):
        if not path.is_file():
            raise UserError(f"{what} {path}: no such file")


def proof_data(given: Namespace) -> Callable[[Sequence[str]], Any] | None:
    """What reads the images to score, by the detector's class names; None for none."""
    if given.data is not None:
        return partial(scored_data, given.data, given.split, given.val_fraction)
    return partial(scored_images, given.json, given.coco_images) if given.json else None


def scored_data(data: str, split: str, val_fraction: float, names: Sequence[str]) -> Any:
    """A split of --data, as `scored_images`."""
    file, line = read_data(data, split, val_fraction, names, masks=False)
    note(line)
    return scored(file, Path(), names, f"--data {data}")


def scored_images(json_path: Path, folder: Path, names: Sequence[str]) -> Any:
    """A COCO dataset as `vidt.onnx.export.export` takes it. Raises UserError for a file that
    `vidt evaluate` refuses, a missing image, and a file without a usable box.
    """
    file = read_truth(str(json_path), str(folder), names, "--coco_images")
    return scored(file, folder, names, f"--json {json_path}")


def scored(file: CocoFile, folder: Path, names: Sequence[str], where: str) -> Any:
    files = [folder / name for name in file.images.names]
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing}: no such file, but {where} has it")
    sizes = [
        probe_image(path).size if size == (0, 0) else size
        for path, size in zip(files, file.images.sizes, strict=True)
    ]
    for path, size in zip(files, sizes, strict=True):  # now, not after minutes
        read_image(path, size)
    empty = {position: ImagePredictions("", size) for position, size in enumerate(sizes)}
    if not len(judge(file, empty).rows):
        raise UserError(f"{where}: no annotation has a usable box to score")

    def score(detections: Iterable[Any]) -> float:
        return map50(file, sizes, detections, names)

    return import_module("vidt.onnx.export").ScoredImages(files, sizes, score)
