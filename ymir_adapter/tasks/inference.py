"""Runs the detector on the candidates, from files to images, batches and predictions, with a
bounded number of each in memory.

Threads decode and resize (Pillow releases the interpreter lock). Worker processes would need shared
memory, of which a container may have only 64 MB. Pictures of equal canvas share a batch, so that
none is padded and none depends on the others (`vidt.images.preprocessing`).

Letters: B pictures, h x w canvas, Q queries, K classes, M committee members.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vidt.images.batching import read_ahead
from vidt.images.canvas import resize
from vidt.images.files import UnreadableImage, read_image
from vidt.images.preprocessing import Preprocessing
from vidt.predict.detections import Detections, score_for
from vidt.predict.predictor import Predictor, is_out_of_memory
from ymir_adapter.protocol.errors import Code, TaskError

logger = logging.getLogger(__name__)

PENDING_BATCHES = 16  # batches' worth of pictures that wait for others of their canvas


@dataclass(frozen=True)
class Candidate:
    """A candidate image; if it is unreadable, `pixels` is None and `problem` is the reason.

    `size` is (height, width) of the stored pixels, without EXIF orientation; (0, 0) if unreadable.
    """

    index: int
    size: tuple[int, int] = (0, 0)
    pixels: Tensor | None = None  # uint8 [3, h, w], on the canvas
    problem: str = ""


@dataclass(frozen=True)
class Predictions:
    """Outputs of the detector for B pictures or views; on the CPU, float32."""

    logits: Tensor  # [M, B, Q, K] of the last M prediction levels, the final one last
    boxes: Tensor  # [B, Q, 4] cxcywh in 0..1, of the final level
    score: Callable[[Tensor], Tensor] = torch.sigmoid  # logits to one probability per class

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities of all members, [M, B, Q, K], in double precision so that scores add
        no rounding errors.
        """
        return self.score(self.logits.double())

    def rows(self, which: slice) -> "Predictions":
        return Predictions(self.logits[:, which], self.boxes[which], self.score)


def names_in_task(known: Sequence[str], asked: Sequence[str]) -> list[str]:
    """The classes of the weights as the task spells them, "" for a class outside the task. Like the
    platform, ignores case and outer blanks.
    """
    exact = {name: name for name in reversed(asked)}
    loose = {name.strip().lower(): name for name in reversed(asked)}
    return [exact.get(name, loose.get(name.strip().lower(), "")) for name in known]


def read_pictures(
    indices: Sequence[int],
    path_of: Callable[[int], str],
    preprocessing: Preprocessing,
    num_threads: int,
) -> Iterator[Candidate]:
    """The candidates at `indices`, in order, read ahead by threads (0: none)."""

    def read(index: int) -> Candidate:
        return read_picture(index, path_of(index), preprocessing)

    return read_ahead(indices, read, num_threads) if num_threads else map(read, indices)


def read_picture(index: int, path: str, preprocessing: Preprocessing) -> Candidate:
    """Reads the stored pixels and resizes them as for evaluation."""
    try:
        image = read_image(path)
    except UnreadableImage as error:
        return Candidate(index, problem=str(error))
    canvas = preprocessing.canvas(image.height, image.width)
    pixels = F.pil_to_tensor(resize(image, canvas))
    return Candidate(index, (image.height, image.width), pixels)


def equal_canvases(pictures: Iterable[Candidate], batch_size: int) -> Iterator[list[Candidate]]:
    """Batches of equal canvas, each as soon as it is full; an unreadable candidate at once, alone.
    If more than PENDING_BATCHES batches' worth of pictures wait, the largest incomplete batch goes.
    """
    waiting: defaultdict[tuple[int, ...], list[Candidate]] = defaultdict(list)
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
    """Runs a predictor's model on batches. When memory runs out it halves the batch from then on,
    and raises the error of torch if a single image does not fit.
    """

    def __init__(self, predictor: Predictor, *, rows: int, num_members: int = 1) -> None:
        """rows: most pictures or views in a forward pass; num_members: how many of the last
        prediction levels are needed, the final one included.
        """
        self.predictor, self.rows, self.num_members = predictor, rows, num_members

    def normalised(self, batch: Sequence[Candidate]) -> Tensor:
        """Readable candidates of one canvas -> float32 [B, 3, h, w] on the detector's device."""
        pixels = [picture.pixels for picture in batch if picture.pixels is not None]
        stacked = torch.stack(pixels).to(self.predictor.device)
        return self.predictor.preprocessing.normalise(stacked)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Predictions:
        """images [B, 3, h, w], normalised, without padding."""
        parts: list[Predictions] = []
        start = 0
        while start < len(images):
            try:
                parts.append(self._forward(images[start : start + self.rows]))
            except RuntimeError as error:
                if self.rows == 1 or not is_out_of_memory(error):
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

    def _forward(self, images: Tensor) -> Predictions:
        no_padding = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=images.device)
        alone = self.num_members == 1
        with self.predictor.autocast():
            outputs = self.predictor.model(images, no_padding, detections_only=alone)
        levels = [*outputs.get("aux_outputs", []), outputs][-self.num_members :]
        if len(levels) < min(self.num_members, 2):
            raise TaskError(
                Code.CONFIG,
                "mining_algorithm is aldd, which compares the inner decoder layers; these weights "
                "were trained without scores there: choose entropy or cald",
            )
        logits = torch.stack([level["pred_logits"] for level in levels]).float().cpu()
        boxes = outputs["pred_boxes"].float().cpu()
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise TaskError(
                Code.NAN,
                "the detector predicts numbers that are not finite; its weights are bad",
            )
        return Predictions(logits, boxes, score_for(self.predictor.model.config))


def detections_of(
    detector: Detector, batch: Sequence[Candidate], predictions: Predictions, threshold: float
) -> list[Detections]:
    """Detections in each picture that score at least `threshold`, best first; boxes in pixels."""
    final = {"pred_logits": predictions.logits[-1], "pred_boxes": predictions.boxes}
    sizes = torch.tensor([picture.size for picture in batch])
    return [found.above(threshold) for found in detector.predictor.decode(final, sizes)]
