"""Denoising queries: extra queries of the decoder that start at boxes near the objects, in training
only (DN-DETR, arXiv 2203.01305).

Letters: B batch, Q detection queries, N denoising queries.
"""

import math

import torch
from torch import Tensor


def denoising_position(boxes: Tensor, dim: int) -> Tensor:
    """Position of the denoising queries: the sine encoding of their boxes (DAB-DETR, arXiv
    2201.12329, equation 4). boxes [B, N, 4] cxcywh -> [B, N, dim].

    DN-DETR (arXiv 2203.01305) trains a decoder to denoise boxes near the objects as well as to
    detect objects. Its queries carry a learned label embedding. Ours carry the position only: the
    class must come from the image, and no weights are added to the released model.
    """
    channel = torch.arange(dim // 8, device=boxes.device)
    angle = boxes[..., None] * (2 * math.pi) / 20 ** (channel / (dim // 8))  # [B, N, 4, dim / 8]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)


def denoising_mask(num_queries: int, num_denoising: int, device: torch.device) -> Tensor:
    """[Q + N, Q + N] bool, True = masked: a denoising query attends to itself and to the detection
    queries; no other query attends to it.
    """
    total = num_queries + num_denoising
    denoising = torch.arange(total, device=device) >= num_queries
    itself = torch.eye(total, dtype=torch.bool, device=device)
    return denoising & ~itself
