"""Strong parts that need one image: IoU crop, scale jitter, zoom-out, affine, photometric
distortion. All but the crop leave the size of the scene as it is.

All random numbers come from the generator passed in. Sizes are (height, width) in pixels.
"""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Mask

from trainer.augmentation.geometry import Crop, Geometry
from trainer.augmentation.scene import Scene, areas

FILL = (124, 116, 104)  # the mean of ImageNet, which normalisation turns into 0, as padding is
# The IoU crop of SSD (Liu et al., arXiv 1512.02325, section 2.2).
LEAST_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
LEAST_CROP = 0.3  # of each side
LONGEST_ASPECT = 2  # of width over height, and of height over width
TRIALS = 40
ZOOMED_OUT = 0.25  # the least scale; SSD's canvas has at most four times the sides of the image
SHIFT = 0.1  # of each side
SHEAR = 2.0  # degrees
# Of `torchvision.transforms.v2.RandomPhotometricDistort`, which follows SSD.
BRIGHTNESS, CONTRAST, SATURATION, HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)

Area = tuple[int, int, int, int]  # top, left, height, width


def iou_area(size: tuple[int, int], boxes: Tensor, random: np.random.Generator) -> Area:
    """A crop that has a random least IoU with one of the boxes [N, 4] xyxy and holds the centre of
    one; the whole image if there are no boxes, or if no trial succeeds.
    """
    least = LEAST_OVERLAPS[int(random.integers(len(LEAST_OVERLAPS)))]
    sides = np.maximum((random.uniform(LEAST_CROP, 1, (TRIALS, 2)) * size).astype(int), 1)
    corners = (random.random((TRIALS, 2)) * (np.array(size) + 1 - sides)).astype(int)
    if not len(boxes):
        return (0, 0, *size)
    xyxy = np.concatenate([corners[:, ::-1], (corners + sides)[:, ::-1]], axis=1)
    crops = torch.from_numpy(xyxy).to(boxes.dtype)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centres > crops[:, None, :2]) & (centres < crops[:, None, 2:])).all(2).any(1)
    aspect = torch.from_numpy(sides[:, 1] / sides[:, 0])
    square = (aspect >= 1 / LONGEST_ASPECT) & (aspect <= LONGEST_ASPECT)
    good = (inside & square & (box_iou(crops, boxes).amax(1) >= least)).nonzero()
    if not len(good):
        return (0, 0, *size)
    (top, left), (height, width) = corners[int(good[0])].tolist(), sides[int(good[0])].tolist()
    return top, left, height, width


def covering(
    size: tuple[int, int],
    area: Area,
    shape: tuple[int, int],
    random: np.random.Generator,
    *,
    flip: bool = False,
) -> Geometry:
    """The geometry that scales an area of an image of `size` until it covers `shape`, and cuts what
    juts out at random.
    """
    top, left, height, width = area
    scale = max(shape[0] / height, shape[1] / width)
    before = (round(size[0] * scale), round(size[1] * scale))
    corner = [
        min(round(start * scale + float(random.random()) * (length * scale - side)), most - side)
        for start, length, side, most in zip(
            (top, left), (height, width), shape, before, strict=True
        )
    ]
    crop = Crop(before, max(corner[0], 0), max(corner[1], 0), *shape)
    return Geometry(size, flip, crop, shape, spare=1)


def rescaled(scene: Scene, scale: float, random: np.random.Generator) -> Scene:
    """The scene scaled on a canvas of its size: below 1 at a random position on FILL, above 1 cut
    at random.
    """
    size = scene.size
    before = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
    across, down = random.random(2)
    top, left = (
        round(float(part) * abs(new - old))
        for part, new, old in zip((down, across), before, size, strict=True)
    )
    if scale >= 1:
        cut = Crop(before, top, left, *size)
        return scene.moved(Geometry(size, False, cut, size), visible=True)
    small = scene.moved(Geometry(size, False, None, before), visible=True)
    canvas = Image.new("RGB", size[::-1], FILL)
    canvas.paste(small.image, (left, top))
    return small.placed(canvas, top, left)


def zoomed_out(scene: Scene, random: np.random.Generator) -> Scene:
    """SSD's zoom-out: the image on a canvas of up to 16 times its area, which is then resized to
    the size of the image.
    """
    return rescaled(scene, 1 / float(random.uniform(1, 1 / ZOOMED_OUT)), random)


def jittered(scene: Scene, factors: tuple[float, ...], random: np.random.Generator) -> Scene:
    """Scale jitter; factors from 0.1 to 2 are the large-scale jitter of Ghiasi et al. (arXiv
    2012.07177).
    """
    return rescaled(scene, float(random.uniform(factors[0], factors[1])), random)


def affine(scene: Scene, rotation: float, random: np.random.Generator) -> Scene:
    """Rotated by up to `rotation` degrees, shifted by up to SHIFT and sheared by up to SHEAR. A box
    becomes the smallest one around its turned corners.
    """
    height, width = scene.size
    angle, shear = (float(random.uniform(-most, most)) for most in (rotation, SHEAR))
    across, down = random.uniform(-SHIFT, SHIFT, 2)
    how = (angle, [round(across * width), round(down * height)], 1.0, [shear, 0.0])
    bilinear = InterpolationMode.BILINEAR
    framed = BoundingBoxes(scene.boxes, format="XYXY", canvas_size=scene.size)
    boxes = F.affine(framed, *how).as_subclass(Tensor).reshape(-1, 4)
    image = F.affine(scene.image, *how, interpolation=bilinear, fill=[*FILL])
    moved = replace(scene, image=image, boxes=boxes)
    if scene.masks is not None and len(scene.masks):
        masks = F.affine(Mask(scene.masks.to(torch.uint8)), *how).as_subclass(Tensor).bool()
        moved = moved.with_masks(masks)
    return moved.visible(areas(scene.boxes))


def photometric(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue changed, contrast first or last."""
    ranges = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    brightness, contrast, saturation, hue = (float(random.uniform(*each)) for each in ranges)
    contrast_first = random.random() < 0.5
    image = F.adjust_brightness(image, brightness)
    if contrast_first:
        image = F.adjust_contrast(image, contrast)
    image = F.adjust_hue(F.adjust_saturation(image, saturation), hue)
    return image if contrast_first else F.adjust_contrast(image, contrast)
