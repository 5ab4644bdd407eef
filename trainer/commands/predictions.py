"""Image files through a detector, in order, with a bounded number of pictures in memory.

Files are decoded by threads while the detector computes. Its pictures come to it a window at a
time, so that it can batch those of equal canvas; the first windows are small, and slow input makes
small ones, so that nobody waits long for results.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from trainer.commands.image_files import ImageFile
from trainer.scoring.prediction_formats import ImagePredictions, image_predictions
from vidt.images.batching import PATIENCE, PENDING_BATCHES, in_order, read_ahead, reading_threads
from vidt.images.files import UnreadableImage, read_image

WINDOW_PIXELS = 2**26  # of all pictures of a window: 200 MB of RGB


@dataclass(frozen=True, eq=False)
class Read:
    """A file and its picture, or why there is none."""

    file: ImageFile
    picture: Image.Image | None
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Predicted:
    """A file, its picture, what the detector says of it (None: unreadable), and that in figures."""

    file: ImageFile
    picture: Image.Image | None
    detections: Any
    found: ImagePredictions


def predict_files(
    detector: Any, files: Iterable[ImageFile], *, threshold: float, batch_size: int
) -> Iterator[Predicted]:
    """What a detector (of PyTorch or ONNX) finds in each file, in their order."""
    for window in windows(read_ahead(files, _read, reading_threads()), batch_size):
        pictures = [read.picture for read in window if read.picture is not None]
        found = in_order(detector.stream(pictures, batch_size=batch_size))
        for read in window:
            if read.picture is None:
                yield Predicted(
                    read.file, None, None, ImagePredictions(read.file.path, problem=read.problem)
                )
                continue
            detections = next(found).above(threshold)
            size = (read.picture.height, read.picture.width)
            row = image_predictions(read.file.path, size, detections)
            yield Predicted(read.file, read.picture, detections, row)


def windows(reads: Iterable[Read], batch_size: int) -> Iterator[list[Read]]:
    """One batch's worth, then two, and so on to a few; fewer where pictures are large, or come so
    slowly that the first of a window has waited for PATIENCE.
    """
    window: list[Read] = []
    pixels, since, most = 0, time.monotonic(), batch_size
    for read in reads:
        if not window:
            since = time.monotonic()
        window.append(read)
        pixels += read.picture.width * read.picture.height if read.picture else 0
        is_late = time.monotonic() - since > PATIENCE
        if len(window) >= most or pixels >= WINDOW_PIXELS or is_late:
            if len(window) >= most:
                most = min(2 * most, PENDING_BATCHES * batch_size)
            yield window
            window, pixels = [], 0
    if window:
        yield window


def _read(file: ImageFile) -> Read:
    try:
        return Read(file, read_image(file.path))
    except UnreadableImage as error:
        return Read(file, None, str(error))
