"""`vidt predict`: draws detections, and writes them as JSON, COCO results, YOLO or CSV."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.commands.command_flags import (
    add_detector_flags,
    add_tile_flags,
    command_parser,
    load_detector,
    note,
    progress_bar,
    threshold,
    tile_settings,
)
from trainer.commands.prediction_writer import PredictionWriter, placed
from trainer.commands.predictions import (
    WINDOW_PIXELS,
    Originals,
    Predicted,
    VideoOutput,
    predict_files,
    predict_video,
    read_file,
    video_files,
    video_names,
)
from trainer.loop.stopping import sigterm_interrupts
from vidt.arguments import OneLineParser
from vidt.downloads import is_url, require_scheme
from vidt.errors import UserError
from vidt.images.batching import read_ahead, reading_threads
from vidt.images.image_files import ImageFiles
from vidt.images.video import import_pyav, is_video
from vidt.predict.selection import least_scores

SUMMARY = """
Detects objects in images: in files, in folders and all folders inside, in files that match a
pattern, at https addresses, or in files that standard input lists, one a line. Writes the images
with boxes drawn on them, and the class, the score from 0 to 1 and the box of each object, in pixels
of the original image. Results appear in the order of the images, as they are ready: a million
images take no more memory than a hundred. Unreadable files are skipped and named at the end.
Photographs are turned as their EXIF says, as every viewer shows them, and boxes are those of the
turned image; training and evaluation turn an image if its annotated size says so.
"""
EXAMPLES = """
examples:
  vidt predict best.safetensors street.jpg
      prints a line for each object
  vidt predict best.safetensors photos/ --out found
      found/ gets the images with boxes, and predictions.json
  vidt predict best.safetensors 'photos/**/*.jpg' --out found --yolo --no_pictures
      a text file for each image in found/labels/
  vidt predict best.safetensors street.mp4 --out found
      found/street.mp4 with boxes, and found/street.jsonl, a line for each frame
  find /data -name '*.jpg' | vidt predict best.safetensors - --csv > found.csv
  vidt predict best.safetensors aerial.tif --tile 640 --threshold best --classes car,truck
      in overlapping tiles, each class by its best threshold, two classes
  vidt predict model.onnx photos/ --out found
      an exported model, which onnxruntime runs without PyTorch

output (without --out, on standard output):
  --json   predictions.json: for each image file, height, width, detections (label, name, score,
           box [x1, y1, x2, y2], mask as COCO's run lengths if the model has masks), or error
  --coco   predictions.coco.json: COCO's results. The image id is the file's name without its
           ending, as a number if it is one; the category id is that of the training data if
           the weights contain it, else the label + 1
  --csv    predictions.csv: a row for each object
  --yolo   labels/*.txt: label, centre, width and height from 0 to 1, score; names in classes.txt
Videos and webcams (webcam:0) need PyAV: pip install av. With --out they get NAME.mp4, with boxes
and the timestamps of the source, and NAME.jsonl, a line for each frame, or NAME.csv; the time is in
seconds since the first frame. Ctrl-C finishes the files.
Labels of a.jpg and a.png are called a.jpg.txt and a.png.txt. If two images would still share a
file, the later one's gets a number, a-2.png. So does a drawing that would replace an image of the
command or, if any of these lies in DIR, another picture there; a video asks for another folder.
--yolo never replaces labels without scores, which are annotations, nor a classes.txt that differs.

exit code: 0 done, 1 no image or video could be used, 2 a mistake that the line "error: ..." names,
130 and 143 stopped by Ctrl-C and SIGTERM; finished results are written.
"""
FORMATS = {
    "json": "all detections as JSON (the default with --out)",
    "coco": "COCO's result format, for COCO's own scoring",
    "yolo": "a text file for each image, in YOLO's format",
    "csv": "a table with a row for each object",
}


def flags() -> OneLineParser:
    parser = command_parser("predict", SUMMARY, EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help=".safetensors, released .pth, or .onnx")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="files, folders, quoted patterns, https addresses, videos, webcam:0, or - for a list "
        "of files on standard input",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--threshold",
        type=threshold,
        default=0.3,
        metavar="S",
        help="lowest score of a detection, 0 to 1 (default %(default)s); best: for each class the "
        "threshold that evaluation found best, as stored in the weights",
    )
    parser.add_argument("--classes", metavar="A,B", help="keep only the objects of these classes")
    kinds = parser.add_mutually_exclusive_group()
    for name, text in FORMATS.items():
        kinds.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=text)
    parser.add_argument(
        "--stored_pixels", action="store_true", help="do not turn images as their EXIF says"
    )
    parser.add_argument(
        "--strict_images", action="store_true", help="skip JPEG files whose end is missing"
    )
    parser.add_argument("--no_pictures", action="store_true", help="with --out: write no images")
    add_tile_flags(parser)
    add_detector_flags(parser, batch_size=8)
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises UserError and OSError, and KeyboardInterrupt when stopped."""
    given = flags().parse_args(argv)
    # Of images between Pillow's limit and twice that; larger ones are skipped and named.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    with sigterm_interrupts():
        return _predict(given)


def _predict(given: Any) -> int:
    check_output(given.out, given.format)
    video_words = [word for word in given.images if is_video(word) and not os.path.isdir(word)]
    images = [word for word in given.images if word not in video_words]
    for word in filter(is_url, images):
        require_scheme(word, word, given.allow_http)
    if video_words and given.format in ("coco", "yolo"):
        raise UserError(
            f"--{given.format} is for images, and {video_words[0]} is a video; use --json or --csv"
        )
    tile_settings(given)
    files = ImageFiles(images, sys.stdin, avoid=given.out)
    videos = video_files(video_words, given.out)
    originals = None if given.out is None else Originals([*files.named(), *videos], given.out)
    kind = given.format or ("json" if given.out else None)
    outputs = [
        VideoOutput(given.out, name, kind, pictures=not given.no_pictures)
        for name in video_names(videos)
    ]
    for video, output in zip(videos, outputs, strict=True):
        import_pyav(video)
        if originals is not None:
            output.check(originals)
    detector = load_detector(given)
    least = wanted_scores(given, detector)
    _run_all(
        [
            *[partial(_predict_images, given, files, detector, least, originals)] * bool(images),
            *(
                partial(_predict_video, given, video, output, detector, least)
                for video, output in zip(videos, outputs, strict=True)
            ),
        ]
    )
    return 0


def _run_all(parts: Sequence[Callable[[], None]]) -> None:
    """Runs the parts of a command. Raises NothingRead if each does; otherwise it is told."""
    failures = []
    for part in parts:
        try:
            part()
        except NothingRead as error:
            failures.append(error)
            if len(parts) > 1:
                note(str(error))
    if len(failures) == len(parts):
        what = "no image or video could be used; the first: " if len(parts) > 1 else ""
        raise NothingRead(f"{what}{failures[0]}")


def _predict_video(
    given: Any, video: str, output: VideoOutput, detector: Any, least: np.ndarray
) -> None:
    settings = {"batch_size": given.batch_size, **tile_settings(given)}
    try:
        lines = predict_video(detector, video, output, least, **settings)
    except UserError as error:
        raise NothingRead(str(error)) from error
    for line in lines:
        note(line)


def _predict_images(
    given: Any, files: ImageFiles, detector: Any, least: np.ndarray, originals: Originals | None
) -> None:
    kind = given.format or ("json" if given.out else None)
    with PredictionWriter(
        given.out, kind, detector, given, pictures=not given.no_pictures, originals=originals
    ) as results:
        # Only a bar is worth a walk through all folders before the first image.
        with progress_bar(files.count() if sys.stderr.isatty() else None, "image") as bar:
            predicted = predict_files(
                detector,
                files,
                least=least,
                batch_size=given.batch_size,
                read=partial(
                    read_file,
                    exif=not given.stored_pixels,
                    strict=given.strict_images,
                    allow_http=given.allow_http,
                ),
                **tile_settings(given),
            )
            done: Iterable[Predicted] = placed(predicted, results)
            if results.pictures:
                # Drawing and writing take as long as detecting, so threads do it meanwhile.
                done = read_ahead(
                    done, results.draw, reading_threads(), weigh=_pixels, heaviest=WINDOW_PIXELS
                )
            for each in done:
                results.add(each)
                bar.update()
        if not results.images and results.skipped:
            raise NothingRead(
                f"none of {results.skipped} images could be read; the first: {results.reasons[0]}"
            )
        if not results.images:
            reason = "; ".join(["there is no image in it", *files.passed_over()])
            raise UserError(f"IMAGES {' '.join(given.images)}: {reason}")
    for line in [*results.summary(), *files.passed_over()]:
        note(line)


def wanted_scores(given: Any, detector: Any) -> np.ndarray:
    """The lowest score of each class [K] by --threshold and --classes. Raises UserError."""
    names = detector.class_names
    classes = given.classes
    if classes is not None:  # a name may contain a comma
        classes = [classes] if classes in names else classes.split(",")
        classes = [each.strip() for each in classes if each.strip()]
    return least_scores(given.threshold, classes, names, detector.info.thresholds)


def _pixels(predicted: Predicted) -> int:
    picture = predicted.picture
    return picture.width * picture.height if picture is not None else 0


class NothingRead(UserError):
    """None of the images could be read, or a video could not be used."""

    exit_code = 1


def check_output(out: Path | None, kind: str | None) -> None:
    if out is None and kind == "yolo":
        raise UserError("--yolo writes a file for each image; say where: --out DIR")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
