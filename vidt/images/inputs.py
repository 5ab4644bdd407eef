"""Images in all forms that a detector accepts: files, Pillow images, arrays and tensors.

Does not import PyTorch: a tensor is recognised by its type's name and read through NumPy.
"""

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vidt.downloads import fetch, is_url
from vidt.errors import UserError, shown
from vidt.images.files import as_rgb, is_truncated, orientation_of, read_image, turned

logger = logging.getLogger(__name__)

# A path, a Pillow image, an array [H, W, 3] or [H, W], or a tensor [3, H, W]. See `as_picture`.
ImageLike: TypeAlias = Any


def as_picture(image: ImageLike) -> Image.Image:
    """One image as an RGB picture, which may share its memory.

    - `str` or path: a file, turned as its EXIF says, as every viewer shows it; or an https address
    - Pillow image of any mode, turned likewise if it has EXIF data
    - NumPy array: uint8 [H, W, 3] RGB, [H, W, 4] RGBA (alpha is dropped), [H, W] or [H, W, 1] grey;
      uint16 [H, W]; or the same shapes in float, from 0 to 1
    - PyTorch tensor: [3, H, W] or [1, H, W], uint8, or float from 0 to 1; on any device

    Raises `vidt.images.files.UnreadableImage` for a file, `vidt.downloads.Unreachable` for an
    address, UserError for an array or tensor of another shape, type or range, TypeError for
    anything else.
    """
    if isinstance(image, str | PathLike):
        content = fetch(str(image)) if is_url(image) else None
        picture = read_image(image, content=content, exif=True)
        if is_truncated(picture):
            logger.warning(f"{image}: the end of the file is missing; what is there is used")
        return picture
    if isinstance(image, Image.Image):
        orientation = orientation_of(image)
        return turned(as_rgb(image), orientation)
    if isinstance(image, np.ndarray):
        return _from_array(image, "array", "height x width, or height x width x 3 (RGB)")
    if _is_tensor(image):
        return _from_tensor(image)
    raise TypeError(
        f"an image is a path, a Pillow image, an array or a tensor; this is {type(image).__name__}"
    )


def is_one(images: Any) -> bool:
    """Whether this is one image rather than several; an array or tensor of four axes is several."""
    if isinstance(images, str | PathLike | Image.Image):
        return True
    return (isinstance(images, np.ndarray) or _is_tensor(images)) and images.ndim < 4


def check_threshold(threshold: float) -> None:
    """Raises UserError for a threshold outside 0 to 1."""
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}; it must be from 0 to 1")


def require_thresholds(stored: Sequence[Any], class_names: Sequence[str]) -> None:
    """Raises ValueError unless a header stores a threshold from 0 to 1, or None, for each class, or
    none at all.
    """
    if not all(each is None or (isinstance(each, float) and 0 <= each <= 1) for each in stored):
        raise ValueError(f"thresholds are {shown(stored)}; they must be from 0 to 1")
    if stored and len(stored) != len(class_names):
        raise ValueError(f"it has {len(stored)} thresholds for {len(class_names)} classes")


def rows_of(which: Any, count: int) -> Any:
    """An index into `count` rows; an integer becomes a slice of one row. Raises IndexError if there
    is no such row, which ends a `for` loop over the rows.
    """
    if isinstance(which, bool) or not hasattr(which, "__index__") or getattr(which, "ndim", None):
        return which
    number = range(count)[which]
    return slice(number, number + 1)


def source_of(image: ImageLike) -> ImageLike:
    """What detections store to show their image again: the path of a file, else the image."""
    return Path(image) if isinstance(image, str) and not is_url(image) else image


def picture_of(source: ImageLike, given: ImageLike = None) -> Image.Image:
    """The picture to draw detections on: the given image, else their source. Raises UserError if
    there is neither, and the errors of `as_picture`.
    """
    image = source if given is None else given
    if image is None:
        raise UserError("these detections do not know their image; pass it to plot(image)")
    return as_picture(image)


def _is_tensor(image: object) -> bool:
    return type(image).__module__.partition(".")[0] == "torch" and hasattr(image, "detach")


def _from_tensor(tensor: Any) -> Image.Image:
    shape = tuple(tensor.shape)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(
            f"tensor of shape {shape}; it must be 3 x height x width (RGB), or 1 x height x width"
        )
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # NumPy has no bfloat16
    return _from_array(tensor.permute(1, 2, 0).numpy(), "tensor", "3 x height x width")


def _from_array(array: np.ndarray, what: str, expected: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UserError(f"{what} of shape {array.shape}; it must be {expected}")
    if not array.size:
        raise UserError(f"{what} of shape {array.shape} has no pixels")
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # NaN fails both
            raise UserError(
                f"{what} of floats from {array.min():g} to {array.max():g}; they must be from 0 to "
                "1, or uint8"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8 and not (array.dtype == np.uint16 and array.ndim == 2):
        raise UserError(f"{what} of {array.dtype}; it must be uint8, or floats from 0 to 1")
    return as_rgb(Image.fromarray(np.ascontiguousarray(array)))
