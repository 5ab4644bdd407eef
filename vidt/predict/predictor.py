"""Pictures to boxes and masks: top-k decoding (Deformable DETR's) and a `Predictor` that owns
everything around the model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from vidt.errors import UserError
from vidt.images.batching import Picture, equal_canvases, in_order, read_ahead, reading_threads
from vidt.images.drawing import draw_detections
from vidt.images.inputs import (
    ImageLike,
    as_picture,
    check_threshold,
    is_one,
    picture_of,
    remembered,
    rows_of,
)
from vidt.images.mask_drawing import decode_vectors, paste_squares
from vidt.images.preprocessing import resize
from vidt.model.config import ViDTConfig
from vidt.model.vidt import ViDT
from vidt.model.without_neck import ViDTWithoutNeck, decode_best_class
from vidt.ops.packing import pack
from vidt.weights.checkpoint import WeightsInfo, load_model
from vidt.weights.published import NUM_COCO_ROWS, coco_rows

TOP_K = 100  # detections per image, the released constant
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class MaskVectors:
    """How masks are kept until they are asked for: a kilobyte each, whatever the picture's size."""

    vectors: Tensor  # [N, n_keep]
    side: int  # of the square that a vector describes: the configuration's gt_mask_len
    size: tuple[int, int]  # (height, width) of the original image
    boxes: Tensor | None = None  # [N, 4] that the squares fill; None: those of the detections


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, best first."""

    scores: Tensor  # [N] in 0..1
    labels: Tensor  # [N] int64
    # [N, 4] xyxy, pixels of the original image; `Predictor.predict` clips them to it, decoding does
    # not.
    boxes: Tensor
    mask_vectors: MaskVectors | None = None  # None: the detector gives no masks
    class_names: tuple[str, ...] = ()  # of the detector: those of all labels that it knows
    source: ImageLike = field(default=None, repr=False)  # the image, a file by its path

    @property
    def names(self) -> list[str]:
        """The class name of each detection; [N]."""
        return [self.class_names[label] for label in self.labels.tolist()]

    @property
    def masks(self) -> Tensor | None:
        """bool [N, H, W], pixels of the original image; None if the detector gives no masks. Drawn
        anew each time: take only what is needed, as by `above`, first.
        """
        if self.mask_vectors is None:
            return None
        vectors, side = self.mask_vectors.vectors, self.mask_vectors.side
        boxes = self.boxes if self.mask_vectors.boxes is None else self.mask_vectors.boxes
        squares = decode_vectors(_as_array(vectors), side)
        drawn = torch.from_numpy(paste_squares(squares, _as_array(boxes), self.mask_vectors.size))
        return drawn.to(vectors.device)

    def plot(self, image: ImageLike = None) -> Image.Image:
        """A copy of the image that they were found in, or of the given one, RGB and of its size,
        with boxes, names, scores and masks drawn on it.

        Raises UserError if the image was not kept and none is given, `UnreadableImage` if its file
        can no longer be read.
        """
        found = self.cpu()
        return draw_detections(
            picture_of(self.source, image),
            found.boxes.float().numpy(),
            found.labels.tolist(),
            found.scores.tolist(),
            self.class_names,
            None if found.masks is None else found.masks.numpy(),
        )

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> "Detections":
        """Those that score at least `threshold`."""
        return self[self.scores >= threshold]

    def __getitem__(self, which: int | slice | Tensor) -> "Detections":
        """Those of a slice, an index or a mask; of a whole number, that one alone."""
        rows = rows_of(which, len(self))
        return self._map(lambda column: column[rows])

    def cpu(self) -> "Detections":
        """The same in the memory of the CPU."""
        return self._map(Tensor.cpu)

    def clipped(self, size: tuple[int, int]) -> "Detections":
        """The same with boxes that end where the picture, of `size` (height, width), does. Masks
        stay as they are.
        """
        masks = self.mask_vectors
        if masks is not None and masks.boxes is None:
            masks = replace(masks, boxes=self.boxes)
        limits = self.boxes.new_tensor([size[1], size[0], size[1], size[0]])
        boxes = self.boxes.clamp(min=0).minimum(limits)
        return replace(self, boxes=boxes, mask_vectors=masks)

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


def on_cpu(found: Sequence[Detections]) -> list[Detections]:
    """The same in the memory of the CPU, float32: detections of one detector in several images, one
    at least, all in one transfer, since each would have to be waited for.
    """
    columns = [
        [each.scores[:, None], each.labels[:, None], each.boxes]
        + ([each.mask_vectors.vectors] if each.mask_vectors else [])
        for each in found
    ]
    # Labels are whole numbers far below 2 ** 24: float32 keeps them.
    rows = torch.cat([torch.cat([part.float() for part in image], dim=1) for image in columns])
    counts = [len(each) for each in found]
    return [
        replace(
            each,
            scores=own[:, 0],
            labels=own[:, 1].long(),
            boxes=own[:, 2:6],
            mask_vectors=each.mask_vectors and replace(each.mask_vectors, vectors=own[:, 6:]),
        )
        for each, own in zip(found, rows.cpu().split(counts), strict=True)
    ]


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
    scale = sizes.to(boxes, non_blocking=True).flip(1).repeat(1, 2)  # [B, 4] as (w, h, w, h)
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
    class names. May be used by several threads at once.
    """

    def __init__(
        self,
        model: ViDT | ViDTWithoutNeck,
        info: WeightsInfo,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        compile: bool = False,
    ) -> None:
        """precision: fp32, bf16 or fp16, by autocast. compile: by torch.compile, once for each
        canvas; on CUDA with CUDA graphs, so that small batches do not wait for the host. The model
        is moved, and on a CPU packed (see `vidt.ops.packing.pack`).

        Raises UserError for a precision that does not exist, or not on this device.
        """
        self.device = torch.device(device)
        if precision not in PRECISIONS:
            raise UserError(f"precision is {precision}; it must be one of {', '.join(PRECISIONS)}")
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("precision is fp16; on a CPU it must be fp32 or bf16")
        self.model = model.to(self.device).eval()
        if precision == "fp32" and not compile:
            pack(self.model)
        self.info = info
        self.decode = decode_for(info.config)
        self.class_names, self.preprocessing = info.class_names, info.preprocessing
        self.precision = precision
        self._autocast = partial(
            torch.autocast,
            self.device.type,
            PRECISIONS[precision],
            enabled=PRECISIONS[precision] is not None,
        )
        self._compiled: Callable[..., dict] | None = None
        self._one_at_a_time = Lock()  # for the compiled model: CUDA graphs have one memory
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._compiled = torch.compile(self.model, dynamic=False, mode=mode)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """What the training data called the classes, [K]; the label + 1 where that is not known."""
        if len(self.class_names) == NUM_COCO_ROWS and self.class_names == coco_rows():
            return tuple(range(NUM_COCO_ROWS))
        ids = self.info.training.get("category_ids", ())
        counted = tuple(range(1, len(self.class_names) + 1))
        return tuple(ids) if len(ids) == len(counted) and min(ids) >= 0 else counted

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        compile: bool = False,
    ) -> "Predictor":
        """Reads a weights file of ours or a released one. Raises UserError, naming the file, for
        any other.
        """
        return cls(*load_model(path), device=device, precision=precision, compile=compile)

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        threshold: float = 0.3,
        batch_size: int = 8,
    ) -> Detections | list[Detections]:
        """What is in one image, or a list of it for several, in their order.

        images: a path, a Pillow image, an array uint8 [H, W, 3] (RGB) or [H, W] (grey), a tensor
        [3, H, W] (uint8, or float from 0 to 1), or several of these, mixed at will; an array [B, H,
        W, 3] or tensor [B, 3, H, W] is several. Of any sizes: each is resized as in evaluation.
        threshold: the lowest score that is kept, 0 to 1. batch_size: images computed together, at
        most; it does not change what is found.

        Returns `Detections`, on the CPU: boxes float32 [N, 4] as xyxy in pixels of the original
        image and clipped to it, labels int64 [N], names [N], scores float32 [N] from 0 to 1 and
        falling, and masks bool [N, H, W] or None; `plot()` draws them.

        Raises `vidt.images.files.UnreadableImage` for a damaged file, UserError or TypeError for
        what is no image, UserError for a threshold that no score has.
        """
        check_threshold(threshold)
        if is_one(images):
            ((_, detections),) = self.stream([images])
            return detections.above(threshold)
        found = in_order(self.stream(images, batch_size=batch_size))
        return [detections.above(threshold) for detections in found]

    def __call__(
        self,
        images: Iterable[ImageLike],
        *,
        threshold: float = 0.0,
        batch_size: int = 8,
    ) -> list[Detections]:
        """Detections of each image, in order; as `predict`, but always of several and, unless told
        otherwise, whatever their score; boxes are those of evaluation, not clipped.
        """
        found = in_order(self.stream(images, batch_size=batch_size, clip=False))
        return [detections.above(threshold) for detections in found]

    def stream(
        self, images: Iterable[ImageLike], *, batch_size: int = 8, clip: bool = True
    ) -> Iterator[tuple[int, Detections]]:
        """(index, detections) as they are ready, which is not quite in order: pictures of equal
        canvas are batched together. Images are taken, decoded and resized by threads a few batches
        ahead of the detector, so that any number of them needs no more memory than some. Boxes are
        clipped to their picture, unless `clip` is False.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be 1 or more")
        sources: dict[int, ImageLike] = {}

        def numbered() -> Iterator[tuple[int, ImageLike]]:
            for index, image in enumerate(images):
                sources[index] = remembered(image)
                yield index, image

        pictures = read_ahead(numbered(), self._prepared, reading_threads())
        for batch in equal_canvases(pictures, batch_size):
            found = self._detect(batch, batch_size)
            for picture, detections in zip(batch, found, strict=True):
                if clip:
                    detections = detections.clipped(picture.size)
                yield picture.index, replace(detections, source=sources.pop(picture.index))

    def _prepared(self, numbered: tuple[int, ImageLike]) -> Picture:
        index, image = numbered
        picture = as_picture(image)
        size = (picture.height, picture.width)
        return Picture(index, size, np.asarray(resize(picture, self.preprocessing.canvas(*size))))

    def _detect(self, batch: Sequence[Picture], batch_size: int) -> list[Detections]:
        """Of pictures of equal canvas, in halves where memory does not suffice for all."""
        try:
            found = self._forward(batch, batch_size)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        else:
            # Copies, made outside of inference mode and each on its own: who gets them may change
            # them, or keep one of many.
            return [each._map(Tensor.clone) for each in found]
        # Not inside `except`, where the traceback still holds the memory.
        half = len(batch) // 2
        return [
            *self._detect(batch[:half], half),
            *self._detect(batch[half:], len(batch) - half),
        ]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Picture], batch_size: int) -> list[Detections]:
        rows = [picture.pixels for picture in batch]
        if self._compiled is not None:  # which is done once for each shape
            rows += [rows[-1]] * (batch_size - len(rows))
        pixels = torch.from_numpy(np.stack(rows)).to(self.device).permute(0, 3, 1, 2)
        images = self.preprocessing.normalise(pixels).contiguous()
        padding = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=self.device)
        sizes = torch.tensor([picture.size for picture in batch])  # the host needs them too
        if self._compiled is None:
            with self._autocast():
                found = self.decode(self.model(images, padding, detections_only=True), sizes)
        else:
            with self._one_at_a_time, self._autocast():
                torch.compiler.cudagraph_mark_step_begin()
                outputs = self._compiled(images, padding, detections_only=True)
                outputs = _first(outputs, len(batch))
                found = self.decode(outputs, sizes)
        return [replace(each, class_names=self.class_names) for each in on_cpu(found)]


def _first(outputs: dict, count: int) -> dict:
    """Those of the first images of a batch, of what is decoded."""
    names = [name for name in ("pred_logits", "pred_boxes", "pred_vectors") if name in outputs]
    return {name: outputs[name][:count] for name in names}
