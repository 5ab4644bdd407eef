"""ViDT: a Swin backbone that carries [DET] tokens and an encoder-free deformable decoder (arXiv
2110.03921).

Module names match the released checkpoints where possible; `vidt.weights.released` maps the others.

Letters: B batch, H x W padded image, Q [DET] tokens, K classes, C = reduced_dim, L pyramid
levels, D decoder layers.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidt.model.backbone import build_backbone
from vidt.model.coat import CoatBlock
from vidt.model.config import ViDTConfig, require
from vidt.model.decoder import (
    DecoderLayer,
    DeformableDecoder,
    MLPHead,
    box_head,
    offset_boxes,
)
from vidt.model.epff import EPFF, LevelProjections, projection
from vidt.model.ram import resize_padding
from vidt.model.swin import SwinBlock
from vidt.model.token_head import TokenHead
from vidt.model.training_queries import ExtraQueries, denoising_queries
from vidt.model.without_neck import ViDTWithoutNeck

BLOCKS = (SwinBlock, CoatBlock, DecoderLayer)
# Compilations of a kind of block before PyTorch runs it uncompiled. A kind is compiled once for
# each stage, and again for grids of one window, of whole windows, and with or without gradients.
MOST_COMPILATIONS = 128


def _classifier(dim: int, num_classes: int) -> nn.Linear:
    """Every class starts at probability 0.01 (focal loss, arXiv 1708.02002, section 4.1)."""
    linear = nn.Linear(dim, num_classes)
    nn.init.constant_(linear.bias, -math.log(99))
    return linear


def _vector_head(dim: int, config: ViDTConfig) -> MLPHead:
    """Initially every vector is zero."""
    head = MLPHead(dim, config.vector_hidden_dim, config.n_keep)
    for parameter in head.layers[-1].parameters():
        nn.init.zeros_(parameter)
    return head


def build_detector(config: ViDTConfig) -> "ViDT | ViDTWithoutNeck":
    """The detector of `config.method`, with `.config`, at its initial weights."""
    return ViDT(config) if config.method == "vidt" else ViDTWithoutNeck(config)


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Lets a detector run its repeated blocks through `torch.compile`, in place, with dynamic
    shapes: the number of compilations does not grow with that of the canvases. Weights keep their
    names. It raises PyTorch's limit of compilations and switches duck shapes off, both for the
    process.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MOST_COMPILATIONS)
    # Otherwise a graph made for a square canvas serves square ones only.
    torch.fx.experimental._config.use_duck_shape = False
    for module in model.modules():
        if isinstance(module, BLOCKS):
            module.compile(dynamic=True, backend=backend)


class ViDT(nn.Module):
    """Images to class logits and boxes of a fixed number of queries."""

    def __init__(self, config: ViDTConfig) -> None:
        super().__init__()
        require(config.method == "vidt", "method", config.method, "vidt for ViDT(config)")
        self.config = config
        self._heads = {"pred_logits": "class_embed"}  # output -> the heads that predict it
        dim = config.reduced_dim
        self.backbone = build_backbone(config)
        projections = EPFF if config.epff else LevelProjections
        self.input_proj = projections(self.backbone.num_channels, dim)
        self.tgt_proj = projection(self.backbone.num_channels[-2], dim)
        self.query_pos_proj = projection(config.pos_dim, dim)
        self.decoder = DeformableDecoder(
            dim,
            num_layers=config.dec_layers,
            num_heads=config.nheads,
            num_levels=config.num_feature_levels,
            num_points=config.dec_n_points,
            dim_feedforward=config.dim_feedforward,
            dropout=config.dropout,
            look_forward_twice=config.look_forward_twice,
        )
        # With refinement every prediction level has heads of its own; without, all share one.
        num_heads = config.dec_layers + 1 if config.with_box_refine else 1
        self.class_embed = nn.ModuleList(
            _classifier(dim, config.num_classes) for _ in range(num_heads)
        )
        self.bbox_embed = nn.ModuleList(
            box_head(dim, size_bias=0.0 if level else -2.0) for level in range(num_heads)
        )
        if config.iou_aware:
            self._heads["pred_ious"] = "iou_embed"
            self.iou_embed = nn.ModuleList(MLPHead(dim, dim, 1) for _ in range(num_heads))
        if config.with_vector:  # one head for all levels, always
            self._heads["pred_vectors"] = "vector_embed"
            self.vector_embed = nn.ModuleList([_vector_head(dim, config)])
        self.token_head = TokenHead(dim, config.token_columns) if config.token_label else None
        # For training only: the embedded labels of denoising queries, the positions of the groups.
        self.label_enc = nn.Embedding(config.num_classes, dim) if config.label_embedding else None
        self.group_pos = None
        if config.query_groups > 1:
            shape = config.query_groups - 1, config.det_token_num, dim
            self.group_pos = nn.Parameter(torch.randn(shape))

    def forward(
        self,
        images: Tensor,
        padding: Tensor,
        denoising_boxes: Tensor | None = None,
        denoising_labels: Tensor | None = None,
        *,
        detections_only: bool = False,
    ) -> dict[str, Any]:
        """images [B, 3, H, W], normalised; padding [B, H, W] bool, True where padded: right of
        the image and below it. detections_only: return only the `pred_*` keys (inference).

        Returns `pred_logits` [B, Q, K] (before the sigmoid), `pred_boxes` [B, Q, 4] (cxcywh in 0..1
        of the unpadded image), with iou_aware `pred_ious` [B, Q, 1] (before the sigmoid) and with
        with_vector `pred_vectors` [B, Q, n_keep]. Further keys, for training:

        - `aux_outputs`, with aux_loss: the `pred_*` of each earlier prediction level, first to
        last;
        - `enc_tokens`, with token_label: `pred_logits`, a map [B, h, w, columns] per level, and
          `padding` as given;
        - `distil_tokens`, for distillation: `patch_token`, a map [B, C, h, w] per level,
          `body_det_token` [B, Q, C] and `neck_det_token` [D + 1, B, Q, C];
        - `denoising_outputs`, with denoising_boxes [B, N, 4] (cxcywh in 0..1), the initial boxes of
          N denoising queries, and with label_embedding denoising_labels [B, N], their noisy
          classes: their `pred_*` of each decoder layer;
        - `group_outputs`, with query_groups in training mode: a list of the same for each further
          group.
        """
        maps, det, det_pos = self.backbone(images, padding)
        maps = self.input_proj(maps)  # from here on in the decoder's order of levels
        paddings = [resize_padding(padding, (level.shape[2], level.shape[3])) for level in maps]
        det = self._project_tokens(self.tgt_proj, det)
        query_pos = self._project_tokens(self.query_pos_proj, det_pos)
        query_pos = query_pos.expand(images.shape[0], -1, -1)
        extra: list[ExtraQueries] = []
        if self.group_pos is not None and self.training and not detections_only:
            extra += [self._group(det, number) for number in range(1, self.config.query_groups)]
        if denoising_boxes is not None:
            embedded = None if self.label_enc is None else self.label_enc(denoising_labels)
            extra.append(denoising_queries(denoising_boxes, embedded, det.shape[-1]))
        states, boxes = self.decoder(
            det,
            query_pos,
            maps,
            paddings,
            self._per_level(self.bbox_embed),
            self.config.with_box_refine,
            ExtraQueries.joined(extra),
        )
        first = len(states) - 1 if detections_only else 0
        predictions = [
            self._predict(level, states[level], boxes[level]) for level in range(first, len(states))
        ]
        num_det = self.config.det_token_num
        detections = [_queries(level, 0, num_det) for level in predictions]
        outputs: dict[str, Any] = dict(detections[-1])
        if detections_only:
            return outputs
        outputs["distil_tokens"] = {
            "patch_token": maps,
            "body_det_token": det,
            "neck_det_token": torch.stack([state[:, :num_det] for state in states]),
        }
        if self.config.aux_loss:
            outputs["aux_outputs"] = detections[:-1]
        if self.token_head is not None:
            logits = self.token_head(maps, paddings)
            outputs["enc_tokens"] = {"pred_logits": logits, "padding": padding}
        # The first level has no extra queries.
        supervised = predictions[1:] if self.config.aux_loss else predictions[-1:]
        parts = [
            [_queries(level, *span) for level in supervised] for span in _spans(num_det, extra)
        ]
        if denoising_boxes is not None:
            outputs["denoising_outputs"] = parts.pop()
        if parts:
            outputs["group_outputs"] = parts
        return outputs

    def _group(self, det: Tensor, number: int) -> ExtraQueries:
        """A group of detection queries: the same [DET] tokens [B, Q, C] at positions of its own."""
        assert self.group_pos is not None
        position = self.group_pos[number - 1].expand_as(det)
        points = self.decoder.points(position)
        boxes = offset_boxes(self._per_level(self.bbox_embed)[0](det), points).detach()
        group = torch.full((det.shape[1],), number, device=det.device)
        return ExtraQueries(det, position, boxes, group)

    def _predict(self, level: int, state: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """The `pred_*` of one prediction level: state [B, Q, C] and boxes [B, Q, 4]."""
        heads = {name: self._per_level(getattr(self, part)) for name, part in self._heads.items()}
        predictions = {name: _outside_autocast(each[level], state) for name, each in heads.items()}
        return predictions | {"pred_boxes": boxes}

    @staticmethod
    def _project_tokens(projection: nn.Sequential, tokens: Tensor) -> Tensor:
        """[B, Q, C_in] -> [B, Q, C]; the norm's statistics run over all tokens of an image."""
        return projection(tokens.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)

    def _per_level(self, heads: nn.ModuleList) -> list[nn.Module]:
        levels = self.config.dec_layers + 1
        return list(heads) if len(heads) == levels else [heads[0]] * levels


def _outside_autocast(head: nn.Module, state: Tensor) -> Tensor:
    """Half precision would shift logits by a tenth; the head costs little."""
    with torch.autocast(state.device.type, enabled=False):
        return head(state.to(next(head.parameters()).dtype)).float()


def _spans(start: int, parts: list[ExtraQueries]) -> Iterator[tuple[int, int]]:
    """Start and stop of each part's queries."""
    for part in parts:
        yield start, start + len(part.group)
        start += len(part.group)


def _queries(level: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The predictions of queries start to stop."""
    return {name: tensor[:, start:stop] for name, tensor in level.items()}
