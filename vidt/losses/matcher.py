"""Hungarian assignment of queries to objects (DETR, arXiv 2005.12872, section 3.1; costs of
Deformable DETR).

Letters: L prediction levels, B batch, Q queries, K classes, T most objects in an image of the
batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vidt.losses.overlap import giou_matrix

EPS = 1e-8


@dataclass(frozen=True, eq=False)
class Matches:
    """Pairs of all levels and images in one flat list; every field is [pairs] int64 on the outputs'
    device.
    """

    level: Tensor
    image: Tensor
    query: Tensor
    target: Tensor  # index within the image's own targets

    @property
    def place(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the matched queries are in predictions [L, B, Q, ...]."""
        return self.level, self.image, self.query


def focal_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """What objects' classes would cost by the focal loss. Alpha .25 and gamma 2 are the released
    constants, whatever the loss has.
    """
    if logits.shape[-1] <= labels.shape[1]:  # the formula is worked out on the fewer
        return of_labels(_focal(logits), labels)
    return _focal(of_labels(logits, labels))


def _focal(logits: Tensor) -> Tensor:
    probability = logits.sigmoid()
    rest = 1 - probability
    miss = (rest + EPS).log_().mul_(probability).mul_(probability).mul_(-0.75)
    hit = probability.add_(EPS).log_().mul_(rest).mul_(rest).mul_(-0.25)
    return hit.sub_(miss)


def of_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """What scores [L, B, Q, K] say of classes [B, T]: a new tensor [L, B, T, Q]."""
    image = torch.arange(len(labels), device=labels.device)[:, None]
    return scores.mT[:, image, labels]


class HungarianMatcher(nn.Module):
    """Finds, per level and image, the assignment of least total cost."""

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        *,
        class_cost: Callable[[Tensor, Tensor], Tensor] = focal_cost,
    ) -> None:
        """class_cost: logits [L, B, Q, K] and labels [B, T] to a new tensor [L, B, T, Q]."""
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
        costs = self.costs(logits, boxes, targets).cpu()  # the one wait for the device
        pairs = self.assign(costs, [len(target["labels"]) for target in targets])
        return Matches(*pairs.to(logits.device, non_blocking=True).unbind(0))

    def costs(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """[L, B, T, Q]; the rows past an image's own count are meaningless.

        Only boxes of one image meet, and queries come last: they are the many.
        """
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)  # [B, T]
        padded = pad_sequence([target["boxes"] for target in targets], batch_first=True)
        wanted = padded.float().movedim(-1, 0).contiguous()[..., None]  # [4, B, T, 1]
        found = boxes.float().movedim(-1, 0).contiguous()[..., None, :]  # [4, L, B, 1, Q]
        costs = self.class_cost(logits.float(), labels).mul_(self.cost_class)
        for ours, theirs in zip(found, wanted, strict=True):
            costs.add_((ours - theirs).abs_(), alpha=self.cost_bbox)
        costs.sub_(giou_matrix(found, wanted), alpha=self.cost_giou)
        # A diverging run must reach the loss, which names the step and the terms, rather than fail
        # in scipy.
        return costs.nan_to_num_(nan=1e6, posinf=1e6, neginf=-1e6)

    def assign(self, costs: Tensor, counts: list[int]) -> Tensor:
        """The assignments of costs [L, B, T, Q], on the CPU, of which only the first `counts` [B]
        rows of an image are there: int64 [4, pairs] of level, image, query and target.
        """
        found = [
            linear_sum_assignment(image[:count])
            for level in costs.numpy()
            for image, count in zip(level, counts, strict=True)
        ]
        levels, images = np.divmod(np.arange(len(found)), len(counts))
        lengths = [len(targets) for targets, _ in found]
        queries = np.concatenate([queries for _, queries in found])
        targets = np.concatenate([targets for targets, _ in found])
        place = (np.repeat(levels, lengths), np.repeat(images, lengths))
        return torch.from_numpy(np.stack([*place, queries, targets]))


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
