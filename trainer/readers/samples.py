"""Annotated images as flat tensors.

A forked worker copies Python objects as soon as it touches their reference counts, and a spawned
one unpickles them. Tensors avoid both: a forked worker reads the parent's pages, a spawned one maps
the same shared memory. A table of a million images costs a worker no memory.

N images, M boxes. Boxes are xyxy in pixels of the annotated image.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.readers.masks import MaskColumn
from trainer.readers.run_lengths import RunLengths


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its n boxes.

    `size` is (height, width) as annotated, (0, 0) if not given. `labels` count from 0 without gaps.
    `crowd` marks regions that training ignores and scoring honours. `annotation_ids` are the
    dataset's own; None numbers boxes in the order of the table. `masks` are n run lengths (see
    `trainer.readers.run_lengths`), None if no object of the dataset has one.
    """

    path: str
    image_id: int
    size: tuple[int, int]
    boxes: Tensor  # float32 [n, 4]
    labels: Tensor  # int64 [n]
    areas: Tensor  # float32 [n]
    crowd: Tensor  # bool [n]
    annotation_ids: Tensor | None = None  # int64 [n]
    masks: tuple[RunLengths, ...] | None = None


@dataclass(frozen=True, eq=False)
class SampleTable:
    """All samples of a split. `source` names it in messages.

    `category_ids[label]` is the dataset's own id of a class, -1 for a class it does not have.
    `masks` is None if they were not read, or if there are none.
    """

    source: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    path_bytes: Tensor  # uint8, all paths end to end
    path_offsets: Tensor  # int64 [N + 1]
    image_ids: Tensor  # int64 [N]
    sizes: Tensor  # int64 [N, 2], (height, width)
    box_offsets: Tensor  # int64 [N + 1]
    boxes: Tensor  # float32 [M, 4]
    labels: Tensor  # int64 [M]
    areas: Tensor  # float32 [M]
    crowd: Tensor  # bool [M]
    annotation_ids: Tensor  # int64 [M]
    masks: MaskColumn | None = None  # of M objects

    @classmethod
    def from_columns(
        cls,
        *,
        source: str,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        paths: Iterable[str],
        image_ids: Any,
        sizes: Any,
        owners: Any,
        boxes: Any,
        labels: Any,
        areas: Any,
        crowd: Any,
        annotation_ids: Any,
        masks: MaskColumn | None = None,
    ) -> "SampleTable":
        """Build from arrays. `owners` [M] is the image, 0..N-1, of each box, in any order."""
        owners = np.asarray(owners, np.int64)
        order = np.argsort(owners, kind="stable")
        encoded = [os.fsencode(path) for path in paths]
        path_bytes = np.frombuffer(b"".join(encoded), np.uint8).copy()
        counts = np.bincount(owners, minlength=len(encoded))

        def column(values: Any, dtype: type) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype)[order])

        return cls(
            source=source,
            class_names=tuple(class_names),
            category_ids=tuple(category_ids),
            path_bytes=torch.from_numpy(path_bytes),
            path_offsets=_offsets(torch.tensor([len(path) for path in encoded])),
            image_ids=torch.from_numpy(np.array(image_ids, np.int64)),
            sizes=torch.from_numpy(np.array(sizes, np.int64).reshape(-1, 2)),
            box_offsets=_offsets(torch.from_numpy(counts)),
            boxes=torch.from_numpy(np.asarray(boxes, np.float32).reshape(-1, 4)[order]),
            labels=column(labels, np.int64),
            areas=column(areas, np.float32),
            crowd=column(crowd, np.bool_),
            annotation_ids=column(annotation_ids, np.int64),
            masks=_picked(masks, torch.from_numpy(order)),
        )

    @classmethod
    def from_samples(
        cls,
        samples: Iterable[Sample],
        class_names: Sequence[str],
        category_ids: Sequence[int] | None = None,
        source: str = "",
    ) -> "SampleTable":
        """Build from samples; category ids default to 1, 2, ... in the order of the classes."""
        samples = list(samples)
        counts = torch.tensor([len(sample.boxes) for sample in samples], dtype=torch.int64)
        starts = _offsets(counts)[:-1].tolist()
        annotation_ids = [
            torch.arange(start + 1, start + 1 + len(sample.boxes))
            if sample.annotation_ids is None
            else sample.annotation_ids
            for start, sample in zip(starts, samples, strict=True)
        ]
        return cls.from_columns(
            source=source,
            class_names=class_names,
            category_ids=range(1, len(class_names) + 1) if category_ids is None else category_ids,
            paths=[sample.path for sample in samples],
            image_ids=[sample.image_id for sample in samples],
            sizes=[sample.size for sample in samples],
            owners=torch.arange(len(samples)).repeat_interleave(counts),
            boxes=_joined([sample.boxes for sample in samples]),
            labels=_joined([sample.labels for sample in samples]),
            areas=_joined([sample.areas for sample in samples]),
            crowd=_joined([sample.crowd for sample in samples]),
            annotation_ids=_joined(annotation_ids),
            masks=_mask_column(samples),
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        """A sample with copies of its tensors."""
        index = range(len(self))[index]
        boxes = slice(*self.box_offsets[index : index + 2].tolist())
        height, width = self.sizes[index].tolist()
        return Sample(
            path=self.path(index),
            image_id=int(self.image_ids[index]),
            size=(height, width),
            boxes=self.boxes[boxes].clone(),
            labels=self.labels[boxes].clone(),
            areas=self.areas[boxes].clone(),
            crowd=self.crowd[boxes].clone(),
            annotation_ids=self.annotation_ids[boxes].clone(),
            masks=None if self.masks is None else self.masks[boxes],
        )

    def objects_of(self, index: int) -> Tensor:
        """The boxes [n, 4] of an image, crowd regions left out."""
        boxes = slice(*self.box_offsets[index : index + 2].tolist())
        return self.boxes[boxes][~self.crowd[boxes]]

    def path(self, index: int) -> str:
        start, end = self.path_offsets[index : index + 2].tolist()
        return os.fsdecode(self.path_bytes[start:end].numpy().tobytes())

    def paths(self) -> Iterator[str]:
        blob, offsets = self.path_bytes.numpy().tobytes(), self.path_offsets.tolist()
        return (os.fsdecode(blob[a:b]) for a, b in pairwise(offsets))

    def fingerprint(self) -> str:
        """A hash of the classes and annotations, independent of where the files are."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for column in (self.image_ids, self.sizes, self.box_offsets, self.boxes, self.labels):
            digest.update(column.contiguous().numpy().tobytes())
        if self.masks is not None:
            digest.update(self.masks.data.numpy().tobytes())
        if self.crowd.any():  # not always, so that checkpoints of older versions still match
            digest.update(self.crowd.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def box_counts(self) -> Tensor:
        """Boxes of each image, crowd boxes included: int64 [N]."""
        return self.box_offsets.diff()

    @property
    def box_owners(self) -> Tensor:
        """Image, 0..N-1, of each box: int64 [M]."""
        return torch.arange(len(self)).repeat_interleave(self.box_counts)

    def subset(self, indices: Sequence[int] | Tensor) -> "SampleTable":
        """The samples at `indices`, in that order; an index may occur more than once."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        path_offsets, path_index = _gather_ranges(self.path_offsets, index)
        box_offsets, box_index = _gather_ranges(self.box_offsets, index)
        return replace(
            self._take_boxes(box_index, box_offsets),
            path_bytes=self.path_bytes[path_index],
            path_offsets=path_offsets,
            image_ids=self.image_ids[index],
            sizes=self.sizes[index],
        )

    def keep_boxes(self, keep: Tensor) -> "SampleTable":
        """The same images with only the boxes where `keep`, bool [M], holds."""
        return self._take_boxes(keep.nonzero().squeeze(1), _offsets(keep)[self.box_offsets])

    def _take_boxes(self, index: Tensor, offsets: Tensor) -> "SampleTable":
        return replace(
            self,
            box_offsets=offsets,
            boxes=self.boxes[index],
            labels=self.labels[index],
            areas=self.areas[index],
            crowd=self.crowd[index],
            annotation_ids=self.annotation_ids[index],
            masks=_picked(self.masks, index),
        )


def concatenated(tables: Sequence[SampleTable]) -> SampleTable:
    """The images of tables with the same classes in one, the first table's first, without masks."""
    first = tables[0]
    assert all(table.class_names == first.class_names for table in tables), "classes differ"
    starts = np.cumsum([0, *(len(table) for table in tables)]).tolist()
    owners = [table.box_owners + start for table, start in zip(tables, starts[:-1], strict=True)]

    def column(name: str) -> np.ndarray:
        return torch.cat([getattr(table, name) for table in tables]).numpy()

    return SampleTable.from_columns(
        source=" and ".join(table.source for table in tables),
        class_names=first.class_names,
        category_ids=first.category_ids,
        paths=[path for table in tables for path in table.paths()],
        image_ids=column("image_ids"),
        sizes=column("sizes"),
        owners=torch.cat(owners).numpy(),
        boxes=column("boxes"),
        labels=column("labels"),
        areas=column("areas"),
        crowd=column("crowd"),
        annotation_ids=column("annotation_ids"),
    )


def _offsets(counts: Tensor) -> Tensor:
    """Counts [n] to the offsets [n + 1] at which each range starts and the last one ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.to(torch.int64).cumsum(0)])


def _gather_ranges(offsets: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """New offsets, and the elements, of the ranges picked by `index`."""
    counts = offsets.diff()[index]
    new_offsets = _offsets(counts)
    shifts = offsets[:-1][index] - new_offsets[:-1]
    return new_offsets, torch.arange(int(new_offsets[-1])) + shifts.repeat_interleave(counts)


def _picked(masks: MaskColumn | None, index: Tensor) -> MaskColumn | None:
    if masks is None:
        return None
    offsets, elements = _gather_ranges(masks.offsets, index)
    return MaskColumn(masks.data[elements], offsets)


def _mask_column(samples: list[Sample]) -> MaskColumn | None:
    if all(sample.masks is None for sample in samples):
        return None
    nothing = [(b"",) * len(sample.boxes) for sample in samples]
    masks = [sample.masks or none for sample, none in zip(samples, nothing, strict=True)]
    return MaskColumn.from_run_lengths([mask for image in masks for mask in image])


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if tensors else torch.zeros(0)
