"""A detector as an ONNX graph that includes normalisation and, optionally, decoding.

Inputs: `images` uint8 [B, 3, H, W] RGB, `padding` bool [B, H, W], True where padded, right of the
picture and below it, and with decoding `sizes` int64 [B, 2], (height, width) of the original
images. Outputs: the detector's `pred_logits`, `pred_boxes` and `pred_vectors`; or decoded `scores`,
`labels`, `boxes` (xyxy, pixels of the original image) and `mask_vectors`, best first.
"""

import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidt.images.preprocessing import Preprocessing
from vidt.model.config import WITHOUT_NECK
from vidt.model.vidt import ViDT
from vidt.model.without_neck import ViDTWithoutNeck, decode_best_class
from vidt.onnx.detector import FORMAT, OnnxInfo
from vidt.onnx.half import halved
from vidt.predict.detections import best_pairs
from vidt.weights.weights_file import WeightsInfo

OPSET = 20


class ExportedDetector(nn.Module):
    """The module that is exported."""

    def __init__(
        self, model: ViDT | ViDTWithoutNeck, preprocessing: Preprocessing, *, decode: bool
    ) -> None:
        super().__init__()
        self.model, self.decode = model, decode
        self.register_buffer("mean", torch.tensor(preprocessing.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preprocessing.std)[:, None, None])

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs of `forward`, in order."""
        masks = isinstance(self.model, ViDT) and self.model.config.with_vector
        if self.decode:
            return ["scores", "labels", "boxes", *(["mask_vectors"] if masks else [])]
        return ["pred_logits", "pred_boxes", *(["pred_vectors"] if masks else [])]

    def forward(
        self, images: Tensor, padding: Tensor, sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """See the module docstring; sizes are needed only for decoding."""
        pixels = self.normalise(images).masked_fill(padding[:, None], 0.0)
        outputs = self.model(pixels, padding, detections_only=True)
        if not self.decode:
            return {name: outputs[name] for name in self.output_names}
        assert sizes is not None
        if isinstance(self.model, ViDTWithoutNeck):
            scores, labels, boxes = decode_best_class(outputs, sizes)
            scores, order = scores.topk(scores.shape[1], dim=1)  # ONNX has no stable sort
            labels, boxes = labels.gather(1, order), boxes.gather(1, _columns(order, 4))
            return {"scores": scores, "labels": labels, "boxes": boxes}
        scores, labels, boxes, query = best_pairs(outputs, sizes)
        decoded = {"scores": scores, "labels": labels, "boxes": boxes}
        if "pred_vectors" in outputs:
            vectors = outputs["pred_vectors"]
            decoded["mask_vectors"] = vectors.gather(1, _columns(query, vectors.shape[2]))
        return decoded

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32: `Preprocessing.normalise` in exportable
        operations.
        """
        assert isinstance(self.mean, Tensor) and isinstance(self.std, Tensor)
        return images.to(torch.float32).mul(1 / 255).sub(self.mean).div(self.std)


def _columns(index: Tensor, columns: int) -> Tensor:
    """[B, N] -> [B, N, columns], for `gather`."""
    return index[..., None].expand(-1, -1, columns)


def make_graph(
    detector: ExportedDetector,
    info: WeightsInfo,
    frame: tuple[int, int],
    *,
    dynamic_batch: bool,
    half: bool,
) -> onnx.ModelProto:
    """The graph with its metadata, checked by onnx. The frame (height, width) is fixed; without
    dynamic_batch the batch size is fixed at one.
    """
    batch = 2 if dynamic_batch else 1  # the exporter would treat a batch of one as a constant
    inputs: dict[str, Tensor] = {
        "images": torch.zeros(batch, 3, *frame, dtype=torch.uint8),
        "padding": torch.zeros(batch, *frame, dtype=torch.bool),
    }
    if detector.decode:
        inputs["sizes"] = torch.ones(batch, 2, dtype=torch.int64)
    axes = {name: {0: torch.export.Dim("batch", min=1)} for name in inputs}
    # Fused attention cannot be decomposed into ONNX operations; plain attention can.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _quietly():
        program = torch.onnx.export(
            detector,
            kwargs=inputs,
            dynamo=True,
            input_names=list(inputs),
            output_names=detector.output_names,
            opset_version=OPSET,
            dynamic_shapes=axes if dynamic_batch else None,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    if half:
        model = halved(model)
    for name, value in metadata_of(detector, info, frame).items():
        model.metadata_props.add(key=name, value=value)
    onnx.checker.check_model(model, full_check=True)
    batches = {each.name: _batch_of(each) for each in (*model.graph.input, *model.graph.output)}
    assert all(isinstance(size, str) == dynamic_batch for size in batches.values()), batches
    return model


def metadata_of(
    detector: ExportedDetector, info: WeightsInfo, frame: tuple[int, int]
) -> dict[str, str]:
    """The entries that `vidt.onnx.detector` reads, and the rest of a weights file's header."""
    config = info.config
    needed = OnnxInfo(
        class_names=info.class_names,
        eval_size=info.preprocessing.eval_size,
        frame=frame,
        decoding="best_class" if config.method == WITHOUT_NECK else "top_k",
        mask_side=config.gt_mask_len,
        thresholds=info.thresholds,
        category_ids=info.category_ids,
    )
    values: dict[str, Any] = dataclasses.asdict(needed) | {
        "config": dataclasses.asdict(config),
        "preprocessing": dataclasses.asdict(info.preprocessing),
        "metrics": info.metrics,
        "opset": OPSET,
    }
    return {"format": FORMAT} | {name: json.dumps(value) for name, value in values.items()}


def _batch_of(value: onnx.ValueInfoProto) -> str | int:
    first = value.type.tensor_type.shape.dim[0]
    return first.dim_param or first.dim_value


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences the exporter's warnings about what it could not simplify."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
