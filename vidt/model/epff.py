"""The pyramid in the decoder's channels: level by level, or fused from coarse to fine (EPFF of
ViDT+, arXiv 2204.07962, section 3.1).

Letters: B batch, C channels of the decoder, h x w a level's grid.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """1 x 1 convolution and GroupNorm over the whole map, as released."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1)
    _start(convolution)
    return nn.Sequential(convolution, nn.GroupNorm(32, out_channels))


def _start(module: nn.Module) -> None:
    """Initialises the 1 x 1 convolutions: Xavier weights, zero bias."""
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv2d) and convolution.kernel_size == (1, 1):
            nn.init.xavier_uniform_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)


class LevelProjections(nn.ModuleList):
    """ViDT: projects every level by itself."""

    def __init__(self, in_channels: tuple[int, ...], dim: int) -> None:
        super().__init__(projection(channels, dim) for channels in in_channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """maps [B, its channels, h, w] -> the same levels, each [B, C, h, w]."""
        return [project(level) for project, level in zip(self, maps, strict=True)]


class ResidualUnit(nn.Module):
    """A residual bottleneck of three convolutions, each after a ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim // 4, kernel_size=1)
        self.conv2 = nn.Conv2d(dim // 4, dim // 4, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(dim // 4, dim, kernel_size=1)

    def forward(self, level: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        hidden = level
        for convolution in (self.conv1, self.conv2, self.conv3):
            hidden = convolution(F.relu(hidden))
        return level + hidden


class CoarsestFusion(nn.Module):
    """The coarsest level, where the fusion starts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resConfUnit2 = ResidualUnit(dim)

    def forward(self, level: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        return self.resConfUnit2(level)


class Fusion(nn.Module):
    """Fuses a level with the fused coarser level."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.smoothing = nn.Conv2d(dim, dim, kernel_size=1)
        self.resConfUnit1 = ResidualUnit(dim)
        self.resConfUnit2 = ResidualUnit(dim)

    def forward(self, level: Tensor, coarser: Tensor) -> Tensor:
        """level [B, C, h, w] and coarser, the fused coarser level -> [B, C, h, w]."""
        grown = F.interpolate(coarser, level.shape[2:], mode="bilinear", align_corners=True)
        return self.resConfUnit2(self.smoothing(grown) + self.resConfUnit1(level))


class EPFF(nn.Module):
    """Efficient pyramid feature fusion: every level receives all coarser ones."""

    def __init__(self, in_channels: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.project = LevelProjections(in_channels, dim)
        finer = [Fusion(dim) for _ in in_channels[:-1]]
        self.refinenet = nn.ModuleList([*finer, CoarsestFusion(dim)])
        _start(self)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """maps [B, its channels, h, w], fine to coarse -> fused levels [B, C, h, w], coarse to
        fine: the order in which the released decoder was trained.
        """
        *finer, coarsest = self.project(maps)
        fused = [self.refinenet[-1](coarsest)]
        for level, fuse in zip(reversed(finer), reversed(self.refinenet[:-1]), strict=True):
            fused.append(fuse(level, fused[-1]))
        return fused
