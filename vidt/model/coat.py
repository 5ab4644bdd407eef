"""CoaT-lite backbone that carries [DET] tokens (ViDT, arXiv 2110.03921; CoaT, arXiv 2104.06399).

Differs from timm's CoaT: the convolutional position is added after the norm and off the residual
path; [DET] tokens travel along, with attention of their own over the same weights; a fifth
embedding makes the stride-64 map.

Letters: B batch, H x W stage grid, N = H * W, Q [DET] tokens, C channels of the stage, M heads, D =
C / M.
"""

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from vidt.model.config import CoatVariant
from vidt.model.ram import attend_det, autocasted, resize_padding, sine_position, split_heads
from vidt.model.swin import COARSE_DIM, PatchEmbedding

NUM_HEADS = 8
HEADS_BY_KERNEL = {3: 2, 5: 3, 7: 3}  # kernel of the relative position -> heads that have it


class ConvPosition(nn.Module):
    """Position by a depthwise convolution over the patch map (CoaT, section 3.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        patch_map = patches.mT.unflatten(-1, grid)
        return (self.proj(patch_map) + patch_map).flatten(2).mT


class ConvRelativePosition(nn.Module):
    """Relative position inside the attention: depthwise convolutions of the values, of a kernel
    that grows with the heads (CoaT, section 3.2).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channels = [heads * dim // NUM_HEADS for heads in HEADS_BY_KERNEL.values()]
        self.conv_list = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel_size=kernel, padding=kernel // 2, groups=channels)
            for kernel, channels in zip(HEADS_BY_KERNEL, self.channels, strict=True)
        )

    def forward(self, query: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """query and values of the patches, each [B, M, N, D] -> [B, M, N, D]."""
        value_map = values.mT.flatten(1, 2).unflatten(-1, grid)  # [B, C, H, W]
        parts = value_map.split(self.channels, dim=1)
        relative = [conv(part) for conv, part in zip(self.conv_list, parts, strict=True)]
        return query * torch.cat(relative, dim=1).flatten(2).unflatten(1, (NUM_HEADS, -1)).mT


class FactorizedAttention(nn.Module):
    """Attention of patches in linear time, and global attention of [DET] tokens, with shared
    weights.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = (dim // NUM_HEADS) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        tokens: Tensor,
        det: Tensor,
        patches: Tensor,
        position: Tensor | None,
        padding: Tensor | None,
        crpe: nn.Module,
        grid: tuple[int, int],
    ) -> Tensor:
        """tokens [B, 1 + N, C], the class token first; det [B, Q, C] with the [DET] position added;
        patches [B, N, C] without the convolutional position, which [DET] tokens do not see;
        position [B, N, C] and padding [B, N] (True = padding) in stages whose [DET] tokens attend
        to the patches, else None. Returns tokens and det as [B, 1 + N + Q, C].
        """
        query, keys, values = split_heads(self.qkv(tokens), NUM_HEADS)
        context = keys.softmax(dim=2).mT @ values  # [B, M, D, D]
        relative = crpe(query[:, :, 1:], values[:, :, 1:], grid)
        # The class token has no position on the map.
        attended = self.scale * (query @ context) + F.pad(relative, (0, 0, 1, 0))
        patch_kv = None
        if position is not None:
            dim = det.shape[2]
            tokens = patches + position.to(patches.dtype)
            patch_kv = F.linear(tokens, self.qkv.weight[dim:], self.qkv.bias[dim:])
        det_out = attend_det(self.qkv(det), patch_kv, padding, NUM_HEADS)
        return self.proj(torch.cat([attended.transpose(1, 2).flatten(2), det_out], dim=1))


class CoatBlock(nn.Module):
    """Pre-norm block; norms, attention and MLP are shared by class token, patches and [DET]
    tokens.
    """

    def __init__(self, dim: int, *, mlp_ratio: int, pos_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.det_pos_linear = nn.Linear(pos_dim, dim)
        self.factoratt_crpe = FactorizedAttention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden_features=mlp_ratio * dim)
        for layer in (self.factoratt_crpe.qkv, self.factoratt_crpe.proj, *self.mlp.children()):
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        tokens: Tensor,
        det_pos: Tensor,
        grid: tuple[int, int],
        cpe: nn.Module,
        crpe: nn.Module,
        position: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """tokens [B, 1 + N + Q, C]: class token, patches, [DET] tokens; det_pos [1, Q, pos_dim];
        position and padding [B, N] as the stage's. Returns tokens of the same shape.
        """
        count = grid[0] * grid[1]
        normed = autocasted(self.norm1(tokens))
        cls, patches, det = normed.split([1, count, det_pos.shape[1]], dim=1)
        attended = self.factoratt_crpe(
            torch.cat([cls, cpe(patches, grid)], dim=1),
            det + self.det_pos_linear(det_pos),
            patches,
            position,
            padding,
            crpe,
            grid,
        )
        tokens = tokens + attended
        return tokens + self.mlp(self.norm2(tokens))


class CoatStage(nn.Module):
    """Patch embedding and the blocks of one resolution, which share the stage's convolutions."""

    def __init__(
        self,
        dim: int,
        in_dim: int | None,
        *,
        depth: int,
        mlp_ratio: int,
        pos_dim: int,
        det_sees_patches: bool,
    ) -> None:
        """in_dim: channels of the stage before, None for the first stage, which takes images."""
        super().__init__()
        self.det_sees_patches = det_sees_patches
        self.det_exp: nn.Module
        if in_dim is None:
            self.patch_embed = PatchEmbedding(dim)
            self.det_exp = nn.Identity()
        else:
            self.patch_embed = PatchEmbedding(dim, patch=2, in_channels=in_dim)
            self.det_exp = nn.Sequential(nn.Linear(in_dim, dim, bias=False), nn.LayerNorm(dim))
            trunc_normal_(self.det_exp[0].weight, std=0.02)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        trunc_normal_(self.cls_token, std=0.02)
        self.cpe = ConvPosition(dim)
        self.crpe = ConvRelativePosition(dim)
        self.serial_blocks = nn.ModuleList(
            CoatBlock(dim, mlp_ratio=mlp_ratio, pos_dim=pos_dim) for _ in range(depth)
        )

    def forward(
        self, images: Tensor, det: Tensor, det_pos: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """images [B, C_in, h, w], the pictures or the map of the stage before; det [B, Q, C_in];
        padding [B, h, w], True = padding, at the backbone's base size. Returns the map [B, C, H, W]
        and det [B, Q, C].
        """
        patches = self.patch_embed(images)
        grid, dim = (patches.shape[1], patches.shape[2]), patches.shape[3]
        position = stage_padding = None
        if self.det_sees_patches:
            grid_padding = resize_padding(padding, grid)
            position = autocasted(sine_position(grid_padding, dim))
            stage_padding = grid_padding.flatten(1)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([cls, patches.flatten(1, 2), self.det_exp(det)], dim=1)
        for block in self.serial_blocks:
            tokens = block(tokens, det_pos, grid, self.cpe, self.crpe, position, stage_padding)
        _, patches, det = tokens.split([1, grid[0] * grid[1], det.shape[1]], dim=1)
        return patches.mT.unflatten(-1, grid), det


class CoatBackbone(nn.Module):
    """Images to a pyramid of maps and the [DET] tokens after the last block."""

    def __init__(
        self,
        variant: CoatVariant,
        *,
        det_token_num: int,
        pos_dim: int,
        cross_indices: tuple[int, ...],
        pyramid: bool = True,
    ) -> None:
        """pyramid: whether there is a stride-64 map. A detector that only reads the [DET] tokens
        does not need one.
        """
        super().__init__()
        dims = variant.dims
        self.num_channels = (*dims[1:], COARSE_DIM) if pyramid else dims[1:]
        self.padding_divisor = 2 ** (4 - len(cross_indices))
        self.det_token = nn.Parameter(torch.zeros(1, det_token_num, dims[0]))
        self.det_pos_embed = nn.Parameter(torch.zeros(1, det_token_num, pos_dim))
        self.stages = nn.ModuleList(
            CoatStage(
                dims[stage],
                dims[stage - 1] if stage else None,
                depth=variant.depths[stage],
                mlp_ratio=variant.mlp_ratios[stage],
                pos_dim=pos_dim,
                det_sees_patches=stage in cross_indices,
            )
            for stage in range(4)
        )
        self.patch_embed5 = (
            PatchEmbedding(COARSE_DIM, patch=2, in_channels=dims[3]) if pyramid else None
        )
        trunc_normal_(self.det_token, std=0.02)
        trunc_normal_(self.det_pos_embed, std=0.02)

    def forward(self, images: Tensor, padding: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """images [B, 3, H, W]; padding [B, H, W], True = padding. Returns the maps of strides 8,
        16, 32 and, with the pyramid, 64, each [B, channels, h, w]; the [DET] tokens [B, Q,
        dims[3]]; their position table [1, Q, pos_dim].
        """
        # The padding is resized in two nearest-neighbour steps, here and in the stage, as released;
        # unlike in Swin, the first divides the size of the image.
        height, width = (max(side // self.padding_divisor, 1) for side in images.shape[2:])
        padding = resize_padding(padding, (height, width))
        det = self.det_token.expand(images.shape[0], -1, -1)
        patch_map, maps = images, []
        for stage in self.stages:
            patch_map, det = stage(patch_map, det, self.det_pos_embed, padding)
            maps.append(patch_map)
        maps = maps[1:]
        if self.patch_embed5 is not None:
            maps.append(self.patch_embed5(patch_map).permute(0, 3, 1, 2))
        return maps, det, self.det_pos_embed
