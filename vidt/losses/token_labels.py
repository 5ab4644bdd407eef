"""Token labels of ViDT+ (arXiv 2204.07962, section 3.2): every position of the pyramid learns its
classes.

Columns are a foreground indicator and the classes: class c in column c + 1 (shift), or as released
in column c, where the indicator takes the place of class 0.

Letters: B batch, H x W padded image, h x w a level's grid, K columns, n objects of an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, sigmoid_focal_loss

from vidt.model.token_head import valid_sizes


def token_label_losses(
    logits: list[Tensor],
    padding: Tensor,
    targets: list[dict[str, Tensor]],
    *,
    shift: bool,
    focal_alpha: float,
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss, summed over levels and images. logits as of `TokenHead`; padding [B, H,
    W] of the images; targets with `labels`, `boxes` and, where known, `masks`.
    """
    truths = token_truth(padding, targets, logits, shift=shift)
    focal, dice = [], []
    for level, truth in zip(logits, truths, strict=True):
        predicted, truth = level.float().flatten(1, 2), truth.flatten(1, 2)  # [B, h * w, K]
        focal.append(sigmoid_focal_loss(predicted, truth, focal_alpha, 2.0).mean(1).sum())
        dice.append(dice_loss(predicted.sigmoid(), truth).sum())
    return torch.stack(focal).sum(), torch.stack(dice).sum()


def dice_loss(probability: Tensor, truth: Tensor) -> Tensor:
    """[B]: 1 - twice the overlap over the sum of each image, both smoothed by 1."""
    overlap = (probability * truth).sum((1, 2))
    total = probability.sum((1, 2)) + truth.sum((1, 2))
    return 1 - (2 * overlap + 1) / (total + 1)


@torch.no_grad()
def token_truth(
    padding: Tensor, targets: list[dict[str, Tensor]], logits: list[Tensor], *, shift: bool
) -> list[Tensor]:
    """Target probabilities of each level: [B, h, w, K]."""
    canvas = (padding.shape[1], padding.shape[2])
    grids = [(level.shape[1], level.shape[2]) for level in logits]
    sizes = torch.stack(valid_sizes(padding), dim=1)
    images = [
        shown_columns(
            object_masks(target, canvas, size),
            target["labels"] + int(shift),
            logits[0].shape[-1],
            grids,
        )
        for target, size in zip(targets, sizes, strict=True)
    ]
    return [torch.stack(levels).permute(0, 2, 3, 1) for levels in zip(*images, strict=True)]


def object_masks(target: dict[str, Tensor], canvas: tuple[int, int], size: Tensor) -> Tensor:
    """[n, *canvas] bool: each object's mask, or the rectangle of its box (cxcywh in 0..1 of
    `size`, (height, width)) if it has none.
    """
    x0, y0, x1, y1 = box_convert(target["boxes"], "cxcywh", "xyxy").T[:, :, None]
    y, x = (torch.arange(side, device=size.device) + 0.5 for side in canvas)
    y, x = y / size[0], x / size[1]
    rows, columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)  # [n, H] and [n, W]
    rectangles = rows[:, :, None] & columns[:, None, :]
    if "masks" not in target:
        return rectangles
    masks = target["masks"]
    masks = F.pad(masks, (0, canvas[1] - masks.shape[2], 0, canvas[0] - masks.shape[1]))
    return torch.where(has_masks(target)[:, None, None], masks, rectangles)


def has_masks(target: dict[str, Tensor]) -> Tensor:
    """[n] bool: which objects have a mask. Without `has_mask`: all, if the target has `masks`."""
    every = torch.full_like(target["labels"], "masks" in target, dtype=torch.bool)
    return target.get("has_mask", every) & every


def shown_columns(
    masks: Tensor, columns: Tensor, num_columns: int, grids: list[tuple[int, int]]
) -> list[Tensor]:
    """The share of every cell that each column covers: [K, h, w] of each grid. masks [n, H, W]
    bool; columns [n] of the objects' classes. Earlier objects cover later ones.
    """
    if len(masks) == 0:
        return [masks.new_zeros((num_columns, *grid), dtype=torch.float32) for grid in grids]
    # The labels are on the GPU; reading them would synchronise. Drawing every class at full size
    # would take gigabytes, so the visible part of each object is drawn, or of each class if there
    # are fewer classes than objects.
    every = torch.arange(min(len(masks), num_columns), device=masks.device)
    covered, owner = masks.view(torch.uint8).max(0)  # owner: the first object that covers a pixel
    drawn_as, targets = (owner, columns) if len(masks) <= num_columns else (columns[owner], every)
    drawn = ((drawn_as == every[:, None, None]) & covered.bool()).float()
    truths = []
    for grid in grids:
        # As released, class 0 has no column.
        shares = F.adaptive_avg_pool2d(drawn, grid) * (targets != 0)[:, None, None]
        truth = drawn.new_zeros((num_columns, *grid)).index_add(0, targets, shares)
        truth[0] = shares.sum(0)
        truths.append(truth)
    return truths
