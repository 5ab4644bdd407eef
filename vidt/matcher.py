"""Hungarian assignment of queries to objects (DETR, arXiv 2005.12872, section 3.1; costs of
Deformable DETR).

Letters: L prediction levels, B batch, Q queries, K classes, T most objects in an image of the
batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, generalized_box_iou

EPS = 1e-8


@dataclass(frozen=True)
class Matches:
    """Pairs of all levels and images in one flat list; every field is [pairs] int64 on the outputs'
    device.
    """

    level: Tensor
    image: Tensor
    query: Tensor
    target: Tensor  # index within the image's own targets


def focal_cost(logits: Tensor) -> Tensor:
    """What each class would cost by the focal loss. Alpha .25 and gamma 2 are the released
    constants, whatever the loss has.
    """
    probability = logits.sigmoid()
    hit = 0.25 * (1 - probability) ** 2 * -(probability + EPS).log()
    miss = 0.75 * probability**2 * -(1 - probability + EPS).log()
    return hit - miss


class HungarianMatcher(nn.Module):
    """Finds, per level and image, the assignment of least total cost."""

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        *,
        class_cost: Callable[[Tensor], Tensor] = focal_cost,
    ) -> None:
        """class_cost: logits [..., K] to the cost of every class, of the same shape."""
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.class_cost = class_cost

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Matches:
        """logits [L, B, Q, K]; boxes [L, B, Q, 4] cxcywh; each target has `labels` [n] and `boxes`
        [n, 4] cxcywh.

        Where an image has more objects than queries, as many objects as there are queries are
        matched.
        """
        costs = self.costs(logits, boxes, targets).cpu().numpy()  # the one wait for the device
        counts = [len(target["labels"]) for target in targets]
        pairs: list[Tensor] = []
        for level in range(len(costs)):
            for image, count in enumerate(counts):
                rows, columns = linear_sum_assignment(costs[level, image, :, :count])
                pair = torch.empty(4, len(rows), dtype=torch.int64)
                pair[0], pair[1] = level, image
                pair[2], pair[3] = torch.from_numpy(rows), torch.from_numpy(columns)
                pairs.append(pair)
        return Matches(*torch.cat(pairs, dim=1).to(logits.device, non_blocking=True).unbind(0))

    def costs(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """[L, B, Q, T]; the columns past an image's own count are meaningless."""
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)  # [B, T]
        wanted = pad_sequence(
            [target["boxes"] for target in targets], batch_first=True
        )  # [B, T, 4]
        index = labels[None, :, None, :].expand(*logits.shape[:3], -1)
        cost_class = self.class_cost(logits.float()).gather(-1, index)
        cost_bbox = torch.cdist(boxes.float(), wanted[None].expand(len(boxes), -1, -1, -1), p=1)
        costs = self.cost_bbox * cost_bbox + self.cost_class * cost_class
        costs = costs - self.cost_giou * _pairwise_giou(boxes.float(), wanted)
        # A diverging run must reach the loss, which names the step and the terms, rather than fail
        # in scipy.
        return costs.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)


def matched_targets(matches: Matches, targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Labels [pairs] and boxes [pairs, 4] of the matched objects."""
    index = flat_index(matches, targets)
    labels = torch.cat([target["labels"] for target in targets])
    boxes = torch.cat([target["boxes"] for target in targets])
    return labels[index], boxes[index]


def flat_index(matches: Matches, targets: list[dict[str, Tensor]]) -> Tensor:
    """[pairs]: places of the matched objects among those of all images in one list."""
    counts = torch.tensor([0, *(len(target["labels"]) for target in targets)])
    first = counts.cumsum(0)[:-1].to(matches.image.device, non_blocking=True)
    return first[matches.image] + matches.target


def _pairwise_giou(boxes: Tensor, wanted: Tensor) -> Tensor:
    """boxes [L, B, Q, 4] and wanted [B, T, 4], both cxcywh -> [L, B, Q, T]."""
    levels, _, queries, _ = boxes.shape
    first = box_convert(boxes, "cxcywh", "xyxy")
    second = box_convert(wanted, "cxcywh", "xyxy")
    images = [
        generalized_box_iou(first[:, image].flatten(0, 1), second[image]).unflatten(
            0, (levels, queries)
        )
        for image in range(len(wanted))
    ]
    return torch.stack(images, dim=1)
