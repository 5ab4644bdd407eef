"""A grid of augmented images with their boxes and masks, as training sees them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import to_pil_image

from vidt.images.drawing import class_colour, class_text, draw_boxes_on, tint

PREVIEW_NAME = "preview.jpg"
PREVIEWED = 16  # images
COLUMNS = 4
CELL = 400  # pixels of the longer side of each image
GAP = 8


def preview(items: Iterable[dict[str, Any]], class_names: Sequence[str]) -> Image.Image:
    """The grid of items, at least one, as `trainer.data.loader.DetectionDataset` returns them."""
    cells = [_drawn(item["image"], item["target"], class_names) for item in items]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    size = (min(len(cells), COLUMNS) * (CELL + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1))
    grid = Image.new("RGB", size, "#ffffff")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            grid.paste(cell, (GAP + column * (CELL + GAP), top))
        top += height + GAP
    return grid


def _drawn(pixels: Any, target: dict[str, Any], class_names: Sequence[str]) -> Image.Image:
    """An image uint8 [3, h, w], scaled to a cell, with its objects drawn on it."""
    image = to_pil_image(pixels)
    scale = CELL / max(image.size)
    cell = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)))
    labels = target["labels"].tolist()
    for row, mask in enumerate(target.get("masks", ())):
        tint(cell, mask.numpy(), class_colour(labels[row]))
    corners = box_convert(target["boxes"], "cxcywh", "xyxy").numpy() * np.tile(cell.size, 2)
    shown = [
        (tuple(box), class_text(label, class_names), class_colour(label))
        for box, label in zip(corners.tolist(), labels, strict=True)
    ]
    draw_boxes_on(cell, shown, line=2, font_size=12)
    return cell
