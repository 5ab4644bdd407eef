"""Hungarian assignment of queries to objects (DETR, arXiv 2005.12872, section 3.1; costs of
Deformable DETR).

Letters: P prediction levels, B batch, Q queries, K classes, T the most objects in an image of the
batch.
"""

from collections.abc import Callable, Sequence
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
    """Matched pairs of all levels and images in one list; every field is int64 [pairs] on the
    predictions' device.
    """

    level: Tensor
    image: Tensor
    query: Tensor
    target: Tensor  # index among the image's objects

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the matched queries in predictions [P, B, Q, ...]."""
        return self.level, self.image, self.query


def focal_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal classification cost of each (object, query) pair: logits [P, B, Q, K] and labels [B, T]
    -> [P, B, T, Q]. Alpha 0.25 and gamma 2 are the released constants, independent of the loss.
    """
    if logits.shape[-1] <= labels.shape[1]:  # compute on the smaller tensor
        return of_labels(_focal(logits), labels)
    return _focal(of_labels(logits, labels))


def _focal(logits: Tensor) -> Tensor:
    probability = logits.sigmoid()
    rest = 1 - probability
    miss = (rest + EPS).log_().mul_(probability).mul_(probability).mul_(-0.75)
    hit = probability.add_(EPS).log_().mul_(rest).mul_(rest).mul_(-0.25)
    return hit.sub_(miss)


def of_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """Selects the columns of classes [B, T] from scores [P, B, Q, K]: a new tensor [P, B, T, Q]."""
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
        classification_cost: Callable[[Tensor, Tensor], Tensor] = focal_cost,
    ) -> None:
        """classification_cost: logits [P, B, Q, K] and labels [B, T] to a new tensor [P, B, T, Q];
        the other three are the weights of the costs.
        """
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.classification_cost = classification_cost

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Matches:
        """logits [P, B, Q, K]; boxes [P, B, Q, 4] cxcywh; each target has `labels` [n] and `boxes`
        [n, 4] cxcywh.

        If an image has more objects than queries, only as many objects are matched.
        """
        return self.each([(logits, boxes)], targets)[0]

    @torch.no_grad()
    def each(
        self, predictions: Sequence[tuple[Tensor, Tensor]], targets: list[dict[str, Tensor]]
    ) -> list[Matches]:
        """The matches of several (logits, boxes) of as many queries, whose costs come to the host
        together.
        """
        costs = torch.cat([self.costs(logits, boxes, targets) for logits, boxes in predictions])
        on_host = costs.cpu()  # the only synchronisation
        counts = [len(target["labels"]) for target in targets]
        pairs = [
            self.assign(part, counts).to(costs.device, non_blocking=True)
            for part in on_host.split([len(logits) for logits, _ in predictions])
        ]
        return [Matches(*each.unbind(0)) for each in pairs]

    def costs(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """[P, B, T, Q]; rows beyond an image's number of objects are meaningless.

        Costs are per image; queries are the last, longest axis.
        """
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)  # [B, T]
        padded = pad_sequence([target["boxes"] for target in targets], batch_first=True)
        true_boxes = padded.float().movedim(-1, 0).contiguous()[..., None]  # [4, B, T, 1]
        pred_boxes = boxes.float().movedim(-1, 0).contiguous()[..., None, :]  # [4, P, B, 1, Q]
        costs = self.classification_cost(logits.float(), labels).mul_(self.cost_class)
        for predicted, true in zip(pred_boxes, true_boxes, strict=True):
            costs.add_((predicted - true).abs_(), alpha=self.cost_bbox)
        costs.sub_(giou_matrix(pred_boxes, true_boxes), alpha=self.cost_giou)
        # A diverging run must reach the loss, which names the step and the terms, rather than fail
        # in scipy.
        return costs.nan_to_num_(nan=1e6, posinf=1e6, neginf=-1e6)

    def assign(self, costs: Tensor, counts: list[int]) -> Tensor:
        """Assigns by costs [P, B, T, Q], on the CPU, of which the first `counts` [B] rows of each
        image are valid: int64 [4, pairs] of level, image, query and target.
        """
        assigned = [
            linear_sum_assignment(image[:count])
            for level in costs.numpy()
            for image, count in zip(level, counts, strict=True)
        ]
        levels, images = np.divmod(np.arange(len(assigned)), len(counts))
        lengths = [len(targets) for targets, _ in assigned]
        queries = np.concatenate([queries for _, queries in assigned])
        targets = np.concatenate([targets for targets, _ in assigned])
        level, image = np.repeat(levels, lengths), np.repeat(images, lengths)
        return torch.from_numpy(np.stack([level, image, queries, targets]))


def matched_targets(matches: Matches, targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Labels [pairs] and boxes [pairs, 4] of the matched objects."""
    index = flat_index(matches, targets)
    labels = torch.cat([target["labels"] for target in targets])
    boxes = torch.cat([target["boxes"] for target in targets])
    return labels[index], boxes[index]


def flat_index(matches: Matches, targets: list[dict[str, Tensor]]) -> Tensor:
    """[pairs]: indices of the matched objects in the concatenated objects of all images."""
    counts = torch.tensor([0, *(len(target["labels"]) for target in targets)])
    first = counts.cumsum(0)[:-1].to(matches.image.device, non_blocking=True)
    return first[matches.image] + matches.target
