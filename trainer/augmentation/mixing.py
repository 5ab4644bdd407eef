"""Strong parts that need more than one image: mosaic, mixup, copy-paste. They leave the size of the
scene as it is.

All random numbers come from the generator passed in. Sizes are (height, width) in pixels.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import masks_to_boxes

from trainer.augmentation.scene import LEAST_SHARE, LEAST_SIDE, Scene, joined
from trainer.augmentation.single import covering

# Reads another image of the dataset, drawn at random, scaled to cover a (height, width).
Partner: TypeAlias = Callable[[tuple[int, int]], Scene]

CENTRE = (0.3, 0.7)  # of each side: where the four images of a mosaic meet
BLEND = 32.0  # of the beta distribution of mixup, as in YOLOv5: shares of 0.3 to 0.7
PASTED = 0.5  # probability of each object of the other image


def mosaic(scene: Scene, partner: Partner, random: np.random.Generator) -> Scene:
    """Four images in the fields of a canvas, each scaled to cover its field (Bochkovskiy et al.,
    arXiv 2004.10934, section 3.3).
    """
    height, width = scene.size
    down, across = (round(side * float(random.uniform(*CENTRE))) for side in (height, width))
    fields = [
        (top, left, bottom - top, right - left)
        for top, bottom in ((0, down), (down, height))
        for left, right in ((0, across), (across, width))
    ]
    own = int(random.integers(4))
    canvas = Image.new("RGB", (width, height))
    scenes = []
    for number, (top, left, *shape) in enumerate(fields):
        field = (shape[0], shape[1])
        if number == own:
            geometry = covering(scene.size, (0, 0, *scene.size), field, random)
            part = scene.moved(geometry, visible=True)
        else:
            part = partner(field)
        canvas.paste(part.image, (left, top))
        scenes.append(part.placed(canvas, top, left))
    mixed = joined(canvas, scenes)
    return replace(mixed, image_id=scene.image_id)


def mixup(scene: Scene, partner: Partner, random: np.random.Generator) -> Scene:
    """Two images blended, with the objects of both (Zhang et al., arXiv 1710.09412, and for
    detection arXiv 1902.04103).
    """
    other = partner(scene.size)
    share = float(random.beta(BLEND, BLEND))
    return joined(Image.blend(scene.image, other.image, share), [scene, other])


def copy_paste(scene: Scene, partner: Partner, random: np.random.Generator) -> Scene:
    """About half of the objects of another image, cut out along their masks, on top of the scene
    (Ghiasi et al., arXiv 2012.07177). Objects without a mask are not pasted.
    """
    other = partner(scene.size)
    chosen = torch.from_numpy(random.random(len(other.labels)) < PASTED)
    if other.masks is None or scene.masks is None or other.has_mask is None:
        return scene
    pasted = other.only(chosen & other.has_mask)
    if pasted.masks is None or not len(pasted.masks):
        return scene
    front = pasted.masks.any(0)
    stencil = Image.fromarray(front.numpy().astype(np.uint8) * 255)
    image = Image.composite(other.image, scene.image, stencil)
    # Where objects overlap without masks, the earlier ones are in front.
    return replace(joined(image, [pasted, _behind(scene, front)]), image_id=scene.image_id)


def _behind(scene: Scene, front: Tensor) -> Scene:
    """The objects of which enough is left behind the mask `front`, bool [H, W]. Where an object has
    a mask, its box shrinks to what is left of it; else its box stays.
    """
    assert scene.masks is not None and scene.has_mask is not None
    masks = scene.masks & ~front
    boxes, kept = scene.boxes.clone(), torch.ones(len(masks), dtype=torch.bool)
    for row, (mask, before) in enumerate(zip(masks, scene.masks, strict=True)):
        if scene.has_mask[row] and before.any():
            left, all_of_it = int(mask.sum()), int(before.sum())
            kept[row] = left >= max(LEAST_SHARE * all_of_it, LEAST_SIDE)
            if kept[row] and left < all_of_it:
                boxes[row] = masks_to_boxes(mask[None])[0] + boxes.new_tensor([0, 0, 1, 1])
        else:
            kept[row] = _share_hidden(boxes[row], front) <= 1 - LEAST_SHARE
    return replace(scene, boxes=boxes).with_masks(masks).only(kept)


def _share_hidden(box: Tensor, front: Tensor) -> float:
    """The share of a box xyxy that lies behind `front`."""
    left, top, right, bottom = box.round().to(torch.int64).tolist()
    inside = front[top : max(bottom, top + 1), left : max(right, left + 1)]
    return float(inside.float().mean()) if inside.numel() else 0.0
