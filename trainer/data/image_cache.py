"""Training images in a folder, decoded and shrunk once to what the augmentation can need.

A cached image is an uncompressed PPM file: it takes a tenth of the time that a JPEG of its size
takes to decode, and loses nothing. Its name is a digest of the original's bytes, of its annotated
size and of the cached size. So an image that was changed, or is needed larger, is cached anew, and
runs and data sets may share a folder.

Sizes are (height, width) in pixels.
"""

import errno
import hashlib
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.augmentation.geometry import SPARE, covered
from trainer.augmentation.recipe import Augmentation
from trainer.readers.samples import Sample, SampleTable
from vidt.atomic import atomic_write
from vidt.errors import UserError, counted
from vidt.images.files import UnreadableImage, read_image

# Cached images are this many times as large as needed. After the augmentation they differ from
# images decoded in full by about as much as JPEGs decoded at SPARE times the size do: measured, by
# 0.2 to 0.4 of 255 on average for noisy photographs (another resampling filter: 0.4 to 0.5) and 0.5
# to 1.2 for a detailed one (2.7 to 3.2).
CACHED_SPARE = 4 / 3
VERSION = 1  # part of each digest; raise it when cached pixels change
ROOM_LEFT = 4 * 2**30  # bytes of the disk that stay free, for the checkpoints of the run
# A file that changed less than this many nanoseconds ago may change again within the same tick of
# its file system's clock.
SETTLED = 3 * 10**9
ABANDONED = 3600  # seconds after which an unfinished file counts as left behind by a kill


class ImageCache:
    """The cached images of a table. `read` returns the same pixels whether an image is cached or
    not, so a run's result does not depend on the content of the folder.
    """

    def __init__(self, folder: str | Path, samples: SampleTable, augmentation: Augmentation):
        self.folder, self.samples, self.augmentation = Path(folder), samples, augmentation
        self.reported = False  # whether `new_problem` has told
        # All workers share both: what `_remember` has noted of each original, and the errno of the
        # first file that could not be written.
        self.notes = torch.zeros(len(samples), 3, dtype=torch.int64).share_memory_()
        self.failure = torch.zeros(1, dtype=torch.int64).share_memory_()

    def open_folder(self) -> str:
        """Makes the folder, removes what killed runs left unfinished, and returns a line on the
        size of the cache. Raises UserError if there is no folder and none can be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(
                f"--cache_images {self.folder}: {error.strerror}; name another folder"
            ) from error
        for path in self.folder.glob("*/.*.tmp"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
        shapes = [self.shape_of((height, width)) for height, width in self.samples.sizes.tolist()]
        needed = sum(3 * height * width for height, width in shapes)
        return (
            f"--cache_images {self.folder}: training images are cached as they are first read; "
            f"{counted(len(shapes), 'image')} take {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB of the disk are free"
        )

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size at which an image of `size` is cached."""
        largest = self.augmentation.largest(size)
        scale = CACHED_SPARE * max(largest[0] / size[0], largest[1] / size[1])
        return size if scale >= 1 else (math.ceil(scale * size[0]), math.ceil(scale * size[1]))

    def read(self, index: int, sample: Sample) -> Image.Image:
        """The image of the table's sample `index` in RGB, shrunk to `shape_of` its size. Raises
        UserError as `read_image` does, also if the original of a cached image is gone.
        """
        shape = self.shape_of(sample.size)
        try:
            known = self._remembered(index, sample.path)
            image = None if known is None else self._load(known, shape)
            if image is not None:
                return image
            with open(sample.path, "rb") as file:
                status, content = os.fstat(file.fileno()), file.read()
        except OSError as error:
            raise UnreadableImage(f"{sample.path}: {error.strerror}") from error
        digest = _digest(content, sample.size, shape)
        self._remember(index, status, digest)
        image = self._load(digest, shape)
        if image is None:
            image = _shrunk(sample, shape, content)
            self._save(digest, image)
        return image

    def new_problem(self) -> str:
        """A line on why images are no longer cached; empty if they are, and after the first call
        that tells.
        """
        number = int(self.failure)
        if not number or self.reported:
            return ""
        self.reported = True
        return (
            f"--cache_images {self.folder}: {os.strerror(number)}. No more images are cached; the "
            "others are decoded each time, with the same result. Make room or name another folder, "
            "then --resume"
        )

    def _remember(self, index: int, status: os.stat_result, digest: bytes) -> None:
        """Notes the digest of an original, so that this run does not read its bytes again. The
        check number covers all of the note, which another worker may read half written.
        """
        if time.time_ns() - status.st_ctime_ns > SETTLED:
            halves = np.frombuffer(digest, np.int64).tolist()
            self.notes[index] = torch.tensor([_check_number(status, halves), *halves])

    def _remembered(self, index: int, path: str) -> bytes | None:
        """The digest of an original that has not changed since it was noted."""
        check, *halves = self.notes[index].tolist()
        unchanged = check == _check_number(os.stat(path), halves)
        return np.array(halves, np.int64).tobytes() if unchanged else None

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self.folder / name[:2] / f"{name}.ppm"  # few files per folder

    def _load(self, digest: bytes, shape: tuple[int, int]) -> Image.Image | None:
        """A cached image; None if it is not cached, or cannot be read whole."""
        header = _header(shape)
        try:
            content = self._path(digest).read_bytes()
        except OSError:
            return None
        if len(content) != len(header) + 3 * shape[0] * shape[1] or not content.startswith(header):
            return None
        pixels = np.frombuffer(content, np.uint8, offset=len(header))
        return Image.frombuffer("RGB", shape[::-1], pixels, "raw", "RGB", 0, 1)

    def _save(self, digest: bytes, image: Image.Image) -> None:
        if self.failure:
            return
        path = self._path(digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < ROOM_LEFT:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            content = _header((image.height, image.width)) + image.tobytes()
            atomic_write(path, content)
        except OSError as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            self.failure[0] = cause.errno or errno.EIO


def _digest(content: bytes, size: tuple[int, int], shape: tuple[int, int]) -> bytes:
    """16 bytes that name a cached image."""
    digest = hashlib.sha256(content)
    digest.update(repr((VERSION, tuple(size), shape)).encode())
    return digest.digest()[:16]


def _check_number(status: os.stat_result, halves: list[int]) -> int:
    """64 bits that change with the file and with the two halves of its digest."""
    times = status.st_mtime_ns, status.st_ctime_ns  # nobody can set the second
    return hash((status.st_ino, status.st_size, *times, *halves))


def _header(shape: tuple[int, int]) -> bytes:
    return f"P6\n{shape[1]} {shape[0]}\n255\n".encode()


def _shrunk(sample: Sample, shape: tuple[int, int], content: bytes) -> Image.Image:
    """The original, decoded from its bytes and resized to `shape`."""
    needed = SPARE / CACHED_SPARE * shape[0], SPARE / CACHED_SPARE * shape[1]
    at_least = math.floor(needed[0]), math.floor(needed[1])
    image = read_image(sample.path, sample.size, at_least=at_least, content=content)
    if shape == sample.size:
        return image
    height, width = covered(sample.size, image)
    return image.resize(shape[::-1], Image.Resampling.LANCZOS, (0, 0, width, height))
