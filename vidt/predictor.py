"""Pictures to boxes and masks: top-k decoding (Deformable DETR's) and a `Predictor` that owns
everything around the model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from vidt.checkpoint import WeightsInfo, load_model
from vidt.config import ViDTConfig
from vidt.images import probe_image, read_image
from vidt.mask_vectors import decode_vectors, paste_squares
from vidt.model import ViDT
from vidt.preprocessing import canvas_batches, pad_batch
from vidt.without_neck import ViDTWithoutNeck, decode_best_class

TOP_K = 100  # detections per image, the released constant


@dataclass(frozen=True, eq=False)
class MaskVectors:
    """How masks are kept until they are asked for: a kilobyte each, whatever the picture's size."""

    vectors: Tensor  # [N, n_keep]
    side: int  # of the square that a vector describes: the configuration's gt_mask_len
    size: tuple[int, int]  # (height, width) of the original image


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first."""

    scores: Tensor  # [N] in 0..1
    labels: Tensor  # [N] int64
    boxes: Tensor  # [N, 4] xyxy, pixels of the original image, not clipped to it
    mask_vectors: MaskVectors | None = None  # None: the detector gives no masks

    @property
    def masks(self) -> Tensor | None:
        """bool [N, H, W], pixels of the original image; None if the detector gives no masks. Drawn
        anew each time: take only what is needed, as by `above`, first.
        """
        if self.mask_vectors is None:
            return None
        squares = decode_vectors(self.mask_vectors.vectors, self.mask_vectors.side)
        return paste_squares(squares, self.boxes, self.mask_vectors.size)

    def above(self, threshold: float) -> "Detections":
        """Those that score at least `threshold`."""
        return self[self.scores >= threshold]

    def __getitem__(self, which: slice | Tensor) -> "Detections":
        return self._map(lambda column: column[which])

    def cpu(self) -> "Detections":
        """The same in the memory of the CPU."""
        return self._map(Tensor.cpu)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Detections":
        masks = self.mask_vectors
        return Detections(
            change(self.scores),
            change(self.labels),
            change(self.boxes),
            masks and replace(masks, vectors=change(masks.vectors)),
        )


def decode_top_k(
    outputs: dict, sizes: Tensor, top_k: int = TOP_K, *, mask_len: int = 128
) -> list[Detections]:
    """The best (query, class) pairs of each image; no suppression, no threshold.

    outputs of `ViDT`; sizes [B, 2] as (height, width) of the original images, in pixels; mask_len
    is the configuration's gt_mask_len.
    """
    scores, labels, boxes, query = best_pairs(outputs, sizes, top_k)
    masks = _mask_vectors(outputs, query, sizes, mask_len)
    return [Detections(*image) for image in zip(scores, labels, boxes, masks, strict=True)]


def best_pairs(
    outputs: dict, sizes: Tensor, top_k: int = TOP_K
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best (query, class) pairs of each image as `decode_top_k` gives them: scores, labels,
    boxes and queries, [B, N] or [B, N, 4] each.
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    num_classes = logits.shape[-1]
    scores = logits.sigmoid().flatten(1)  # [B, Q * K]
    scores, index = scores.topk(min(top_k, scores.shape[1]), dim=1)
    query = index.div(num_classes, rounding_mode="floor")
    scale = sizes.to(boxes).flip(1).repeat(1, 2)  # [B, 4] as (w, h, w, h)
    boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    boxes = box_convert(boxes, "cxcywh", "xyxy") * scale[:, None]
    return scores, index % num_classes, boxes, query


def _mask_vectors(
    outputs: dict, query: Tensor, sizes: Tensor, mask_len: int
) -> Sequence[MaskVectors | None]:
    """Those of the chosen queries [B, N], for each image."""
    if "pred_vectors" not in outputs:
        return [None] * len(query)
    vectors = outputs["pred_vectors"]
    vectors = vectors.gather(1, query[..., None].expand(-1, -1, vectors.shape[2]))
    return [
        MaskVectors(each, mask_len, (height, width))
        for each, (height, width) in zip(vectors, sizes.tolist(), strict=True)
    ]


def decode_all(outputs: dict, sizes: Tensor) -> list[Detections]:
    """Every [DET] token of a detector without neck with its best class, best first."""
    scores, labels, boxes = decode_best_class(outputs, sizes)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    labels, boxes = labels.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return [Detections(*image) for image in zip(scores, labels, boxes, strict=True)]


def score_for(config: ViDTConfig) -> Callable[[Tensor], Tensor]:
    """How logits [..., columns] of a detector of this configuration become one probability for each
    class: [..., K].
    """
    if config.method == "vidt_wo_neck":
        return lambda logits: logits.softmax(-1)[..., :-1]  # the last column is the background
    return torch.sigmoid


def decode_for(config: ViDTConfig) -> Callable[[dict, Tensor], list[Detections]]:
    """How the outputs of a detector of this configuration become detections: called with them and
    the sizes [B, 2] of the original images as (height, width).
    """
    if config.method == "vidt_wo_neck":
        return decode_all
    return partial(decode_top_k, mask_len=config.gt_mask_len)


class Predictor:
    """A trained detector as it was evaluated: same resize, same normalisation, same decoding, its
    class names.
    """

    def __init__(
        self,
        model: ViDT | ViDTWithoutNeck,
        info: WeightsInfo,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model = model.to(device).eval()
        self.decode = decode_for(info.config)
        self.class_names, self.preprocessing = info.class_names, info.preprocessing
        self.device = torch.device(device)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, device: str | torch.device = "cpu"
    ) -> "Predictor":
        """Reads a weights file of ours. Raises ValueError, naming the file, for any other."""
        return cls(*load_model(path), device=device)

    def __call__(
        self,
        images: Sequence[str | Path | Image.Image],
        *,
        threshold: float = 0.0,
        batch_size: int = 8,
    ) -> list[Detections]:
        """Detections of each picture or file, in order. Raises `vidt.images.UnreadableImage` for a
        damaged file.
        """
        found = self.stream(images, batch_size=batch_size)
        results = {index: detections.above(threshold) for index, detections in found}
        return [results[index] for index in range(len(images))]

    @torch.inference_mode()
    def stream(
        self, images: Sequence[str | Path | Image.Image], *, batch_size: int = 8
    ) -> Iterator[tuple[int, Detections]]:
        """(index, detections) as they are ready, which is not in order: pictures of equal canvas
        are batched together. Files are decoded batch by batch.
        """
        sizes_of_all = [_size(image) for image in images]
        canvases = [self.preprocessing.canvas(*size) for size in sizes_of_all]
        for indices in canvas_batches(canvases, batch_size):
            tensors = [self.preprocessing(_opened(images[index])) for index in indices]
            batch, padding = pad_batch([tensor.to(self.device) for tensor in tensors])
            sizes = torch.tensor([sizes_of_all[index] for index in indices])
            found = self.decode(self.model(batch, padding), sizes.to(self.device))
            for index, detections in zip(indices, found, strict=True):
                yield index, detections.cpu()


def _size(image: str | Path | Image.Image) -> tuple[int, int]:
    """(height, width) of the stored pixels."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return probe_image(image).size


def _opened(image: str | Path | Image.Image) -> Image.Image:
    return image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
