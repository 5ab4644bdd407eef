"""The embedded dataset: images of coloured shapes, written once as a COCO folder.

An image depends on (seed, split, index) alone. Shapes are rasterised here, without anti-aliasing,
because a drawing library may change pixels between versions.
"""

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASS_NAMES = ("rectangle", "ellipse", "triangle")

_SPLITS = ("train", "val")
_VERSION = 3  # part of the folder's name: increment it when images change
_MAX_OBJECTS = 6
_MAX_HIDDEN = 0.2  # of an object's pixels
_MIN_CONTRAST = 40.0  # distance in RGB to the background and to shapes beneath
_GREY = (90.0, 160.0)  # background, drawn for each picture
_NOISE = (4.0, 12.0)  # standard deviation, drawn for each picture
_OUTLINE_POINTS = 32


@dataclass(frozen=True, eq=False)
class Shape:
    """`label` indexes CLASS_NAMES; `mask` [size, size] is the whole shape, also where another one
    hides it; `outline` [P, 2] holds x, y of a polygon around it, in pixels."""

    label: int
    mask: np.ndarray
    outline: np.ndarray
    colour: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Extent of the mask: xyxy, pixels."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def write_shapes(
    root: str | os.PathLike[str],
    num_train: int = 400,
    num_val: int = 80,
    size: int = 128,
    seed: int = 0,
) -> Path:
    """Return the folder in `root` that holds these images in the layout of COCO 2017.

    Writes it if it is missing or incomplete: first beside it, then by a rename, so that concurrent
    processes end with one complete folder.
    """
    folder = Path(root) / f"shapes-v{_VERSION}-{size}px-{num_train}-{num_val}-seed{seed}"
    counts = {"train": num_train, "val": num_val}
    if _is_whole(folder, counts):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".shapes-", dir=folder.parent) as temporary:
        for split, count in counts.items():
            _write_split(Path(temporary) / "new", split, count, size, seed)
        _put_in_place(Path(temporary), folder, counts)
    return folder


def draw_picture(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, list[Shape]]:
    """An image, uint8 [size, size, 3], and its one to six shapes, the last on top: shapes of any
    colour on noisy grey.
    """
    rng = np.random.default_rng([seed, _SPLITS.index(split), index])
    background = np.full(3, rng.uniform(*_GREY))
    shapes: list[Shape] = []
    for _ in range(rng.integers(1, _MAX_OBJECTS + 1)):
        shape = _place(rng, size, background, shapes)
        shapes += [shape] if shape else []
    pixels = np.broadcast_to(background, (size, size, 3)).copy()
    for shape in shapes:
        pixels[shape.mask] = shape.colour
    pixels += rng.normal(0, rng.uniform(*_NOISE), pixels.shape)
    return np.rint(pixels.clip(0, 255)).astype(np.uint8), shapes


def _place(
    rng: np.random.Generator, size: int, background: np.ndarray, shapes: list[Shape]
) -> Shape | None:
    """A shape that fits beside the others; None if the image has no room."""
    label = int(rng.integers(len(CLASS_NAMES)))  # not drawn again: all classes are as frequent
    for _ in range(200):
        shape = _random_shape(rng, label, size)
        left, top, right, bottom = shape.box
        if not all(size / 8 <= side <= size / 3 for side in (right - left, bottom - top)):
            continue  # the tip of a thin triangle may miss every pixel centre
        beneath = [other.colour for other in shapes if (other.mask & shape.mask).any()]
        contrast = min(np.linalg.norm(shape.colour - colour) for colour in [background, *beneath])
        if contrast >= _MIN_CONTRAST and _all_visible([*shapes, shape]):
            return shape
    return None


def _all_visible(shapes: list[Shape]) -> bool:
    """Whether the later shapes leave enough of each shape visible."""
    above = np.zeros_like(shapes[0].mask)
    for shape in reversed(shapes):
        if (shape.mask & above).sum() > _MAX_HIDDEN * shape.mask.sum():
            return False
        above |= shape.mask
    return True


def _random_shape(rng: np.random.Generator, label: int, size: int) -> Shape:
    least, most = -(-size // 8), size // 3
    width, height = rng.integers(least, most + 1, 2)
    left, top = rng.integers(0, size - width + 1), rng.integers(0, size - height + 1)
    colour = rng.uniform(0, 255, 3)
    unit_outline = (_rectangle, _ellipse, _triangle)[label](rng)
    outline = unit_outline * [width, height] + [left, top]
    if CLASS_NAMES[label] == "ellipse":
        mask = _inside_ellipse(size, left, top, width, height)
    else:
        mask = _inside_convex(size, outline)
    return Shape(label, mask, outline, colour)


def _rectangle(rng: np.random.Generator) -> np.ndarray:
    """Corners in the unit square, clockwise on the screen, like the two outlines below."""
    return np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def _ellipse(rng: np.random.Generator) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, _OUTLINE_POINTS, endpoint=False)
    return 0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], 1)


def _triangle(rng: np.random.Generator) -> np.ndarray:
    """The base is one side of the square, the tip anywhere on the opposite side."""
    corners = np.array([[rng.uniform(), 0.0], [1.0, 1.0], [0.0, 1.0]])
    for _ in range(rng.integers(4)):  # quarter turns
        corners = np.stack([1 - corners[:, 1], corners[:, 0]], 1)
    return corners


def _pixel_centres(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x [1, size] and y [size, 1]."""
    centres = np.arange(size) + 0.5
    return centres[None], centres[:, None]


def _inside_ellipse(size: int, left: int, top: int, width: int, height: int) -> np.ndarray:
    x, y = _pixel_centres(size)
    x, y = (x - left - width / 2) / (width / 2), (y - top - height / 2) / (height / 2)
    return x * x + y * y <= 1


def _inside_convex(size: int, outline: np.ndarray) -> np.ndarray:
    """Pixels whose centre is on the inner side of every edge of a clockwise outline."""
    x, y = _pixel_centres(size)
    inside = np.ones((size, size), np.bool_)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, 0), strict=True):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    return inside


def _write_split(folder: Path, split: str, count: int, size: int, seed: int) -> None:
    image_dir = folder / f"{split}2017"
    image_dir.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        pixels, shapes = draw_picture(seed, split, index, size)
        name = f"{index + 1:06d}.png"
        Image.fromarray(pixels).save(image_dir / name, compress_level=1)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for shape in shapes:
            annotations.append(_annotation(len(annotations) + 1, index + 1, shape))
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES, 1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    json_path = folder / "annotations" / f"instances_{split}2017.json"
    json_path.parent.mkdir(exist_ok=True)
    json_path.write_text(json.dumps(document))


def _annotation(annotation_id: int, image_id: int, shape: Shape) -> dict[str, Any]:
    left, top, right, bottom = shape.box
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": shape.label + 1,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(shape.mask.sum()),
        "iscrowd": 0,
        "segmentation": [[round(float(value), 2) for value in shape.outline.flatten()]],
    }


def _is_whole(folder: Path, counts: dict[str, int]) -> bool:
    for split, count in counts.items():
        files = [folder / f"{split}2017" / f"{index + 1:06d}.png" for index in range(count)]
        files.append(folder / "annotations" / f"instances_{split}2017.json")
        if not all(file.is_file() and file.stat().st_size for file in files):
            return False
    return True


def _put_in_place(temporary: Path, folder: Path, counts: dict[str, int]) -> None:
    """Rename temporary/new to `folder`, unless another process did so first."""
    if folder.exists() and not _is_whole(folder, counts):
        with suppress(FileNotFoundError):  # another process moved it away first
            os.rename(folder, temporary / "damaged")
    try:
        os.rename(temporary / "new", folder)
    except OSError:
        if not _is_whole(folder, counts):
            raise
