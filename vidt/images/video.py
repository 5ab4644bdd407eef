"""Videos and webcams: frames with their timestamps in, and a video with the same timestamps out.

PyAV (FFmpeg) reads and writes them. It is imported when a video is opened.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vidt.errors import UserError, counted, shown
from vidt.images.formats import VIDEO_ENDINGS, ending

WEBCAM = re.compile(r"webcam:(\d+)")
# FFmpeg's input device on each system, and how it calls the camera of a number.
CAMERAS = {
    "linux": ("v4l2", "/dev/video{}"),
    "darwin": ("avfoundation", "{}"),
    "win32": ("dshow", "video={}"),
}
FRAME_RATE = Fraction(30)  # of a source that does not tell
LONGEST_STEP = 10  # seconds, or frames of a slow video, between frames; a longer step is a jump
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
}


def is_webcam(source: str) -> bool:
    """Whether this is `webcam:0`, for example."""
    return WEBCAM.fullmatch(source) is not None


def is_video(source: str) -> bool:
    """Whether this names a webcam or, by its ending, a video file."""
    return is_webcam(source) or ending(source) in VIDEO_ENDINGS


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """A frame, upright and in RGB. `number` counts from 0; `time` is in seconds since the first
    frame.
    """

    number: int
    time: Fraction
    picture: Image.Image


class VideoReader:
    """The frames of a video file or a webcam, to be used in a `with` block and read once.

    `rate` is the mean number of frames a second, `time_base` the unit of the timestamps in seconds,
    and `count` the number of frames as far as the file tells, else None.
    """

    def __init__(self, source: str | Path) -> None:
        """Raises UserError, naming the source, if PyAV is missing or there is no video in it."""
        self.source = str(source)
        av = import_pyav(self.source)
        path, kind = _device(self.source)
        if kind is None and not os.path.isfile(path):
            raise UserError(f"{self.source}: no such file")
        try:
            self._container = av.open(path, format=kind)
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{self.source} cannot be read as a video: {_reason(error)}") from error
        if not self._container.streams.video:
            self._container.close()
            raise UserError(f"{self.source} has no video in it, only sound or text")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or FRAME_RATE)
        self.time_base = Fraction(self._stream.time_base or 1 / self.rate)
        self.count: int | None = self._stream.frames or None
        self._early_end = ""  # why the frames ended early
        self._num_damaged = 0  # packets
        self._failures = av.FFmpegError

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        """Frames as the video stores them; a recording that was put together from several may jump
        in time. Damaged packets are skipped, and a video that breaks off ends there, which
        `problems` tells.
        """
        first: int | None = None
        for number, (frame, picture) in enumerate(self._decoded()):
            time = number / self.rate
            if frame.pts is not None:
                first = frame.pts if first is None else first
                time = (frame.pts - first) * Fraction(frame.time_base or self.time_base)
            yield VideoFrame(number, time, picture)

    def problems(self) -> list[str]:
        """What was wrong with the video as far as it has been read: a line each."""
        lines = [f"{self.source} ends early: {self._early_end}"] if self._early_end else []
        if self._num_damaged:
            packets = counted(self._num_damaged, "damaged packet was", "damaged packets were")
            lines.append(f"{self.source}: {packets} skipped")
        return lines

    def _decoded(self) -> Iterator[tuple[Any, Image.Image]]:
        """Each frame, and its picture."""
        for packet in self._packets():
            try:
                for frame in self._stream.decode(packet):
                    yield frame, _upright(frame)
            except self._failures:
                self._num_damaged += 1

    def _packets(self) -> Iterator[Any]:
        """The packets, and at the end None, for which the decoder yields what it still holds."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:  # the last one of `demux` is empty
                    yield packet
        except self._failures as error:
            self._early_end = _reason(error)
        yield None


class VideoWriter:
    """An .mp4 file (H.264) whose frames have the timestamps that they are given. In a `with` block
    the file appears at its end, after Ctrl-C too, and does not appear after another exception.
    """

    def __init__(
        self,
        path: str | Path,
        size: tuple[int, int],
        *,
        rate: Fraction = FRAME_RATE,
        time_base: Fraction | None = None,
    ) -> None:
        """size: (height, width); an odd side grows by one pixel, which H.264 needs. time_base: the
        unit of timestamps in seconds. Raises UserError if PyAV is missing or FFmpeg cannot write
        the file, as `add` and the end of the block do, and OSError.
        """
        self.path, self._av = Path(path), import_pyav(str(path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(f".{self.path.name}.part")
        codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
        self._time_base = time_base or 1 / rate
        if codec == "mpeg4":  # whose time base has 16 bits
            self._time_base = Fraction(1, 60_000)
        self._padding = (size[0] % 2, size[1] % 2)
        self._step = 1 / rate
        with self._failures_named():
            self._container = self._av.open(os.path.abspath(self._temporary), "w", format="mp4")
        self._stream = self._container.add_stream(codec, rate=rate)
        self._stream.height, self._stream.width = size[0] + size[0] % 2, size[1] + size[1] % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = self._time_base
        self._last = -1  # in units of the time base
        self._before: Fraction | None = None  # the time of the frame before
        self._shift = Fraction(0)

    def add(self, picture: Image.Image, time: Fraction) -> None:
        """Appends a frame that is shown from `time`, in seconds, at the earliest one tick of the
        time base after the frame before it. Where time goes backwards or jumps by more than
        LONGEST_STEP, the clock goes on from there by the time of one frame: no player shows a gap
        of hours, and few files can hold one.
        """
        below, right = self._padding
        pixels = np.pad(np.asarray(picture), [(0, below), (0, right), (0, 0)], "edge")
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._last = max(round(self._rebased(time) / self._time_base), self._last + 1)
        frame.pts, frame.time_base = self._last, self._time_base
        with self._failures_named():
            self._container.mux(self._stream.encode(frame))

    def _rebased(self, time: Fraction) -> Fraction:
        """The time on the clock of this file."""
        before = time if self._before is None else self._before
        if not 0 <= time - before <= LONGEST_STEP * max(self._step, Fraction(1)):
            self._shift += before + self._step - time
        self._before = time
        return time + self._shift

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except (self._av.FFmpegError, OSError) as error:
            raise UserError(f"{self.path} cannot be written: {_reason(error)}") from error

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        stopped = exception[0] is None or issubclass(exception[0], KeyboardInterrupt)
        try:
            with self._failures_named() if stopped else suppress(self._av.FFmpegError, OSError):
                if stopped and self._last >= 0:
                    self._container.mux(self._stream.encode(None))  # what the encoder still holds
                self._container.close()
                if stopped and self._last >= 0:
                    os.replace(self._temporary, self.path)
        finally:
            with suppress(OSError):  # the failure that counts is the one above
                self._temporary.unlink(missing_ok=True)


def import_pyav(source: str) -> Any:
    """PyAV, for this video. Raises UserError if it is missing."""
    try:
        return import_module("av")
    except ImportError as error:
        raise UserError(
            f"{source} needs PyAV, which reads and writes videos and is not installed ({error}); "
            "pip install av"
        ) from error


def _device(source: str) -> tuple[str, str | None]:
    """What FFmpeg opens, and its input device; None for a file, whose whole path it gets: it takes
    `20240501T12:30.mp4` for an address.
    """
    webcam = WEBCAM.fullmatch(source)
    if webcam is None:
        return os.path.abspath(source), None
    if sys.platform not in CAMERAS:
        raise UserError(f"{source}: webcams are not supported on {sys.platform}")
    kind, name = CAMERAS[sys.platform]
    return name.format(webcam[1]), kind


def _upright(frame: Any) -> Image.Image:
    """The frame as players show it: turned as a phone's video says."""
    picture: Image.Image = frame.to_image()
    rotation = round(getattr(frame, "rotation", 0))
    return picture.transpose(_TURNS[rotation]) if rotation in _TURNS else picture


def _reason(error: Exception) -> str:
    return shown(getattr(error, "strerror", None) or str(error), 200)
