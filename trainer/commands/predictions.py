"""Runs a detector over image files or the frames of a video, in order, with a bounded number of
images in memory.

Threads decode files while the detector computes. Images reach it in windows, so that it can batch
images of equal canvas. The first windows and those of slow input are small, so that results appear
early.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from trainer.commands.command_flags import atomic_text, progress_bar, standard_output
from trainer.scoring.prediction_formats import (
    ImagePredictions,
    frames_csv_format,
    frames_json_format,
    frames_text_format,
    image_predictions,
)
from vidt.downloads import fetch, is_url
from vidt.errors import UserError, counted
from vidt.images.batching import PATIENCE, PENDING_BATCHES, in_order, read_ahead, reading_threads
from vidt.images.files import is_truncated, read_image
from vidt.images.formats import ENDINGS, VIDEO_ENDINGS, ending
from vidt.images.image_files import ImageFile, ImageFiles, distinct, is_inside
from vidt.images.video import VideoFrame, VideoReader, VideoWriter, is_webcam
from vidt.predict.selection import select

WINDOW_PIXELS = 2**26  # of all images of a window: 200 MB of RGB
Entry = TypeVar("Entry")


@dataclass(frozen=True, eq=False)
class Read:
    """A file and its image, or the reason why it is unreadable."""

    file: ImageFile
    picture: Image.Image | None
    problem: str = ""
    truncated: bool = False


@dataclass(frozen=True, eq=False)
class Predicted:
    """A file, its image, its detections (None: unreadable), and their form for the results;
    `undrawn` is the reason why there is no drawing.
    """

    file: ImageFile
    picture: Image.Image | None
    detections: Any
    found: ImagePredictions
    truncated: bool = False
    undrawn: str = ""


def read_file(
    file: ImageFile,
    size: tuple[int, int] | None = None,
    *,
    exif: bool = False,
    strict: bool = False,
    allow_http: bool = False,
) -> Read:
    """`size`, (height, width), is that of the annotations; see `vidt.images.files.read_image`. An
    address is fetched.
    """
    try:
        content = fetch(file.path, allow_http=allow_http) if is_url(file.path) else None
        picture = read_image(file.path, size, content=content, exif=exif, strict=strict)
        return Read(file, picture, truncated=is_truncated(picture))
    except UserError as error:
        return Read(file, None, str(error))


def predict_files(
    detector: Any,
    entries: Iterable[Entry],
    *,
    least: np.ndarray | float,
    batch_size: int,
    read: Callable[[Entry], Read] = read_file,  # type: ignore[assignment]
    **tiles: Any,
) -> Iterator[Predicted]:
    """The detections of a detector (PyTorch or ONNX) in each file, in order, that reach the least
    score, one for all classes or one for each [K]. `read` reads the file of an entry. tiles: see
    `trainer.commands.command_flags.tile_settings`.
    """
    least = np.broadcast_to(np.asarray(least, np.float32), (len(detector.class_names),))
    reads = read_ahead(
        entries,
        read,
        reading_threads(),
        weigh=lambda entry: pixels_of(path_of(entry)),
        heaviest=WINDOW_PIXELS,
    )
    for window in windows(reads, batch_size):
        pictures = [each.picture for each in window if each.picture is not None]
        found = in_order(detector.stream(pictures, batch_size=batch_size, **tiles))
        for each in window:
            if each.picture is None:
                yield Predicted(
                    each.file, None, None, ImagePredictions(each.file.path, problem=each.problem)
                )
                continue
            detections = select(next(found), least)
            size = (each.picture.height, each.picture.width)
            row = image_predictions(each.file.path, size, detections)
            yield Predicted(each.file, each.picture, detections, row, each.truncated)
        # Not before the next window is read: these may be all that memory holds.
        del each
        window.clear()
        pictures.clear()


def path_of(entry: Any) -> str:
    """The path of a file, or of the file that is the first of several values."""
    file: ImageFile = entry if isinstance(entry, ImageFile) else entry[0]
    return file.path


def pixels_of(path: str) -> int:
    """The number of pixels as the header promises; 0 for a file that has none, or cannot be read:
    reading it says why. That of an address is not known: a few may be read ahead.
    """
    if is_url(path):
        return WINDOW_PIXELS // 8
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # Pillow raises nearly anything on damaged bytes
        return 0


def windows(reads: Iterable[Read], batch_size: int) -> Iterator[list[Read]]:
    """Lists of one batch, then of two, and so on to a few. A list is shorter if its images are
    large, or if its first has waited for PATIENCE.
    """
    window: list[Read] = []
    pixels, start, limit = 0, time.monotonic(), batch_size
    for read in reads:
        if not window:
            start = time.monotonic()
        window.append(read)
        pixels += read.picture.width * read.picture.height if read.picture else 0
        is_full = len(window) >= limit
        if is_full or pixels >= WINDOW_PIXELS or time.monotonic() - start > PATIENCE:
            if is_full:
                limit = min(2 * limit, PENDING_BATCHES * batch_size)
            yield window
            window, pixels = [], 0
    if window:
        yield window


class Originals:
    """What results in the folder `out` must not overwrite: the files that a command reads, and if
    any of them lies in `out`, every picture and video that was there before.
    """

    def __init__(self, sources: Iterable[str], out: Path) -> None:
        self._out = os.path.realpath(out)
        self._sources = {os.path.realpath(path) for path in sources}
        self._among_results = any(is_inside(path, self._out) for path in self._sources)

    def include(self, path: str) -> bool:
        """Whether this file must stay as it is."""
        if not os.path.lexists(path):
            return False
        real = os.path.realpath(path)
        if real in self._sources:
            return True
        if is_inside(real, self._out):
            return self._among_results and ending(path) in ENDINGS | VIDEO_ENDINGS
        return any(str(folder) in self._sources for folder in Path(real).parents)


VIDEO_FORMATS = {
    "json": (frames_json_format, ".jsonl"),
    "csv": (frames_csv_format, ".csv"),
    None: (frames_text_format, ".txt"),
}


@dataclass(frozen=True)
class VideoOutput:
    """Where the results of a video go: to `name`.mp4, unless `pictures` is False, and `name`.jsonl
    or .csv in the folder `out`; without one, to standard output.
    """

    out: Path | None
    name: str
    kind: str | None  # a key of VIDEO_FORMATS
    pictures: bool = True

    def drawn(self) -> Path | None:
        """The file of the drawn video."""
        return self.out / f"{self.name}.mp4" if self.out is not None and self.pictures else None

    def check(self, originals: Originals) -> None:
        """Raises UserError if the drawn video would overwrite an original."""
        path = self.drawn()
        if path is not None and originals.include(str(path)):
            raise UserError(f"--out {self.out} would overwrite {path}; name another folder")

    def rows(self) -> Any:
        """The open file of the results, as a context manager."""
        if self.out is None:
            return standard_output()
        return atomic_text(self.out / f"{self.name}{VIDEO_FORMATS[self.kind][1]}")


def video_files(words: Sequence[str], avoid: Path | None) -> list[str]:
    """The videos of these words: webcams, files, and what matches patterns outside of the folder
    `avoid`. Raises UserError for a word that names nothing.
    """
    videos = []
    for word in words:
        if is_url(word):
            raise UserError(f"IMAGES {word}: videos are not fetched; download it")
        found = [word] if is_webcam(word) else ImageFiles([word], sys.stdin, avoid).named()
        if not found:
            raise UserError(f"IMAGES {word}: only results in --out {avoid} match this pattern")
        videos += found
    return videos


def video_names(sources: Sequence[str]) -> list[str]:
    """The names of the videos' results, each another one."""
    return distinct([Path(source).stem.replace(":", "-") for source in sources])


def predict_video(
    detector: Any,
    source: str,
    output: VideoOutput,
    least: np.ndarray,
    **settings: Any,
) -> list[str]:
    """The detections in each frame of a video file or a webcam, written frame by frame; settings
    are those of the detector's `stream`. Returns what to tell the user. On KeyboardInterrupt it
    finishes the files and raises it again.

    Raises UserError for a source that is no video or has no frame, without PyAV, and where the
    drawn video cannot be written; the results up to there are kept.
    """
    lines, num_objects, num_frames = VIDEO_FORMATS[output.kind][0](), 0, 0
    path, pending = output.drawn(), deque[VideoFrame]()
    stopped: KeyboardInterrupt | UserError | None = None

    def pictures() -> Iterator[Image.Image]:
        for frame in video:
            pending.append(frame)
            yield frame.picture

    with ExitStack() as files:
        video = files.enter_context(VideoReader(source))
        rows = files.enter_context(output.rows())
        bar = files.enter_context(progress_bar(video.count, "frame"))
        rows.write(lines.begin())
        writer: VideoWriter | None = None
        try:
            with ExitStack() as drawing:  # ends before the rows, which stay if it fails
                for detections in in_order(detector.stream(pictures(), **settings)):
                    frame = pending.popleft()
                    detections = select(detections, least)
                    size = (frame.picture.height, frame.picture.width)
                    found = image_predictions(source, size, detections)
                    rows.write(lines.record(frame.number, replace(found, time=float(frame.time))))
                    num_frames, num_objects = num_frames + 1, num_objects + len(detections)
                    if output.out is None:  # a pipe gets each line at once
                        rows.flush()
                    if path is not None:
                        if writer is None:
                            how = {"rate": video.rate, "time_base": video.time_base}
                            writer = drawing.enter_context(VideoWriter(path, size, **how))
                        writer.add(detections.plot(frame.picture), frame.time)
                    bar.update()
        except (KeyboardInterrupt, UserError) as error:
            stopped = error
        if not num_frames and stopped is None:
            reasons = "; ".join(["no frame can be decoded", *video.problems()])
            raise UserError(f"{source} cannot be read as a video: {reasons}")
    if stopped is not None:
        raise stopped
    where = f"; results in {output.out}" if output.out else ""
    told = [f"{source}: {counted(num_frames, 'frame')}, {counted(num_objects, 'object')}{where}"]
    return told + video.problems()
