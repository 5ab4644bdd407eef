"""Set loss of ViDT (arXiv 2110.03921, section 3.3; DETR, arXiv 2005.12872): focal, L1 and GIoU on
matched pairs, and what ViDT+ adds (arXiv 2204.07962): how well a box fits, mask vectors and token
labels.

All prediction levels are matched and scored together: level l of the decoder is one row of a
stacked tensor.

Letters: L prediction levels, B batch, Q queries, K classes, N matched pairs of all levels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidt.losses.mask_vectors import encode_squares, square_masks
from vidt.losses.matcher import HungarianMatcher, Matches, flat_index, matched_targets
from vidt.losses.overlap import giou_losses, paired_iou
from vidt.losses.softmax_criterion import SoftmaxCriterion
from vidt.losses.token_labels import has_masks, token_label_losses
from vidt.model.config import ViDTConfig

Targets = list[dict[str, Tensor]]
Levels = list[dict[str, Tensor]]
Stacked = dict[str, Tensor]  # predictions by name, [L, B, Q, ...]


def criterion_for(config: ViDTConfig) -> "SetCriterion | SoftmaxCriterion":
    """The criterion for a detector of this configuration, with the published loss weights. Call it
    with outputs, targets and, by keyword, the counts that its `normalised_by` names.
    """
    if config.method == "vidt_wo_neck":
        return SoftmaxCriterion()
    return SetCriterion(token_label_shift=config.token_label_shift, gt_mask_len=config.gt_mask_len)


class SetCriterion(nn.Module):
    """Weighted loss terms by name; the training loss is their plain sum.

    Terms are `loss_ce`, `loss_bbox`, `loss_giou` for the last prediction level, and with suffix
    `_0`, `_1`, ... for the earlier ones; likewise `loss_iouaware` and `loss_vector` where the
    outputs have IoUs and vectors. Token labels give `loss_token_focal` and `loss_token_dice`.

    Differs from the released code in one normaliser: a vector's loss is a mean over the objects of
    the whole step, as all other terms are, rather than over the pairs that one process holds.
    """

    normalised_by = ("num_boxes",)

    def __init__(
        self,
        matcher: HungarianMatcher | None = None,
        *,
        cls_loss_coef: float = 2.0,
        bbox_loss_coef: float = 5.0,
        giou_loss_coef: float = 2.0,
        iouaware_loss_coef: float = 2.0,
        token_loss_coef: float = 2.0,
        vector_loss_coef: float = 3.0,
        focal_alpha: float = 0.25,
        vector_loss_norm: bool = True,
        vector_start_stage: int = 0,
        token_label_shift: bool = True,
        gt_mask_len: int = 128,
    ) -> None:
        """vector_loss_norm: a vector's loss is the mean over its numbers, else their sum;
        vector_start_stage: the first prediction level whose vectors count; gt_mask_len: side of the
        square in which masks are described.
        """
        super().__init__()
        self.matcher = matcher or HungarianMatcher()
        self.weights = {
            "ce": cls_loss_coef,
            "bbox": bbox_loss_coef,
            "giou": giou_loss_coef,
            "iouaware": iouaware_loss_coef,
            "vector": vector_loss_coef,
            "token": token_loss_coef,
        }
        self.focal_alpha = focal_alpha
        self.vector_loss_norm, self.vector_start_stage = vector_loss_norm, vector_start_stage
        self.token_label_shift, self.gt_mask_len = token_label_shift, gt_mask_len

    def forward(
        self, outputs: dict, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """outputs of `ViDT`; targets with `labels` [n] and `boxes` [n, 4] cxcywh in 0..1, and for
        vectors and token labels `masks` [n, H, W] bool on the image, `mask_boxes` [n, 4] xyxy in
        its pixels and `has_mask` [n], where objects have them; num_boxes normalises, and is counted
        by the caller over everything that makes one optimiser step. Returns scalars by name.
        """
        found = stacked(prediction_levels(outputs))
        matches = self.matcher(found["pred_logits"], found["pred_boxes"], targets)
        sums = self._sums(found, matches, targets)
        if "pred_ious" in found:
            sums["iouaware"] = self._iou_sums(found, matches, targets)
        of_levels = {
            name: (each * (self.weights[name] / num_boxes)).unbind() for name, each in sums.items()
        }
        terms = {
            f"loss_{name}{suffix}": each[level]
            for level, suffix in _suffixes(len(found["pred_logits"]))
            for name, each in of_levels.items()
        }
        if "pred_vectors" in found:
            terms |= self._vectors(found["pred_vectors"], matches, targets, num_boxes)
        if "enc_tokens" in outputs:
            terms |= self._tokens(outputs["enc_tokens"], targets, num_boxes)
        if "denoising_outputs" in outputs:
            terms |= self._denoising(stacked(outputs["denoising_outputs"]), targets, num_boxes)
        return terms

    def match(self, outputs: dict, targets: Targets) -> Matches:
        """Assignment of every level, earlier levels first, the last prediction level last."""
        levels = prediction_levels(outputs)
        return self.matcher(stack(levels, "pred_logits"), stack(levels, "pred_boxes"), targets)

    def _iou_sums(self, found: Stacked, matches: Matches, targets: Targets) -> Tensor:
        """[L]: cross entropy of the predicted IoU. As released the IoU it should be keeps its
        gradient, which moves the boxes as well.
        """
        _, wanted = matched_targets(matches, targets)
        ious = paired_iou(found["pred_boxes"][matches.place], wanted)
        logits = found["pred_ious"][(*matches.place, 0)]
        losses = F.binary_cross_entropy_with_logits(logits, ious, reduction="none")
        return per_level(losses, matches, len(found["pred_ious"]))

    def _vectors(
        self, vectors: Tensor, matches: Matches, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Terms `loss_vector*`: L1 of the vectors [L, B, Q, n_keep] of matched objects that have a
        mask.
        """
        wanted, known = wanted_vectors(targets, self.gt_mask_len, vectors.shape[-1])
        index = flat_index(matches, targets)
        losses = (vectors[matches.place] - wanted[index]).abs().sum(-1) * known[index]
        scale = self.weights["vector"] / (vectors.shape[-1] if self.vector_loss_norm else 1)
        terms = (per_level(losses, matches, len(vectors)) * (scale / num_boxes)).unbind()
        return {
            f"loss_vector{suffix}": terms[level]
            for level, suffix in _suffixes(len(vectors))
            if level >= self.vector_start_stage or suffix == ""
        }

    def _tokens(
        self, tokens: dict, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        focal, dice = token_label_losses(
            tokens["pred_logits"],
            tokens["padding"],
            targets,
            shift=self.token_label_shift,
            focal_alpha=0.25,  # the released constant, whatever focal_alpha is
        )
        weight = self.weights["token"]
        return {
            "loss_token_focal": weight * focal / num_boxes,
            "loss_token_dice": weight * dice / num_boxes,
        }

    def _denoising(
        self, found: Stacked, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Terms `loss_dn_*`, summed over decoder layers; an image's copies of its objects count as
        one.
        """
        matches, weights = denoising_matches(found["pred_logits"], targets)
        sums = self._sums(found, matches, targets, weights)
        return {
            f"loss_dn_{name}": self.weights[name] * of_levels.sum() / num_boxes
            for name, of_levels in sums.items()
        }

    def _sums(
        self,
        found: Stacked,
        matches: Matches,
        targets: Targets,
        query_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of each level [L] in class and box, summed over images and queries, each counted
        by query_weights [B, Q] if given.
        """
        labels, wanted = matched_targets(matches, targets)
        boxes = found["pred_boxes"][matches.place]  # [N, 4]
        logits = found["pred_logits"]
        empty, taken = focal_parts(logits, logits[(*matches.place, labels)], self.focal_alpha)
        pair_losses = {
            "bbox": (boxes - wanted).abs().sum(-1),
            "giou": giou_losses(boxes, wanted),
            "ce": taken,
        }
        if query_weights is not None:
            each = query_weights[matches.image, matches.query]
            pair_losses = {name: loss * each for name, loss in pair_losses.items()}
            empty = empty * query_weights
        sums = {name: per_level(loss, matches, len(logits)) for name, loss in pair_losses.items()}
        sums["ce"] = sums["ce"] + empty.sum((1, 2))
        return sums


def focal_parts(logits: Tensor, matched: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Focal loss (arXiv 1708.02002, gamma 2) in two parts: that of logits [L, B, Q, K] as if no
    class were there, summed over classes [L, B, Q], and by how much it differs for the matched [N].

    Those are few; the formula for both cases, worked out for every logit, takes three times as
    long.
    """
    probability, wrong = matched.sigmoid(), (1 - alpha) * _miss(matched)
    right = alpha * (1 - probability) ** 2 * F.softplus(-matched)
    return (1 - alpha) * _miss(logits).sum(-1), right - wrong


def _miss(logits: Tensor) -> Tensor:
    return logits.sigmoid().square() * F.softplus(logits)


def per_level(losses: Tensor, matches: Matches, levels: int) -> Tensor:
    """[N] summed up to [L]."""
    return losses.new_zeros(levels).index_add(0, matches.level, losses)


def denoising_matches(logits: Tensor, targets: Targets) -> tuple[Matches, Tensor]:
    """Pairs of the denoising queries, and their weights [B, Q].

    Queries of logits [L, B, Q, K] hold whole copies of the image's n objects in turn, so query q
    belongs to object q mod n and counts 1 / copies; places past the image's own (`denoising_boxes`
    of the target) count 0.
    """
    # Put together on the host: all that is known there already, and goes over in one piece each.
    used = np.array([len(target["denoising_boxes"]) for target in targets])
    objects = np.array([len(target["labels"]) for target in targets])
    own = np.arange(logits.shape[2]) < used[:, None]  # [B, Q]
    weights = (own * (objects / np.maximum(used, 1))[:, None]).astype(np.float32)
    level, image, query = np.broadcast_to(own, logits.shape[:3]).nonzero()
    pairs = torch.from_numpy(np.stack([level, image, query, query % objects[image]]))
    matches = Matches(*pairs.to(logits.device, non_blocking=True).unbind())
    return matches, torch.from_numpy(weights).to(logits.device, non_blocking=True)


def prediction_levels(outputs: dict) -> Levels:
    """The outputs of every prediction level, the last one last."""
    return [*outputs.get("aux_outputs", []), outputs]


def stack(levels: Levels, name: str) -> Tensor:
    """One kind of prediction, float32: [L, B, Q, ...]."""
    return torch.stack([level[name] for level in levels]).float()


def stacked(levels: Levels) -> Stacked:
    """All kinds of prediction that every level has."""
    return {name: stack(levels, name) for name in levels[0] if name.startswith("pred_")}


@torch.no_grad()
def wanted_vectors(targets: Targets, mask_len: int, n_keep: int) -> tuple[Tensor, Tensor]:
    """Vectors [objects of all images, n_keep] of the objects' masks, and which have a mask [objects
    of all images].
    """
    squares = [
        square_masks(target["masks"], target["mask_boxes"], mask_len)
        if "masks" in target
        else target["boxes"].new_zeros(len(target["boxes"]), mask_len, mask_len, dtype=torch.bool)
        for target in targets
    ]
    known = torch.cat([has_masks(target) for target in targets])
    return encode_squares(torch.cat(squares), n_keep), known


def _suffixes(levels: int) -> list[tuple[int, str]]:
    return [(levels - 1, ""), *((level, f"_{level}") for level in range(levels - 1))]
