"""A grid of validation images with ground truth and predictions side by side, and the drawing
functions that `trainer.report.worst_pictures` also uses.

Boxes are xyxy in pixels of the image they belong to; masks are run lengths, as of
`trainer.readers.run_lengths`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from trainer.readers.masks import decode
from trainer.readers.run_lengths import RunLengths
from trainer.readers.samples import Sample, SampleTable
from vidt.atomic import atomic_write
from vidt.errors import UserError, counted
from vidt.images.drawing import (
    class_colour,
    class_text,
    clipped,
    draw_boxes_on,
    object_colours,
    tint,
)
from vidt.images.files import read_image
from vidt.predict.detections import Detections

MOST_PAIRS = 16  # validation images shown after an evaluation
BACKGROUND = "#ffffff"
INK = "#202020"


@dataclass(frozen=True, eq=False)
class Comparison:
    """A validation image, its annotations, and the N detections in it."""

    image: Image.Image
    sample: Sample
    detections: Detections
    masks: Sequence[RunLengths] | None = None  # N

    @property
    def labels(self) -> set[int]:
        """The classes that occur in it."""
        return {*self.sample.labels.tolist(), *self.detections.labels.tolist()}


@dataclass(frozen=True, eq=False)
class Mark:
    """A box to draw, xyxy in pixels of its image. Without text it is thin and in the background."""

    box: np.ndarray  # [4]
    text: str
    colour: str
    mask: RunLengths | None = None


def comparisons(
    samples: SampleTable,
    detections: Mapping[int, Detections],
    masks: Mapping[int, Sequence[RunLengths]],
) -> list[Comparison]:
    """A few images of this process's share, spread over the table; detections and their masks, if
    there are any, by index.
    """
    indices = sorted(detections)
    chosen = indices[:: max(len(indices) // MOST_PAIRS, 1)][:MOST_PAIRS]
    return [
        Comparison(image_of(samples[index]), samples[index], detections[index], masks.get(index))
        for index in chosen
    ]


def image_of(sample: Sample) -> Image.Image:
    """The image; grey if its file has become unreadable, so that the run can continue."""
    try:
        return read_image(sample.path, sample.size)
    except (UserError, OSError):
        height, width = sample.size
        return Image.new("RGB", (max(width, 1), max(height, 1)), "grey")


def truth_beside_prediction(
    rows: Sequence[Comparison],
    class_names: Sequence[str],
    pairs: Sequence[Image.Image],
    panel: int = 400,
) -> Image.Image:
    """A grid of pairs under a legend of the classes. `pairs` are the results of `compare` for the
    rows, at least one, with the same `panel`.
    """
    columns = 1 if len(pairs) < 2 else 2
    lines = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    gap = panel // 16
    body = joined([joined(line, gap) for line in lines], gap, down=True)
    legend = _legend(sorted(set().union(*(row.labels for row in rows))), class_names, body.width)
    return ImageOps.expand(joined([legend, body], gap, down=True), gap, BACKGROUND)


def compare(
    row: Comparison, class_names: Sequence[str], min_score: float = 0.3, panel: int = 400
) -> Image.Image:
    """One pair, truth | prediction, with captions above. Predictions below `min_score` are not
    drawn. `panel`: pixels of the longer side of each image.
    """
    sample, found, scores = row.sample, row.detections, row.detections.scores.tolist()
    truth = _marks(sample.boxes, sample.labels, class_names, None, sample.masks)
    every = _marks(found.boxes, found.labels, class_names, scores, row.masks)
    rising = np.argsort(scores, kind="stable").tolist()  # the highest score is drawn on top
    kept = [every[index] for index in rising if scores[index] >= min_score]
    name = Path(sample.path).name
    captions = (
        f"{name}  truth: {counted(len(truth), 'box', 'boxes')}".strip(),
        _prediction_caption(scores, len(kept), min_score),
    )
    scale = panel / max(row.image.size)
    halves = [
        _captioned(draw_marks(row.image, marks, scale), caption, panel)
        for marks, caption in zip((truth, kept), captions, strict=True)
    ]
    return joined(halves, gap=4)


def _marks(
    boxes: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    scores: Sequence[float] | None,
    masks: Sequence[RunLengths] | None,
) -> list[Mark]:
    classes = labels.tolist()
    texts = [class_text(label, class_names) for label in classes]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)]
    colours = object_colours(classes)
    columns = (boxes.numpy(), texts, colours, masks_or_none(masks, len(texts)))
    return [Mark(*row) for row in zip(*columns, strict=True)]


def masks_or_none(masks: Sequence[RunLengths] | None, count: int) -> Sequence[RunLengths | None]:
    """A mask, or None, for each of `count` objects."""
    return [None] * count if masks is None else masks


def _prediction_caption(scores: Sequence[float], num_kept: int, min_score: float) -> str:
    """The caption of a prediction, which says why an image has no boxes."""
    if num_kept or not scores:
        return f"prediction: {counted(num_kept, 'box', 'boxes')} of score {min_score:g} and above"
    return f"prediction: no box of score {min_score:g} (highest {max(scores):.2f})"


def draw_marks(image: Image.Image, marks: Sequence[Mark], scale: float) -> Image.Image:
    """A scaled copy with marks on it, the last on top. It is scaled first, so that lines and text
    keep their size.
    """
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    for mark in marks:
        if mark.mask:
            tint(canvas, decode([mark.mask], (image.height, image.width))[0].numpy(), mark.colour)
    draw, longest = ImageDraw.Draw(canvas), max(size)
    line = max(3, round(longest / 250))
    for mark in marks:
        if not mark.text:
            box = clipped((mark.box * scale).tolist(), size)
            draw.rectangle(box, outline=mark.colour, width=line - 1)
    labelled = [(tuple(mark.box * scale), mark.text, mark.colour) for mark in marks if mark.text]
    draw_boxes_on(canvas, labelled, line=line, font_size=max(12, round(longest / 45)))
    return canvas


def joined(pictures: Sequence[Image.Image], gap: int, *, down: bool = False) -> Image.Image:
    """Pictures side by side, or one below the other, on white."""
    widths, heights = zip(*(picture.size for picture in pictures), strict=True)
    gaps = gap * (len(pictures) - 1)
    size = (max(widths), sum(heights) + gaps) if down else (sum(widths) + gaps, max(heights))
    sheet = Image.new("RGB", size, BACKGROUND)
    place = 0
    for picture in pictures:
        sheet.paste(picture, (0, place) if down else (place, 0))
        place += gap + (picture.height if down else picture.width)
    return sheet


def as_jpeg(picture: Image.Image, *, quality: int, subsampling: int = -1) -> bytes:
    """subsampling: Pillow's; -1 leaves it to the encoder, 0 keeps colours sharp."""
    encoded = io.BytesIO()
    picture.convert("RGB").save(
        encoded, "JPEG", quality=quality, subsampling=subsampling, optimize=True
    )
    return encoded.getvalue()


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a JPEG atomically."""
    atomic_write(path, as_jpeg(picture, quality=90, subsampling=0))


def _captioned(picture: Image.Image, caption: str, width: int) -> Image.Image:
    """`picture` in the middle of a column, its caption above on one line."""
    font_size = max(12, width // 28)
    font = ImageFont.load_default(font_size)
    head = round(font_size * 1.5)
    cell = Image.new("RGB", (width, head + picture.height), BACKGROUND)
    while len(caption) > 4 and font.getlength(caption) > width:
        caption = caption[:-3] + ".."
    ImageDraw.Draw(cell).text((0, head / 2), caption, fill=INK, font=font, anchor="lm")
    cell.paste(picture, ((width - picture.width) // 2, head))
    return cell


def _legend(labels: Sequence[int], class_names: Sequence[str], width: int) -> Image.Image:
    """The colours of the classes, wrapped to `width`."""
    font = ImageFont.load_default(16)
    corners: list[tuple[float, int]] = []
    x, y = 0.0, 0
    for label in labels:
        wide = 22 + font.getlength(class_text(label, class_names)) + 20
        if x and x + wide > width:
            x, y = 0.0, y + 24
        corners.append((x, y))
        x += wide
    legend = Image.new("RGB", (width, y + 24 if labels else 1), BACKGROUND)
    draw = ImageDraw.Draw(legend)
    for label, (x, y) in zip(labels, corners, strict=True):
        draw.rectangle((x, y + 4, x + 15, y + 19), fill=class_colour(label), outline="#000000")
        draw.text((x + 22, y + 12), class_text(label, class_names), INK, font, anchor="lm")
    return legend
