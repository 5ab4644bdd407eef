"""The sizes of the published bodies. Without PyTorch, so that a help text need not wait for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SwinVariant:
    """Sizes of one published Swin body."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_path: float


@dataclass(frozen=True)
class CoatVariant:
    """Sizes of one published CoaT-lite body."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)


SWIN_VARIANTS = {
    "swin_nano": SwinVariant(48, (2, 2, 6, 2), (3, 6, 12, 24), 0.0),
    "swin_tiny": SwinVariant(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "swin_small": SwinVariant(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "swin_base_win7_22k": SwinVariant(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.3),
    "swin_large_win7_22k": SwinVariant(192, (2, 2, 18, 2), (6, 12, 24, 48), 0.3),
}
COAT_VARIANTS = {
    "coat_lite_tiny": CoatVariant((64, 128, 256, 320), (2, 2, 2, 2)),
    "coat_lite_mini": CoatVariant((64, 128, 320, 512), (2, 2, 2, 2)),
    "coat_lite_small": CoatVariant((64, 128, 320, 512), (3, 4, 6, 3)),
}
