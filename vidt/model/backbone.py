"""The backbone that a configuration names."""

from typing import Any

from vidt.model.coat import CoatBackbone
from vidt.model.config import COAT_VARIANTS, SWIN_VARIANTS, ViDTConfig
from vidt.model.swin import SwinBackbone


def build_backbone(config: ViDTConfig) -> SwinBackbone | CoatBackbone:
    """The backbone that a configuration names. Its forward takes images and padding and returns the
    maps of strides 8, 16, 32 and, for method vidt, 64, the [DET] tokens [B, Q, channels of stride
    32] and their position table [1, Q, pos_dim]; `num_channels` are the maps' channels.
    """
    settings: dict[str, Any] = {
        "det_token_num": config.det_token_num,
        "pos_dim": config.pos_dim,
        "cross_indices": config.cross_indices,
        "pyramid": config.method == "vidt",
    }
    if config.backbone_name in SWIN_VARIANTS:
        return SwinBackbone(SWIN_VARIANTS[config.backbone_name], **settings)
    return CoatBackbone(COAT_VARIANTS[config.backbone_name], **settings)
