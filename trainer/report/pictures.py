"""Boxes and masks drawn on pictures, and truth beside prediction for a grid of validation images.

Boxes are xyxy in pixels of the image they belong to; masks are run lengths, as of
`trainer.readers.run_lengths`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trainer.readers.masks import decode
from trainer.readers.run_lengths import RunLengths
from trainer.readers.samples import Sample, SampleTable
from trainer.settings.wording import counted
from vidt.atomic import atomic_write
from vidt.errors import UserError
from vidt.images.drawing import MASK_SHARE, Label, Rectangle, class_colour, class_text
from vidt.images.drawing import write_labels as _write_labels
from vidt.images.files import read_image
from vidt.predict.detections import Detections

MOST_PAIRS = 16  # validation pictures shown after an evaluation

BACKGROUND = "#ffffff"
INK = "#202020"

Array: TypeAlias = Tensor | np.ndarray | Sequence[Sequence[float]] | Sequence[float]


@dataclass(frozen=True, eq=False)
class Comparison:
    """One validation image, what is on it, and what was found. Boxes: xyxy, pixels of `image`."""

    image: Image.Image
    truth_boxes: Array  # [M, 4]
    truth_labels: Array  # [M]
    boxes: Array  # [N, 4]
    labels: Array  # [N]
    scores: Array  # [N], 0..1
    name: str = ""
    truth_masks: Sequence[RunLengths] | None = None  # M
    masks: Sequence[RunLengths] | None = None  # N


def truth_beside_prediction(
    rows: Sequence[Comparison],
    class_names: Sequence[str],
    pairs: Sequence[Image.Image],
    panel: int = 400,
) -> Image.Image:
    """A grid of pairs, which are what `compare` drew of the rows; colours explained on top.
    `panel`: as they were drawn with. There must be a row at least.
    """
    assert rows
    columns = 1 if len(pairs) < 2 else 2
    lines = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    gap = panel // 16
    body = _stack([_beside(line, gap) for line in lines], gap)
    labels = [_int_list(part) for row in rows for part in (row.truth_labels, row.labels)]
    legend = _legend(sorted({label for part in labels for label in part}), class_names, body.width)
    return _framed(_stack([legend, body], gap), gap)


def compare(
    row: Comparison, class_names: Sequence[str], min_score: float = 0.3, panel: int = 400
) -> Image.Image:
    """One pair, truth | prediction, with its captions above.

    Predictions below `min_score` are not drawn, their number is in the caption. `panel`: pixels of
    the longer side of every image.
    """
    scale = panel / max(row.image.size)
    truth = _Boxes(row.truth_boxes, row.truth_labels, None, row.truth_masks)
    every = _Boxes(row.boxes, row.labels, row.scores, row.masks)
    found = every.at_least(min_score)
    pictures = [_drawn(row.image, shown, class_names, scale) for shown in (truth, found)]
    captions = (_truth_caption(row.name, truth), _found_caption(every, found, min_score))
    halves = [
        _captioned(picture, caption, panel)
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    return _beside(halves, gap=4)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a JPEG so that a reader never finds half a file."""
    encoded = io.BytesIO()
    picture.convert("RGB").save(encoded, "JPEG", quality=90, subsampling=0)
    atomic_write(path, encoded.getvalue())


class _Boxes:
    """Boxes, labels, scores and masks of one image, whatever they came as."""

    def __init__(
        self,
        boxes: Array,
        labels: Array,
        scores: Array | None,
        masks: Sequence[RunLengths] | None = None,
    ) -> None:
        self.boxes = _array(boxes).reshape(-1, 4)
        self.labels = _int_list(labels)
        self.scores = None if scores is None else _array(scores).reshape(-1)
        self.masks = masks
        optional = (self.scores, self.masks)
        given = {len(each) for each in optional if each is not None}
        assert given <= {len(self.labels)} == {len(self.boxes)}

    def at_least(self, min_score: float) -> "_Boxes":
        assert self.scores is not None
        keep = self.scores >= min_score
        masks = self.masks and [self.masks[row] for row in np.flatnonzero(keep).tolist()]
        return _Boxes(self.boxes[keep], np.asarray(self.labels)[keep], self.scores[keep], masks)

    def __len__(self) -> int:
        return len(self.labels)


def _array(values: Array) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().float().numpy()
    return np.asarray(values, dtype=np.float32)


def _int_list(labels: Array) -> list[int]:
    return [int(label) for label in _array(labels).reshape(-1)]


@dataclass(frozen=True, eq=False)
class Mark:
    """A box to draw, xyxy in pixels of its image, with a text unless that is empty; `quiet` ones
    stay behind the others.
    """

    box: np.ndarray  # [4]
    text: str
    colour: str
    mask: RunLengths | None = None
    quiet: bool = False


def draw_marks(image: Image.Image, marks: Sequence[Mark], scale: float) -> Image.Image:
    """A scaled copy with marks on it, the last on top. Scaled first and drawn on afterwards, so
    that lines and text keep their size.
    """
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    for mark in marks:
        if mark.mask is not None:
            _tint(canvas, mark.mask, (image.height, image.width), mark.colour)
    draw = ImageDraw.Draw(canvas)
    longest = max(size)
    line = max(3, round(longest / 250))
    labels: list[Label] = []
    for mark in sorted(marks, key=lambda each: not each.quiet):
        box = _inside(mark.box * scale, size)
        if mark.quiet:
            draw.rectangle(box, outline=mark.colour, width=line - 1)
        else:
            draw.rectangle(_grown(box, 1), outline="#000000", width=line + 2)
            draw.rectangle(box, outline=mark.colour, width=line)
        if mark.text:
            labels.append((box, mark.text, mark.colour))
    _write_labels(draw, labels[::-1], size, max(12, round(longest / 45)))
    return canvas


def _drawn(
    image: Image.Image, boxes: _Boxes, class_names: Sequence[str], scale: float
) -> Image.Image:
    order = range(len(boxes)) if boxes.scores is None else np.argsort(boxes.scores)
    marks = []
    for i in order:  # the surest last, on top
        text = class_text(boxes.labels[i], class_names)
        if boxes.scores is not None:
            text += f" {boxes.scores[i]:.2f}"
        mask = None if boxes.masks is None else boxes.masks[i]
        marks.append(Mark(boxes.boxes[i], text, class_colour(boxes.labels[i]), mask))
    return draw_marks(image, marks, scale)


def _tint(canvas: Image.Image, mask: RunLengths, size: tuple[int, int], colour: str) -> None:
    """Colours a mask of an image of `size` (height, width) on the canvas that shows it."""
    inside = np.uint8(255 * MASK_SHARE) * decode([mask], size)[0].numpy()
    veil = Image.fromarray(inside).resize(canvas.size, Image.Resampling.BILINEAR)
    canvas.paste(Image.new("RGB", canvas.size, colour), mask=veil)


def _inside(box: np.ndarray, size: tuple[int, int]) -> Rectangle:
    """Clipped to the picture and put in order, so that a wild early prediction can be drawn."""
    xs = np.clip(np.nan_to_num(box[0::2]), 0, size[0] - 1)
    ys = np.clip(np.nan_to_num(box[1::2]), 0, size[1] - 1)
    return float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())


def _grown(box: Rectangle, by: float) -> Rectangle:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _truth_caption(name: str, truth: _Boxes) -> str:
    return f"{name}  truth: {counted(len(truth), 'box', 'boxes')}".strip()


def _found_caption(every: _Boxes, found: _Boxes, min_score: float) -> str:
    """An empty panel early in a run should explain itself: nothing found, or not sure enough."""
    assert every.scores is not None
    if len(found) or not len(every):
        return f"prediction: {counted(len(found), 'box', 'boxes')} of score {min_score:g} and above"
    return f"prediction: no box of score {min_score:g} (highest {every.scores.max():.2f})"


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
    """The colours of the classes that occur, wrapped to `width`."""
    font = ImageFont.load_default(16)
    places: list[tuple[float, int]] = []
    x, y = 0.0, 0
    for label in labels:
        wide = 22 + font.getlength(class_text(label, class_names)) + 20
        if x and x + wide > width:
            x, y = 0.0, y + 24
        places.append((x, y))
        x += wide
    legend = Image.new("RGB", (width, y + 24 if labels else 1), BACKGROUND)
    draw = ImageDraw.Draw(legend)
    for label, (x, y) in zip(labels, places, strict=True):
        draw.rectangle((x, y + 4, x + 15, y + 19), fill=class_colour(label), outline="#000000")
        draw.text((x + 22, y + 12), class_text(label, class_names), INK, font, anchor="lm")
    return legend


def _beside(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), BACKGROUND)
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + gap
    return sheet


def _stack(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (max(picture.width for picture in pictures), height), BACKGROUND)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height + gap
    return sheet


def _framed(picture: Image.Image, margin: int) -> Image.Image:
    size = (picture.width + 2 * margin, picture.height + 2 * margin)
    sheet = Image.new("RGB", size, BACKGROUND)
    sheet.paste(picture, (margin, margin))
    return sheet


def picture_of(sample: Sample) -> Image.Image:
    """Grey where the file cannot be read any more: a run matters more than its pictures."""
    try:
        return read_image(sample.path, sample.size)
    except (UserError, OSError):
        height, width = sample.size
        return Image.new("RGB", (max(width, 1), max(height, 1)), "grey")


def comparisons(
    samples: SampleTable,
    detections: dict[int, Detections],
    masks: Mapping[int, Sequence[RunLengths]],
) -> list[Comparison]:
    """Truth beside prediction for a few images of this process's share, spread over the table;
    their masks where there are some.
    """
    indices = sorted(detections)
    chosen = indices[:: max(len(indices) // MOST_PAIRS, 1)][:MOST_PAIRS]
    rows = []
    for index in chosen:
        sample, found = samples[index], detections[index]
        rows.append(
            Comparison(
                image=picture_of(sample),
                truth_boxes=sample.boxes,
                truth_labels=sample.labels,
                boxes=found.boxes,
                labels=found.labels,
                scores=found.scores,
                name=Path(sample.path).name,
                truth_masks=sample.masks,
                masks=masks.get(index),
            )
        )
    return rows
