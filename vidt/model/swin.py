"""Swin backbone that carries [DET] tokens (ViDT, arXiv 2110.03921; Swin, arXiv 2103.14030).

Differs from timm's Swin: every attention is a `ReconfiguredAttention`; shifted windows are used
even where the map is no larger than one window; each stage ends, rather than begins, with its
patch merging; a fourth merging makes the stride-64 map.

Letters: B batch, H x W stage grid, Q [DET] tokens, C channels of the stage.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from vidt.model.config import SwinVariant
from vidt.model.ram import (
    ReconfiguredAttention,
    autocasted,
    resize_padding,
    shift_mask,
    sine_position,
)

COARSE_DIM = 256  # channels of the stride-64 map of every backbone; fixed by the released weights
WINDOW = 7


class PatchEmbedding(nn.Module):
    """Image or map to one token per patch x patch pixels, zero-padded at the right and bottom."""

    def __init__(self, dim: int, *, patch: int = 4, in_channels: int = 3) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C_in, H, W] -> [B, ceil(H / patch), ceil(W / patch), C]."""
        below, right = (-side % self.patch for side in images.shape[-2:])
        images = F.pad(images, (0, right, 0, below))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halves the patch map. A [DET] token, repeated four times, passes through the same weights."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), out_dim]."""
        patches = F.pad(patches, (0, 0, 0, patches.shape[2] % 2, 0, patches.shape[1] % 2))
        squares = patches.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, 2, W/2, 2, C]
        merged = squares.permute(0, 1, 3, 4, 2, 5).flatten(3)  # each square column by column
        return self.reduction(self.norm(merged))

    def merge_det(self, det: Tensor) -> Tensor:
        """det [B, Q, C] -> [B, Q, out_dim]."""
        return self.reduction(self.norm(det.repeat(1, 1, 4)))


class SwinBlock(nn.Module):
    """Pre-norm Swin block; norms, attention and MLP are shared by patches and [DET] tokens."""

    def __init__(
        self, dim: int, num_heads: int, *, shift: int, drop_path: float, pos_dim: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.det_pos_linear = nn.Linear(pos_dim, dim)
        self.attn = ReconfiguredAttention(dim, num_heads, window=WINDOW, shift=shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        tokens: Tensor,
        det_pos: Tensor,
        grid: tuple[int, int],
        mask: Tensor,
        position: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """tokens [B, H * W + Q, C], patches first: joined, so that drop path drops both kinds
        together; det_pos [1, Q, pos_dim]; grid (H, W); mask, the `shift_mask` of the stage;
        position and padding as in `ReconfiguredAttention`. Returns tokens of the same shape.
        """
        normed = autocasted(self.norm1(tokens))
        patches, det = normed.split([grid[0] * grid[1], det_pos.shape[1]], dim=1)
        attended = self.attn(
            patches.unflatten(1, grid),
            det + self.det_pos_linear(det_pos),
            mask if self.attn.shift else None,
            position,
            padding,
        )
        tokens = tokens + self.drop_path(attended)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class SwinStage(nn.Module):
    """Blocks of one resolution and the patch merging that follows them."""

    def __init__(
        self,
        dim: int,
        out_dim: int | None,
        *,
        num_heads: int,
        drop_paths: list[float],
        pos_dim: int,
        det_sees_patches: bool,
    ) -> None:
        """out_dim: channels after the merging, None for a stage without one."""
        super().__init__()
        self.det_sees_patches = det_sees_patches
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                num_heads,
                shift=(index % 2) * (WINDOW // 2),
                drop_path=drop_path,
                pos_dim=pos_dim,
            )
            for index, drop_path in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(dim, out_dim) if out_dim else None

    def forward(
        self, patches: Tensor, det: Tensor, det_pos: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs the blocks, without the merging: patches [B, H, W, C] and det [B, Q, C] in and out.
        det_pos [1, Q, pos_dim]; padding [B, h, w], True = padding, at the backbone's base
        size.
        """
        grid = (patches.shape[1], patches.shape[2])
        position = stage_padding = None
        if self.det_sees_patches:
            grid_padding = resize_padding(padding, grid)
            position = autocasted(sine_position(grid_padding, patches.shape[-1]))
            stage_padding = grid_padding.flatten(1)
        mask = autocasted(shift_mask(grid, WINDOW, WINDOW // 2, patches.device))
        tokens = torch.cat([patches.flatten(1, 2), det], dim=1)  # [B, H * W + Q, C]
        for block in self.blocks:
            tokens = block(tokens, det_pos, grid, mask, position, stage_padding)
        patches, det = tokens.split([grid[0] * grid[1], det.shape[1]], dim=1)
        return patches.unflatten(1, grid), det


class SwinBackbone(nn.Module):
    """Images to a pyramid of maps and the [DET] tokens after the last block."""

    def __init__(
        self,
        variant: SwinVariant,
        *,
        det_token_num: int,
        pos_dim: int,
        cross_indices: tuple[int, ...],
        pyramid: bool = True,
    ) -> None:
        """pyramid: whether the last stage is merged into a stride-64 map. A detector that only
        reads the [DET] tokens does not need one.
        """
        super().__init__()
        dims = [variant.embed_dim * 2**stage for stage in range(4)]
        self.num_channels = (*dims[1:], COARSE_DIM) if pyramid else tuple(dims[1:])
        self.padding_divisor = 2 ** (4 - len(cross_indices))
        self.patch_embed = PatchEmbedding(dims[0])
        self.det_token = nn.Parameter(torch.zeros(1, det_token_num, dims[0]))
        self.det_pos_embed = nn.Parameter(torch.zeros(1, det_token_num, pos_dim))
        last = sum(variant.depths) - 1
        rates = [variant.drop_path * block / last for block in range(last + 1)]
        self.layers = nn.ModuleList(
            SwinStage(
                dims[stage],
                (*dims[1:], COARSE_DIM if pyramid else None)[stage],
                num_heads=variant.num_heads[stage],
                drop_paths=rates[sum(variant.depths[:stage]) : sum(variant.depths[: stage + 1])],
                pos_dim=pos_dim,
                det_sees_patches=stage in cross_indices,
            )
            for stage in range(4)
        )
        trunc_normal_(self.det_token, std=0.02)
        trunc_normal_(self.det_pos_embed, std=0.02)
        if not pyramid:
            # The last block's patches are not used, so this parameter's gradient would be zero.
            last_block = [module for module in self.modules() if isinstance(module, SwinBlock)][-1]
            last_block.attn.relative_position_bias_table.requires_grad_(False)

    def forward(self, images: Tensor, padding: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """images [B, 3, H, W]; padding [B, H, W], True = padding. Returns the maps of strides 8,
        16, 32 and, with the pyramid, 64, each [B, channels, h, w]; the [DET] tokens [B, Q, 8 *
        embed_dim]; their position table [1, Q, pos_dim].
        """
        patches = self.patch_embed(images)
        det = self.det_token.expand(images.shape[0], -1, -1)
        # The padding is resized in two nearest-neighbour steps, here and in the stage, as released;
        # one step would round differently.
        height, width = (max(side // self.padding_divisor, 1) for side in patches.shape[1:3])
        padding = resize_padding(padding, (height, width))
        maps = []
        *earlier, last = self.layers
        for stage in earlier:
            assert isinstance(stage, SwinStage) and stage.downsample is not None
            patches, det = stage(patches, det, self.det_pos_embed, padding)
            maps.append(patches)
            patches, det = stage.downsample(patches), stage.downsample.merge_det(det)
        assert isinstance(last, SwinStage)
        patches, det = last(patches, det, self.det_pos_embed, padding)
        maps.append(patches)
        if last.downsample is not None:
            maps.append(last.downsample(patches))
        return [level.permute(0, 3, 1, 2) for level in maps[1:]], det, self.det_pos_embed
