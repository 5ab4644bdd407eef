"""Set loss of ViDT (arXiv 2110.03921, section 3.3; DETR, arXiv 2005.12872): focal, L1 and GIoU on
matched pairs, and the terms of ViDT+ (arXiv 2204.07962): the IoU of each box, mask vectors and
token labels.

All prediction levels are matched and scored together, stacked in one tensor.

Letters: P prediction levels (the bare tokens, then each decoder layer), B batch, Q queries, K
classes, N matched pairs of all levels.
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
from vidt.model.config import CLASS_LOSSES, WITHOUT_NECK, ViDTConfig, require

Targets = list[dict[str, Tensor]]
Stacked = dict[str, Tensor]  # predictions by name, [P, B, Q, ...]


def criterion_for(
    config: ViDTConfig, *, class_loss: str = "focal", contrastive_denoising: bool = False
) -> "SetCriterion | SoftmaxCriterion":
    """The criterion for a detector of this configuration, with the published loss weights. Call it
    with outputs, targets and, as keywords, the counts named in its `normalised_by`.
    """
    if config.method == WITHOUT_NECK:
        return SoftmaxCriterion()
    return SetCriterion(
        class_loss=class_loss,
        contrastive_denoising=contrastive_denoising,
        token_label_shift=config.token_label_shift,
        gt_mask_len=config.gt_mask_len,
    )


class SetCriterion(nn.Module):
    """Weighted loss terms by name; the training loss is their plain sum.

    Terms are `loss_ce`, `loss_bbox`, `loss_giou` for the last prediction level, and with suffix
    `_0`, `_1`, ... for the earlier ones; likewise `loss_iouaware` and `loss_vector` where the
    outputs have IoUs and vectors. Token labels give `loss_token_focal` and `loss_token_dice`.

    Differs from the released code in one normaliser: a vector's loss is a mean over the objects of
    the whole step, like all other terms, rather than over the pairs of one process.
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
        class_loss: str = "focal",
        contrastive_denoising: bool = False,
        focal_alpha: float = 0.25,
        vector_loss_norm: bool = True,
        vector_start_stage: int = 0,
        token_label_shift: bool = True,
        gt_mask_len: int = 128,
    ) -> None:
        """class_loss: one of `vidt.model.config.CLASS_LOSSES`; contrastive_denoising: every second
        copy of the denoising queries is one of negatives; vector_loss_norm: a vector's loss is the
        mean over its numbers, else their sum; vector_start_stage: the first prediction level with a
        vector loss; gt_mask_len: side of the square to which masks are resized.
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
        require(class_loss in CLASS_LOSSES, "class_loss", class_loss, f"one of {CLASS_LOSSES}")
        self.class_loss, self.focal_alpha = class_loss, focal_alpha
        self.contrastive_denoising = contrastive_denoising
        self.vector_loss_norm, self.vector_start_stage = vector_loss_norm, vector_start_stage
        self.token_label_shift, self.gt_mask_len = token_label_shift, gt_mask_len

    def forward(
        self, outputs: dict, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """outputs of `ViDT`; targets with `labels` [n] and `boxes` [n, 4] cxcywh in 0..1, and for
        vectors and token labels `masks` [n, H, W] bool on the image, `mask_boxes` [n, 4] xyxy in
        its pixels and `has_mask` [n], where objects have them; num_boxes is the
        normaliser, the number of objects in the whole optimiser step. Returns scalars by name.
        """
        stack = stacked(prediction_levels(outputs))
        groups = outputs.get("group_outputs", [])
        own = (stack["pred_logits"], stack["pred_boxes"])
        if groups:
            in_groups = stacked([level for group in groups for level in group])
            theirs = (in_groups["pred_logits"], in_groups["pred_boxes"])
            matches, of_groups = self.matcher.each([own, theirs], targets)
        else:
            matches = self.matcher(*own, targets)
        sums = self._sums(stack, matches, targets)
        if "pred_ious" in stack:
            sums["iouaware"] = self._iou_sums(stack, matches, targets)
        losses = {
            name: (each * (self.weights[name] / num_boxes)).unbind() for name, each in sums.items()
        }
        terms = {
            f"loss_{name}{suffix}": loss[level]
            for level, suffix in _suffixes(len(stack["pred_logits"]))
            for name, loss in losses.items()
        }
        if "pred_vectors" in stack:
            terms |= self._vectors(stack["pred_vectors"], matches, targets, num_boxes)
        if "enc_tokens" in outputs:
            terms |= self._tokens(outputs["enc_tokens"], targets, num_boxes)
        if "denoising_outputs" in outputs:
            terms |= self._denoising(stacked(outputs["denoising_outputs"]), targets, num_boxes)
        if groups:
            terms |= self._groups(in_groups, of_groups, targets, len(groups) * num_boxes)
        return terms

    def match(self, outputs: dict, targets: Targets) -> Matches:
        """Assignment of every prediction level, first to last."""
        stack = stacked(prediction_levels(outputs))
        return self.matcher(stack["pred_logits"], stack["pred_boxes"], targets)

    def _iou_sums(self, stack: Stacked, matches: Matches, targets: Targets) -> Tensor:
        """[P]: cross entropy of the predicted IoU. As released, the target IoU is not detached, so
        this loss also moves the boxes.
        """
        _, true_boxes = matched_targets(matches, targets)
        ious = paired_iou(stack["pred_boxes"][matches.index], true_boxes)
        logits = stack["pred_ious"][(*matches.index, 0)]
        losses = F.binary_cross_entropy_with_logits(logits, ious, reduction="none")
        return per_level(losses, matches, len(stack["pred_ious"]))

    def _vectors(
        self, vectors: Tensor, matches: Matches, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Terms `loss_vector*`: L1 of the vectors [P, B, Q, n_keep] of matched objects that have a
        mask.
        """
        true_vectors, known = target_vectors(targets, self.gt_mask_len, vectors.shape[-1])
        index = flat_index(matches, targets)
        losses = (vectors[matches.index] - true_vectors[index]).abs().sum(-1) * known[index]
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
            focal_alpha=0.25,  # the released constant, independent of self.focal_alpha
        )
        weight = self.weights["token"]
        return {
            "loss_token_focal": weight * focal / num_boxes,
            "loss_token_dice": weight * dice / num_boxes,
        }

    def _denoising(
        self, stack: Stacked, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Terms `loss_dn_*`, summed over decoder layers and averaged over the copies of each
        object.
        """
        matches, weights = denoising_matches(
            stack["pred_logits"], targets, contrastive=self.contrastive_denoising
        )
        sums = self._sums(stack, matches, targets, weights)
        return {
            f"loss_dn_{name}": self.weights[name] * losses.sum() / num_boxes
            for name, losses in sums.items()
        }

    def _groups(
        self, stack: Stacked, matches: Matches, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Terms `loss_group_*` (Group DETR, arXiv 2207.13085, section 3): each group is matched by
        itself; the losses are summed over decoder layers and averaged over the groups. num_boxes
        counts the objects of all groups.
        """
        sums = self._sums(stack, matches, targets)
        return {
            f"loss_group_{name}": self.weights[name] * losses.sum() / num_boxes
            for name, losses in sums.items()
        }

    def _sums(
        self,
        stack: Stacked,
        matches: Matches,
        targets: Targets,
        query_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Class and box losses of each level, [P] each: sums over images and queries, weighted by
        query_weights [B, Q] if given.
        """
        labels, true_boxes = matched_targets(matches, targets)
        pred_boxes = stack["pred_boxes"][matches.index]  # [N, 4]
        logits = stack["pred_logits"]
        background, matched = self._class_parts(
            logits, logits[(*matches.index, labels)], pred_boxes, true_boxes
        )
        pair_losses = {
            "bbox": (pred_boxes - true_boxes).abs().sum(-1),
            "giou": giou_losses(pred_boxes, true_boxes),
            "ce": matched,
        }
        if query_weights is not None:
            pair_weights = query_weights[matches.image, matches.query]
            pair_losses = {name: loss * pair_weights for name, loss in pair_losses.items()}
            background = background * query_weights
        sums = {name: per_level(loss, matches, len(logits)) for name, loss in pair_losses.items()}
        sums["ce"] = sums["ce"] + background.sum((1, 2))
        return sums

    def _class_parts(
        self, logits: Tensor, matched: Tensor, pred_boxes: Tensor, true_boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The class loss in the two parts of `focal_parts`."""
        if self.class_loss == "focal":
            return focal_parts(logits, matched, self.focal_alpha)
        quality = paired_iou(pred_boxes, true_boxes).detach()
        parts = varifocal_parts if self.class_loss == "varifocal" else matchability_parts
        return parts(logits, matched, quality)


def focal_parts(logits: Tensor, matched: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Focal loss (arXiv 1708.02002, gamma 2) in two parts: the loss of logits [P, B, Q, K] if all
    were background, summed over classes [P, B, Q], and the correction for the matched logits [N].

    Matched logits are few; computing both cases for every logit takes three times as long.
    """
    probability, as_background = matched.sigmoid(), (1 - alpha) * _background(matched)
    as_class = alpha * (1 - probability) ** 2 * F.softplus(-matched)
    return (1 - alpha) * _background(logits).sum(-1), as_class - as_background


def varifocal_parts(logits: Tensor, matched: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """Varifocal loss (arXiv 2008.13367, equation 2, alpha 0.75, gamma 2) in the parts of
    `focal_parts`: a matched logit learns the IoU of its box, quality [N] in 0..1, weighted by it.
    """
    as_class = quality * _towards(matched, quality)
    return 0.75 * _background(logits).sum(-1), as_class - 0.75 * _background(matched)


def matchability_parts(logits: Tensor, matched: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """Matchability-aware loss (DEIM, arXiv 2412.04234, equation 3, gamma 1.5) in the parts of
    `focal_parts`: a matched logit learns a power of the IoU of its box, quality [N] in 0..1, with
    full weight, so that a loose match counts too.
    """

    def background(logits: Tensor) -> Tensor:
        return logits.sigmoid() ** 1.5 * F.softplus(logits)

    as_class = _towards(matched, quality**1.5)
    return background(logits).sum(-1), as_class - background(matched)


def _towards(logits: Tensor, probability: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, probability, reduction="none")


def _background(logits: Tensor) -> Tensor:
    return logits.sigmoid().square() * F.softplus(logits)


def per_level(losses: Tensor, matches: Matches, levels: int) -> Tensor:
    """Sums losses [N] of pairs to [P] of prediction levels."""
    return losses.new_zeros(levels).index_add(0, matches.level, losses)


def denoising_matches(
    logits: Tensor, targets: Targets, *, contrastive: bool = False
) -> tuple[Matches, Tensor]:
    """Pairs of the denoising queries, and their weights [B, Q].

    The queries of logits [P, B, Q, K] are whole copies of the image's n objects, one copy after the
    other, so query q belongs to object q mod n. contrastive: every second copy is one of negatives
    (DINO, arXiv 2203.03605, section 3.3), which are background and have no pairs. A weight is 1
    over the positive copies. Queries beyond the target's `denoising_boxes` are padding, with weight
    0.
    """
    # Built on the CPU, where the counts are known, and copied once.
    used = np.array([len(target["denoising_boxes"]) for target in targets])
    objects = np.array([len(target["labels"]) for target in targets])
    kinds = 2 if contrastive else 1
    query = np.arange(logits.shape[2])
    is_used = query < used[:, None]  # [B, Q]
    is_positive = is_used & (query // np.maximum(objects, 1)[:, None] % kinds == 0)
    weights = (is_used * (kinds * objects / np.maximum(used, 1))[:, None]).astype(np.float32)
    level, image, query = np.broadcast_to(is_positive, logits.shape[:3]).nonzero()
    pairs = torch.from_numpy(np.stack([level, image, query, query % objects[image]]))
    matches = Matches(*pairs.to(logits.device, non_blocking=True).unbind())
    return matches, torch.from_numpy(weights).to(logits.device, non_blocking=True)


def prediction_levels(outputs: dict) -> list[dict[str, Tensor]]:
    """The outputs of every prediction level, first to last."""
    return [*outputs.get("aux_outputs", []), outputs]


def stacked(levels: list[dict[str, Tensor]]) -> Stacked:
    """The `pred_*` of all levels as float32 [P, B, Q, ...] by name."""
    names = [name for name in levels[0] if name.startswith("pred_")]
    return {name: torch.stack([level[name] for level in levels]).float() for name in names}


@torch.no_grad()
def target_vectors(targets: Targets, mask_len: int, n_keep: int) -> tuple[Tensor, Tensor]:
    """Mask vectors [all objects, n_keep] of the objects of all images, and which of them have a
    mask: bool [all objects].
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
