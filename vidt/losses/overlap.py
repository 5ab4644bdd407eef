"""Overlap of boxes, pair by pair or all with all, without synchronisation: torchvision's losses
index with a mask, which synchronises. Boxes are cxcywh, all in the same frame.

Letters: N pairs.
"""

import torch
from torch import Tensor
from torchvision.ops import box_convert

LEAST_AREA = 1e-12  # of a divisor; a box of one pixel in 10,000 has 1e-8


def paired_areas(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of the intersection, the union and the smallest enclosing box of each pair of boxes
    [N, 4]: [N] each.
    """
    first, second = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (first, second))
    (low, high), (other_low, other_high) = (boxes.split(2, dim=1) for boxes in (first, second))
    shared = _area((torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0))
    union = _area(high - low) + _area(other_high - other_low) - shared
    return shared, union, _area(torch.maximum(high, other_high) - torch.minimum(low, other_low))


def _area(sides: Tensor) -> Tensor:
    """[N, 2] to [N]; its gradient is simpler than that of `prod`."""
    return sides[:, 0] * sides[:, 1]


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of each pair of boxes [N, 4]: [N]."""
    shared, union, _ = paired_areas(first, second)
    return shared / union.clamp(min=LEAST_AREA)


def giou_losses(first: Tensor, second: Tensor) -> Tensor:
    """1 - generalised IoU (arXiv 1902.09630) of each pair of boxes [N, 4]: [N]."""
    shared, union, frame = paired_areas(first, second)
    union, frame = union.clamp(min=LEAST_AREA), frame.clamp(min=LEAST_AREA)
    return 1 - shared / union + (frame - union) / frame


@torch.no_grad()
def giou_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of boxes [4, ...] whose other dimensions are broadcast. Works in place where
    possible, since such matrices are large.
    """
    overlap, frame = first.new_ones(()), first.new_ones(())
    for axis in (0, 1):
        centre, side, other_centre, other_side = (
            box[part] for box in (first, second) for part in (axis, axis + 2)
        )
        shared = torch.minimum(centre + side / 2, other_centre + other_side / 2)
        shared -= torch.maximum(centre - side / 2, other_centre - other_side / 2)
        frame = (side + other_side).sub_(shared).mul_(frame)  # before the clamp
        overlap = shared.clamp_(min=0).mul_(overlap)
    union = (first[2] * first[3] + second[2] * second[3]).sub_(overlap)
    return overlap.div_(union).add_(union.div_(frame)).sub_(1)
