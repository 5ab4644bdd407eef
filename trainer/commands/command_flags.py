"""What the subcommands of `vidt` share: a parser, types of values, and files of results."""

import argparse
import io
import json
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from trainer.readers.findings import BadDataset, Finding, format_findings
from trainer.settings.config import TrainConfig
from trainer.settings.limits import LARGEST_SIZE
from vidt.arguments import MIXED_PRECISIONS, OneLineParser
from vidt.atomic import atomic_file, atomic_write
from vidt.errors import UserError, escaped, printable, shown
from vidt.loading import load
from vidt.predict.selection import BEST
from vidt.predict.tiles import OVERLAP, check_tile
from vidt.weights.published import local_weights, nearest_model

SILENT = 2.0  # seconds that a stage takes before a command speaks of it
BETWEEN_LINES = 10.0  # seconds between two lines of progress where there is no terminal
MOST = 65_536  # of anything that a flag counts, such as the images of a batch


# What flags of other programs are called here.
_SIZE = "the size is saved with the weights; --tile predicts large images in tiles"
ELSEWHERE = {
    **dict.fromkeys(("conf", "score_threshold", "conf_thres"), "its name here is --threshold"),
    **dict.fromkeys(("imgsz", "img_size", "image_size"), _SIZE),
    **dict.fromkeys(("source", "images"), "images are given without a flag, after the weights"),
    **dict.fromkeys(("model", "checkpoint"), "weights are given without a flag, first"),
    **dict.fromkeys(("project", "name", "save_dir", "output", "output_dir"), "see --out"),
    **dict.fromkeys(("batch",), "its name here is --batch_size"),
    **dict.fromkeys(("save_txt",), "--yolo writes label files"),
    **dict.fromkeys(("half", "fp16"), "--mixed_precision fp16 asks for it"),
    **dict.fromkeys(("iou", "nms"), "the detector needs no suppression of overlaps"),
}


def command_parser(command: str, summary: str, examples: str) -> OneLineParser:
    """The parser of one subcommand."""
    return OneLineParser(
        f"vidt {command}",
        description=summary.strip(),
        epilog=examples.strip(),
        elsewhere=ELSEWHERE,
    )


def add_data(parser: argparse._ActionsContainer) -> None:
    """The flags that name ground truth in any layout."""
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="folder of a COCO, YOLO or Pascal VOC dataset of any layout, or its annotation file",
    )
    parser.add_argument(
        "--split",
        choices=("val", "test"),
        default="val",
        help="the part of --data to use (default %(default)s)",
    )
    add_val_fraction(parser)


def add_val_fraction(parser: argparse._ActionsContainer) -> None:
    """The flag of the part that is held out of --data."""
    parser.add_argument(
        "--val_fraction",
        type=share,
        default=TrainConfig.val_fraction,
        metavar="S",
        help="share of the images of --data to validate on if it has no validation part "
        "(default %(default)s)",
    )


def share(text: str) -> float:
    """The type of a flag whose value is from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number from 0 to 1")
    return value


def threshold(text: str) -> float | str:
    """The type of --threshold: a score, or best."""
    return BEST if text == BEST else share(text)


def count(text: str, most: int = MOST) -> int:
    """The type of a flag whose value is a whole number from 1 to `most`."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number of 1 or more")
    if value > most:
        raise argparse.ArgumentTypeError(f"{shown(text)} is too large; it must be at most {most:,}")
    return value


def side(text: str) -> int:
    """The type of a flag whose value is in pixels."""
    value = count(text, LARGEST_SIZE)
    if value < 32:
        raise argparse.ArgumentTypeError(f"{value} is too small; it must be 32 pixels or more")
    return value


def add_detector_flags(flags: argparse.ArgumentParser, batch_size: int) -> None:
    """The flags that become arguments of `vidt.load` and of the detector."""
    group = flags.add_argument_group("computation")
    group.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one"
    )
    group.add_argument(
        "--mixed_precision",
        choices=MIXED_PRECISIONS,
        help="no is fp32; default auto: bf16 where the GPU computes it natively, else fp32. An "
        ".onnx model has a fixed one",
    )
    group.add_argument(  # its older name
        "--precision",
        dest="mixed_precision",
        choices=("fp32", "bf16", "fp16"),
        help=argparse.SUPPRESS,
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the model's blocks with torch.compile, which takes minutes to start",
    )
    group.add_argument(
        "--batch_size",
        type=count,
        default=batch_size,
        metavar="N",
        help="most images in a batch (default %(default)s); it changes no result",
    )
    add_allow_http(group)


def add_allow_http(flags: argparse._ActionsContainer) -> None:
    flags.add_argument(
        "--allow_http", action="store_true", help="fetch from http addresses too, unencrypted"
    )


def add_tile_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that become arguments of a detector's `stream`; see `vidt.predict.tiles`."""
    group = flags.add_argument_group("tiles, for large images and many objects")
    group.add_argument(
        "--tile",
        type=side,
        metavar="N",
        help="predict in tiles of N x N pixels and in the whole image, and merge the detections",
    )
    group.add_argument(
        "--overlap",
        type=share,
        default=OVERLAP,
        metavar="S",
        help="share of a tile's side that neighbours have in common (default %(default)s)",
    )


def tile_settings(given: argparse.Namespace) -> dict[str, Any]:
    """Those arguments. Raises UserError for an overlap that is too large."""
    check_tile(given.tile, given.overlap)
    return {"tile": given.tile, "overlap": given.overlap}


def weights_file(source: str, allow_http: bool) -> Path:
    """The file of WEIGHTS, fetched if it is an address. Raises UserError if there is none."""
    path = local_weights(source, flag=None, allow_http=allow_http)
    if path.is_dir():
        raise UserError(f"WEIGHTS {path} is a folder; name the weights file in it")
    if not path.is_file():
        raise UserError(f"WEIGHTS {path}: no such file{nearest_model(source)}")
    return path


def load_detector(given: argparse.Namespace, *, threads: int | None = None) -> Any:
    """The detector of WEIGHTS and those flags, see `vidt.load`. On a GPU, a line says its precision
    and why.
    """
    detector = load(
        given.weights,
        device=given.device,
        precision=given.mixed_precision,
        compile=given.compile,
        threads=threads,
        allow_http=given.allow_http,
    )
    device = getattr(detector, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        note(f"on {device}, precision {detector.precision} ({detector.why_precision})")
    return detector


def check_result(flag: str, path: Path | None, read: Iterable[Path]) -> None:
    """Raises UserError if `path`, the value of `flag`, is a folder or one of the files that the
    command reads, under any name.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file")
    if path.resolve() in {each.resolve() for each in read}:
        raise UserError(f"{flag} {path} would overwrite a file that is read; name another")


def say(text: str) -> None:
    """Prints text on standard output at once."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Prints a line on standard error, apart from the results."""
    sys.stdout.flush()
    sys.stderr.write(escaped(text) + "\n")


def note_findings(findings: Sequence[Finding]) -> None:
    """Prints findings as `note` does, a line for each."""
    for line in format_findings(findings).splitlines():
        note(line)


@contextmanager
def findings_of_refused_data() -> Iterator[None]:
    """Prints the findings that led to a BadDataset before it goes on."""
    try:
        yield
    except BadDataset as error:
        note_findings(error.findings)
        raise


class _ProgressLines(tqdm):
    """Counts in lines, for a log file, which cannot show a bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.n and msg is None:  # tqdm clears a bar with an empty message
            total = "" if self.total is None else f" of {self.total:,}"
            note(f"{self.n:,}{total} {self.unit}s ...")


def progress_bar(total: int | None, unit: str) -> tqdm:
    """Progress on standard error: a bar on a terminal, else a line every BETWEEN_LINES seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, file=sys.stderr)
    return _ProgressLines(
        total=total,
        unit=unit,
        file=sys.stderr,
        leave=False,
        miniters=1,
        mininterval=BETWEEN_LINES,
        delay=BETWEEN_LINES,
    )


class Stages:
    """Says on standard error what a command does: each stage once it has taken SILENT seconds, so
    that quick commands print nothing but their results.
    """

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def __call__(self, text: str) -> None:
        """A stage begins, and the one before it has ended."""
        self.end()
        self._timer = threading.Timer(SILENT, note, [f"{text} ..."])
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def write_result(path: Path, data: bytes) -> None:
    """An atomic write, not forced onto the disk: results can be computed again, and forcing a
    million files takes long. Raises OSError naming the file.
    """
    atomic_write(path, data, durable=False)


def write_json(path: Path | None, value: object) -> None:
    """Writes a value as JSON, if there is a path to write to."""
    if path is not None:
        write_result(path, json.dumps(value, indent=1).encode())


@contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """A text file that appears when the block ends well, and does not appear when it raises. Raises
    OSError naming the file.
    """
    with atomic_file(path, durable=False) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield text
        text.flush()
        text.detach()  # otherwise the wrapper closes the file


@contextmanager
def standard_output() -> Iterator[TextIO]:
    """Standard output, which takes any text and is flushed at the end."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    yield sys.stdout
    sys.stdout.flush()
