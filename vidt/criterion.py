"""Set loss of ViDT (arXiv 2110.03921, section 3.3; DETR, arXiv 2005.12872): focal, L1 and GIoU on
matched pairs.

All prediction levels are matched and scored together: level l of the decoder is one row of a
stacked tensor.

Letters: L prediction levels, B batch, Q queries, K classes, N matched pairs of all levels.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from vidt.matcher import HungarianMatcher, Matches

Targets = list[dict[str, Tensor]]


class SetCriterion(nn.Module):
    """Weighted loss terms by name; the training loss is their plain sum.

    Terms are `loss_ce`, `loss_bbox`, `loss_giou` for the last prediction level, and with suffix
    `_0`, `_1`, ... for the earlier ones.
    """

    def __init__(
        self,
        matcher: HungarianMatcher | None = None,
        *,
        cls_loss_coef: float = 2.0,
        bbox_loss_coef: float = 5.0,
        giou_loss_coef: float = 2.0,
        focal_alpha: float = 0.25,
    ) -> None:
        super().__init__()
        self.matcher = matcher or HungarianMatcher()
        self.weights = {"ce": cls_loss_coef, "bbox": bbox_loss_coef, "giou": giou_loss_coef}
        self.focal_alpha = focal_alpha

    def forward(
        self, outputs: dict, targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """outputs of `ViDT`; targets with `labels` [n] and `boxes` [n, 4] cxcywh in 0..1; num_boxes
        normalises, and is counted by the caller over everything that makes one optimiser step.
        Returns scalars by name.
        """
        logits, boxes = stack_levels([*outputs.get("aux_outputs", []), outputs])
        sums = self._sums(logits, boxes, self.match(outputs, targets), targets)
        terms = {
            f"loss_{name}{suffix}": self.weights[name] * sums[name][level] / num_boxes
            for level, suffix in _suffixes(len(logits))
            for name in self.weights
        }
        if "denoising_outputs" in outputs:
            terms |= self._denoising(outputs["denoising_outputs"], targets, num_boxes)
        return terms

    def match(self, outputs: dict, targets: Targets) -> Matches:
        """Assignment of every level, earlier levels first, the last prediction level last."""
        logits, boxes = stack_levels([*outputs.get("aux_outputs", []), outputs])
        return self.matcher(logits, boxes, targets)

    def _denoising(
        self, levels: list[dict[str, Tensor]], targets: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Terms `loss_dn_*`, summed over decoder layers; an image's copies of its objects count as
        one.
        """
        logits, boxes = stack_levels(levels)
        matches, weights = noised_matches(logits, targets)
        sums = self._sums(logits, boxes, matches, targets, weights)
        return {
            f"loss_dn_{name}": self.weights[name] * sums[name].sum() / num_boxes
            for name in self.weights
        }

    def _sums(
        self,
        logits: Tensor,
        boxes: Tensor,
        matches: Matches,
        targets: Targets,
        query_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of each level [L], summed over images and queries, each counted by query_weights
        [B, Q] if given.
        """
        labels, wanted = _matched_targets(matches, targets)
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
    logits, _ = stack_levels([*outputs.get("aux_outputs", []), outputs])
    best = logits.argmax(-1)  # [L, B, Q]
    labels, _ = _matched_targets(matches, targets)
    final = matches.level == len(best) - 1
    right = final & (best[matches.level, matches.image, matches.query] == labels)
    counts = torch.tensor([len(target["labels"]) for target in targets]).to(logits.device)
    predicted = (best != logits.shape[-1] - 1).sum(-1)  # [L, B]
    cardinality = (predicted - counts).abs().float().mean(-1)
    values = {"class_error": 100 - 100 * right.sum() / final.sum().clamp(min=1)}
    for level, suffix in _suffixes(len(best)):
        values[f"cardinality_error{suffix}"] = cardinality[level]
    return values


def stack_levels(levels: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits [L, B, Q, K] and boxes [L, B, Q, 4] of prediction levels, float32."""
    logits = torch.stack([level["pred_logits"] for level in levels])
    boxes = torch.stack([level["pred_boxes"] for level in levels])
    return logits.float(), boxes.float()


def _suffixes(levels: int) -> list[tuple[int, str]]:
    return [(levels - 1, ""), *((level, f"_{level}") for level in range(levels - 1))]


def _matched_targets(matches: Matches, targets: Targets) -> tuple[Tensor, Tensor]:
    """Labels [N] and boxes [N, 4] of the matched objects."""
    counts = torch.tensor([0, *(len(target["labels"]) for target in targets)])
    first = counts.cumsum(0)[:-1].to(matches.image.device, non_blocking=True)
    index = first[matches.image] + matches.target
    labels = torch.cat([target["labels"] for target in targets])
    boxes = torch.cat([target["boxes"] for target in targets])
    return labels[index], boxes[index]
