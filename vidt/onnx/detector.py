"""An exported detector, run by onnxruntime: pictures to boxes without PyTorch.

The graph's metadata hold its settings and class names. The graph takes pictures of one size, its
frame. A picture whose canvas is the frame is treated as by `vidt.predict.predictor.Predictor`; a
smaller canvas is padded right and below, which the `padding` input marks; a larger one is shrunk to
fit the frame.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from vidt.errors import UserError, shown
from vidt.images.canvas import canvas_of, fitted_shape, framed
from vidt.images.drawing import draw_detections
from vidt.images.inputs import (
    ImageLike,
    as_picture,
    is_one,
    picture_of,
    require_thresholds,
    rows_of,
    source_of,
)
from vidt.images.mask_drawing import Patch, decode_vectors, paste_squares, patch_of
from vidt.predict.exchange import as_coco, as_pandas, as_supervision
from vidt.predict.selection import least_scores, select
from vidt.predict.tiles import OVERLAP, check_tile, tiled

FORMAT = "vidt-onnx-1"  # the value of `format` in the metadata of a model of ours
TOP_K = 100  # detections per image, the released constant
DECODINGS = ("top_k", "best_class")
COLUMNS = ("scores", "labels", "boxes", "mask_vectors", "mask_boxes")  # of `OnnxDetections`


@dataclass(frozen=True)
class OnnxInfo:
    """The metadata of a model; each field is an entry, written as JSON."""

    class_names: tuple[str, ...]
    eval_size: int  # determines a picture's canvas, see `vidt.images.canvas.canvas_of`
    frame: tuple[int, int]  # (height, width) of the graph's input
    decoding: str  # of raw outputs: the best (query, class) pairs, or each query's best class
    mask_side: int  # of the square that a mask vector encodes
    # The best score threshold of each class, see `WeightsInfo`; older models have none.
    thresholds: tuple[float | None, ...] = ()
    category_ids: tuple[int, ...] = ()  # of the training data, [K]; older models have none

    @classmethod
    def of(cls, metadata: dict[str, str], source: object) -> "OnnxInfo":
        """Reads metadata. Raises UserError, naming the source, if they are not ours."""
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{source} is an ONNX model but not one of ours ({FORMAT}); make one by vidt export"
            )
        try:
            given = {"thresholds": "[]", "category_ids": "[]"} | metadata
            values = {name: json.loads(given[name]) for name in cls.__dataclass_fields__}
            names, frame = tuple(values.pop("class_names")), tuple(values.pop("frame"))
            for name in ("thresholds", "category_ids"):
                values[name] = tuple(values[name])
            require_thresholds(values["thresholds"], names)
            _require_ids(values["category_ids"], names)
            info = cls(class_names=names, frame=frame, **values)
            whole = (info.eval_size, info.mask_side, *info.frame)
            if not all(type(each) is int for each in whole) or len(info.frame) != 2:
                raise ValueError(f"sizes {shown(whole)} must be whole numbers")
            if not all(isinstance(name, str) for name in names):
                raise ValueError("class_names must be texts")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source} has metadata that cannot be read: {error!r}") from error
        if info.decoding not in DECODINGS:
            raise UserError(f"{source} has decoding {info.decoding}; known: {DECODINGS}")
        return info


@dataclass(frozen=True, eq=False)
class OnnxDetections:
    """The detections of one image, best first."""

    scores: np.ndarray  # float32 [N] in 0..1
    labels: np.ndarray  # int64 [N]
    boxes: np.ndarray  # float32 [N, 4] xyxy, pixels of the original image, clipped to it
    class_names: tuple[str, ...]  # all classes of the detector
    size: tuple[int, int]  # (height, width) of the original image
    mask_vectors: np.ndarray | None = None  # [N, n_keep]; None: the detector gives no masks
    mask_side: int = 0
    source: ImageLike = field(default=None, repr=False)  # the image, a file by its path
    mask_boxes: np.ndarray | None = None  # [N, 4] xyxy of the masks' squares; None: `boxes`

    @property
    def names(self) -> list[str]:
        """The class name of each detection; [N]."""
        return [self.class_names[label] for label in self.labels]

    @property
    def masks(self) -> np.ndarray | None:
        """bool [N, H, W], pixels of the original image; None if the detector gives no masks. Every
        access decodes them again: select detections first, for example by `above`.
        """
        if self.mask_vectors is None:
            return None
        squares = decode_vectors(self.mask_vectors, self.mask_side)
        boxes = self.boxes if self.mask_boxes is None else self.mask_boxes
        return paste_squares(squares, boxes, self.size)

    def plot(self, image: ImageLike = None) -> Image.Image:
        """A copy of the given image, by default of the source image, with boxes, names, scores and
        masks drawn on it: RGB, in the image's size.

        Raises UserError if there is no source image and none is given, `UnreadableImage` if its
        file can no longer be read.
        """
        return draw_detections(
            picture_of(self.source, image),
            self.boxes,
            self.labels.tolist(),
            self.scores.tolist(),
            self.class_names,
            None if self.mask_vectors is None else self._patch,
        )

    def _patch(self, row: int) -> Patch:
        """The mask of one detection."""
        assert self.mask_vectors is not None
        (square,) = decode_vectors(self.mask_vectors[row : row + 1], self.mask_side)
        box = (self.boxes if self.mask_boxes is None else self.mask_boxes)[row]
        return patch_of(square, box, self.size)

    def above(self, threshold: float) -> "OnnxDetections":
        """The detections that score at least `threshold`."""
        return self[self.scores >= threshold]

    def clipped(self) -> "OnnxDetections":
        """A copy with boxes clipped to the image. Masks do not change."""
        height, width = self.size
        limits = np.array([width, height, width, height], self.boxes.dtype)
        return self.with_boxes(self.boxes.clip(0, limits))

    def moved(self, x: int, y: int, size: tuple[int, int]) -> "OnnxDetections":
        """The detections in a tile as those in its image of `size` (height, width), in which the
        tile begins at (x, y).
        """
        offset = np.array([x, y, x, y], self.boxes.dtype)
        squares = self.boxes if self.mask_boxes is None else self.mask_boxes
        return replace(self, boxes=self.boxes + offset, mask_boxes=squares + offset, size=size)

    def joined(self, parts: "Sequence[OnnxDetections]") -> "OnnxDetections":
        """The detections of several parts of one image, of which this is the first, in order."""
        columns = [name for name in COLUMNS if getattr(self, name) is not None]
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(each, name) for each in parts]) for name in columns
        }
        return replace(self, **joined)

    def with_boxes(self, boxes: np.ndarray) -> "OnnxDetections":
        """A copy with other boxes [N, 4]. Masks do not change."""
        mask_boxes = self.boxes if self.mask_boxes is None else self.mask_boxes
        return replace(self, boxes=boxes, mask_boxes=mask_boxes)

    def to_supervision(self) -> Any:
        """A `supervision.Detections` with boxes, masks if there are any, scores, labels and names.
        Raises UserError if the package is missing.
        """
        return as_supervision(self.scores, self.labels, self.boxes, self.names, self.masks)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each detection: name, label, score, and the box as
        x1, y1, x2, y2. Raises UserError if the package is missing.
        """
        return as_pandas(self.scores, self.labels, self.boxes, self.names)

    def to_coco(
        self, image_id: int, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """COCO results: dictionaries with image_id, category_id, bbox (x, y, width, height), score,
        and segmentation (run lengths) if there are masks. category_ids: of the classes, such as
        `detector.category_ids`; None: label + 1.
        """
        return as_coco(image_id, category_ids, self.scores, self.labels, self.boxes, self.masks)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, which: int | slice | np.ndarray) -> "OnnxDetections":
        """The detections of a slice, an index array or a boolean mask; an integer selects one
        detection and keeps the axis.
        """
        rows = rows_of(which, len(self))
        given: dict[str, Any] = {name: getattr(self, name) for name in COLUMNS}
        selected = {name: each[rows] for name, each in given.items() if each is not None}
        return replace(self, **selected)


class OnnxDetector:
    """An exported detector with its class names. Several threads may use it at once."""

    def __init__(
        self, path: str | Path, *, device: str = "cpu", threads: int | None = None
    ) -> None:
        """device: "cpu", "cuda" or "cuda:1"; CUDA needs the GPU build of onnxruntime. threads: per
        operation on the CPU; None: one per core. Use fewer on a machine that does other work too.

        Raises UserError, in one line that names the file, if it is not one of our models, and for a
        device that this onnxruntime does not support.
        """
        self._session = _session(Path(path), device, threads)
        self.info = OnnxInfo.of(self._session.get_modelmeta().custom_metadata_map, path)
        self.class_names, self.frame = self.info.class_names, self.info.frame
        inputs = {each.name: each.shape for each in self._session.get_inputs()}
        if set(inputs) - {"sizes"} != {"images", "padding"}:
            raise UserError(f"{path} takes {', '.join(inputs)}; expected images and padding")
        if tuple(inputs["images"][2:]) != self.frame:
            raise UserError(
                f"{path} takes pictures of {inputs['images'][2:]}; its metadata say {self.frame}"
            )
        self.input_names = tuple(inputs)
        outputs = self._session.get_outputs()
        # A dynamic batch is a name.
        self.output_shapes: dict[str, list[Any]] = {each.name: each.shape for each in outputs}
        batch = inputs["images"][0]  # a name if the batch is dynamic
        self.batch: int | None = batch if isinstance(batch, int) else None

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The category ids of the training data, [K]; label + 1 if they are unknown."""
        return self.info.category_ids or tuple(range(1, len(self.class_names) + 1))

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        threshold: float | str = 0.3,
        batch_size: int = 1,
        tile: int | None = None,
        overlap: float = OVERLAP,
        classes: Iterable[str] | None = None,
    ) -> OnnxDetections | list[OnnxDetections]:
        """Detections of one image, or a list of them for several, in order.

        images: one or more of what `vidt.images.inputs.as_picture` takes (a path, a Pillow image,
        an array). threshold, tile, overlap and classes are those of `Predictor.predict`.
        batch_size: the most images computed together; a model with a fixed batch size ignores it.

        Returns `OnnxDetections`; boxes are clipped to the image.

        Raises `vidt.images.files.UnreadableImage` for a damaged file, UserError or TypeError for
        anything but an image, UserError for a setting outside its range.
        """
        least = least_scores(threshold, classes, self.class_names, self.info.thresholds)
        one = is_one(images)
        results = self.stream(
            [images] if one else images, batch_size=batch_size, tile=tile, overlap=overlap
        )
        found = [select(detections, least) for _, detections in results]
        return found[0] if one else found

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        batch_size: int = 1,
        clip: bool = True,
        tile: int | None = None,
        overlap: float = OVERLAP,
    ) -> Iterator[tuple[int, OnnxDetections]]:
        """Yields (index, detections) in order; pictures are opened batch by batch. Boxes are
        clipped to their picture unless `clip` is False. tile and overlap are those of
        `Predictor.predict`.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be 1 or more")
        check_tile(tile, overlap)
        if tile is not None:
            yield from tiled(
                self.stream, images, tile=tile, overlap=overlap, batch_size=batch_size, clip=clip
            )
            return
        numbered = enumerate(images)
        while batch := list(islice(numbered, self.batch or batch_size)):
            results = self._detect([image for _, image in batch])
            for (index, _), detections in zip(batch, results, strict=True):
                yield index, detections.clipped() if clip else detections

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a picture of this size inside the frame; the rest is padding."""
        return fitted_shape(canvas_of(*size, self.info.eval_size), self.frame)

    def feeds(self, pictures: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """What the graph takes for these pictures, see `vidt.onnx.graph`, and the `sizes` that a
        graph without decoding does not take. A fixed batch is filled up with black pictures.
        """
        rows = len(pictures) if self.batch is None else self.batch
        images = np.zeros((rows, 3, *self.frame), np.uint8)
        padding = np.zeros((rows, *self.frame), bool)
        sizes = np.ones((rows, 2), np.int64)
        for row, picture in enumerate(pictures):
            sizes[row] = size = (picture.height, picture.width)
            shape = self.shape_of(size)
            images[row] = framed(picture, shape, self.frame)
            padding[row, shape[0] :] = True
            padding[row, :, shape[1] :] = True
        return {"images": images, "padding": padding, "sizes": sizes}

    def detections(
        self, outputs: dict[str, np.ndarray], sizes: np.ndarray, sources: Sequence[ImageLike]
    ) -> list[OnnxDetections]:
        """The graph's outputs, with rows for at least the sources, as detections of each source.
        sizes: int64 [B, 2], (height, width) of the original images.
        """
        if "sizes" not in self.input_names:
            outputs = _decoded(outputs, sizes, self.info.decoding)
        vectors = outputs.get("mask_vectors")
        return [
            OnnxDetections(
                outputs["scores"][row],
                outputs["labels"][row],
                outputs["boxes"][row],
                self.class_names,
                (int(sizes[row, 0]), int(sizes[row, 1])),
                None if vectors is None else vectors[row],
                self.info.mask_side,
                source_of(source),
            )
            for row, source in enumerate(sources)
        ]

    def _detect(self, sources: list[ImageLike]) -> list[OnnxDetections]:
        feeds = self.feeds([as_picture(source) for source in sources])
        taken = {name: feeds[name] for name in self.input_names}
        outputs = dict(zip(self.output_shapes, self._session.run(None, taken), strict=True))
        return self.detections(outputs, feeds["sizes"], sources)


def _require_ids(ids: Sequence[Any], class_names: Sequence[str]) -> None:
    """Raises ValueError unless there is an integer for each class, or none at all."""
    if ids and len(ids) != len(class_names):
        raise ValueError(f"it has {len(ids)} category ids for {len(class_names)} classes")
    if not all(type(each) is int for each in ids):
        raise ValueError(f"category ids are {shown(ids)}; they must be integers")


def _session(path: Path, device: str, threads: int | None) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a model that vidt export wrote")
    kind, _, number = device.partition(":")
    providers: dict[str, list[Any]] = {
        "cpu": ["CPUExecutionProvider"],
        "cuda": [("CUDAExecutionProvider", {"device_id": number or "0"}), "CPUExecutionProvider"],
    }
    if kind not in providers or (number and not number.isdecimal()):
        raise UserError(f"device is {device}; it must be cpu, cuda or cuda:N")
    available = onnxruntime.get_available_providers()
    if kind == "cuda" and "CUDAExecutionProvider" not in available:
        raise UserError(
            f"device is {device}, but this onnxruntime has only {', '.join(available)}; pip "
            "install onnxruntime-gpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: onnxruntime's default
    options.log_severity_level = 3  # errors; warnings are about the graph, not for users
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers[kind])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as an ONNX model: {reason}") from error


def _decoded(
    outputs: dict[str, np.ndarray], sizes: np.ndarray, decoding: str
) -> dict[str, np.ndarray]:
    """Decodes raw outputs [B, Q, ...] like `vidt.predict.detections.decode_for`; sizes [B, 2]."""
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    if decoding == "best_class":
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = (powers / powers.sum(-1, keepdims=True))[..., :-1]
        all_scores, all_labels = probabilities.max(-1), probabilities.argmax(-1)
        order = np.argsort(-all_scores, axis=1, kind="stable")
        query, labels = order, np.take_along_axis(all_labels, order, 1)
    else:
        sigmoid = np.exp(-np.logaddexp(0, -logits))
        all_scores = sigmoid.reshape(len(logits), -1)  # [B, Q * K]
        order = np.argsort(-all_scores, axis=1, kind="stable")[:, :TOP_K]
        query, labels = np.divmod(order, logits.shape[-1])
    centre, extent = np.split(np.take_along_axis(boxes, query[..., None], 1), 2, axis=-1)
    corners = np.concatenate([centre - extent / 2, centre + extent / 2], axis=-1)
    scale = sizes[:, None, [1, 0, 1, 0]].astype(np.float32)
    decoded = {
        "scores": np.take_along_axis(all_scores, order, 1),
        "labels": labels.astype(np.int64),
        "boxes": corners * scale,
    }
    if "pred_vectors" in outputs:
        decoded["mask_vectors"] = np.take_along_axis(outputs["pred_vectors"], query[..., None], 1)
    return decoded
