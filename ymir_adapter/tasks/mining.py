"""Scores how informative an image is by the detector's predictions: pure functions and a ranking.

A score depends on one image only, is finite and bounded, and is higher for a more informative
image. None is a sum over boxes, so that images with many and with few boxes compare. The boxes of
an image are the queries whose best class scores at least the threshold, without duplicates.

random   A hash of the seed and the asset's name; class balance does not apply.
entropy  Mean over the boxes of the entropy of the best class score, in bits. After the "average"
         aggregation of Brust et al. (arXiv 1809.09875). Instead of their margin between two softmax
         scores it is the entropy of one sigmoid, which this detector predicts.
cald     Consistency under augmentation, Yu et al. (arXiv 2103.10374): minus the mean over four
         views of the least |IoU + C - 1.3|, see `view_consistency`. Departures: sigmoid scores
         divided by their sum replace the softmax; the smaller view is padded to the canvas with
         the mean colour, so that all views share a batch; the cut-outs lie anywhere, not beside
         predicted boxes, so that all views are predicted at once. Their second stage needs the
         labelled images, which a mining task does not have: see class balance.
aldd     Disagreement, after Aghdam et al. (ICCV 2019, arXiv 1911.09168): entropy of the mean
         prediction minus mean entropy of the predictions, its largest value in each region of the
         picture, the mean over regions. The paper compares neighbouring cells of a dense score
         map. This detector has none, so the predictions of the last decoder layers for the same
         query are compared (the layers as a committee: Roy et al., BMVC 2018), and only regions
         with a box count. It needs weights that were trained with scores of inner layers.

Class balance weighs a score by how much the image's classes differ from those of all candidates
(Jensen-Shannon divergence, as CALD's second stage against the labelled images). A class
distribution weighs it by the classes of the image's own boxes, see `wanted_share`.

If no query of an image or view reaches the threshold, its best one counts as a box, so that a score
has no gap there. The code of CALD's authors ranks such images first, an empty one too.

Letters: Q queries, K classes, M committee members, V views. Probabilities are sigmoid scores. Boxes
are cxcywh in 0..1 of the canvas unless stated otherwise.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.special import entr
from torchvision.ops import batched_nms, box_convert, box_iou
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ymir_adapter.protocol.outputs import DECIMALS

DUPLICATE = 0.5  # IoU above which boxes of one class are duplicates
BASE = 1.3  # CALD's base point: a box of this consistency is the most informative
# The lowest score of each algorithm.
FLOORS = {"random": 0.0, "entropy": 0.0, "cald": -BASE, "aldd": 0.0}
SHARE_UNITS = 1_000_000  # of a class share: sums of integers do not depend on their order

VIEWS = 4
SHRINK = 0.8
ANGLE = 5.0  # degrees, counter-clockwise
CUTS, CUT_SIDE = 2, 0.2  # erased patches and their sides, as a share of the picture's

COMMITTEE = 3  # number of last decoder layers; earlier ones are too inaccurate
REGIONS = 4  # along each side of the picture


def digest(seed: int, asset: str) -> int:
    """64 bits from the seed and the base name; the folder and the order of files do not matter."""
    text = f"{seed}\0{PurePosixPath(asset).name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def random_score(seed: int, asset: str) -> float:
    """Uniform in 0..1."""
    return (digest(seed, asset) >> 11) / 2**53


def boxes_of(probabilities: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Which queries count as boxes: bool [Q]. Of duplicates only the one with the highest score
    counts: the detector does not suppress the others, which are no further uncertainty.

    probabilities [Q, K], boxes [Q, 4].
    """
    best, label = probabilities.max(1)
    sure = (best >= threshold).nonzero().squeeze(1)
    corners = box_convert(boxes[sure], "cxcywh", "xyxy")
    kept = sure[batched_nms(corners, best[sure], label[sure], DUPLICATE)]
    return torch.zeros_like(best, dtype=torch.bool).index_fill_(0, kept, True)


def boxes_or_best(probabilities: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Like `boxes_of`, but at least the best query counts: bool [Q], never all False."""
    return boxes_of(probabilities, boxes, min(threshold, probabilities.max().item()))


def binary_entropy(probabilities: Tensor) -> Tensor:
    """In bits, 0..1, of any shape; finite at 0 and 1."""
    return (entr(probabilities) + entr(1 - probabilities)) / math.log(2)


def entropy_score(probabilities: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """probabilities [Q, K], boxes [Q, 4] -> scalar in 0..1."""
    counts = boxes_or_best(probabilities, boxes, threshold)
    return binary_entropy(probabilities.amax(1)[counts]).mean()


def disagreement(members: Tensor) -> Tensor:
    """members [M, Q, K] -> [Q] bits, 0..1: of each query the class that they disagree on most."""
    spread = binary_entropy(members.mean(0)) - binary_entropy(members).mean(0)
    return spread.clamp(min=0).amax(1)


def aldd_score(members: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Probabilities of the committee [M, Q, K] and the last member's boxes [Q, 4] -> scalar in
    0..1.
    """
    counts = boxes_or_best(members.mean(0), boxes, threshold)
    column, row = (boxes[counts, :2] * REGIONS).long().clamp(0, REGIONS - 1).unbind(1)
    region, inverse = (row * REGIONS + column).unique(return_inverse=True)
    largest = torch.zeros(len(region), dtype=members.dtype)
    largest.scatter_reduce_(0, inverse, disagreement(members)[counts], "amax")
    return largest.mean()


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Of distributions [..., K]: [...] in nats, 0..ln 2."""
    mixed = entr((first + second) / 2).sum(-1)
    return (mixed - (entr(first) + entr(second)).sum(-1) / 2).clamp(min=0)


def view_consistency(
    probabilities: Tensor, boxes: Tensor, view_probabilities: Tensor, view_boxes: Tensor
) -> Tensor:
    """CALD's measure of one view: the least |IoU + C - 1.3| of the picture's boxes, moved along
    with the view, each against the view's box that fits it best. A scalar in 0..1.3.

    probabilities [N, K], boxes [N, 4] xyxy in the view; the view's own [M, K] and [M, 4] xyxy; N
    and M at least 1.
    C is half the sum of the two best class scores, times 1 - the divergence of the two class
    distributions (natural logarithms, as in the authors' code).
    """
    # If no box overlaps, `max` returns the first, which is then the one with the highest score.
    best_first = view_probabilities.amax(1).argsort(descending=True, stable=True)
    overlap = box_iou(boxes, view_boxes[best_first]).nan_to_num(0.0)  # 0 / 0: both are empty
    best, match = overlap.max(1)
    matched = view_probabilities[best_first[match]]
    divergence = jensen_shannon(_distribution(probabilities), _distribution(matched))
    agreement = (probabilities.amax(1) + matched.amax(1)) / 2 * (1 - divergence)
    return (best + agreement - BASE).abs().amin()


def _distribution(probabilities: Tensor) -> Tensor:
    return probabilities / probabilities.sum(-1, keepdim=True).clamp(min=1e-12)


def cald_score(
    probabilities: Tensor, boxes: Tensor, canvas: tuple[int, int], threshold: float
) -> Tensor:
    """probabilities [1 + V, Q, K] and boxes [1 + V, Q, 4] of the picture and its views, canvas
    (height, width) -> scalar in -1.3..0, 0 the most informative.
    """
    own = boxes_or_best(probabilities[0], boxes[0], threshold)
    measured = []
    for scores, found, moved in zip(
        probabilities[1:], boxes[1:], boxes_in_views(boxes[0, own], canvas), strict=True
    ):
        kept = boxes_or_best(scores, found, threshold)
        corners = box_convert(found[kept], "cxcywh", "xyxy").clamp(0, 1)
        measured.append(view_consistency(probabilities[0, own], moved, scores[kept], corners))
    return -torch.stack(measured).mean()


def views(image: Tensor, seed: int, asset: str) -> Tensor:
    """A normalised picture [3, h, w] mirrored, with erased patches, shrunk, and rotated:
    [V, 3, h, w]. Empty areas have the mean colour.
    """
    random = np.random.default_rng(digest(seed, asset))
    turned = F.rotate(image, ANGLE, InterpolationMode.BILINEAR, fill=0.0)
    return torch.stack([image.flip(-1), _cut_out(image, random), _shrunk(image), turned])


def _cut_out(image: Tensor, random: np.random.Generator) -> Tensor:
    image = image.clone()
    height, width = image.shape[1:]
    for _ in range(CUTS):
        top, left = (random.random(2) * (1 - CUT_SIDE) * (height, width)).astype(int)
        bottom, right = top + max(int(CUT_SIDE * height), 1), left + max(int(CUT_SIDE * width), 1)
        image[:, top:bottom, left:right] = 0
    return image


def _shrunk_sides(canvas: tuple[int, int]) -> tuple[int, int]:
    height, width = (max(round(side * SHRINK), 1) for side in canvas)
    return height, width


def _shrunk(image: Tensor) -> Tensor:
    """Shrunk into the upper left corner, by whole pixels, so that the scale of boxes is exact."""
    height, width = _shrunk_sides((image.shape[1], image.shape[2]))
    small = F.resize(image, [height, width], antialias=True)
    return F.pad(small, [0, 0, image.shape[2] - width, image.shape[1] - height], fill=0.0)


def boxes_in_views(boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] moved into the views of a picture with canvas (height, width): [V, N, 4] xyxy in
    0..1, clipped.
    """
    x1, y1, x2, y2 = box_convert(boxes, "cxcywh", "xyxy").unbind(1)
    height, width = canvas
    small_height, small_width = _shrunk_sides(canvas)
    scale = boxes.new_tensor([small_width / width, small_height / height] * 2)
    plain = torch.stack([x1, y1, x2, y2], 1)
    mirrored = torch.stack([1 - x2, y1, 1 - x1, y2], 1)
    # A rotated box is the bounding box of its rotated corners, in pixels from the centre.
    cos, sin = math.cos(math.radians(ANGLE)), math.sin(math.radians(ANGLE))
    x = (torch.stack([x1, x2, x1, x2], 1) - 0.5) * width
    y = (torch.stack([y1, y1, y2, y2], 1) - 0.5) * height
    x, y = (cos * x + sin * y) / width + 0.5, (cos * y - sin * x) / height + 0.5
    turned = torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], 1)
    return torch.stack([mirrored, plain, plain * scale, turned]).clamp(0, 1)


def class_shares(probabilities: Tensor, threshold: float) -> Tensor:
    """probabilities [Q, K] -> [K] int64 with sum SHARE_UNITS: the best score of each class among
    the queries that reach the threshold, as a share. Zeros without boxes.
    """
    sure = probabilities.amax(1) >= threshold
    if not sure.any():
        return torch.zeros(probabilities.shape[1], dtype=torch.int64)
    return (_distribution(probabilities[sure].amax(0)) * SHARE_UNITS).round().long()


def class_weights(shares: Tensor, total: Tensor) -> Tensor:
    """shares [N, K] of images, total [K] over all candidates -> weights [N] in 0.5..1: close to 1
    for an image of rare classes; 1 without boxes.
    """
    shares, total = shares.double(), total.double()
    divergence = jensen_shannon(_distribution(shares), _distribution(total)) / math.log(2)
    return torch.where(shares.sum(1) > 0, (1 + divergence) / 2, 1.0)


def wanted_share(
    probabilities: Tensor, boxes: Tensor, threshold: float, class_weights: Tensor
) -> Tensor:
    """The mean weight of the classes of the boxes, a scalar. probabilities [Q, K], boxes [Q, 4],
    class_weights [K].
    """
    counts = boxes_or_best(probabilities, boxes, threshold)
    return class_weights[probabilities.argmax(1)[counts]].mean()


def weighted(scores: Tensor, weights: Tensor, floor: float) -> Tensor:
    """Scores moved towards the lowest possible score by their weights, elementwise."""
    return floor + (scores - floor) * weights


def rounded(score: float) -> float:
    """The score to rank by and to write."""
    return round(score, DECIMALS) + 0.0  # no -0.0


def ranking(scores: Sequence[float]) -> list[int]:
    """Indices, the most informative first; ties in the order of the candidates."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])
