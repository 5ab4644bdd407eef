"""Files in which the ranks of a mining or inference task store predictions until the results are
written: in the order of processing, read in the order of the candidates.

Memory holds 40 bytes for each candidate; boxes and class shares stay on disk.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vidt.predict.detections import Detections
from ymir_adapter.tasks.inference import Candidate
from ymir_adapter.tasks.mining import class_weights

NAMED_UNREADABLE = 5  # unreadable candidates whose reason a rank remembers
ROWS_TOGETHER = 4096  # class shares that are read at once
IMAGE = np.dtype(
    [
        *(("index", "<i8"), ("height", "<i4"), ("width", "<i4")),
        *(("start", "<i8"), ("count", "<i4"), ("score", "<f8")),
    ]
)
BOX = np.dtype([("box", "<f4", (4,)), ("score", "<f4"), ("label", "<i4")])


class Part:
    """Three files of one rank, which only grow: an IMAGE for each candidate, its BOXes, and its
    class shares if class balance is on.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        names = (f"{rank}.images", f"{rank}.boxes", f"{rank}.shares")
        self._images, self._boxes, self._shares = ((folder / name).open("wb") for name in names)
        self.written = 0  # boxes
        self.unreadable: list[str] = []  # the reasons of the first few
        self.num_unreadable = 0

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (self._images, self._boxes, self._shares):
            file.close()

    def add(
        self,
        picture: Candidate,
        score: float,
        detections: Detections | None = None,
        shares: Tensor | None = None,
    ) -> None:
        """shares: int64 [K], for all pictures or for none."""
        count = 0 if detections is None else len(detections.scores)
        row = (picture.index, *picture.size, self.written, count, score)
        self._images.write(np.array(row, IMAGE).tobytes())
        if detections is not None:
            boxes = np.empty(count, BOX)
            boxes["box"], boxes["score"] = detections.boxes.numpy(), detections.scores.numpy()
            boxes["label"] = detections.labels.numpy()
            self._boxes.write(boxes.tobytes())
            self.written += count
        if shares is not None:
            self._shares.write(shares.numpy().astype("<i8").tobytes())
        if picture.problem:
            self.num_unreadable += 1
            self.unreadable += [picture.problem][: NAMED_UNREADABLE - len(self.unreadable)]


class Parts:
    """The files of all ranks, read in the order of the candidates."""

    def __init__(self, folder: Path, num_candidates: int, num_parts: int) -> None:
        tables = [np.fromfile(folder / f"{rank}.images", IMAGE) for rank in range(num_parts)]
        rows = np.concatenate(tables)
        owners = np.repeat(np.arange(num_parts), [len(table) for table in tables])
        self.order = np.argsort(rows["index"], kind="stable")
        self.images, self.owners = rows[self.order], owners[self.order]
        assert np.array_equal(self.images["index"], np.arange(num_candidates)), "one row for each"
        self._boxes = [(folder / f"{rank}.boxes").open("rb") for rank in range(num_parts)]
        self._shares = [folder / f"{rank}.shares" for rank in range(num_parts)]

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._boxes:
            file.close()

    @property
    def readable(self) -> np.ndarray:
        return self.images["height"] > 0

    def detections(self, index: int) -> Detections:
        image = self.images[index]
        file = self._boxes[self.owners[index]]
        file.seek(int(image["start"]) * BOX.itemsize)
        boxes = np.frombuffer(file.read(int(image["count"]) * BOX.itemsize), BOX)
        columns = (boxes["score"], boxes["label"].astype(np.int64), boxes["box"])
        scores, labels, corners = (torch.from_numpy(column.copy()) for column in columns)
        return Detections(scores, labels, corners)

    def class_weights(self, num_classes: int) -> np.ndarray:
        """Weights [N] in the order of the candidates."""
        total = torch.zeros(num_classes, dtype=torch.int64)
        for rows in self._class_shares(num_classes):
            total += rows.sum(0)
        weights = [class_weights(rows, total) for rows in self._class_shares(num_classes)]
        return torch.cat(weights).numpy()[self.order]

    def _class_shares(self, num_classes: int) -> Iterator[Tensor]:
        """int64 [some, K] in the order of the files, a bounded number at a time."""
        for path in self._shares:
            with path.open("rb") as file:
                while read := file.read(ROWS_TOGETHER * num_classes * 8):
                    yield torch.frombuffer(bytearray(read), dtype=torch.int64).unflatten(
                        0, (-1, num_classes)
                    )
