"""Reconfigured Attention Module (ViDT, arXiv 2110.03921, section 3.1): Swin's window attention that
also serves [DET] tokens.

One set of weights answers three questions: [PATCH] x [PATCH] in (shifted) windows as in Swin (arXiv
2103.14030), [DET] x [DET] over all tokens of the image, and in chosen stages [DET] x [PATCH] over
all patches of the image.

Letters: B batch, H x W stage grid, N = H * W, Q [DET] tokens, C channels, M heads, D = C / M, T =
window * window.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn

from vidt.model.dropout import drop
from vidt.model.window_attention import at_once, attend_windows
from vidt.model.windows import MASKED, collect, windows_of
from vidt.ops.linear import Linear, linear


def resize_padding(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """padding [B, H, W] bool -> [B, *size] bool by nearest neighbour with the floor rule."""
    return F.interpolate(padding[:, None].float(), size=size).bool()[:, 0]


class SinePosition(NamedTuple):
    """DETR's sine encoding of places on a map: of a place it is that of its row, then that of its
    column, each in half of the C channels.
    """

    rows: Tensor  # [B, H, C / 2]
    columns: Tensor  # [B, W, C / 2]

    def add_projected(self, patch_kv: Tensor, weight: Tensor) -> Tensor:
        """Keys and values of the patches as if the position had been added before their projection
        by `weight`, [2 * C, C]: it is linear, so that H rows and W columns may go through it by
        themselves, and not H * W places. patch_kv [B, N, 2 * C] -> the same shape.

        The released model adds it there: the position is in the values as well.
        """
        of_row, of_column = weight.chunk(2, dim=1)
        rows, columns = linear(self.rows, of_row), linear(self.columns, of_column)
        return patch_kv + (rows[:, :, None] + columns[:, None]).flatten(1, 2)


def sine_position(padding: Tensor, dim: int, dtype: torch.dtype) -> SinePosition:
    """Of the unpadded part of a map, a rectangle: padding [B, H, W], C = dim. Padded places have a
    position too, but nobody looks there.
    """
    channel = torch.arange(dim // 2, dtype=torch.float32, device=padding.device)
    period = 10000 ** (2 * channel.div(2, rounding_mode="floor") / (dim // 2))

    def encode(padding: Tensor) -> Tensor:
        place = (~padding).float().cumsum(1)
        place = place / (place[:, -1:] + 1e-6) * (2 * math.pi)
        angle = place[..., None] / period  # [B, H or W, dim / 2]
        sines = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1)
        return sines.flatten(-2).to(dtype)

    return SinePosition(encode(padding.all(2)), encode(padding.all(1)))


def split_heads(qkv: Tensor, num_heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """[B, N, parts * C] -> query, keys and values, or keys and values, each [B, M, N, D]."""
    return qkv.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention: query [B, M, Q, D], keys and values [B, M, N, D], mask what is added to
    the scores, [*, Q or 1, N], dropout of the weights -> [B, Q, M * D].
    """
    # PyTorch, too, writes it out there; half precision it raises to float32 first.
    if dropout and query.device.type == "cpu" and query.dtype == torch.float32:
        scores = (query * query.shape[-1] ** -0.5) @ keys.mT
        scores = scores if mask is None else scores + mask
        output = drop(scores.softmax(-1), dropout) @ values
    else:
        output = F.scaled_dot_product_attention(query, keys, values, mask, dropout)
    return output.transpose(1, 2).flatten(2)


def attend_det(
    det_qkv: Tensor, patch_kv: Tensor | None, padding: Tensor | None, num_heads: int
) -> Tensor:
    """[DET] tokens look at each other and, where they are given, at the patches, in one softmax.

    det_qkv [B, Q, 3 * C]; patch_kv [B, N, 2 * C] or None; padding [B, N] bool, True = padding, or
    None. Returns [B, Q, C], before the projection.
    """
    query, keys, values = split_heads(det_qkv, num_heads)
    mask = None
    if patch_kv is not None:
        patch_keys, patch_values = split_heads(patch_kv, num_heads, parts=2)
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
        self.qkv = Linear(dim, dim * 3)
        self.proj = Linear(dim, dim)
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
        grid: tuple[int, int],
        position: SinePosition | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """patches [B, H * W, C]; det [B, Q, C] with the [DET] position added; position and padding
        [B, H * W] (True = padding) are given in stages whose [DET] tokens look at the patches.
        Returns patches, then [DET] tokens: [B, H * W + Q, C].
        """
        batch, num_det, dim = det.shape
        # Padded places of a window hold a token of zeros, not masked, as released.
        tokens = torch.cat([patches, det, det.new_zeros(batch, 1, dim)], dim=1)
        places = windows_of(
            grid,
            self.window,
            self.shift,
            num_det=num_det,
            num_heads=self.num_heads,
            batch=batch,
            at_once=at_once(tokens.device),
            device=tokens.device,
        )
        qkv = self.qkv(tokens)
        attended, det_qkv = attend_windows(qkv, self._bias().to(qkv.dtype), places)

        patch_kv = None
        if position is not None:
            patch_kv = qkv[:, : patches.shape[1], dim:]
            patch_kv = position.add_projected(patch_kv, self.qkv.weight[dim:])
        det_out = attend_det(det_qkv, patch_kv, padding, self.num_heads)
        return self.proj(collect(attended, det_out, places))

    def _bias(self) -> Tensor:
        """Relative position bias [M, T, T]."""
        area = self.window**2
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return bias.view(area, area, -1).permute(2, 0, 1)
