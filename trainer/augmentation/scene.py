"""An image and its objects between two parts of the augmentation.

N objects of an H x W image. Boxes are xyxy in pixels of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from trainer.augmentation.geometry import Geometry
from trainer.readers.masks import decode
from trainer.readers.samples import Sample

# A strong part drops an object of which less than LEAST_SHARE is left, unless what is left fills
# LARGE_SHARE of the image: the crop of a large object is not background.
LEAST_SHARE = 0.25
LARGE_SHARE = 0.1
LEAST_SIDE = 1.0  # pixels; a strong part drops objects whose box is narrower or lower


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with its N objects, crowd regions left out. `masks` and `has_mask` are None if no
    object of the dataset has a mask; the mask of an object without one is empty.
    """

    image: Image.Image
    boxes: Tensor  # float32 [N, 4]
    labels: Tensor  # int64 [N]
    image_id: int
    masks: Tensor | None = None  # bool [N, H, W]
    has_mask: Tensor | None = None  # bool [N]

    @classmethod
    def of(
        cls, sample: Sample, geometry: Geometry, image: Image.Image, *, visible: bool = False
    ) -> "Scene":
        """The objects of a sample under the geometry that made `image`: those of which anything is
        left, or with `visible` those of which enough is.
        """
        objects = ~sample.crowd  # crowd regions only matter in scoring
        boxes, kept = geometry.on_boxes(sample.boxes[objects])
        scene = cls(image, boxes, sample.labels[objects][kept], sample.image_id)
        if sample.masks is not None:
            rows = objects.nonzero()[kept, 0].tolist()
            masks = [sample.masks[row] for row in rows]
            has_mask = torch.tensor([bool(mask) for mask in masks], dtype=torch.bool)
            scene = replace(scene, has_mask=has_mask)
            scene = scene.with_masks(geometry.on_masks(decode(masks, geometry.size)))
        whole = areas(sample.boxes[objects][kept]) * geometry.enlargement
        return scene.visible(whole) if visible else scene

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.height, self.image.width

    def moved(self, geometry: Geometry, *, visible: bool = False) -> "Scene":
        """The scene under a geometry, with the objects of which anything is left, or with `visible`
        those of which enough is.
        """
        boxes, kept = geometry.on_boxes(self.boxes)
        image = geometry.on_image(self.image, shrunk=True)
        scene = replace(self.only(kept), image=image, boxes=boxes)
        if scene.masks is not None:
            scene = scene.with_masks(geometry.on_masks(scene.masks))
        return scene.visible(areas(self.boxes[kept]) * geometry.enlargement) if visible else scene

    def with_masks(self, masks: Tensor) -> "Scene":
        """The objects with masks that were moved or covered; one whose mask has no pixel left
        counts as one without a mask.
        """
        assert self.has_mask is not None
        return replace(self, masks=masks, has_mask=self.has_mask & masks.flatten(1).any(1))

    def placed(self, canvas: Image.Image, top: int, left: int) -> "Scene":
        """The objects on a larger canvas, on which the image lies at (top, left)."""
        masks, boxes = self.masks, self.boxes + self.boxes.new_tensor([left, top, left, top])
        if masks is not None:
            below, right = canvas.height - top, canvas.width - left
            pad = (left, right - self.image.width, top, below - self.image.height)
            masks = torch.nn.functional.pad(masks, pad)
        return replace(self, image=canvas, boxes=boxes, masks=masks)

    def only(self, kept: Tensor) -> "Scene":
        """The objects where `kept`, bool [N], holds."""
        return replace(
            self,
            boxes=self.boxes[kept],
            labels=self.labels[kept],
            masks=None if self.masks is None else self.masks[kept],
            has_mask=None if self.has_mask is None else self.has_mask[kept],
        )

    def visible(self, whole: Tensor) -> "Scene":
        """The objects of which enough is left; `whole` [N] is the area in pixels that each box had
        before it was cut, at the present scale.
        """
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        area = sides.prod(1)
        height, width = self.size
        enough = (area >= LEAST_SHARE * whole) | (area >= LARGE_SHARE * height * width)
        return self.only(enough & (sides >= LEAST_SIDE).all(1))


def joined(image: Image.Image, scenes: Sequence[Scene]) -> Scene:
    """All objects of scenes of one size on an image of that size, which counts as the first."""
    with_masks = [scene for scene in scenes if scene.masks is not None]
    return Scene(
        image,
        torch.cat([scene.boxes for scene in scenes]),
        torch.cat([scene.labels for scene in scenes]),
        scenes[0].image_id,
        torch.cat([scene.masks for scene in with_masks]) if with_masks else None,  # type: ignore[misc]
        torch.cat([scene.has_mask for scene in with_masks]) if with_masks else None,  # type: ignore[misc]
    )


def areas(boxes: Tensor) -> Tensor:
    """Of boxes [N, 4]: [N], pixels."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
