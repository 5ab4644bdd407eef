"""ViDT: a Swin body that carries [DET] tokens and an encoder-free deformable decoder (arXiv
2110.03921).

Module names follow the released checkpoints where they are free to choose; `vidt.convert` maps the
rest.

Letters: B batch, H x W padded image, Q [DET] tokens, K classes, C = reduced_dim, L levels, D
decoder layers.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vidt.decoder import BoxHead, DeformableDecoder
from vidt.ram import resize_padding
from vidt.swin import SWIN_VARIANTS, SwinBody

METHODS = ("vidt",)
NUM_LEVELS = 4  # strides 8, 16, 32 and 64


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ViDTConfig:
    """Architecture of a detector; saved with its weights. Fields bear the released flags' names.

    Raises ValueError for a value that no detector can be built from.
    """

    method: str = _setting("vidt", "which detector of the family")
    backbone_name: str = _setting("swin_nano", "body: " + ", ".join(SWIN_VARIANTS))
    num_classes: int = _setting(80, "classes; on the command line taken from the data")
    det_token_num: int = _setting(100, "[DET] tokens: the most objects found in an image")
    reduced_dim: int = _setting(256, "channels of the decoder")
    pos_dim: int = _setting(256, "channels of the [DET] tokens' position table")
    dec_layers: int = _setting(6, "decoder layers")
    nheads: int = _setting(8, "attention heads of the decoder")
    dim_feedforward: int = _setting(1024, "hidden channels of the decoder's MLPs")
    dec_n_points: int = _setting(4, "points that a head samples on each level")
    num_feature_levels: int = _setting(NUM_LEVELS, "levels of the pyramid; 4 is the only one")
    cross_indices: tuple[int, ...] = _setting((3,), "stages whose [DET] tokens see the patches")
    dropout: float = _setting(0.1, "dropout in the decoder")
    aux_loss: bool = _setting(True, "supervise every decoder layer, not only the last")
    with_box_refine: bool = _setting(True, "each decoder layer refines the boxes of the one before")

    def __post_init__(self) -> None:
        object.__setattr__(self, "cross_indices", tuple(self.cross_indices))
        _require(self.method in METHODS, "method", self.method, f"one of {', '.join(METHODS)}")
        known = ", ".join(SWIN_VARIANTS)
        _require(
            self.backbone_name in SWIN_VARIANTS,
            "backbone_name",
            self.backbone_name,
            f"one of {known}",
        )
        for name in (
            "num_classes",
            "det_token_num",
            "pos_dim",
            "nheads",
            "dim_feedforward",
            "dec_n_points",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.dec_layers >= 0, "dec_layers", self.dec_layers, "0 or more")
        _require(
            self.num_feature_levels == NUM_LEVELS,
            "num_feature_levels",
            self.num_feature_levels,
            "4",
        )
        step = math.lcm(32, self.nheads)  # GroupNorm has 32 groups
        _require(
            self.reduced_dim > 0 and self.reduced_dim % step == 0,
            "reduced_dim",
            self.reduced_dim,
            f"a multiple of {step}",
        )
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more and below 1")
        _require(
            all(0 <= stage <= 3 for stage in self.cross_indices),
            "cross_indices",
            self.cross_indices,
            "stages from 0 to 3",
        )


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {expected}")


def _projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """1 x 1 convolution and GroupNorm over the whole map, as released."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1)
    for parameter in convolution.parameters():
        (nn.init.xavier_uniform_ if parameter.dim() > 1 else nn.init.zeros_)(parameter)
    return nn.Sequential(convolution, nn.GroupNorm(32, out_channels))


def _classifier(dim: int, num_classes: int) -> nn.Linear:
    """Every class starts at probability 0.01 (focal loss, arXiv 1708.02002, section 4.1)."""
    linear = nn.Linear(dim, num_classes)
    nn.init.constant_(linear.bias, -math.log(99))
    return linear


class ViDT(nn.Module):
    """Images to class logits and boxes of a fixed number of queries."""

    def __init__(self, config: ViDTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.reduced_dim
        self.backbone = SwinBody(
            SWIN_VARIANTS[config.backbone_name],
            det_token_num=config.det_token_num,
            pos_dim=config.pos_dim,
            cross_indices=config.cross_indices,
        )
        self.input_proj = nn.ModuleList(
            _projection(channels, dim) for channels in self.backbone.num_channels
        )
        self.tgt_proj = _projection(self.backbone.num_channels[-2], dim)
        self.query_pos_proj = _projection(config.pos_dim, dim)
        self.decoder = DeformableDecoder(
            dim,
            num_layers=config.dec_layers,
            num_heads=config.nheads,
            num_levels=config.num_feature_levels,
            num_points=config.dec_n_points,
            dim_feedforward=config.dim_feedforward,
            dropout=config.dropout,
        )
        # With refinement every prediction level has heads of its own; without, all share one.
        num_heads = config.dec_layers + 1 if config.with_box_refine else 1
        self.class_embed = nn.ModuleList(
            _classifier(dim, config.num_classes) for _ in range(num_heads)
        )
        self.bbox_embed = nn.ModuleList(
            BoxHead(dim, size_bias=0.0 if level else -2.0) for level in range(num_heads)
        )

    def forward(
        self,
        images: Tensor,
        padding: Tensor,
        noised_boxes: Tensor | None = None,
    ) -> dict[str, Any]:
        """images [B, 3, H, W] normalised; padding [B, H, W] bool, True where padded.

        Returns `pred_logits` [B, Q, K] (before the sigmoid), `pred_boxes` [B, Q, 4] (cxcywh in 0..1
        of the unpadded image) and, with aux_loss, `aux_outputs`: the same two of each earlier
        prediction level, first to last. noised_boxes [B, N, 4] (cxcywh), in training only: extra
        queries that start there; what becomes of them is in `denoising_outputs`, per decoder layer.
        """
        maps, det, det_pos = self.backbone(images, padding)
        paddings = [resize_padding(padding, (level.shape[2], level.shape[3])) for level in maps]
        maps = [project(level) for project, level in zip(self.input_proj, maps, strict=True)]
        queries = self._project_tokens(self.tgt_proj, det)
        query_pos = self._project_tokens(self.query_pos_proj, det_pos).expand(len(images), -1, -1)

        levels = self.config.dec_layers + 1
        box_heads = self._per_level(self.bbox_embed, levels)
        states, boxes = self.decoder(
            queries, query_pos, maps, paddings, box_heads, self.config.with_box_refine, noised_boxes
        )
        predictions = [
            {"pred_logits": _in_full_precision(head, state), "pred_boxes": box}
            for head, state, box in zip(
                self._per_level(self.class_embed, levels), states, boxes, strict=True
            )
        ]
        found = [_queries(level, slice(self.config.det_token_num)) for level in predictions]
        outputs: dict[str, Any] = dict(found[-1])
        if self.config.aux_loss:
            outputs["aux_outputs"] = found[:-1]
        if noised_boxes is not None:
            mended = slice(self.config.det_token_num, None)
            outputs["denoising_outputs"] = [_queries(level, mended) for level in predictions[1:]]
        return outputs

    @staticmethod
    def _project_tokens(projection: nn.Sequential, tokens: Tensor) -> Tensor:
        """[B, Q, C_in] -> [B, Q, C]; the norm's statistics run over all tokens of an image."""
        return projection(tokens.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)

    @staticmethod
    def _per_level(heads: nn.ModuleList, levels: int) -> list[nn.Module]:
        return list(heads) if len(heads) == levels else [heads[0]] * levels


def _in_full_precision(head: nn.Module, state: Tensor) -> Tensor:
    """Logits of half precision are off by a tenth, and the head costs nothing."""
    with torch.autocast(state.device.type, enabled=False):
        return head(state.to(next(head.parameters()).dtype)).float()


def _queries(level: dict[str, Tensor], which: slice) -> dict[str, Tensor]:
    return {name: tensor[:, which] for name, tensor in level.items()}
