"""The set loss of ViDT without its neck (arXiv 2110.03921, section 4.2): a softmax over the classes
and a background, as in DETR (arXiv 2005.12872).

Letters: B batch, Q [DET] tokens, K classes, T targets, N matched pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidt.losses.matcher import HungarianMatcher, Matches, matched_targets, of_labels
from vidt.losses.overlap import giou_losses


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative probability of each object's class: logits [1, B, Q, K + 1] and labels [B, T] ->
    [1, B, T, Q].
    """
    return -of_labels(logits.softmax(-1), labels)


class SoftmaxCriterion(nn.Module):
    """Weighted loss terms `loss_ce`, `loss_bbox` and `loss_giou`; the training loss is their plain
    sum.

    The released code averages the cross entropy over the queries of one GPU; here it is averaged
    over those of a whole optimiser step. With one micro-batch on one device the two agree, if there
    is an object and no image has more of them than [DET] tokens.
    """

    normalised_by = ("num_boxes", "num_images")

    def __init__(
        self,
        matcher: HungarianMatcher | None = None,
        *,
        cls_loss_coef: float = 1.0,
        bbox_loss_coef: float = 5.0,
        giou_loss_coef: float = 2.0,
        eos_coef: float = 0.1,
    ) -> None:
        """eos_coef: weight of background queries in the cross entropy."""
        super().__init__()
        self.matcher = matcher or HungarianMatcher(classification_cost=softmax_cost)
        self.weights = {"ce": cls_loss_coef, "bbox": bbox_loss_coef, "giou": giou_loss_coef}
        self.eos_coef = eos_coef

    def forward(
        self,
        outputs: dict[str, Tensor],
        targets: list[dict[str, Tensor]],
        num_boxes: float | Tensor,
        num_images: float | None = None,
    ) -> dict[str, Tensor]:
        """outputs of `ViDTWithoutNeck`; targets with `labels` [n] and `boxes` [n, 4] cxcywh in
        0..1. num_boxes and num_images are the normalisers, counts of the whole optimiser step; the
        default of num_images is the number of these images. Returns scalars by name.
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        matches = self.match(outputs, targets)
        labels, true_boxes = matched_targets(matches, targets)
        pred_boxes = boxes[matches.index[1:]]  # [N, 4]
        num_queries = (num_images or len(logits)) * logits.shape[1]
        # Total weight of all queries of the step; each object has one query.
        weight = num_boxes + self.eos_coef * (num_queries - num_boxes)
        sums = {
            "ce": self._cross_entropy(logits, matches, labels) / weight,
            "bbox": (pred_boxes - true_boxes).abs().sum() / num_boxes,
            "giou": giou_losses(pred_boxes, true_boxes).sum() / num_boxes,
        }
        return {f"loss_{name}": self.weights[name] * value for name, value in sums.items()}

    def match(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Matches:
        """Assignment of the only prediction level."""
        return self.matcher(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)

    def _cross_entropy(self, logits: Tensor, matches: Matches, labels: Tensor) -> Tensor:
        """Sum over queries, weighted by class. Unmatched queries count as background."""
        background = logits.shape[-1] - 1
        classes = torch.full(logits.shape[:2], background, device=logits.device)
        classes[matches.index[1:]] = labels
        class_weights = logits.new_ones(logits.shape[-1])
        class_weights[background] = self.eos_coef
        return F.cross_entropy(logits.mT, classes, class_weights, reduction="sum")
