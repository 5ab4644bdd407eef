"""The configuration of a detector, which is saved with its weights, and the sizes of the published
backbones. It does not import PyTorch, so that help texts appear quickly.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from vidt.errors import UserError, shown

WITHOUT_NECK = "vidt_wo_neck"
METHODS = ("vidt", WITHOUT_NECK)
NECK_PARTS = ("epff", "iou_aware", "token_label", "with_vector")  # they need a neck
CLASS_LOSSES = ("focal", "varifocal", "matchability")
NUM_LEVELS = 4  # strides 8, 16, 32 and 64
# Limits far beyond any published detector, for headers and flags that are damaged or hostile.
LARGEST = {
    **{"num_classes": 100_000, "det_token_num": 10_000, "dec_layers": 100, "nheads": 1024},
    "query_groups": 64,
    **dict.fromkeys(("reduced_dim", "pos_dim"), 8192),
    **dict.fromkeys(("dim_feedforward", "vector_hidden_dim"), 65_536),
    **{"dec_n_points": 1024, "gt_mask_len": 1024, "n_keep": 65_536},
}


@dataclass(frozen=True)
class SwinVariant:
    """Sizes of a Swin backbone."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_path: float


@dataclass(frozen=True)
class CoatVariant:
    """Sizes of a published CoaT-lite backbone."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)


SWIN_VARIANTS = {
    "swin_nano": SwinVariant(48, (2, 2, 6, 2), (3, 6, 12, 24), 0.0),
    "swin_tiny": SwinVariant(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "swin_small": SwinVariant(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "swin_base_win7_22k": SwinVariant(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.3),
    "swin_large_win7_22k": SwinVariant(192, (2, 2, 18, 2), (6, 12, 24, 48), 0.3),
    # Ours, for random weights and a CPU: nothing was published for it.
    "swin_pico": SwinVariant(32, (2, 2, 2, 2), (1, 2, 4, 8), 0.0),
}
COAT_VARIANTS = {
    "coat_lite_tiny": CoatVariant((64, 128, 256, 320), (2, 2, 2, 2)),
    "coat_lite_mini": CoatVariant((64, 128, 320, 512), (2, 2, 2, 2)),
    "coat_lite_small": CoatVariant((64, 128, 320, 512), (3, 4, 6, 3)),
}


def backbone_names() -> list[str]:
    """All values of `backbone_name`."""
    return [*SWIN_VARIANTS, *COAT_VARIANTS]


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ViDTConfig:
    """Architecture of a detector; saved with its weights. Fields have the names of the released
    flags.

    Raises UserError for a value that no detector can be built from.
    """

    method: str = _setting("vidt", "which detector of the family: " + ", ".join(METHODS))
    backbone_name: str = _setting("swin_nano", "backbone: " + ", ".join(backbone_names()))
    num_classes: int = _setting(80, "classes; on the command line taken from the data")
    det_token_num: int = _setting(100, "[DET] tokens: the most objects detected in an image")
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
    look_forward_twice: bool = _setting(
        False, "in training the loss of a box also moves the decoder layer before its own"
    )
    label_embedding: bool = _setting(
        False, "in training denoising queries carry an embedding of their object's class"
    )
    query_groups: int = _setting(
        1, "groups of queries in training, each matched by itself; prediction uses the first"
    )
    epff: bool = _setting(False, "ViDT+: fuse the levels of the pyramid before the decoder")
    iou_aware: bool = _setting(False, "ViDT+: predict how well each box fits")
    token_label: bool = _setting(False, "ViDT+: classify every position of the pyramid in training")
    token_label_shift: bool = _setting(
        True, "of token_label: a column for any object before the classes; False: as released"
    )
    with_vector: bool = _setting(False, "ViDT+: predict instance masks")
    n_keep: int = _setting(256, "numbers that describe a mask")
    gt_mask_len: int = _setting(128, "side of the square in which masks are described, pixels")
    vector_hidden_dim: int = _setting(256, "hidden channels of the mask head")

    def __post_init__(self) -> None:
        object.__setattr__(self, "cross_indices", tuple(self.cross_indices))
        require(self.method in METHODS, "method", self.method, f"one of {', '.join(METHODS)}")
        require(
            self.backbone_name in backbone_names(),
            "backbone_name",
            self.backbone_name,
            f"one of {', '.join(backbone_names())}",
        )
        refined = self.method == "vidt" and self.with_box_refine and self.dec_layers > 0
        for name, plain in (
            ("query_groups", 1),
            ("label_embedding", False),
            ("look_forward_twice", False),
        ):
            value = getattr(self, name)
            expected = f"{plain} without a decoder that refines boxes"
            require(refined or value == plain, name, value, expected)
        for name in NECK_PARTS:
            allowed = self.method == "vidt" or not getattr(self, name)
            require(allowed, name, getattr(self, name), f"False with method {self.method}")
        for name in (
            "num_classes",
            "det_token_num",
            "pos_dim",
            "nheads",
            "dim_feedforward",
            "dec_n_points",
            "query_groups",
            "n_keep",
            "gt_mask_len",
            "vector_hidden_dim",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.dec_layers >= 0, "dec_layers", self.dec_layers, "0 or more")
        require(
            self.num_feature_levels == NUM_LEVELS,
            "num_feature_levels",
            self.num_feature_levels,
            "4",
        )
        for name, most in LARGEST.items():
            require(getattr(self, name) <= most, name, getattr(self, name), f"at most {most:,}")
        step = math.lcm(32, self.nheads)  # GroupNorm has 32 groups
        require(
            self.reduced_dim > 0 and self.reduced_dim % step == 0,
            "reduced_dim",
            self.reduced_dim,
            f"a multiple of {step}, the least common one of 32 and nheads, {self.nheads}",
        )
        cells = self.gt_mask_len**2
        require(
            self.n_keep <= cells, "n_keep", self.n_keep, f"at most gt_mask_len squared, {cells}"
        )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more and below 1")
        require(
            set(self.cross_indices) <= {0, 1, 2, 3}
            and len(set(self.cross_indices)) == len(self.cross_indices),
            "cross_indices",
            self.cross_indices,
            "distinct stages from 0 to 3",
        )
        # Without a neck, only this attention takes anything from the image to the tokens.
        require(
            self.method != WITHOUT_NECK or len(self.cross_indices) > 0,
            "cross_indices",
            self.cross_indices,
            f"at least one stage with method {WITHOUT_NECK}",
        )

    @property
    def token_columns(self) -> int:
        """Columns of the token labels. The released ones have no column for class 0."""
        return self.num_classes + int(self.token_label_shift)


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise UserError(f"{name} is {shown(str(value))}; it must be {expected}")
