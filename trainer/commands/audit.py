"""`vidt audit`: annotations that a detector disagrees with, on a page and as JSON."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.commands.check import add_data_flags, settings
from trainer.commands.command_flags import (
    add_detector_flags,
    command_parser,
    findings_of_refused_data,
    load_detector,
    note,
    note_findings,
    progress_bar,
    say,
    weights_file,
    write_json,
    write_result,
)
from vidt.arguments import OneLineParser
from vidt.errors import UserError, counted
from vidt.images.image_files import ImageFile

SUMMARY = """
Looks for mistakes in the annotations of a dataset with detectors that were trained on it or on the
like: objects that seem forgotten, boxes and classes that seem wrong, annotations that nothing
supports, and pictures that are there twice. It changes nothing.
"""
EXAMPLES = """
examples:
  vidt audit output/best.safetensors --coco_path data/coco --output_dir audit
  vidt audit fold1.safetensors fold2.safetensors --yolo_path data/yolo --split train
      each image is judged by the detectors that were not trained on it, if the files tell

output: DIR/audit.html, the first 100 findings with pictures, and DIR/audit.json, all of them: kind,
score, rank, rank_in_kind, split, file, image_id, annotation_id, class, box, suggested, twin_id,
twin_file, text. Boxes are xyxy in pixels. Scores run from 0 to 1.

exit code: 0 done, 2 a mistake that the line "error: ..." names.
"""
SPLITS = ("train", "val")
WEAK = 0.6  # a map50 below which most disagreements are the detector's fault
NO_NOISE = 0.01  # detections that score less are noise


def flags() -> OneLineParser:
    parser = command_parser("audit", SUMMARY, EXAMPLES)
    parser.add_argument(
        "weights", nargs="+", metavar="WEIGHTS", help=".safetensors, released .pth, or .onnx"
    )
    add_data_flags(parser)
    parser.add_argument("--split", choices=SPLITS, help="audit one part only; default: both")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("audit"),
        metavar="DIR",
        help="folder of the results (default %(default)s)",
    )
    add_detector_flags(parser, batch_size=8)
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    given = flags().parse_args(argv)
    config = settings(vars(given))
    if given.output_dir.exists() and not given.output_dir.is_dir():
        raise UserError(f"--output_dir {given.output_dir} is a file; name a folder")
    files = {path: weights_file(path, given.allow_http) for path in given.weights}
    # Imported here, so that --help does not wait for PyTorch.
    from trainer.data.load import read_datasets
    from trainer.readers.samples import concatenated
    from trainer.report.audit_page import AuditFacts, as_document, render_audit
    from trainer.scoring.audit import audit
    from trainer.scoring.held_out import how_judged, judges_of, seen_by

    with findings_of_refused_data():
        train, val, findings = read_datasets(config, num_queries=100, num_classes=None, tell=note)
    note_findings(findings)
    given.output_dir.mkdir(parents=True, exist_ok=True)  # before the work
    parts = {"train": train, "val": val}
    if given.split:
        parts = {given.split: parts[given.split]}
    samples = concatenated([*parts.values()])
    splits = [name for name, table in parts.items() for _ in range(len(table))]
    tables = [*parts.values()]
    seen = {path: seen_by(str(file), tables) for path, file in files.items()}
    judges = judges_of(given.weights, seen, len(samples))
    found, thumbnails, notes = predictions(given, samples, judges)
    note(f"comparing {counted(len(samples), 'picture')} with each other")
    ranked = audit(samples, found, thumbnails)
    notes = [how_judged(given.weights, seen, judges), *notes]
    facts = AuditFacts(given.output_dir, [Path(path).name for path in given.weights], splits, notes)
    note(f"drawing the page of {counted(len(ranked), 'suspicion')}")
    document = as_document(samples, ranked, facts, len(found))
    write_json(given.output_dir / "audit.json", document)
    page = render_audit(samples, ranked, facts, len(found))
    write_result(given.output_dir / "audit.html", page.encode())
    say(summary(document, given.output_dir))
    return 0


def predictions(
    given: Any, samples: Any, judges: Sequence[Sequence[str]]
) -> tuple[dict[int, Any], Any, list[str]]:
    """The detections in each readable image, by its index, the thumbnails of all images, and
    remarks for the page.
    """
    import numpy as np

    from trainer.scoring.audit import THUMBNAIL, merged, thumbnail
    from trainer.scoring.held_out import label_map, relabelled

    found: dict[int, list[Any]] = {}
    thumbnails = np.zeros((len(samples), THUMBNAIL**2), np.float32)
    remarks: list[str] = []
    unread: set[int] = set()
    for number, path in enumerate(given.weights, 1):
        indices = [index for index, paths in enumerate(judges) if path in paths]
        if not indices:
            continue
        note(f"weights {number} of {len(given.weights)}, {path}: {counted(len(indices), 'image')}")
        detector = load_detector(Namespace(**{**vars(given), "weights": path}))
        labels = label_map(path, detector.class_names, samples.class_names)
        map50 = detector.info.metrics.get("map50", 1.0)
        if 0 <= map50 < WEAK:  # -1: nothing was scored
            remarks.append(
                f"{Path(path).name} is a weak detector, with a map50 of {map50:.2f} on its "
                "validation images: many suspicions are its own mistakes. Train longer first."
            )
        missing = [
            name
            for label, name in enumerate(samples.class_names)
            if not bool((labels == label).any())
        ]
        if missing:
            remarks.append(f"{Path(path).name} does not know the class {', '.join(missing)}.")
        for index, each in detected(detector, samples, indices, given.batch_size):
            if each.picture is None:
                unread.add(index)
            else:
                thumbnails[index] = thumbnail(each.picture)
                found.setdefault(index, []).append(relabelled(each.detections, labels))
    if unread:
        remarks.append(f"{counted(len(unread), 'image')} cannot be read.")
    return {index: merged(each) for index, each in found.items()}, thumbnails, remarks


def detected(
    detector: Any, samples: Any, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[int, Any]]:
    """Yields each index and the `Predicted` of its image."""
    from trainer.commands.predictions import predict_files, read_file

    sizes = samples.sizes.tolist()
    entries = ((ImageFile(samples.path(index), ""), tuple(sizes[index])) for index in indices)
    with progress_bar(len(indices), "image") as bar:
        predicted = predict_files(
            detector,
            entries,
            least=NO_NOISE,
            batch_size=batch_size,
            read=lambda entry: read_file(*entry),
        )
        for index, each in zip(indices, predicted, strict=True):
            yield index, each
            bar.update()


def summary(document: Mapping[str, Any], folder: Path) -> str:
    """A line for each kind, and where the results are."""
    lines = [*document["notes"]]
    lines += [f"{kind:<19} {count:>7,}" for kind, count in document["counts"].items()]
    return "\n".join([*lines, f"{folder / 'audit.html'} shows the first, audit.json has all"])
