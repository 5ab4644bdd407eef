"""Reconfigured Attention Module (ViDT, arXiv 2110.03921, section 3.1): Swin's window attention that
also serves [DET] tokens.

One set of weights computes three attentions: [PATCH] x [PATCH] in (shifted) windows as in Swin
(arXiv 2103.14030), [DET] x [DET] over all tokens of the image, and in chosen stages [DET] x [PATCH]
over all patches of the image.

Letters: B batch, H x W stage grid, N = H * W, Q [DET] tokens, C channels, M heads, D = C / M, W' =
windows of an image, T = window * window.
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

# Added to masked scores. The released -100 gives the same attention, but leaves weights of
# exp(-100), denormal numbers, with which a CPU multiplies matrices ten times slower.
MASKED = -1000.0


def autocasted(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which autocast multiplies matrices; without autocast, as it
    is. One cast then serves every reader, and copies on the way move half the bytes.
    """
    device = tensor.device.type
    if tensor.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def resize_padding(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """padding [B, H, W] bool -> [B, *size] bool by nearest neighbour with the floor rule."""
    return F.interpolate(padding[:, None].float(), size=size).bool()[:, 0]


def sine_position(padding: Tensor, dim: int) -> Tensor:
    """DETR's sine encoding (arXiv 2005.12872, appendix A.4) of the positions of a map, counted over
    its unpadded part: padding [B, H, W], True = padding -> [B, H * W, dim] float32.
    """
    channel = torch.arange(dim // 2, dtype=torch.float32, device=padding.device)
    period = 10000 ** (2 * channel.div(2, rounding_mode="floor") / (dim // 2))

    def encode(axis: int) -> Tensor:
        position = (~padding).float().cumsum(axis)
        last = position.narrow(axis, -1, 1)
        angle = (position / (last + 1e-6) * (2 * math.pi))[..., None] / period  # [B, H, W, dim / 2]
        return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)

    return torch.cat([encode(1), encode(2)], dim=-1).flatten(1, 2)


def shift_mask(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Swin's mask for windows of a rolled map (arXiv 2103.14030, section 3.2): tokens that were not
    neighbours before the roll do not attend to each other.

    grid is (H, W) before padding. Returns [W', T, T] float32, 0 or MASKED.
    """

    def regions(length: int) -> Tensor:
        padded = math.ceil(length / window) * window
        position = torch.arange(padded, device=device)
        return (position >= padded - window).float() + (position >= padded - shift).float()

    region = 3 * regions(grid[0])[:, None] + regions(grid[1])
    windows = window_partition(region[None, :, :, None], (window, window)).flatten(1)  # [W', T]
    return (windows[:, :, None] != windows[:, None, :]).float() * MASKED


def split_heads(qkv: Tensor, num_heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """[B, N, parts * C] -> query, keys and values, or keys and values, each [B, M, N, D]."""
    return qkv.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention: query [B, M, Q, D], keys and values [B, M, N, D], mask (added to the
    scores) broadcasts to [B, M, Q, N] -> [B, Q, M * D].
    """
    mask = None if mask is None else mask.to(query.dtype)
    attended = F.scaled_dot_product_attention(query, keys, values, mask)
    return attended.transpose(1, 2).flatten(2)


def attend_det(
    det_qkv: Tensor, patch_kv: Tensor | None, padding: Tensor | None, num_heads: int
) -> Tensor:
    """[DET] tokens attend to each other and, if given, to the patches, in one softmax.

    det_qkv [B, Q, 3 * C]; patch_kv [B, N, 2 * C] or None; padding [B, N] bool, True = padding, or
    None. Returns [B, Q, C], before the projection.
    """
    query, keys, values = split_heads(det_qkv, num_heads)
    if patch_kv is None:
        return attend(query, keys, values, None)
    patch_keys, patch_values = split_heads(patch_kv, num_heads, parts=2)
    keys = torch.cat([patch_keys, keys], dim=2)
    values = torch.cat([patch_values, values], dim=2)
    mask = None
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
        mask: Tensor | None,
        position: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """patches [B, H, W, C]; det [B, Q, C] with the [DET] position added; mask as of
        `shift_mask` for shifted windows, else None; position [B, H * W, C] and padding [B, H * W]
        (True = padding) in stages whose [DET] tokens attend to the patches, else None. Returns
        patches, then [DET] tokens: [B, H * W + Q, C].
        """
        patch_kv = None
        if position is not None:  # keys and values both hold the position, as released
            dim = det.shape[-1]
            tokens = patches.flatten(1, 2) + position.to(patches.dtype)
            patch_kv = F.linear(tokens, self.qkv.weight[dim:], self.qkv.bias[dim:])
        attended_det = attend_det(self.qkv(det), patch_kv, padding, self.num_heads)
        attended = self._attend_windows(patches, mask).flatten(1, 2)
        return self.proj(torch.cat([attended, attended_det], dim=1))

    def _attend_windows(self, patches: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], before the projection."""
        window, shift = self.window, self.shift
        batch, height, width, _ = patches.shape
        padded = -(-height // window) * window, -(-width // window) * window
        # Padded positions take part as tokens of zeros, unmasked, as released.
        patches = F.pad(patches, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        if shift:
            patches = patches.roll((-shift, -shift), dims=(1, 2))
        windows = window_partition(patches, (window, window)).flatten(1, 2)  # [B * W', T, C]
        query, keys, values = split_heads(self.qkv(windows), self.num_heads)
        bias = autocasted(self._relative_position_bias())[None]  # [1, M, T, T]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(batch, 1, 1, 1)  # [B * W', M, T, T]
        windows = attend(query, keys, values, bias)
        patches = window_reverse(windows.unflatten(1, (window, window)), (window, window), *padded)
        if shift:
            patches = patches.roll((shift, shift), dims=(1, 2))
        return patches[:, :height, :width]

    def _relative_position_bias(self) -> Tensor:
        """[M, T, T] (Swin, arXiv 2103.14030, equation 4)."""
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return bias.unflatten(0, (self.window**2, -1)).permute(2, 0, 1)
