"""Extra queries of the decoder, in training only: denoising queries, which start at boxes near the
objects (DN-DETR, arXiv 2203.01305), and more groups of detection queries (Group DETR, arXiv
2207.13085). No detection query attends to them, so they change no detection.

Letters: B batch, Q detection queries, E extra queries, N denoising queries, C channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DENOISING = -1  # in place of a group's number
DETECTION = 0  # group of the detection queries


@dataclass(frozen=True)
class ExtraQueries:
    """Queries that the decoder appends to its detection queries."""

    content: Tensor  # [B, E, C]
    position: Tensor  # [B, E, C]
    boxes: Tensor  # [B, E, 4] cxcywh in 0..1, from which the first layer starts
    group: Tensor  # [E] int64: 1 and up, or DENOISING

    @classmethod
    def joined(cls, parts: "list[ExtraQueries]") -> "ExtraQueries | None":
        """The queries of all parts, in their order; None for no parts."""
        if not parts:
            return None
        return cls(
            torch.cat([part.content for part in parts], dim=1),
            torch.cat([part.position for part in parts], dim=1),
            torch.cat([part.boxes for part in parts], dim=1),
            torch.cat([part.group for part in parts]),
        )


def denoising_queries(boxes: Tensor, content: Tensor | None, dim: int) -> ExtraQueries:
    """Queries that start at boxes [B, N, 4] cxcywh in 0..1. content [B, N, dim] is an embedding of
    their labels; None: zeros, so that the class must come from the image.
    """
    position = box_position(boxes, dim)
    group = torch.full((boxes.shape[1],), DENOISING, device=boxes.device)
    return ExtraQueries(
        torch.zeros_like(position) if content is None else content, position, boxes, group
    )


def box_position(boxes: Tensor, dim: int) -> Tensor:
    """The sine encoding of boxes (DAB-DETR, arXiv 2201.12329, equation 4): boxes [B, N, 4] cxcywh
    -> [B, N, dim].
    """
    channel = torch.arange(dim // 8, device=boxes.device)
    angle = boxes[..., None] * (2 * math.pi) / 20 ** (channel / (dim // 8))  # [B, N, 4, dim / 8]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)


def attention_mask(num_queries: int, group: Tensor) -> Tensor:
    """[Q + E, Q + E] bool, True = masked, for extra queries of `group` [E]: the detection queries
    and each further group attend to themselves; a denoising query attends to itself and to the
    detection queries.
    """
    groups = torch.cat([group.new_full((num_queries,), DETECTION), group])
    denoising = groups == DENOISING
    seen = (groups[:, None] == groups) & ~denoising
    seen |= denoising[:, None] & (groups == DETECTION)
    return ~(seen | torch.eye(len(groups), dtype=torch.bool, device=group.device))
