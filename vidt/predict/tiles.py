"""Prediction in overlapping tiles, for large images and for more objects than [DET] tokens.

Tiles of one size cover the image, and the whole image is one more tile, which sees the objects that
no other tile sees whole. The detections of all tiles are merged:

1. Boxes are clipped to their tile. A side that ends at an edge of the tile inside the image is cut.
2. Of the whole image's detections, those smaller than the overlap are dropped: a tile sees such an
   object whole, and larger.
3. From the highest score down, a detection absorbs the detections of its class in other tiles that
   see the same object: clipped to the area that both tiles see, the two boxes have an IoU of
   MIN_AGREEMENT or more. Two detections of one tile never merge: the detector needs no suppression.
4. The absorbing detection keeps its score and its box. Only a cut side moves out, to where the
   absorbed boxes of at least half the score end; what agrees with these is absorbed, too.

Steps 2 to 4 do nothing if the image is no larger than a tile. Boxes are xyxy in pixels. N
detections. Does not import PyTorch, which an exported detector does not need.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vidt.errors import UserError
from vidt.images.batching import read_ahead
from vidt.images.inputs import ImageLike, as_picture, source_of

OVERLAP = 0.2  # of a tile's side
MIN_AGREEMENT = 0.5  # IoU
CUT_MARGIN = 0.02  # of a tile's side: how far from its edge a cut object's box may end
MIN_SUPPORT = 0.5  # of the absorbing score: what a detection needs to move a cut side
SMALLEST_TILE = 32  # pixels


@dataclass(frozen=True)
class Tiling:
    """The tiles of an image of (height, width) `size`, the whole image last unless it is the only
    one. boxes [T, 4]. `reach` (x, y): an object that is not larger is whole in one of the first T -
    1 tiles; infinite along a side that the tiles do not divide.
    """

    size: tuple[int, int]
    boxes: np.ndarray  # int64 [T, 4]
    reach: tuple[float, float]


def check_tile(tile: int | None, overlap: float) -> None:
    """Raises UserError for a tile or an overlap outside its range."""
    if tile is not None and (not isinstance(tile, int) or tile < SMALLEST_TILE):
        raise UserError(
            f"tile is {tile}; it must be a whole number of pixels, {SMALLEST_TILE} or more"
        )
    if not 0 <= overlap <= 0.9:
        raise UserError(f"overlap is {overlap}; it must be from 0 to 0.9")


def tiling(size: tuple[int, int], tile: int, overlap: float = OVERLAP) -> Tiling:
    """Tiles of `tile` x `tile` pixels, less where the image of `size` (height, width) is smaller,
    evenly spaced, so that neighbours share at least `overlap` of their side.
    """
    height, width = size
    tops, reach_y = _starts(height, tile, overlap)
    lefts, reach_x = _starts(width, tile, overlap)
    tall, wide = min(tile, height), min(tile, width)
    boxes = [(x, y, x + wide, y + tall) for y in tops for x in lefts]
    if len(boxes) > 1:
        boxes.append((0, 0, width, height))
    return Tiling(size, np.array(boxes, np.int64), (reach_x, reach_y))


def _starts(length: int, tile: int, overlap: float) -> tuple[list[int], float]:
    """Where tiles begin along a side, and how many pixels neighbours share."""
    if length <= tile:
        return [0], math.inf
    step = max(tile - math.ceil(tile * overlap), 1)
    number = math.ceil((length - tile) / step) + 1
    starts = np.linspace(0, length - tile, number).round().astype(int)
    return starts.tolist(), float(tile - np.diff(starts).max())


def tiled(
    stream: Callable[..., Iterator[tuple[int, Any]]],
    images: Iterable[ImageLike],
    *,
    tile: int,
    overlap: float,
    **settings: Any,
) -> Iterator[tuple[int, Any]]:
    """Like `stream(images, **settings)` of a detector, (index, detections) of each image, but
    merged from detections in tiles. Tiles of several images share batches.
    """
    plans: dict[int, tuple[Tiling, ImageLike]] = {}  # of the images that are not finished
    parts: dict[int, dict[int, Any]] = {}  # their detections so far, by the number of the tile
    owners: dict[int, int] = {}  # the image of each tile without detections so far
    numbers = count()

    def crops() -> Iterator[Image.Image]:
        pictures = read_ahead(images, lambda image: (as_picture(image), source_of(image)), 1)
        for index, (picture, source) in enumerate(pictures):
            plan = tiling((picture.height, picture.width), tile, overlap)
            plans[index], parts[index] = (plan, source), {}
            for box in plan.boxes.tolist():
                number = next(numbers)
                owners[number] = index
                yield picture if len(plan.boxes) == 1 else picture.crop(box)

    for number, detections in stream(crops(), **settings):
        index = owners.pop(number)
        parts[index][number] = detections
        plan, source = plans[index]
        if len(parts[index]) == len(plan.boxes):
            del plans[index]
            by_tile = [detections for _, detections in sorted(parts.pop(index).items())]
            yield index, replace(merged(by_tile, plan), source=source)


def merged(parts: Sequence[Any], plan: Tiling) -> Any:
    """The detections in an image from those in each of its tiles, best first. See the module."""
    if len(parts) == 1:
        return parts[0]
    corners = plan.boxes[:, :2].tolist()
    moved = [part.moved(x, y, plan.size) for part, (x, y) in zip(parts, corners, strict=True)]
    joined = moved[0].joined(moved)
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    boxes, labels, scores = (
        np.asarray(column) for column in (joined.boxes, joined.labels, joined.scores)
    )
    rows, grown = merge(boxes, labels, scores, owner, plan)
    return joined[rows].with_boxes(grown)


def merge(
    boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, owner: np.ndarray, plan: Tiling
) -> tuple[np.ndarray, np.ndarray]:
    """The detections that stay, best first: their rows [M], and their boxes float32 [M, 4].

    boxes [N, 4] are relative to the image, labels [N], scores [N]; owner [N] is the tile of each.
    """
    tiles = plan.boxes[owner].astype(np.float32)
    boxes = _clipped(boxes, tiles)
    cut = _cut_sides(boxes, tiles, plan.size)
    ranked = np.argsort(-scores, kind="stable")
    ranked = ranked[~_seen_better(boxes, owner, plan)[ranked]]
    overlap = _overlapping(plan.boxes)
    kept = [ranked[:0]]
    for label in np.unique(labels):
        rows = ranked[labels[ranked] == label]
        own = owner[rows]
        near = {tile: np.flatnonzero(overlap[tile][own]) for tile in np.unique(own)}
        found = _Ranked(boxes[rows], tiles[rows], own, scores[rows], cut[rows], near)
        stays, boxes[rows] = _merge_class(found)
        kept.append(rows[stays])
    rows = np.concatenate(kept)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    return rows, boxes[rows]


class _Ranked(NamedTuple):
    """The detections of one class, best first."""

    boxes: np.ndarray  # float32 [N, 4], inside their tiles
    tiles: np.ndarray  # float32 [N, 4]
    owner: np.ndarray  # int64 [N], the number of the tile
    scores: np.ndarray  # [N]
    cut: np.ndarray  # bool [N, 4]
    near: dict[int, np.ndarray]  # by tile, the rows in it and in the tiles that overlap it


def _merge_class(found: _Ranked) -> tuple[np.ndarray, np.ndarray]:
    """bool [N], the detections that no other absorbs, and the boxes [N, 4], theirs grown."""
    free, stays = np.ones(len(found.boxes), bool), np.zeros(len(found.boxes), bool)
    boxes = found.boxes.copy()
    for head in range(len(boxes)):
        if free[head]:
            stays[head] = True
            boxes[head] = _absorb(head, found, free)
    return stays, boxes


def _absorb(head: int, found: _Ranked, free: np.ndarray) -> np.ndarray:
    """Takes a detection and what it absorbs out of the free ones; returns its box [4]."""
    free[head] = False
    box, group = found.boxes[head], [head]
    for one in group:  # grows meanwhile
        others = found.near[found.owner[one]]
        others = others[free[others] & (found.owner[others] != found.owner[head])]
        others = others[_touching(found.boxes[others], found.boxes[one])]
        if not len(others):
            continue
        same = others[_agreement(one, others, found) >= MIN_AGREEMENT]
        free[same] = False
        strong = same[found.scores[same] >= MIN_SUPPORT * found.scores[head]]
        if found.cut[head].any() and len(strong):
            group.extend(strong.tolist())
            low, high = found.boxes[strong, :2].min(0), found.boxes[strong, 2:].max(0)
            further = np.concatenate([np.minimum(box[:2], low), np.maximum(box[2:], high)])
            box = np.where(found.cut[head], further, box)
    return box


def _overlapping(tiles: np.ndarray) -> np.ndarray:
    """bool [T, T]: which tiles [T, 4] share pixels. Detections in others cannot agree."""
    return np.array([_touching(tiles, tile) for tile in tiles])


def _touching(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """bool [N]: the boxes [N, 4] that a box overlaps; no others can agree with it."""
    apart = (boxes[:, :2] > box[2:]) | (boxes[:, 2:] < box[:2])
    return ~np.any(apart, axis=1)


def _agreement(one: int, others: np.ndarray, found: _Ranked) -> np.ndarray:
    """IoU of a box with others [N], each pair clipped to the area that both tiles see."""
    mine, their_tiles = found.tiles[one], found.tiles[others]
    shared = _intersection(mine, their_tiles)
    first, second = _clipped(found.boxes[one], shared), _clipped(found.boxes[others], shared)
    common = _areas(_intersection(first, second))
    union = _areas(first) + _areas(second) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _intersection(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What boxes [N, 4] or [4] share with others [N, 4]; sides of negative length for nothing."""
    low = np.maximum(boxes[..., :2], others[:, :2])
    return np.concatenate([low, np.minimum(boxes[..., 2:], others[:, 2:])], axis=1)


def _clipped(boxes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Boxes [N, 4] or [4] inside limits [N, 4]; without area where they do not overlap."""
    low, high = np.tile(limits[:, :2], 2), np.tile(limits[:, 2:], 2)
    return np.minimum(np.maximum(boxes, low), high)


def _areas(boxes: np.ndarray) -> np.ndarray:
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(0)
    return sides[:, 0] * sides[:, 1]


def _seen_better(boxes: np.ndarray, owner: np.ndarray, plan: Tiling) -> np.ndarray:
    """bool [N]: the whole image's detections that are whole in a smaller tile."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return (owner == len(plan.boxes) - 1) & (sides <= np.array(plan.reach)).all(1)


def _cut_sides(boxes: np.ndarray, tiles: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [N, 4]: the sides of boxes at an edge of their tile that is inside the image."""
    edges = np.array([0, 0, size[1], size[0]], np.float32)
    margins = CUT_MARGIN * np.tile(tiles[:, 2:] - tiles[:, :2], 2)
    return (np.abs(boxes - tiles) <= margins) & (tiles != edges)
