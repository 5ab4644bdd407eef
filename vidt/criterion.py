"""Set loss of ViDT (arXiv 2110.03921, section 3.3; DETR, arXiv 2005.12872): focal, L1 and GIoU on
matched pairs, and what ViDT+ adds (arXiv 2204.07962): how well a box fits, mask vectors and token
labels.

All prediction levels are matched and scored together: level l of the decoder is one row of a
stacked tensor.

Letters: L prediction levels, B batch, Q queries, K classes, N matched pairs of all levels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from vidt.config import ViDTConfig
from vidt.mask_vectors import encode_masks
from vidt.matcher import HungarianMatcher, Matches, flat_index, matched_targets
from vidt.token_label import has_masks, token_label_losses
from vidt.without_neck import SoftmaxCriterion

Targets = list[dict[str, Tensor]]
Levels = list[dict[str, Tensor]]


def criterion_for(config: ViDTConfig) -> nn.Module:
    """What a detector of this configuration is trained with, at its published weights."""
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
        self,
        outputs: dict,
        targets: Targets,
        num_boxes: float | Tensor,
        num_images: float | None = None,
    ) -> dict[str, Tensor]:
        """outputs of `ViDT`; targets with `labels` [n] and `boxes` [n, 4] cxcywh in 0..1, and for
        vectors and token labels `masks` [n, H, W] bool on the image, `mask_boxes` [n, 4] xyxy in
        its pixels and `has_mask` [n], where objects have them; num_boxes normalises, and is counted
        by the caller over everything that makes one optimiser step (num_images, likewise, is read
        by `SoftmaxCriterion` alone). Returns scalars by name.
        """
        levels = prediction_levels(outputs)
        matches = self.match(outputs, targets)
        sums = self._sums(levels, matches, targets)
        if "pred_ious" in outputs:
            sums["iouaware"] = self._iou_sums(levels, matches, targets)
        terms = {
            f"loss_{name}{suffix}": self.weights[name] * of_levels[level] / num_boxes
            for level, suffix in _suffixes(len(levels))
            for name, of_levels in sums.items()
        }
        if "pred_vectors" in outputs:
            terms |= self._vectors(levels, matches, targets, num_boxes)
        if "enc_tokens" in outputs:
            terms |= self._tokens(outputs["enc_tokens"], targets, num_boxes)
        if "denoising_outputs" in outputs:
            terms |= self._denoising(outputs["denoising_outputs"], targets, num_boxes)
        return terms

    def match(self, outputs: dict, targets: Targets) -> Matches:
        """Assignment of every level, earlier levels first, the last prediction level last."""
        levels = prediction_levels(outputs)
        return self.matcher(stack(levels, "pred_logits"), stack(levels, "pred_boxes"), targets)

    def _iou_sums(self, levels: Levels, matches: Matches, targets: Targets) -> Tensor:
        """[L]: cross entropy of the predicted IoU. As released the IoU it should be keeps its
        gradient, which moves the boxes as well.
        """
        _, wanted = matched_targets(matches, targets)
        place = (matches.level, matches.image, matches.query)
        ious = paired_iou(stack(levels, "pred_boxes")[place], wanted)
        logits = stack(levels, "pred_ious")[(*place, 0)]
        losses = F.binary_cross_entropy_with_logits(logits, ious, reduction="none")
        return losses.new_zeros(len(levels)).index_add(0, matches.level, losses)

    def _vectors(
        self, levels: Levels, matches: Matches, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Terms `loss_vector*`: L1 of the vectors of matched objects that have a mask."""
        vectors = stack(levels, "pred_vectors")
        found = vectors[matches.level, matches.image, matches.query]  # [N, n_keep]
        wanted, known = wanted_vectors(targets, self.gt_mask_len, vectors.shape[-1])
        index = flat_index(matches, targets)
        losses = (found - wanted[index]).abs().sum(-1) * known[index]
        sums = losses.new_zeros(len(levels)).index_add(0, matches.level, losses)
        scale = self.weights["vector"] / (vectors.shape[-1] if self.vector_loss_norm else 1)
        return {
            f"loss_vector{suffix}": scale * sums[level] / num_boxes
            for level, suffix in _suffixes(len(levels))
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
        self, levels: Levels, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Terms `loss_dn_*`, summed over decoder layers; an image's copies of its objects count as
        one.
        """
        matches, weights = noised_matches(stack(levels, "pred_logits"), targets)
        sums = self._sums(levels, matches, targets, weights)
        return {
            f"loss_dn_{name}": self.weights[name] * of_levels.sum() / num_boxes
            for name, of_levels in sums.items()
        }

    def _sums(
        self,
        levels: Levels,
        matches: Matches,
        targets: Targets,
        query_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of each level [L] in class and box, summed over images and queries, each counted
        by query_weights [B, Q] if given.
        """
        logits, boxes = stack(levels, "pred_logits"), stack(levels, "pred_boxes")
        labels, wanted = matched_targets(matches, targets)
        found = boxes[matches.level, matches.image, matches.query]  # [N, 4]
        found_xyxy, wanted_xyxy = (box_convert(b, "cxcywh", "xyxy") for b in (found, wanted))
        pair_losses = {
            "bbox": (found - wanted).abs().sum(-1),
            "giou": generalized_box_iou_loss(found_xyxy, wanted_xyxy),
        }
        if query_weights is not None:
            each = query_weights[matches.image, matches.query]
            pair_losses = {name: loss * each for name, loss in pair_losses.items()}
        sums = {
            name: logits.new_zeros(len(logits)).index_add(0, matches.level, loss)
            for name, loss in pair_losses.items()
        }
        place = (matches.level, matches.image, matches.query, labels)
        truth = torch.zeros_like(logits)
        truth[place] = 1.0
        losses = sigmoid_focal_loss(logits, truth, self.focal_alpha, 2.0)
        if query_weights is not None:
            losses = losses * query_weights[..., None]
        sums["ce"] = losses.flatten(1).sum(1)
        return sums


def noised_matches(logits: Tensor, targets: Targets) -> tuple[Matches, Tensor]:
    """Pairs of the denoising queries, and their weights [B, Q].

    Queries of logits [L, B, Q, K] hold whole copies of the image's n objects in turn, so query q
    belongs to object q mod n and counts 1 / copies; places past the image's own (`noised_boxes` of
    the target) count 0.
    """
    weights, pairs = torch.zeros(logits.shape[1:3]), []
    for image, target in enumerate(targets):
        used, objects = len(target["noised_boxes"]), len(target["labels"])
        weights[image, :used] = objects / max(used, 1)
        pairs.append(
            torch.cartesian_prod(
                torch.arange(len(logits)), torch.tensor([image]), torch.arange(used)
            )
        )
    levels, images, queries = torch.cat(pairs).to(logits.device, non_blocking=True).unbind(1)
    counts = torch.tensor([max(len(target["labels"]), 1) for target in targets])
    counts = counts.to(logits.device, non_blocking=True)
    matches = Matches(levels, images, queries, queries % counts[images])
    return matches, weights.to(logits.device)


@torch.no_grad()
def log_values(outputs: dict, targets: Targets, matches: Matches) -> dict[str, Tensor]:
    """What the released code logs beside its losses, scalars by name; matches from
    `SetCriterion.match`.

    `class_error`: per cent of the last level's matched queries whose best class is not their
    object's, 100 if none is matched. `cardinality_error` of each level: how far the number of
    queries whose best class is not the last one is from the number of objects, mean over images;
    made for a softmax with background and of use beside old logs only.
    """
    logits = stack(prediction_levels(outputs), "pred_logits")
    best = logits.argmax(-1)  # [L, B, Q]
    labels, _ = matched_targets(matches, targets)
    final = matches.level == len(best) - 1
    right = final & (best[matches.level, matches.image, matches.query] == labels)
    counts = torch.tensor([len(target["labels"]) for target in targets]).to(logits.device)
    predicted = (best != logits.shape[-1] - 1).sum(-1)  # [L, B]
    cardinality = (predicted - counts).abs().float().mean(-1)
    values = {"class_error": 100 - 100 * right.sum() / final.sum().clamp(min=1)}
    for level, suffix in _suffixes(len(best)):
        values[f"cardinality_error{suffix}"] = cardinality[level]
    return values


def prediction_levels(outputs: dict) -> Levels:
    """The outputs of every prediction level, the last one last."""
    return [*outputs.get("aux_outputs", []), outputs]


def stack(levels: Levels, name: str) -> Tensor:
    """One kind of prediction, float32: [L, B, Q, ...]."""
    return torch.stack([level[name] for level in levels]).float()


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of each pair, [N]; boxes [N, 4] cxcywh."""
    first, second = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (first, second))
    low, high = torch.maximum(first, second)[:, :2], torch.minimum(first, second)[:, 2:]
    overlap = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return overlap / (areas[0] + areas[1] - overlap).clamp(min=1e-12)


@torch.no_grad()
def wanted_vectors(targets: Targets, mask_len: int, n_keep: int) -> tuple[Tensor, Tensor]:
    """Vectors [objects of all images, n_keep] of the objects' masks, and which have a mask [objects
    of all images].
    """
    vectors, known = [], []
    for target in targets:
        has_mask = has_masks(target)
        own = torch.zeros(len(has_mask), n_keep, device=has_mask.device)
        if "masks" in target and len(has_mask):
            own = encode_masks(target["masks"], target["mask_boxes"], n_keep=n_keep, side=mask_len)
        vectors.append(own)
        known.append(has_mask)
    return torch.cat(vectors), torch.cat(known)


def _suffixes(levels: int) -> list[tuple[int, str]]:
    return [(levels - 1, ""), *((level, f"_{level}") for level in range(levels - 1))]
