"""Swin body that carries [DET] tokens (ViDT, arXiv 2110.03921; Swin, arXiv 2103.14030).

Differs from timm's Swin: every attention is a `ReconfiguredAttention`; shifted windows are used
even where the map is no larger than one window; each stage ends, rather than begins, with its
merging; a fourth merging makes the stride-64 map.

Letters: B batch, H x W stage grid, Q [DET] tokens, C channels of the stage.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vidt.model.mlp import Mlp
from vidt.model.ram import ReconfiguredAttention, SinePosition, resize_padding, sine_position
from vidt.model.variants import SWIN_VARIANTS as SWIN_VARIANTS
from vidt.model.variants import SwinVariant
from vidt.ops.linear import Linear

COARSE_DIM = 256  # channels of the stride-64 map, whatever the body; fixed by the released weights
WINDOW = 7


class PatchEmbedding(nn.Module):
    """Image or map to tokens of patch x patch places, zero padded right and below to whole ones."""

    def __init__(self, dim: int, *, patch: int = 4, in_channels: int = 3) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C_in, H, W] -> [B, ceil(H / patch), ceil(W / patch), C]."""
        below, right = (-side % self.patch for side in images.shape[-2:])
        if below or right:  # a padding of nothing would be a copy
            images = F.pad(images, (0, right, 0, below))
        # Channels last is how the norm, and its gradient, are going to read the map.
        images = images.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Merging(nn.Module):
    """Halves the patch map; a [DET] token passes through the same weights, repeated four times."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, out_dim, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), out_dim]."""
        below, right = (side % 2 for side in patches.shape[1:3])
        if below or right:
            patches = F.pad(patches, (0, 0, 0, right, 0, below))
        squares = patches.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, 2, W/2, 2, C]
        corners = squares.permute(0, 1, 3, 4, 2, 5).flatten(3)  # of a square column by column
        return self.reduction(self.norm(corners))

    def merge_det(self, det: Tensor) -> Tensor:
        """det [B, Q, C] -> [B, Q, out_dim]."""
        return self.reduction(self.norm(det.repeat(1, 1, 4)))


class Block(nn.Module):
    """Pre-norm Swin block; norms, attention and MLP are shared by patches and [DET] tokens."""

    def __init__(
        self, dim: int, num_heads: int, *, shift: int, drop_path: float, pos_dim: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.det_pos_linear = Linear(pos_dim, dim)
        self.attn = ReconfiguredAttention(dim, num_heads, window=WINDOW, shift=shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        tokens: Tensor,
        det_pos: Tensor,
        grid: tuple[int, int],
        position: SinePosition | None,
        padding: Tensor | None,
    ) -> Tensor:
        """tokens [B, H * W + Q, C], patches first, so that one draw of drop path serves both kinds;
        det_pos [1, Q, pos_dim]; grid (H, W). Returns tokens of the same shape.
        """
        patches, det = self.norm1(tokens).split([grid[0] * grid[1], det_pos.shape[1]], dim=1)
        attended = self.attn(patches, det + self.det_pos_linear(det_pos), grid, position, padding)
        tokens = _sum(tokens, self.drop_path(attended))
        return _sum(tokens, self.drop_path(self.mlp(self.norm2(tokens))))


def _sum(tokens: Tensor, update: Tensor) -> Tensor:
    """Their sum, in the memory of the update. One of half precision must not make the tokens so."""
    return update.add_(tokens) if update.dtype == tokens.dtype else tokens + update


class Stage(nn.Module):
    """Blocks of one resolution and the merging that follows them."""

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
            Block(
                dim,
                num_heads,
                shift=(index % 2) * (WINDOW // 2),
                drop_path=drop_path,
                pos_dim=pos_dim,
            )
            for index, drop_path in enumerate(drop_paths)
        )
        self.downsample = Merging(dim, out_dim) if out_dim else None

    def forward(
        self, patches: Tensor, det: Tensor, det_pos: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """padding [B, h, w], True = padding, at the size in which the body resizes it first. No
        merging yet.
        """
        grid = (patches.shape[1], patches.shape[2])
        position = stage_padding = None
        if self.det_sees_patches:
            grid_padding = resize_padding(padding, grid)
            position = sine_position(grid_padding, patches.shape[-1], patches.dtype)
            stage_padding = grid_padding.flatten(1)
        tokens = torch.cat([patches.flatten(1, 2), det], dim=1)  # [B, H*W + Q, C]
        for block in self.blocks:
            tokens = block(tokens, det_pos, grid, position, stage_padding)
        patches, det = tokens.split([grid[0] * grid[1], det.shape[1]], dim=1)
        return patches.unflatten(1, grid), det


class SwinBody(nn.Module):
    """Returns a pyramid of maps and the [DET] tokens as they are after the last block."""

    def __init__(
        self,
        variant: SwinVariant,
        *,
        det_token_num: int,
        pos_dim: int,
        cross_indices: tuple[int, ...],
        pyramid: bool = True,
    ) -> None:
        """Without the pyramid, for who reads [DET] tokens only, there is no last merging and no
        stride-64 map.
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
            Stage(
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
            # It moves nothing but patches that nobody reads: no gradient would ever come.
            last_block = [module for module in self.modules() if isinstance(module, Block)][-1]
            last_block.attn.relative_position_bias_table.requires_grad_(False)

    def forward(self, images: Tensor, padding: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """images [B, 3, H, W]; padding [B, H, W], True = padding. Returns the maps of strides 8,
        16, 32 and, with the pyramid, 64, each [B, channels, h, w]; the [DET] tokens [B, Q, 8 *
        embed_dim]; their position table [1, Q, pos_dim].
        """
        patches = self.patch_embed(images)
        det = self.det_token.expand(images.shape[0], -1, -1)
        # Two nearest steps, this one and the stage's, as released: their floors do not always agree
        # with one.
        height, width = (max(side // self.padding_divisor, 1) for side in patches.shape[1:3])
        padding = resize_padding(padding, (height, width))
        maps = []
        *earlier, last = self.layers
        for stage in earlier:
            assert isinstance(stage, Stage) and stage.downsample is not None
            patches, det = stage(patches, det, self.det_pos_embed, padding)
            maps.append(patches)
            patches, det = stage.downsample(patches), stage.downsample.merge_det(det)
        assert isinstance(last, Stage)
        patches, det = last(patches, det, self.det_pos_embed, padding)
        maps.append(patches)
        if last.downsample is not None:
            maps.append(last.downsample(patches))
        return [level.permute(0, 3, 1, 2) for level in maps[1:]], det, self.det_pos_embed
