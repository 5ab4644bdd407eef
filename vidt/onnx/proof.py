"""Comparison of an exported detector with the original on the same pictures, from the file to the
boxes.

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
from vidt.onnx.other_runner import OtherRunner
from vidt.predict.detections import Detections
from vidt.predict.predictor import Predictor

SHOWN = 0.05  # detections that score less need not be matched
SAME_BOX = 0.95  # IoU from which two boxes are the same
MOST_MASKS = 20  # the best of a picture: decoding takes time
PROOF_BATCH = 3  # batch size if it is dynamic; it differs from the traced one


@dataclass(frozen=True)
class Limits:
    """The largest differences allowed between an exported detector and the trained one."""

    scores: float  # largest difference of scores, 0..1
    boxes: float  # largest difference of sides, in shares of the picture
    masks: float  # largest share of a mask's square that differs
    matched: float  # least share of detections that are matched
    map50: float  # largest difference of map50, 0..1


FULL = Limits(scores=1e-3, boxes=1e-3, masks=0.01, matched=0.99, map50=1e-3)
HALF = Limits(scores=0.03, boxes=0.02, masks=0.1, matched=0.95, map50=0.01)


@dataclass(frozen=True)
class Differences:
    """Measured differences of the two detectors on the same pictures."""

    scores: float  # the largest difference
    boxes: float  # the largest difference of a side, in shares of the picture
    masks: float | None  # the largest share of a square that differs; None: there are no masks
    num_compared: int  # boxes
    num_shown: int  # detections that score SHOWN or more
    matched: float  # share of these that are matched; 1 if there are none
    num_reshaped: int  # pictures that evaluation resizes to another size than the frame

    def failures(self, limits: Limits) -> Iterator[str]:
        """Yields a text for each difference beyond its limit; NaN is beyond."""
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
    detector: OnnxDetector | OtherRunner,
    pictures: Iterable[Image.Image],
    limits: Limits,
    batch_size: int = PROOF_BATCH,
) -> Differences:
    """Runs both detectors on the pictures, which are iterated twice; batch_size is that of the
    exported detector if it is dynamic.
    """
    scores, boxes, masks = [0.0], [np.zeros(0)], [np.zeros(0)]
    shown, num_reshaped = np.zeros(2, int), 0
    mine = detections_in_frame(predictor, detector, pictures)
    theirs = detector.stream(pictures, batch_size=batch_size, clip=False)
    for expected, (_, exported) in zip(mine, theirs, strict=True):
        scores.append(_score_difference(expected, exported))
        pairs = _pairs(expected, exported, limits)
        boxes.append(_side_differences(*pairs))
        masks.append(_mask_differences(*pairs))
        shown += _matched_count(expected, exported)
        num_reshaped += predictor.preprocessing.canvas(*exported.size) != detector.frame
    # NumPy's maximum propagates NaN, Python's does not.
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
def detections_in_frame(
    predictor: Predictor, detector: OnnxDetector | OtherRunner, pictures: Iterable[Image.Image]
) -> Iterator[Detections]:
    """Detections of the trained detector on pictures in the exported detector's frame."""
    for picture in pictures:
        size = (picture.height, picture.width)
        resized = resize(picture, detector.shape_of(size))
        pixels, padding = pad_batch([to_pixels(resized)], detector.frame)
        batch = predictor.preprocessing.normalise(pixels, padding)
        outputs = predictor.model(batch, padding, detections_only=True)
        yield predictor.decode(outputs, torch.tensor([size]))[0]


def _score_difference(expected: Detections, exported: OnnxDetections) -> float:
    """Largest difference by rank, since near ties may change their order."""
    return float(np.abs(expected.scores.numpy() - exported.scores).max(initial=0.0))


def _pairs(
    expected: Detections, exported: OnnxDetections, limits: Limits
) -> tuple[Detections, OnnxDetections]:
    """Expected detections, and for each the nearest exported one of its class, by box and score.

    If only the best TOP_K are returned, detections that score about as little as the last are left
    out: a tie may have removed them. One without a partner of its class gets a box of NaN.
    """
    if len(expected.scores) >= TOP_K:
        expected = expected.above(expected.scores[-1].item() + 2 * limits.scores)
    if not len(expected.scores) or not len(exported):
        return expected[:0], exported[:0]
    same = expected.labels.numpy()[:, None] == exported.labels[None]
    scores = np.abs(expected.scores.numpy()[:, None] - exported.scores[None])
    sides = np.abs(
        _shares(expected.boxes.numpy(), exported)[:, None] - _shares(exported.boxes, exported)
    )
    distances = np.where(same, scores + sides.max(-1), np.inf)  # [expected, exported]
    partners = exported[distances.argmin(1)]
    lost = ~same.any(1)
    partners.boxes[lost] = np.nan
    return expected, partners


def _shares(boxes: np.ndarray, exported: OnnxDetections) -> np.ndarray:
    """Boxes [N, 4] in shares of the picture's sides."""
    height, width = exported.size
    return boxes / np.array([width, height, width, height], np.float32)


def _side_differences(expected: Detections, partners: OnnxDetections) -> np.ndarray:
    """[N]: of each pair, the largest difference of a side, in shares of the picture."""
    return np.abs(_shares(expected.boxes.numpy() - partners.boxes, partners)).max(-1)


def _mask_differences(expected: Detections, partners: OnnxDetections) -> np.ndarray:
    """[N or fewer]: of each pair, the share of the mask's square that differs; none without
    masks."""
    mine, theirs = expected.mask_vectors, partners.mask_vectors
    if mine is None or theirs is None:
        return np.zeros(0)
    vectors = [each[:MOST_MASKS] for each in (mine.vectors.numpy(), theirs)]
    squares = [decode_vectors(each, mine.side) for each in vectors]
    return (squares[0] != squares[1]).mean((1, 2))


def _matched_count(expected: Detections, exported: OnnxDetections) -> tuple[int, int]:
    """The number of detections that score SHOWN or more, and how many of them match an exported
    one: same class, IoU of at least SAME_BOX, each used once.
    """
    expected = expected.above(SHOWN)
    overlaps = _overlaps(expected.boxes.numpy(), exported.boxes)
    overlaps[expected.labels.numpy()[:, None] != exported.labels[None]] = 0.0
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
