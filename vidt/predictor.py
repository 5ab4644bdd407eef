"""Pictures to boxes: top-k decoding (Deformable DETR's) and a `Predictor` that owns everything
around the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from vidt.checkpoint import WeightsInfo, load_model
from vidt.images import read_image
from vidt.model import ViDT
from vidt.preprocessing import canvas_batches, pad_batch

TOP_K = 100  # detections per image, the released constant


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first."""

    scores: Tensor  # [N] in 0..1
    labels: Tensor  # [N] int64
    boxes: Tensor  # [N, 4] xyxy, pixels of the original image, not clipped to it

    def above(self, threshold: float) -> "Detections":
        """Those that score at least `threshold`."""
        keep = self.scores >= threshold
        return Detections(self.scores[keep], self.labels[keep], self.boxes[keep])


def decode_top_k(outputs: dict, sizes: Tensor, top_k: int = TOP_K) -> list[Detections]:
    """The best (query, class) pairs of each image; no suppression, no threshold.

    outputs of `ViDT`; sizes [B, 2] as (height, width) of the original images, in pixels.
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    num_classes = logits.shape[-1]
    scores = logits.sigmoid().flatten(1)  # [B, Q * K]
    scores, index = scores.topk(min(top_k, scores.shape[1]), dim=1)
    query = index.div(num_classes, rounding_mode="floor")
    scale = sizes.to(boxes).flip(1).repeat(1, 2)  # [B, 4] as (w, h, w, h)
    boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    boxes = box_convert(boxes, "cxcywh", "xyxy") * scale[:, None]
    labels = index % num_classes
    return [Detections(*image) for image in zip(scores, labels, boxes, strict=True)]


class Predictor:
    """A trained detector as it was evaluated: same resize, same normalisation, same decoding, its
    class names.
    """

    def __init__(
        self, model: ViDT, info: WeightsInfo, *, device: str | torch.device = "cpu"
    ) -> None:
        self.model = model.to(device).eval()
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
        results = dict(self.stream(images, batch_size=batch_size))
        return [results[index].above(threshold) for index in range(len(images))]

    @torch.inference_mode()
    def stream(
        self, images: Sequence[str | Path | Image.Image], *, batch_size: int = 8
    ) -> Iterator[tuple[int, Detections]]:
        """(index, detections) as they are ready; pictures of equal canvas are batched together."""
        pictures = [
            image if isinstance(image, Image.Image) else read_image(image) for image in images
        ]
        canvases = [
            self.preprocessing.canvas(picture.height, picture.width) for picture in pictures
        ]
        for indices in canvas_batches(canvases, batch_size):
            tensors = [self.preprocessing(pictures[index].convert("RGB")) for index in indices]
            batch, padding = pad_batch([tensor.to(self.device) for tensor in tensors])
            sizes = torch.tensor([(pictures[i].height, pictures[i].width) for i in indices])
            found = decode_top_k(self.model(batch, padding), sizes.to(self.device))
            for index, detections in zip(indices, found, strict=True):
                yield (
                    index,
                    Detections(
                        detections.scores.cpu(), detections.labels.cpu(), detections.boxes.cpu()
                    ),
                )
