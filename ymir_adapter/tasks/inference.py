"""Candidates through the detector: files to pictures to batches to predictions, never more than a
few of each in memory.

Pictures are decoded and resized by threads (Pillow lets go of the interpreter meanwhile), not by
worker processes: those hand pictures over in shared memory, of which a container may have 64 MB.
From thread to detector a picture is 8-bit pixels on its canvas. Pictures of equal canvas share a
batch, so that none is padded and none depends on its batch mates (`vidt.images.preprocessing`).

Letters: B pictures, h x w canvas, Q queries, K classes, M committee members.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vidt.images.files import UnreadableImage, read_image
from vidt.images.preprocessing import Preprocessing, resize
from vidt.predict.predictor import Detections, Predictor, score_for
from ymir_adapter.protocol.errors import Code, TaskError

logger = logging.getLogger(__name__)

READ_AHEAD = 4  # pictures that each thread may be ahead of the detector
# In a forward pass on a CPU. Measured on one thread: images of 128 x 128 gain from company, ones of
# 320 x 416 take longer each.
PIXELS_ON_CPU = 2**16
PENDING_BATCHES = 16  # pictures that wait for others of their canvas, in batches


@dataclass(frozen=True)
class Picture:
    """A candidate as it was read; `pixels` is None where that failed, and `problem` says why.

    size is (height, width) of the stored pixels, no EXIF orientation applied; (0, 0) if unreadable.
    """

    index: int
    size: tuple[int, int] = (0, 0)
    pixels: Tensor | None = None  # uint8 [3, h, w], on the canvas
    problem: str = ""


@dataclass(frozen=True)
class Predictions:
    """What the detector says of B pictures or views; on the CPU, float32."""

    logits: Tensor  # [M, B, Q, K] of the last M prediction levels, the final one last
    boxes: Tensor  # [B, Q, 4] cxcywh in 0..1, of the final level
    score: Callable[[Tensor], Tensor] = torch.sigmoid  # logits to one probability per class

    @property
    def probabilities(self) -> Tensor:
        """Of all members, in double precision, so that what is computed from them adds nothing to
        their own rounding: [M, B, Q, K].
        """
        return self.score(self.logits.double())

    def rows(self, which: slice) -> "Predictions":
        return Predictions(self.logits[:, which], self.boxes[which], self.score)


def names_in_task(known: Sequence[str], asked: Sequence[str]) -> list[str]:
    """The classes of the weights as the task spells them, empty for one that the task does not
    have. The platform tells names apart without case and outer blanks.
    """
    exact = {name: name for name in reversed(asked)}
    loose = {name.strip().lower(): name for name in reversed(asked)}
    return [exact.get(name, loose.get(name.strip().lower(), "")) for name in known]


def read_pictures(
    indices: Sequence[int],
    path_of: Callable[[int], str],
    preprocessing: Preprocessing,
    num_threads: int,
) -> Iterator[Picture]:
    """The candidates at `indices`, in that order, read ahead by threads (0: by none)."""

    def read(index: int) -> Picture:
        return read_picture(index, path_of(index), preprocessing)

    if num_threads == 0:
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="pictures") as pool:
        ahead: deque[Future[Picture]] = deque()
        try:
            for index in indices:
                if len(ahead) >= num_threads * READ_AHEAD:
                    yield ahead.popleft().result()
                ahead.append(pool.submit(read, index))
            while ahead:
                yield ahead.popleft().result()
        finally:  # a reader that stops early waits for none but those under way
            for future in ahead:
                future.cancel()


def read_picture(index: int, path: str, preprocessing: Preprocessing) -> Picture:
    """Stored pixels, resized as for evaluation."""
    try:
        image = read_image(path)
    except UnreadableImage as error:
        return Picture(index, problem=str(error))
    canvas = preprocessing.canvas(image.height, image.width)
    pixels = F.pil_to_tensor(resize(image, canvas))
    return Picture(index, (image.height, image.width), pixels)


def equal_canvases(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Readable pictures in batches of equal canvas as soon as one is full; those that could not be
    read at once, each alone. Of pictures that wait for company there are never more than
    PENDING_BATCHES batches' worth: then the fullest goes as it is.
    """
    waiting: defaultdict[tuple[int, ...], list[Picture]] = defaultdict(list)
    count = 0
    for picture in pictures:
        if picture.pixels is None:
            yield [picture]
            continue
        canvas = tuple(picture.pixels.shape)
        waiting[canvas].append(picture)
        count += 1
        if len(waiting[canvas]) < batch_size:
            if count < PENDING_BATCHES * batch_size:
                continue
            canvas = max(waiting, key=lambda key: len(waiting[key]))
        batch = waiting.pop(canvas)
        count -= len(batch)
        yield batch
    yield from waiting.values()


class Detector:
    """A predictor's model on batches. Where memory does not suffice it takes half as many at a
    time from then on; one alone that does not fit raises torch.OutOfMemoryError.
    """

    def __init__(self, predictor: Predictor, *, rows: int, num_members: int = 1) -> None:
        """rows: pictures or views in a forward pass at most; num_members: prediction levels that
        are asked for, the final one included.
        """
        self.predictor, self.rows, self.num_members = predictor, rows, num_members

    def normalised(self, batch: Sequence[Picture]) -> Tensor:
        """Readable pictures of one canvas -> float32 [B, 3, h, w] on the detector's device."""
        pixels = [picture.pixels for picture in batch if picture.pixels is not None]
        stacked = torch.stack(pixels).to(self.predictor.device)
        return self.predictor.preprocessing.normalise(stacked)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Predictions:
        """images [B, 3, h, w], normalised, nothing padded."""
        parts: list[Predictions] = []
        start = 0
        while start < len(images):
            try:
                parts.append(self._forward(images[start : start + self._rows_for(images)]))
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
                self.rows = max(min(self.rows, len(images)) // 2, 1)
                logger.warning(f"out of memory: {self.rows} images at a time from here on")
                continue
            start += len(parts[-1].boxes)
        return Predictions(
            torch.cat([part.logits for part in parts], dim=1),
            torch.cat([part.boxes for part in parts]),
            parts[0].score,
        )

    def _rows_for(self, images: Tensor) -> int:
        """Of images [B, 3, h, w] in one forward pass: a CPU wants no more than its caches hold."""
        if images.device.type != "cpu":
            return self.rows
        return min(self.rows, max(PIXELS_ON_CPU // images[0, 0].numel(), 1))

    def _forward(self, images: Tensor) -> Predictions:
        no_padding = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=images.device)
        alone = self.num_members == 1
        outputs = self.predictor.model(images, no_padding, detections_only=alone)
        levels = [*outputs.get("aux_outputs", []), outputs][-self.num_members :]
        if len(levels) < min(self.num_members, 2):
            raise TaskError(
                Code.CONFIG,
                "mining_algorithm is aldd, which compares what the inner decoder layers say; these "
                "weights were not trained to score there: choose entropy or cald",
            )
        logits = torch.stack([level["pred_logits"] for level in levels]).float().cpu()
        boxes = outputs["pred_boxes"].float().cpu()
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise TaskError(
                Code.NAN, "the detector predicts numbers that are not finite; its weights are bad"
            )
        return Predictions(logits, boxes, score_for(self.predictor.model.config))


def detections_of(
    detector: Detector, batch: Sequence[Picture], predictions: Predictions, threshold: float
) -> list[Detections]:
    """What was found in each picture, at least `threshold`, best first; boxes in pixels of it."""
    final = {"pred_logits": predictions.logits[-1], "pred_boxes": predictions.boxes}
    sizes = torch.tensor([picture.size for picture in batch])
    return [found.above(threshold) for found in detector.predictor.decode(final, sizes)]
