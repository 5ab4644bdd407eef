"""Writes the predictions of `vidt predict` in images: a file or standard output, drawn images, and
label files.
"""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from trainer.commands.command_flags import atomic_text, standard_output, write_result
from trainer.commands.predictions import Originals, Predicted
from trainer.scoring.prediction_formats import (
    Format,
    ImagePredictions,
    coco_format,
    csv_format,
    json_format,
    text_format,
    yolo_text,
)
from vidt.errors import UserError, counted, shown
from vidt.images.image_files import DistinctFiles, ImageFile, fitting

FILES = {
    "json": "predictions.json",
    "coco": "predictions.coco.json",
    "csv": "predictions.csv",
}
NAMED = 20  # unreadable images that the summary names
LONGEST_JPEG_SIDE = 65_500  # pixels
PICTURE_KINDS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def placed(predicted: Iterable[Predicted], results: "PredictionWriter") -> Iterator[Predicted]:
    """Gives each readable image a name that no other has, and that is not the name of an original.
    Raises UserError if a drawn image would have the name of its own original.
    """
    distinct = DistinctFiles(results.written, results.is_original)
    for each in predicted:
        if each.picture is None:
            yield each
            continue
        target, path = results.picture_path(each.file), each.file.path
        if target is not None and os.path.realpath(target) == os.path.realpath(path):
            raise UserError(f"--out {results.out} would overwrite {path}; name another folder")
        yield replace(each, file=distinct.place(each.file))


class PredictionWriter:
    """Writes predictions to files in `out`, or to standard output without it."""

    def __init__(
        self,
        out: Path | None,
        kind: str | None,
        detector: Any,
        given: Any,
        *,
        pictures: bool,
        originals: Originals | None = None,
    ) -> None:
        self.out, self.kind, self.names = out, kind, tuple(detector.class_names)
        self.pictures = pictures and out is not None
        self.images = self.skipped = self.boxes = self.undrawn = 0
        self.reasons: list[str] = []  # why the first few are unreadable
        self.undrawn_reasons: list[str] = []  # why the first few are not drawn
        self.truncated: list[str] = []
        self._format = format_of(kind, detector, given)
        self._originals = originals
        self._is_new = out is not None and not out.exists()
        self._open_files = ExitStack()
        self._file: TextIO | None = None

    def __enter__(self) -> "PredictionWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Finishes the open file, after Ctrl-C too; removes it after a failure."""
        if exception[0] is None or issubclass(exception[0], KeyboardInterrupt):
            with self._open_files:
                if self._file is not None and self._format is not None:
                    self._file.write(self._format.end(self.images + self.skipped))
            return
        self._open_files.__exit__(*exception)
        if self._is_new and self.out is not None and self.out.is_dir():
            with suppress(OSError):  # not empty: finished images may stay
                self.out.rmdir()

    def picture_path(self, file: ImageFile) -> Path | None:
        """The file of a drawn image: under its own name, as JPEG unless it is a PNG."""
        if not self.pictures or self.out is None:
            return None
        stem, suffix = os.path.splitext(file.name)
        if suffix.lower() not in PICTURE_KINDS:
            stem, suffix = file.name, ".jpg"
        return self.out / fitting(stem, suffix)

    def labels_path(self, file: ImageFile) -> Path | None:
        """The YOLO text file of an image."""
        if self.kind != "yolo" or self.out is None:
            return None
        stem = file.name if file.has_twin else os.path.splitext(file.name)[0]
        return self.out / "labels" / fitting(stem, ".txt")

    def written(self, file: ImageFile) -> list[str]:
        """The files that belong to this image alone."""
        paths = (self.picture_path(file), self.labels_path(file))
        return [str(path) for path in paths if path is not None]

    def is_original(self, path: str) -> bool:
        """Whether a result must not have this path."""
        return self._originals is not None and self._originals.include(path)

    def draw(self, predicted: Predicted) -> Predicted:
        """Writes the image with its boxes, unless --no_pictures is given. Safe in many threads."""
        path = self.picture_path(predicted.file)
        if path is None or predicted.picture is None:
            return predicted
        undrawn = ""
        try:
            self._draw(predicted, path)
        except (OSError, ValueError) as error:  # no reason to lose the other pictures
            undrawn = f"{predicted.file.path}: {shown(str(error) or type(error).__name__, 200)}"
        return replace(  # picture and detections hold the image
            predicted, picture=None, detections=None, undrawn=undrawn
        )

    def _draw(self, predicted: Predicted, path: Path) -> None:
        assert predicted.picture is not None
        picture = predicted.detections.plot(predicted.picture)
        kind = PICTURE_KINDS[path.suffix.lower()]
        if kind == "JPEG" and max(picture.size) > LONGEST_JPEG_SIDE:
            kind, path = "PNG", path.with_name(fitting(path.name, ".png"))
            if self.is_original(str(path)):
                raise UserError(f"{path} would be overwritten; name another folder")
        encoded = io.BytesIO()
        picture.save(encoded, kind, quality=90)
        write_result(path, encoded.getvalue())

    def add(self, predicted: Predicted) -> None:
        """Writes the predictions of the next image."""
        found, number = predicted.found, self.images + self.skipped
        if found.problem:
            self.skipped += 1
            self.reasons += [found.problem][: NAMED - len(self.reasons)]
        if self._format is not None:
            if self._file is None:
                self._file = self._opened()
                self._file.write(self._format.begin())
            self._file.write(self._format.record(number, found))
            if self.out is None:  # a pipe gets each line at once
                self._file.flush()
        if found.problem:
            return
        if predicted.truncated:
            self.truncated.append(predicted.file.path)
        if predicted.undrawn:
            self.undrawn += 1
            self.undrawn_reasons += [predicted.undrawn][: NAMED - len(self.undrawn_reasons)]
        self.images += 1
        self.boxes += len(found.labels)
        path = self.labels_path(predicted.file)
        if path is not None:
            self._write_labels(path, predicted.found)

    def summary(self) -> list[str]:
        """How many images and objects there were, and which files were skipped."""
        where = f"; results in {self.out}" if self.out else ""
        images, objects = counted(self.images, "image"), counted(self.boxes, "object")
        lines = [f"{images}, {objects}{where}"]
        if self.skipped:
            lines.append(f"skipped {self.skipped} that cannot be read:")
            lines += [f"  {reason}" for reason in self.reasons]
        if self.skipped > len(self.reasons):
            where = f", in {FILES['json']}" if self.out and self.kind == "json" else ""
            lines.append(f"  and {self.skipped - len(self.reasons)} more{where}")
        if self.undrawn:
            lines.append(f"{counted(self.undrawn, 'image')} could not be drawn:")
            lines += [f"  {reason}" for reason in self.undrawn_reasons]
        if self.undrawn > len(self.undrawn_reasons):
            lines.append(f"  and {self.undrawn - len(self.undrawn_reasons)} more")
        if self.truncated:
            used = counted(len(self.truncated), "truncated JPEG was", "truncated JPEGs were")
            more = ", ..." if len(self.truncated) > 1 else ""
            lines.append(f"{used} used: {self.truncated[0]}{more}")
        return lines

    def _opened(self) -> TextIO:
        if self.out is None or self.kind is None:
            return self._open_files.enter_context(standard_output())
        return self._open_files.enter_context(atomic_text(self.out / FILES[self.kind]))

    def _write_labels(self, path: Path, found: ImagePredictions) -> None:
        assert self.out is not None
        if self.images == 1:
            classes = self.out / "classes.txt"
            names = "".join(f"{name}\n" for name in self.names).encode("utf-8", "backslashreplace")
            if classes.exists() and classes.read_bytes() != names:
                raise UserError(f"{classes} lists other classes; name another folder by --out")
            write_result(classes, names)
        if path.exists() and not is_prediction(path):
            raise UserError(f"{path} is an annotation; name another folder by --out")
        write_result(path, yolo_text(found).encode())


def is_prediction(path: Path) -> bool:
    """Whether the first line of a YOLO label file ends with a score, as ours do, or the file is
    empty. Annotations of boxes have five numbers, those of polygons an odd number.
    """
    with path.open("rb") as file:
        return len(file.readline(1000).split()) in (0, 6)


def format_of(kind: str | None, detector: Any, given: Any) -> Format | None:
    """None if each image has a file of its own."""
    names = list(detector.class_names)
    if kind == "coco":
        return coco_format(detector.category_ids)
    if kind == "json":
        about = {"weights": str(given.weights), "threshold": given.threshold, "class_names": names}
        return json_format(about)
    return {"csv": csv_format(), None: text_format()}.get(kind)
