"""Boxes, labels and masks drawn on a picture, with Pillow and NumPy alone.

Boxes are xyxy in pixels of the picture.
"""

import colorsys
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Colours of the first classes: easy to distinguish, also for most colour-blind readers.
COLOURS = (
    *("#e6194b", "#0082c8", "#ffe119", "#3cb44b", "#f58231", "#911eb4"),
    *("#46f0f0", "#f032e6", "#d2f53c", "#008080", "#fabebe", "#aa6e28"),
)
LONGEST_NAME = 16  # characters
MASK_SHARE = 0.45  # opacity of a mask
SMALLEST_FONT = 11  # pixels

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
    masks: np.ndarray | None = None,
) -> Image.Image:
    """A copy of the picture, RGB and of its size, with boxes [N, 4], masks bool [N, H, W], classes
    and scores drawn on it, the best on top. Lines and letters scale with the picture.
    """
    canvas = image.convert("RGB")  # a copy in any case
    order = np.argsort(scores, kind="stable").tolist()
    for row in order if masks is not None else ():
        tint(canvas, masks[row], class_colour(int(labels[row])))  # type: ignore[index]
    texts = [
        f"{class_text(int(label), class_names)} {score:.2f}"
        for label, score in zip(labels, scores, strict=True)
    ]
    colours = [class_colour(int(label)) for label in labels]
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
    veil = Image.fromarray(np.uint8(255 * MASK_SHARE) * np.asarray(mask, np.uint8))
    veil = veil.resize(canvas.size, Image.Resampling.BILINEAR)
    canvas.paste(Image.new("RGB", canvas.size, colour), mask=veil)


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
    """Writes labels, best first, each at the position that covers least of the labels before it."""
    font = ImageFont.load_default(font_size)
    placed: list[Rectangle] = []
    for box, text, colour in labels:
        width, height = draw.textlength(text, font=font) + 6, font_size + 3
        candidates = _positions(box, width, height, size)
        position = min(candidates, key=lambda each: _covered(each, placed))
        placed.append(position)
        draw.rectangle(position, fill=colour)
        ink = "#000000" if _is_light(colour) else "#ffffff"
        middle = (position[0] + 3, (position[1] + position[3]) / 2)
        draw.text(middle, text, fill=ink, font=font, anchor="lm")


def _positions(
    box: Rectangle, width: float, height: float, size: tuple[int, int]
) -> list[Rectangle]:
    """Positions of a label: above the box, inside at the top or bottom, and below."""
    x0, y0, x1, y1 = box
    lefts = (x0, x1 - width)
    tops = (y0 - height, y0, y1 - height, y1)
    corners = [
        (min(max(0.0, x), size[0] - 1 - width), min(max(0.0, y), size[1] - 1 - height))
        for y in tops
        for x in lefts
    ]
    return [(x, y, x + width, y + height) for x, y in corners]


def _covered(position: Rectangle, placed: Sequence[Rectangle]) -> float:
    """Area of `position` that is covered by labels already written."""
    x0, y0, x1, y1 = position
    return sum(
        max(0.0, min(x1, other[2]) - max(x0, other[0]))
        * max(0.0, min(y1, other[3]) - max(y0, other[1]))
        for other in placed
    )


def _channels(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue


def _darker(colour: str) -> tuple[int, int, int]:
    red, green, blue = _channels(colour)
    return red // 2, green // 2, blue // 2


def _is_light(colour: str) -> bool:
    red, green, blue = _channels(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140
