"""Image files to RGB pixels, the same for training, evaluation and prediction.

Sizes are (height, width) in pixels. "Stored pixels" are what Pillow yields without applying the
EXIF orientation. Pillow itself applies a TIFF's orientation while it decodes, so a TIFF counts as
stored upright here.
"""

import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from os import PathLike
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vidt.errors import UserError

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG = ("JPEG", "MPO")
_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_HEIF = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")
_TAIL_BYTES = 4096
_TRUNCATED = "vidt_truncated"  # key in `Image.info`
_SIDEWAYS = 5  # the first EXIF orientation that exchanges height and width
_MOST_MISSING = 0.25  # share of the rows of a truncated JPEG
LONGEST_SIDE = 2**18  # resizing needs memory for each pixel of a side


class UnreadableImage(UserError):
    """A file that is missing, damaged, truncated or too large to decode; one line names it."""


@dataclass(frozen=True)
class ImageHeader:
    """Properties of an image file that are known without decoding it.

    `size` is that of the stored pixels. `fingerprint` is (bytes, CRC of the last 4 KiB): equal
    files have equal ones. `ends_whole` is False if the end marker of the format is not at the end
    of the file, as after a broken download; such a file may still decode. `truncated`: it decodes
    but for its end (see `read_image`). `frames`: there are several, of which the first counts.
    """

    size: tuple[int, int]
    orientation: int
    mode: str
    fingerprint: tuple[int, int]
    ends_whole: bool
    frames: bool = False
    truncated: bool = False

    @property
    def shown_size(self) -> tuple[int, int]:
        """The size as every viewer shows the image, turned as its EXIF says."""
        return self.size[::-1] if self.orientation >= _SIDEWAYS else self.size


def read_image(
    path: str | PathLike[str],
    size: tuple[int, int] | None = None,
    *,
    at_least: tuple[int, int] | None = None,
    content: bytes | None = None,
    exif: bool = False,
    strict: bool = False,
) -> Image.Image:
    """Decode a file to mode RGB, 8 bits a channel. The result has no EXIF data.

    `size` is the annotated size. If only the EXIF orientation brings the stored pixels to that
    size, the image is turned; otherwise, and without `size`, pixels stay as stored. `exif`, without
    `size`, turns the image as its EXIF says, as every viewer does.

    `at_least` (height, width) is the size that is needed: a JPEG of at least twice that size is
    decoded at a half, a quarter or an eighth of its size, rounded up, in a fraction of the time,
    unless it has to be turned.

    `content` are the bytes of the file, if the caller has read them.

    Alpha is dropped, not blended: other detectors train on these colours too, and blending would
    need a background colour. A JPEG whose end is missing is read with one colour in place of the
    end if at least three quarters of its rows are there, unless `strict`; see `is_truncated`.

    Raises UnreadableImage, or UserError if the image has another size in both orientations.
    """
    source = path if content is None else BytesIO(content)
    with _failures_named(path, content):
        try:
            rgb, orientation, smaller = _decode(source, size, at_least, exif)
        except OSError:
            whole = None if strict else _with_end(path, content)
            if whole is None:
                raise
            rgb, orientation, smaller = _decode(whole, size, at_least, exif)
            if _missing(rgb) > _MOST_MISSING:
                raise
            rgb.info[_TRUNCATED] = True
    if smaller:
        return rgb
    if exif and size is None:
        return turned(rgb, orientation)
    turn = find_turn(path, (rgb.height, rgb.width), orientation, size)
    return rgb if turn is None else rgb.transpose(turn)


def is_truncated(image: Image.Image) -> bool:
    """Whether `read_image` replaced the missing end of a file by one colour."""
    return bool(image.info.get(_TRUNCATED))


def _decode(
    source: str | PathLike[str] | BinaryIO,
    size: tuple[int, int] | None,
    at_least: tuple[int, int] | None,
    exif: bool,
) -> tuple[Image.Image, int, bool]:
    """The stored pixels as RGB, the EXIF orientation, and whether they are final: decoded smaller,
    and not to be turned.
    """
    # Given a path, Pillow maps uncompressed TIFF files into memory, and garbles those to be turned.
    with (
        open(source, "rb") if isinstance(source, str | PathLike) else source as file,
        Image.open(file) as image,
    ):
        orientation = orientation_of(image)
        as_stored = size == (image.height, image.width) or (size is None and not exif)
        smaller = at_least is not None and image.format in _JPEG and as_stored
        if smaller:
            image.draft("RGB", at_least[::-1])  # type: ignore[index]
        return without_exif(as_rgb(image)), orientation, smaller


def _with_end(path: str | PathLike[str], content: bytes | None) -> BinaryIO | None:
    """A JPEG file with an end marker after its last byte; None for any other file."""
    if content is None:
        with open(path, "rb") as file:
            content = file.read()
    return BytesIO(content + _JPEG_END) if content.startswith(_JPEG_START) else None


def _missing(image: Image.Image) -> float:
    """The share of rows at the bottom that have one colour, as libjpeg fills missing ones."""
    pixels = np.asarray(image)
    other = (pixels != pixels[-1, -1]).any((1, 2)).nonzero()[0]
    return 1 - (int(other[-1]) + 1 if len(other) else 0) / len(pixels)


def probe_image(path: str | PathLike[str]) -> ImageHeader:
    """Read a file's header and its last bytes. Raises UnreadableImage."""
    with _failures_named(path), open(path, "rb") as file, Image.open(file) as image:
        size, mode, kind = (image.height, image.width), image.mode, image.format
        orientation, frames = orientation_of(image), _has_frames(image)
        num_bytes = file.seek(0, 2)
        file.seek(max(num_bytes - _TAIL_BYTES, 0))
        tail = file.read()
        ends_whole = _ends_whole(file, kind, tail, num_bytes)
    fingerprint = (num_bytes, zlib.crc32(tail))
    return ImageHeader(size, orientation, mode, fingerprint, ends_whole, frames)


def probe_images(
    paths: Iterable[str], num_threads: int = 16
) -> Iterator[ImageHeader | UnreadableImage]:
    """Probe many files, in order; failures are yielded, not raised.

    Files without their end marker are decoded to find out: some cameras append data of their own.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        yield from pool.map(_probe_or_error, paths, chunksize=64)


def find_turn(
    path: str | PathLike[str],
    stored: tuple[int, int],
    orientation: int,
    size: tuple[int, int] | None,
) -> Image.Transpose | None:
    """The rotation that brings an image of `stored` size to the annotated `size`; None for none.

    Raises UserError if neither the stored nor the turned image has that size.
    """
    if size is None or tuple(size) == stored:
        return None
    if orientation >= _SIDEWAYS and tuple(size) == stored[::-1]:
        return _TURNS[orientation]
    raise UserError(
        f"{path}: image is {stored[1]} x {stored[0]} (width x height), "
        f"but its annotations say {size[1]} x {size[0]}"
    )


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image as an EXIF orientation says."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def without_exif(image: Image.Image) -> Image.Image:
    """The image itself, which nobody will turn again as its EXIF says."""
    for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        image.info.pop(key, None)
    image.getexif().clear()
    return image


@contextmanager
def _failures_named(path: str | PathLike[str], content: bytes | None = None) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path}: no such file") from error
    # Pillow's decoders raise nearly anything (SyntaxError, struct.error, ...) on damaged bytes.
    except Exception as error:
        raise UnreadableImage(
            f"{path}: cannot be read as an image ({_why(error, path, content)})"
        ) from error


def _why(error: Exception, path: str | PathLike[str], content: bytes | None) -> str:
    """In one line, why a file cannot be decoded."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if not isinstance(error, UnidentifiedImageError):
        reason = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    with open(path, "rb") if content is None else BytesIO(content) as file:
        start = file.read(64)
    if not start:
        return "the file is empty"
    if start[4:12] in _HEIF:
        return "it is HEIF, which Pillow does not read; convert it to JPEG"
    if start.isascii() and start.decode().replace("\n", " ").replace("\r", " ").isprintable():
        return f"it holds text, {start[:30].decode()!r}"
    if not any(start):
        return "it starts with zero bytes, as after a failed copy"
    return "not an image, or the file header is damaged"


def _probe_or_error(path: str) -> ImageHeader | UnreadableImage:
    try:
        header = probe_image(path)
        return (
            header
            if header.ends_whole
            else replace(header, truncated=is_truncated(read_image(path)))
        )
    except UnreadableImage as error:
        return error


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; before decoding, which changes what Pillow reports."""
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # broken metadata says nothing about the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


def _has_frames(image: Image.Image) -> bool:
    """Whether more than one picture is in the file; the previews in a camera's MPO do not count."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame says nothing about the first
        return False


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB with 8 bits per channel; deeper grey images are scaled. The
    colour that a PNG declares transparent is a colour like others.
    """
    if max(image.size) > LONGEST_SIDE:
        raise UserError(
            f"{image.width} x {image.height} pixels; a side may have at most {LONGEST_SIDE:,}"
        )
    if type(image) is Image.Image and image.mode == "RGB":  # in memory: `convert` would copy it
        return image
    rgb = _converted(image)
    rgb.info.pop("transparency", None)
    return rgb


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scale_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("P", "PA"):
        # Via RGBA: the direct conversion warns about palettes with transparency.
        return image.convert("RGBA").convert("RGB")
    if image.mode == "RGB" and image.format in _JPEG:
        image.load()  # already in its own memory; `convert` would copy it
        return image
    return image.convert("RGB")


def _scale_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Grey values of a deep image to uint8.

    Integers span 0..4095 (12 bits, as many cameras and scanners deliver) if that holds them, else
    0..65535: not the image's own range, so that brightness compares between images. Floats span the
    first of 0..1, 0..255, 0..65535 that holds them. Values outside these (32-bit images) have no
    nominal range and are stretched from their least to their greatest.
    """
    tops = (4095.0, 65535.0) if values.dtype.kind in "iu" else (1.0, 255.0, 65535.0)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        values, top = values - low, max(high - low, 1e-12)
    return np.rint(values * (255.0 / top)).astype(np.uint8)


def _ends_whole(file: BinaryIO, kind: str | None, tail: bytes, num_bytes: int) -> bool:
    if kind in _JPEG:
        return tail.endswith(_JPEG_END)
    if kind == "PNG":
        return tail.endswith(_PNG_END)
    if kind == "WEBP":  # RIFF: bytes 4 to 8 count what follows them
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= num_bytes
    return True
