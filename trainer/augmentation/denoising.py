"""Denoising queries of training images: noisy copies of each image's objects (DN-DETR, arXiv
2203.01305; contrastive as in DINO, arXiv 2203.03605).

Letters: B batch, n objects of an image, N denoising queries.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

NOISE = 0.5  # the largest shift in half-sides, and change of size in sides
LABEL_NOISE = 0.25  # share of the labels that are drawn anew


@dataclass(frozen=True)
class Denoising:
    """How many denoising queries an image has, and of which kinds.

    contrastive: every second copy of the objects is one of negatives. num_classes: of the labels
    that the queries carry, None if they carry none.
    """

    queries: int
    contrastive: bool = False
    num_classes: int | None = None

    def of_target(
        self, boxes: Tensor, labels: Tensor, random: np.random.Generator
    ) -> dict[str, Tensor]:
        """`denoising_boxes` [copies * n, 4] for boxes [n, 4] cxcywh in 0..1, and with num_classes
        `denoising_labels` [copies * n]; nothing without queries.
        """
        if not self.queries:
            return {}
        noised = noise_boxes(boxes, self.copies(len(boxes)), random, contrastive=self.contrastive)
        target = {"denoising_boxes": noised}
        if self.num_classes is not None:
            repeated = labels.repeat(self.copies(len(boxes)))
            target["denoising_labels"] = noise_labels(repeated, self.num_classes, random)
        return target

    def copies(self, objects: int) -> int:
        """As many complete copies of the objects as fit into the queries, at least one of each
        kind.
        """
        kinds = 2 if self.contrastive else 1
        return kinds * max(self.queries // max(kinds * objects, 1), 1)


NO_DENOISING = Denoising(0)


def noise_boxes(
    boxes: Tensor, copies: int, random: np.random.Generator, *, contrastive: bool = False
) -> Tensor:
    """Copies of boxes [n, 4] cxcywh, each shifted by up to NOISE half-sides and its sides changed
    by up to NOISE: [copies * n, 4]. contrastive: the noise of every second copy is larger by NOISE.
    """
    true_boxes = boxes.numpy()
    noise = random.uniform(-NOISE, NOISE, (copies, *true_boxes.shape)).astype(true_boxes.dtype)
    if contrastive:
        noise[1::2] += np.copysign(true_boxes.dtype.type(NOISE), noise[1::2])
    reach = np.concatenate([true_boxes[:, 2:] / 2, true_boxes[:, 2:]], axis=1)
    noised = (true_boxes + noise * reach).clip(np.float32(1e-3), np.float32(1))
    return torch.from_numpy(noised.reshape(-1, 4))


def noise_labels(labels: Tensor, num_classes: int, random: np.random.Generator) -> Tensor:
    """Labels [N], of which a share of LABEL_NOISE is drawn anew from all classes."""
    drawn = torch.from_numpy(random.integers(num_classes, size=len(labels)))
    changed = torch.from_numpy(random.random(len(labels)) < LABEL_NOISE)
    return torch.where(changed, drawn, labels)


def denoising_inputs(targets: list[dict[str, Any]], queries: int) -> dict[str, Tensor]:
    """The model's inputs `denoising_boxes` [B, N, 4] and `denoising_labels` [B, N], if the targets
    have them, filled up with a box in the middle and class 0. N is a multiple of `queries`.
    """
    if "denoising_boxes" not in targets[0]:
        return {}
    each = [target["denoising_boxes"] for target in targets]
    boxes = pad_sequence(each, batch_first=True, padding_value=0.5)
    beyond = -boxes.shape[1] % queries
    inputs = {"denoising_boxes": F.pad(boxes, (0, 0, 0, beyond), value=0.5)}
    if "denoising_labels" in targets[0]:
        labels = pad_sequence([t["denoising_labels"] for t in targets], batch_first=True)
        inputs["denoising_labels"] = F.pad(labels, (0, beyond))
    return inputs
