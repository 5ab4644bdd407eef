"""The detections of an image, and the decoding of a detector's outputs into them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from vidt.images.drawing import draw_detections
from vidt.images.inputs import ImageLike, picture_of, rows_of
from vidt.images.mask_drawing import Patch, decode_vectors, paste_squares, patch_of
from vidt.model.config import WITHOUT_NECK, ViDTConfig
from vidt.model.without_neck import decode_best_class
from vidt.predict.exchange import as_coco, as_pandas, as_supervision

TOP_K = 100  # detections per image, the released constant


@dataclass(frozen=True, eq=False)
class MaskVectors:
    """Masks in encoded form, a kilobyte each; `Detections.masks` decodes them."""

    vectors: Tensor  # [N, n_keep]
    side: int  # of the square that a vector encodes: the configuration's gt_mask_len
    size: tuple[int, int]  # (height, width) of the original image
    boxes: Tensor | None = None  # [N, 4] xyxy of the squares; None: the boxes of the detections


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of one image, best first."""

    scores: Tensor  # [N] in 0..1
    labels: Tensor  # [N] int64
    # [N, 4] xyxy, pixels of the original image; `Predictor.predict` clips them to it, decoding does
    # not.
    boxes: Tensor
    mask_vectors: MaskVectors | None = None  # None: the detector gives no masks
    class_names: tuple[str, ...] = ()  # all classes of the detector
    source: ImageLike = field(default=None, repr=False)  # the image, a file by its path

    @property
    def names(self) -> list[str]:
        """The class name of each detection; [N]."""
        return [self.class_names[label] for label in self.labels.tolist()]

    @property
    def masks(self) -> Tensor | None:
        """bool [N, H, W], pixels of the original image; None if the detector gives no masks. Every
        access decodes them again: select detections first, for example by `above`.
        """
        if self.mask_vectors is None:
            return None
        vectors, side = self.mask_vectors.vectors, self.mask_vectors.side
        boxes = self.boxes if self.mask_vectors.boxes is None else self.mask_vectors.boxes
        squares = decode_vectors(_as_array(vectors), side)
        drawn = torch.from_numpy(paste_squares(squares, _as_array(boxes), self.mask_vectors.size))
        return drawn.to(vectors.device)

    def plot(self, image: ImageLike = None) -> Image.Image:
        """A copy of the given image, by default of the source image, with boxes, names, scores and
        masks drawn on it: RGB, in the image's size.

        Raises UserError if there is no source image and none is given, `UnreadableImage` if its
        file can no longer be read.
        """
        own = self.cpu()
        return draw_detections(
            picture_of(self.source, image),
            own.boxes.float().numpy(),
            own.labels.tolist(),
            own.scores.tolist(),
            self.class_names,
            None if self.mask_vectors is None else own._patch,
        )

    def _patch(self, row: int) -> Patch:
        """The mask of one detection."""
        masks = self.mask_vectors
        assert masks is not None
        (square,) = decode_vectors(_as_array(masks.vectors[row : row + 1]), masks.side)
        box = (self.boxes if masks.boxes is None else masks.boxes)[row]
        return patch_of(square, _as_array(box), masks.size)

    def to_supervision(self) -> Any:
        """A `supervision.Detections` with boxes, masks if there are any, scores, labels and names.
        Raises UserError if the package is missing.
        """
        return as_supervision(*self._arrays(), self.names, self._mask_array())

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each detection: name, label, score, and the box as
        x1, y1, x2, y2. Raises UserError if the package is missing.
        """
        return as_pandas(*self._arrays(), self.names)

    def to_coco(
        self, image_id: int, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """COCO results: dictionaries with image_id, category_id, bbox (x, y, width, height), score,
        and segmentation (run lengths) if there are masks. category_ids: of the classes, such as
        `detector.category_ids`; None: label + 1.
        """
        return as_coco(image_id, category_ids, *self._arrays(), self._mask_array())

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _as_array(self.scores), self.labels.cpu().numpy(), _as_array(self.boxes)

    def _mask_array(self) -> np.ndarray | None:
        masks = self.masks
        return None if masks is None else masks.cpu().numpy()

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> "Detections":
        """The detections that score at least `threshold`."""
        return self[self.scores >= threshold]

    def __getitem__(self, which: int | slice | Tensor) -> "Detections":
        """The detections of a slice, an index tensor or a boolean mask; an integer selects one
        detection and keeps the axis.
        """
        rows = rows_of(which, len(self))
        return self._map(lambda column: column[rows])

    def cpu(self) -> "Detections":
        """A copy on the CPU."""
        return self._map(Tensor.cpu)

    def clipped(self, size: tuple[int, int]) -> "Detections":
        """A copy with boxes clipped to the image of `size` (height, width). Masks do not change."""
        masks = self.mask_vectors
        if masks is not None and masks.boxes is None:
            masks = replace(masks, boxes=self.boxes)
        limits = self.boxes.new_tensor([size[1], size[0], size[1], size[0]])
        boxes = self.boxes.clamp(min=0).minimum(limits)
        return replace(self, boxes=boxes, mask_vectors=masks)

    def moved(self, x: int, y: int, size: tuple[int, int]) -> "Detections":
        """The detections in a tile as those in its image of `size` (height, width), in which the
        tile begins at (x, y).
        """
        offset, masks = self.boxes.new_tensor([x, y, x, y]), self.mask_vectors
        if masks is not None:
            squares = self.boxes if masks.boxes is None else masks.boxes
            masks = replace(masks, size=size, boxes=squares + offset)
        return replace(self, boxes=self.boxes + offset, mask_vectors=masks)

    def joined(self, parts: "Sequence[Detections]") -> "Detections":
        """The detections of several parts of one image, of which this is the first, in order."""
        masks = [each.mask_vectors for each in parts if each.mask_vectors is not None]
        return replace(
            self,
            scores=torch.cat([each.scores for each in parts]),
            labels=torch.cat([each.labels for each in parts]),
            boxes=torch.cat([each.boxes for each in parts]),
            mask_vectors=self.mask_vectors
            and replace(
                self.mask_vectors,
                vectors=torch.cat([each.vectors for each in masks]),
                boxes=torch.cat([each.boxes for each in masks if each.boxes is not None]),
            ),
        )

    def with_boxes(self, boxes: np.ndarray) -> "Detections":
        """A copy with other boxes [N, 4]. Masks do not change."""
        masks = self.mask_vectors
        if masks is not None and masks.boxes is None:
            masks = replace(masks, boxes=self.boxes)
        return replace(self, boxes=torch.from_numpy(boxes).to(self.boxes), mask_vectors=masks)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Detections":
        masks = self.mask_vectors
        return replace(
            self,
            scores=change(self.scores),
            labels=change(self.labels),
            boxes=change(self.boxes),
            mask_vectors=masks
            and replace(
                masks,
                vectors=change(masks.vectors),
                boxes=None if masks.boxes is None else change(masks.boxes),
            ),
        )


def _as_array(tensor: Tensor) -> np.ndarray:
    """NumPy has no bfloat16."""
    return tensor.cpu().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()


def copy_to_cpu(detections: Sequence[Detections]) -> Callable[[], list[Detections]]:
    """Starts to copy the detections of one detector in one or more images to the CPU, as float32 in
    one transfer. Returns the function that waits for the copy and returns the detections.
    """
    columns = [
        [each.scores[:, None], each.labels[:, None], each.boxes]
        + ([each.mask_vectors.vectors] if each.mask_vectors else [])
        for each in detections
    ]
    # Labels are far below 2 ** 24, so float32 holds them exactly.
    rows = torch.cat([torch.cat([part.float() for part in image], dim=1) for image in columns])
    counts = [len(each) for each in detections]
    # On CUDA the copy goes to pinned memory, and the wait is for this copy, not for later work.
    on_host = rows.to("cpu", non_blocking=rows.is_cuda)
    copied = torch.cuda.current_stream(rows.device).record_event() if rows.is_cuda else None

    def finish() -> list[Detections]:
        if copied is not None:
            copied.synchronize()
        return [
            replace(
                each,
                scores=own[:, 0],
                labels=own[:, 1].long(),
                boxes=own[:, 2:6],
                mask_vectors=each.mask_vectors and replace(each.mask_vectors, vectors=own[:, 6:]),
            )
            for each, own in zip(detections, on_host.split(counts), strict=True)
        ]

    return finish


def decode_top_k(
    outputs: dict, sizes: Tensor, top_k: int = TOP_K, *, mask_len: int = 128
) -> list[Detections]:
    """The best (query, class) pairs of each image, without suppression or threshold.

    outputs of `ViDT`; sizes [B, 2] as (height, width) of the original images, in pixels; mask_len
    is the configuration's gt_mask_len.
    """
    scores, labels, boxes, query = best_pairs(outputs, sizes, top_k)
    masks = _mask_vectors(outputs, query, sizes, mask_len)
    return [Detections(*image) for image in zip(scores, labels, boxes, masks, strict=True)]


def best_pairs(
    outputs: dict, sizes: Tensor, top_k: int = TOP_K
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best (query, class) pairs of each image, as in `decode_top_k`: scores [B, N], labels [B,
    N], boxes [B, N, 4] and queries [B, N].
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    num_classes = logits.shape[-1]
    scores = logits.sigmoid().flatten(1)  # [B, Q * K]
    scores, index = scores.topk(min(top_k, scores.shape[1]), dim=1)
    query = index.div(num_classes, rounding_mode="floor")
    scale = sizes.to(boxes, non_blocking=True).flip(1).repeat(1, 2)  # [B, 4] as (w, h, w, h)
    boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    boxes = box_convert(boxes, "cxcywh", "xyxy") * scale[:, None]
    return scores, index % num_classes, boxes, query


def _mask_vectors(
    outputs: dict, query: Tensor, sizes: Tensor, mask_len: int
) -> Sequence[MaskVectors | None]:
    """The mask vectors of the chosen queries [B, N], for each image."""
    if "pred_vectors" not in outputs:
        return [None] * len(query)
    vectors = outputs["pred_vectors"]
    vectors = vectors.gather(1, query[..., None].expand(-1, -1, vectors.shape[2]))
    return [
        MaskVectors(each, mask_len, (height, width))
        for each, (height, width) in zip(vectors, sizes.tolist(), strict=True)
    ]


def decode_all(outputs: dict, sizes: Tensor) -> list[Detections]:
    """The best class of every [DET] token of a detector without neck, best first."""
    scores, labels, boxes = decode_best_class(outputs, sizes)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    labels, boxes = labels.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return [Detections(*image) for image in zip(scores, labels, boxes, strict=True)]


def score_for(config: ViDTConfig) -> Callable[[Tensor], Tensor]:
    """The function from logits [..., columns] of a detector of this configuration to the
    probabilities of the classes [..., K].
    """
    if config.method == WITHOUT_NECK:
        return lambda logits: logits.softmax(-1)[..., :-1]  # the last column is the background
    return torch.sigmoid


def decode_for(config: ViDTConfig) -> Callable[[dict, Tensor], list[Detections]]:
    """The function from the outputs of a detector of this configuration and the sizes [B, 2] of the
    original images, (height, width), to detections.
    """
    if config.method == WITHOUT_NECK:
        return decode_all
    return partial(decode_top_k, mask_len=config.gt_mask_len)
