"""Boxes, labels and masks drawn on a picture, with Pillow and NumPy alone.

Boxes are xyxy in pixels of the picture.
"""

import colorsys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vidt.errors import escaped
from vidt.images.mask_drawing import Patch

# Colours of the first classes: easy to distinguish, also for most colour-blind readers.
COLOURS = (
    *("#e6194b", "#0082c8", "#ffe119", "#3cb44b", "#f58231", "#911eb4"),
    *("#46f0f0", "#f032e6", "#d2f53c", "#008080", "#fabebe", "#aa6e28"),
)
LONGEST_NAME = 16  # characters
MASK_SHARE = 0.45  # opacity of a mask
SMALLEST_FONT = 11  # pixels

# Share of white, or below 0 of black, in the colours of a class's objects in one picture, in turn.
SHADES = (0.0, 0.45, -0.35, 0.7, -0.55)

Rectangle: TypeAlias = tuple[float, float, float, float]
Label: TypeAlias = tuple[Rectangle, str, str]  # box, text, colour


def class_colour(label: int) -> str:
    """The colour of a label in every picture of every run, '#rrggbb'."""
    if label < len(COLOURS):
        return COLOURS[label]
    # Golden-ratio steps round the colour circle never repeat a hue.
    hue = label * 0.618034 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9 - 0.4 * (label % 2), 0.95 - 0.2 * (label % 3))
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def object_colours(labels: Sequence[int]) -> list[str]:
    """A colour for each object of a picture: that of its class, in another shade for each object of
    the class until the shades repeat. The first of each class has the colour itself.
    """
    seen: Counter[int] = Counter()
    colours = []
    for label in labels:
        colours.append(_shaded(class_colour(label), SHADES[seen[label] % len(SHADES)]))
        seen[label] += 1
    return colours


def _shaded(colour: str, share: float) -> str:
    """The colour with a share of white, or of black if it is negative."""
    end = 255 if share > 0 else 0
    mixed = (round(each + abs(share) * (end - each)) for each in _channels(colour))
    return "#" + "".join(f"{each:02x}" for each in mixed)


def class_text(label: int, class_names: Sequence[str]) -> str:
    """The name, cut if long; 'class 7' without a name, or if the built-in font lacks a letter."""
    name = class_names[label] if label < len(class_names) else ""
    try:
        name.encode("latin-1")
    except UnicodeEncodeError:
        name = ""
    name = name or f"class {label}"
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 2] + ".."


def draw_detections(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[int],
    scores: Sequence[float],
    class_names: Sequence[str],
    patch_of: Callable[[int], Patch] | None = None,
) -> Image.Image:
    """A copy of the picture, RGB and of its size, with boxes [N, 4], masks, classes and scores
    drawn on it, the best on top. Lines and letters scale with the picture. patch_of: the mask of an
    object, called for one at a time, since all masks of a large picture take gigabytes.
    """
    canvas = image.convert("RGB")  # a copy in any case
    canvas.info.pop("transparency", None)  # of a PNG: the colours of the drawing are none of it
    order = np.argsort(scores, kind="stable").tolist()
    best_first = order[::-1]
    shades = object_colours([int(labels[row]) for row in best_first])
    colours = dict(zip(best_first, shades, strict=True))
    if patch_of is not None:
        for row in order:
            _tint_patch(canvas, patch_of(row), colours[row])
    texts = [
        f"{class_text(int(label), class_names)} {score:.2f}"
        for label, score in zip(labels, scores, strict=True)
    ]
    longest = max(canvas.size)
    draw_boxes_on(
        canvas,
        [(tuple(boxes[row]), texts[row], colours[row]) for row in order],
        line=max(2, round(longest / 300)),
        font_size=max(SMALLEST_FONT, round(longest / 52)),
    )
    return canvas


def draw_boxes_on(
    canvas: Image.Image, shown: Sequence[Label], *, line: int, font_size: int
) -> None:
    """Draws boxes with their labels on the picture itself, the last on top; `line` is in pixels.
    Boxes are clipped to the picture, and swapped corners are put in order.
    """
    draw = ImageDraw.Draw(canvas)
    labels: list[Label] = []
    for box, text, colour in shown:
        inside = clipped(box, canvas.size)
        # A darker rim keeps light boxes visible in a light picture.
        draw.rectangle(_grown(inside, 1), outline=_darker(colour), width=1)
        draw.rectangle(inside, outline=colour, width=line)
        labels.append((inside, text, colour))
    write_labels(draw, labels[::-1], canvas.size, font_size)


def tint(canvas: Image.Image, mask: np.ndarray, colour: str) -> None:
    """Colours a mask, bool [H, W], on a canvas that shows the mask's image at any size."""
    veil = _veil(mask).resize(canvas.size, Image.Resampling.BILINEAR)
    canvas.paste(colour, (0, 0), veil)


def _tint_patch(canvas: Image.Image, patch: Patch, colour: str) -> None:
    if patch.mask.size:
        canvas.paste(colour, (patch.left, patch.top), _veil(patch.mask))


def _veil(mask: np.ndarray) -> Image.Image:
    """The opacity of a mask, bool [H, W]."""
    return Image.fromarray(np.uint8(255 * MASK_SHARE) * np.asarray(mask, np.uint8))


def clipped(box: Sequence[float], size: tuple[int, int]) -> Rectangle:
    """A box clipped to a picture of `size` (width, height), with its corners in order, so that any
    prediction can be drawn.
    """
    corners = np.nan_to_num(np.asarray(box, np.float64))
    xs = np.clip(corners[0::2], 0, size[0] - 1)
    ys = np.clip(corners[1::2], 0, size[1] - 1)
    return float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())


def _grown(box: Rectangle, by: float) -> Rectangle:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def write_labels(
    draw: ImageDraw.ImageDraw, labels: Sequence[Label], size: tuple[int, int], font_size: int
) -> None:
    """Writes labels, best first, each at its box if that covers no label before it, else at the
    nearest place that is free. Only where a picture has no room left do labels cover each other.
    """
    font = ImageFont.load_default(font_size)
    placed = np.zeros((0, 4))
    for box, name, colour in labels:
        text = escaped(name)  # a line break cannot be measured
        width, height = draw.textlength(text, font=font) + 6, font_size + 3
        positions = _positions(box, width, height, size)
        covered = _covered(positions, placed)
        position = positions[covered.argmin()]
        if covered.min() > 0:
            place, still_covered = _freest_place(box, width, height, size, placed)
            position = place if still_covered < covered.min() else position
        x0, y0, x1, y1 = position.tolist()
        placed = np.concatenate([placed, [[x0 - 1, y0 - 1, x1 + 1, y1 + 1]]])
        draw.rectangle((x0, y0, x1, y1), fill=colour)
        ink = "#000000" if _is_light(colour) else "#ffffff"
        draw.text((x0 + 3, (y0 + y1) / 2), text, fill=ink, font=font, anchor="lm")


def _positions(box: Rectangle, width: float, height: float, size: tuple[int, int]) -> np.ndarray:
    """Positions of a label at its box, best first: above it, inside at the top or bottom, and
    below: xyxy [8, 4].
    """
    x0, y0, x1, y1 = box
    lefts = (x0, x1 - width)
    tops = (y0 - height, y0, y1 - height, y1)
    return _rectangles([(x, y) for y in tops for x in lefts], width, height, size)


def _freest_place(
    box: Rectangle, width: float, height: float, size: tuple[int, int], placed: np.ndarray
) -> tuple[np.ndarray, float]:
    """Of places all over the picture, the one that covers the least of the labels already written
    [L, 4], the nearest to the corner of the box of several: xyxy [4], and the area that it covers.
    """
    right, bottom = max(size[0] - 1 - width, 0), max(size[1] - 1 - height, 0)  # where starts end
    ys = np.arange(0, bottom + 1, (height + 2) / 2).clip(max=bottom)
    xs = np.arange(0, right + 1, max(width / 4, 8)).clip(max=right)
    # Places form a grid, in which a covered area is a width that depends on x times a height that
    # depends on y. For all pairs of a place and a label, areas take seconds in a full picture.
    covered = _shared(ys, height, placed[:, 1::2]).T @ _shared(xs, width, placed[:, 0::2])  # [Y, X]
    distances = np.hypot(xs - box[0], (ys - (box[1] - height))[:, None])
    row, column = divmod(np.lexsort((distances.ravel(), covered.ravel()))[0], len(xs))
    return _rectangles([(xs[column], ys[row])], width, height, size)[0], covered[row, column]


def _shared(starts: np.ndarray, length: float, spans: np.ndarray) -> np.ndarray:
    """What intervals of a length, by their starts [P], share with spans [L, 2]: [L, P]."""
    low = np.maximum(starts, spans[:, :1])
    return (np.minimum(starts + length, spans[:, 1:]) - low).clip(0)


def _rectangles(
    corners: Sequence[tuple[float, float]] | np.ndarray,
    width: float,
    height: float,
    size: tuple[int, int],
) -> np.ndarray:
    """Labels at upper left corners, moved into the picture: xyxy [P, 4]."""
    inside = np.array(corners).clip(0, [max(size[0] - 1 - width, 0), max(size[1] - 1 - height, 0)])
    return np.concatenate([inside, inside + np.array([width, height])], 1)


def _covered(positions: np.ndarray, placed: np.ndarray) -> np.ndarray:
    """Area of each position [P, 4] that is covered by labels already written [L, 4]: [P]."""
    low = np.maximum(positions[:, None, :2], placed[:, :2])
    high = np.minimum(positions[:, None, 2:], placed[:, 2:])
    return (high - low).clip(0).prod(-1).sum(-1)


def _channels(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue


def _darker(colour: str) -> tuple[int, int, int]:
    red, green, blue = _channels(colour)
    return red // 2, green // 2, blue // 2


def _is_light(colour: str) -> bool:
    red, green, blue = _channels(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140
