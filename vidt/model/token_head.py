"""The token-label head of ViDT+ (arXiv 2204.07962, section 3.2): predicts the classes at every
position of the pyramid. It is used in training only; boxes do not depend on it. Its losses and the
meaning of its columns are in `vidt.losses.token_labels`.

Letters: B batch, h x w a level's grid, C channels, K columns.
"""

import math

import torch
from torch import Tensor, nn

MARGIN = 0.01  # of the image's size: positions within it of the edge are masked out


class TokenHead(nn.Module):
    """Logits of the columns at every position of every level."""

    def __init__(self, dim: int, columns: int) -> None:
        super().__init__()
        self.enc_output = nn.Linear(dim, dim)
        self.enc_output_norm = nn.LayerNorm(dim)
        self.token_embed = nn.Linear(dim, columns)
        for linear in (self.enc_output, self.token_embed):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.constant_(self.token_embed.bias, -math.log(99))

    def forward(self, maps: list[Tensor], paddings: list[Tensor]) -> list[Tensor]:
        """maps [B, C, h, w] and paddings [B, h, w] of each level -> logits [B, h, w, K] of each."""
        return [
            self._logits((level * inside(padding)[:, None]).permute(0, 2, 3, 1))
            for level, padding in zip(maps, paddings, strict=True)
        ]

    def _logits(self, positions: Tensor) -> Tensor:
        return self.token_embed(self.enc_output_norm(self.enc_output(positions)))


def inside(padding: Tensor) -> Tensor:
    """padding [B, h, w] -> [B, h, w], True where a position is in the image and off its edge."""
    off_edge = [
        _off_edge(length, valid)
        for length, valid in zip(padding.shape[1:], valid_sizes(padding), strict=True)
    ]
    return ~padding & off_edge[0][:, :, None] & off_edge[1][:, None, :]


def _off_edge(length: int, valid: Tensor) -> Tensor:
    centre = (torch.arange(length, device=valid.device) + 0.5) / valid[:, None]
    return (centre > MARGIN) & (centre < 1 - MARGIN)


def valid_sizes(padding: Tensor) -> tuple[Tensor, Tensor]:
    """Unpadded height and width of each image, [B] each."""
    return (~padding[:, :, 0]).sum(1), (~padding[:, 0, :]).sum(1)
