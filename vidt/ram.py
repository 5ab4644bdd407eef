"""Reconfigured Attention Module (ViDT, arXiv 2110.03921, section 3.1): Swin's window attention that
also serves [DET] tokens.

One set of weights answers three questions: [PATCH] x [PATCH] in (shifted) windows as in Swin (arXiv
2103.14030), [DET] x [DET] over all tokens of the image, and in chosen stages [DET] x [PATCH] over
all patches of the image.

Letters: B batch, H x W stage grid, N = H * W, Q [DET] tokens, C channels, M heads, D = C / M, T =
window * window.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.swin_transformer import (
    get_relative_position_index,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

MASKED = -100.0  # the released value; a masked key keeps a weight near e^-100 rather than none


def resize_padding(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """padding [B, H, W] bool -> [B, *size] bool by nearest neighbour with the floor rule."""
    return F.interpolate(padding[:, None].float(), size=size).bool()[:, 0]


def sine_position(padding: Tensor, dim: int) -> Tensor:
    """DETR's sine encoding of the place inside the unpadded part of the map. padding [B, H, W] ->
    [B, H * W, dim].
    """
    valid = (~padding).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    channel = torch.arange(dim // 2, dtype=torch.float32, device=padding.device)
    period = 10000 ** (2 * channel.div(2, rounding_mode="floor") / (dim // 2))

    def encode(position: Tensor) -> Tensor:
        angle = position[..., None] / period  # [B, H, W, dim / 2]
        return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)

    return torch.cat([encode(y), encode(x)], dim=-1).flatten(1, 2)


def shift_mask(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Keeps patches that a cyclic shift brought together apart: [number of windows, T, T], 0 or
    MASKED.
    """
    height, width = grid

    def region(length: int) -> Tensor:
        place = torch.arange(length, device=device)
        return (place >= length - window).long() + (place >= length - shift).long()

    regions = region(height)[:, None] * 3 + region(width)[None, :]
    windows = window_partition(regions[None, :, :, None], (window, window)).flatten(1)  # [nW, T]
    return (windows[:, None, :] != windows[:, :, None]) * MASKED


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """[B, N, 3 * C] -> query, keys and values, each [B, M, N, D]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Each [B, M, N, D] -> [B, N, M * D]."""
    output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return output.transpose(1, 2).flatten(2)


def attend_det(
    det_qkv: Tensor, patch_qkv: Tensor | None, padding: Tensor | None, num_heads: int
) -> Tensor:
    """[DET] tokens look at each other and, where they are given, at the patches, in one softmax.

    det_qkv [B, Q, 3 * C]; patch_qkv [B, N, 3 * C] or None; padding [B, N] bool, True = padding, or
    None. Returns [B, Q, C], before the projection.
    """
    query, keys, values = split_heads(det_qkv, num_heads)
    mask = None
    if patch_qkv is not None:
        _, patch_keys, patch_values = split_heads(patch_qkv, num_heads)
        keys = torch.cat([patch_keys, keys], dim=2)
        values = torch.cat([patch_values, values], dim=2)
    if padding is not None:
        mask = F.pad(padding.to(query.dtype) * MASKED, (0, query.shape[2]))[:, None, None]
    return attend(query, keys, values, mask)


class ReconfiguredAttention(nn.Module):
    """Window attention for patches and global attention for [DET] tokens, with shared weights."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, *, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2, num_heads)
        )
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer(
            "relative_position_index", get_relative_position_index(window, window), persistent=False
        )

    def forward(
        self,
        patches: Tensor,
        det: Tensor,
        positions: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """patches [B, H, W, C]; det [B, Q, C] with the [DET] position added; positions [B, H * W,
        C] and padding [B, H * W] (True = padding) are given in stages whose [DET] tokens look at
        the patches. Returns patches as [B, H * W, C] and det [B, Q, C].
        """
        grid, tokens = patches.shape[1:3], patches.flatten(1, 2)
        # Without its bias: that is added once the windows are padded, since padded places hold the
        # bias and nothing else.
        products = F.linear(torch.cat([tokens, det], dim=1), self.qkv.weight)
        patch_products, det_products = products.split([tokens.shape[1], det.shape[1]], dim=1)
        patch_out = self._windows(patch_products.unflatten(1, grid))

        # The released model adds the position before qkv: it is in the values as well.
        seen = None if positions is None else self.qkv(tokens + positions)
        det_out = attend_det(det_products + self.qkv.bias, seen, padding, self.num_heads)
        return self.proj(torch.cat([patch_out, det_out], dim=1)).split(
            [tokens.shape[1], det.shape[1]], dim=1
        )

    def _windows(self, products: Tensor) -> Tensor:
        """products [B, H, W, 3 * C], qkv without bias -> attended patches [B, H * W, C], before the
        projection.
        """
        batch, height, width, _ = products.shape
        # Zero padding of the normed patches, not masked, as released.
        pad_h, pad_w = -height % self.window, -width % self.window
        products = F.pad(products, (0, 0, 0, pad_w, 0, pad_h)) + self.qkv.bias
        grid = (height + pad_h, width + pad_w)
        if self.shift:
            products = products.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(products, (self.window, self.window)).flatten(
            1, 2
        )  # [B*nW, T, 3C]
        query, keys, values = split_heads(windows, self.num_heads)
        windows = attend(query, keys, values, self._window_mask(grid, batch, query.dtype))
        windows = windows.unflatten(1, (self.window, self.window))
        patches = window_reverse(windows, (self.window, self.window), *grid)
        if self.shift:
            patches = patches.roll((self.shift, self.shift), dims=(1, 2))
        return patches[:, :height, :width].flatten(1, 2)

    def _window_mask(self, grid: tuple[int, int], batch: int, dtype: torch.dtype) -> Tensor:
        """Relative position bias, plus the shift mask: [1 or B * nW, M, T, T]."""
        area = self.window**2
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(area, area, -1).permute(2, 0, 1).to(dtype)  # [M, T, T]
        if not self.shift:
            return bias[None]
        apart = shift_mask(grid, self.window, self.shift, bias.device).to(dtype)
        return (bias + apart[:, None]).repeat(batch, 1, 1, 1)
