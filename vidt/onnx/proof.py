"""How far an exported detector is from the one that it was exported from: the same pictures through
both, from the file to the boxes.

Letters: N detections of a picture, best first.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from vidt.images.canvas import resize
from vidt.images.mask_drawing import decode_vectors
from vidt.images.preprocessing import pad_batch, to_pixels
from vidt.onnx.detector import TOP_K, OnnxDetections, OnnxDetector
from vidt.predict.detections import Detections
from vidt.predict.predictor import Predictor

SHOWN = 0.05  # detections that score less are not asked to be found again
SAME_BOX = 0.95  # IoU from which two boxes are the same
MOST_MASKS = 20  # of a picture, the best: their squares take time
PROOF_BATCH = 3  # pictures computed together, where the batch is dynamic: not the traced number


@dataclass(frozen=True)
class Limits:
    """How far an exported detector may be from the trained one."""

    scores: float  # largest difference of scores, 0..1
    boxes: float  # largest difference of sides, in shares of the picture
    masks: float  # largest share of a mask's square that differs
    matched: float  # least share of detections that are found again
    map50: float  # largest difference of map50, 0..1


FULL = Limits(scores=1e-3, boxes=1e-3, masks=0.01, matched=0.99, map50=1e-3)
HALF = Limits(scores=0.03, boxes=0.02, masks=0.1, matched=0.95, map50=0.01)


@dataclass(frozen=True)
class Differences:
    """What the two say of the same pictures."""

    scores: float  # the largest difference
    boxes: float  # the largest difference of a side, in shares of the picture
    masks: float | None  # the largest share of a square that differs; None: there are no masks
    num_compared: int  # boxes
    num_shown: int  # detections that score SHOWN or more
    matched: float  # share of these that is found again; 1 if there are none
    num_reshaped: int  # pictures that evaluation would bring to another size than the frame

    def failures(self, limits: Limits) -> Iterator[str]:
        """In words, what is beyond the limits; NaN is."""
        if not self.scores <= limits.scores:
            yield f"scores differ by {self.scores:.2g}"
        if not self.boxes <= limits.boxes:
            yield f"boxes differ by {self.boxes:.2g} of the picture"
        if self.masks is not None and not self.masks <= limits.masks:
            yield f"masks differ in {self.masks:.1%} of their square"
        if not self.matched >= limits.matched:
            yield f"only {self.matched:.1%} are found again"
        if not self.num_compared:
            yield "no detection stands out enough to be compared; are the weights trained?"


def compare(
    predictor: Predictor,
    detector: OnnxDetector,
    pictures: Iterable[Image.Image],
    limits: Limits,
    batch_size: int = PROOF_BATCH,
) -> Differences:
    """Both detectors on pictures that can be gone through twice; batch_size is the exported one's,
    where it takes any.
    """
    scores, boxes, masks = [0.0], [np.zeros(0)], [np.zeros(0)]
    shown, num_reshaped = np.zeros(2, int), 0
    mine = found_in_frame(predictor, detector, pictures)
    theirs = detector.stream(pictures, batch_size=batch_size, clip=False)
    for wanted, (_, found) in zip(mine, theirs, strict=True):
        scores.append(_score_difference(wanted, found))
        pairs = _pairs(wanted, found, limits)
        boxes.append(_side_differences(*pairs))
        masks.append(_mask_differences(*pairs))
        shown += _found_again(wanted, found)
        num_reshaped += predictor.preprocessing.canvas(*found.size) != detector.frame
    # NumPy's maximum of anything and NaN is NaN, Python's is not.
    return Differences(
        scores=float(np.max(scores)),
        boxes=float(np.max(np.concatenate(boxes), initial=0.0)),
        masks=float(np.max(np.concatenate(masks))) if any(map(len, masks)) else None,
        num_compared=sum(map(len, boxes)),
        num_shown=int(shown[0]),
        matched=shown[1] / shown[0] if shown[0] else 1.0,
        num_reshaped=num_reshaped,
    )


@torch.inference_mode()
def found_in_frame(
    predictor: Predictor, detector: OnnxDetector, pictures: Iterable[Image.Image]
) -> Iterator[Detections]:
    """What the trained detector finds where pictures are brought to the exported one's frame."""
    for picture in pictures:
        size = (picture.height, picture.width)
        resized = resize(picture, detector.shape_of(size))
        pixels, padding = pad_batch([to_pixels(resized)], detector.frame)
        batch = predictor.preprocessing.normalise(pixels, padding)
        outputs = predictor.model(batch, padding, detections_only=True)
        yield predictor.decode(outputs, torch.tensor([size]))[0]


def _score_difference(wanted: Detections, found: OnnxDetections) -> float:
    """Of the best, the second best, and so on: near ties may change places."""
    return float(np.abs(wanted.scores.numpy() - found.scores).max(initial=0.0))


def _pairs(
    wanted: Detections, found: OnnxDetections, limits: Limits
) -> tuple[Detections, OnnxDetections]:
    """Detections, and for each of them the nearest of its class; nearness is in scores as well.

    Where only the best are told, those that score about as little as the last are left out: they
    may be missing for a tie. One whose class is not found at all has a partner of no place.
    """
    if len(wanted.scores) >= TOP_K:
        wanted = wanted.above(wanted.scores[-1].item() + 2 * limits.scores)
    if not len(wanted.scores) or not len(found):
        return wanted[:0], found[:0]
    same = wanted.labels.numpy()[:, None] == found.labels[None]
    scores = np.abs(wanted.scores.numpy()[:, None] - found.scores[None])
    sides = np.abs(_shares(wanted.boxes.numpy(), found)[:, None] - _shares(found.boxes, found))
    distances = np.where(same, scores + sides.max(-1), np.inf)  # [those wanted, those found]
    partners = found[distances.argmin(1)]
    lost = ~same.any(1)
    partners.boxes[lost] = np.nan
    return wanted, partners


def _shares(boxes: np.ndarray, found: OnnxDetections) -> np.ndarray:
    """Boxes [N, 4] in shares of the picture's sides."""
    height, width = found.size
    return boxes / np.array([width, height, width, height], np.float32)


def _side_differences(wanted: Detections, partners: OnnxDetections) -> np.ndarray:
    """[N]: of each pair, the largest difference of a side, in shares of the picture."""
    return np.abs(_shares(wanted.boxes.numpy() - partners.boxes, partners)).max(-1)


def _mask_differences(wanted: Detections, partners: OnnxDetections) -> np.ndarray:
    """[N or fewer]: of each pair, the share of the mask's square that differs; none without
    masks."""
    mine, theirs = wanted.mask_vectors, partners.mask_vectors
    if mine is None or theirs is None:
        return np.zeros(0)
    vectors = [each[:MOST_MASKS] for each in (mine.vectors.numpy(), theirs)]
    squares = [decode_vectors(each, mine.side) for each in vectors]
    return (squares[0] != squares[1]).mean((1, 2))


def _found_again(wanted: Detections, found: OnnxDetections) -> tuple[int, int]:
    """Detections that are shown, and how many of them have a box of the same class, each its own,
    with an IoU of at least SAME_BOX.
    """
    wanted = wanted.above(SHOWN)
    overlaps = _overlaps(wanted.boxes.numpy(), found.boxes)
    overlaps[wanted.labels.numpy()[:, None] != found.labels[None]] = 0.0
    matched = 0
    for row in overlaps:
        best = int(row.argmax())
        if row[best] >= SAME_BOX:
            matched += 1
            overlaps[:, best] = 0.0
    return len(overlaps), matched


def _overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of boxes [n, 4] and [m, 4], xyxy: [n, m]."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    other = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inside = (other - corner).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(-1) for boxes in (first, second)]
    return inside / (areas[0][:, None] + areas[1][None] - inside).clip(1e-9)
