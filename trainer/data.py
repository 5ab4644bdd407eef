"""Samples to batches: decoding, augmentation on torchvision v2, and the order in which a run sees
its images.

Every random number comes from (seed, epoch, image): a run does not depend on the number of workers,
and any step can be made again from nothing but its number.

Boxes are xyxy in pixels inside this file, and cxcywh in 0..1 of the unpadded image in what leaves
it.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, wrap

from trainer.config import TrainConfig
from trainer.masks import RunLengths, decode
from trainer.samples import Sample, SampleTable
from vidt.images import read_image
from vidt.preprocessing import GRANULE, Preprocessing, pad_batch, resize, resized_shape

RELEASED_EVAL_SIZE = 800  # the released scales are stated for this evaluation size
RELEASED_LADDER = (480, 800)  # short sides drawn from, in steps of 16
RELEASED_CROP_RESIZE = (400, 500, 600)  # short sides before a crop
RELEASED_CROP = (384, 600)  # sides of the crop
NOISED_GRANULE = 16  # few numbers of denoising queries, so few shapes to compile
NOISE = 0.5  # how far a denoising query starts from its box, in its (half) sizes


@dataclass(frozen=True)
class Augmentation:
    """The released recipe: flip; then half the time resize, half the time resize, crop and
    resize.
    """

    sizes: tuple[int, ...]
    max_size: int
    flip: bool = True
    crop: bool = True
    crop_resize: tuple[int, ...] = RELEASED_CROP_RESIZE
    crop_range: tuple[int, int] = RELEASED_CROP

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Augmentation":
        """Released scales in proportion to eval_size, unless train_sizes and train_max_size say
        otherwise.
        """
        ratio = config.eval_size / RELEASED_EVAL_SIZE
        low, high = (max(round(side * ratio / GRANULE), 1) * GRANULE for side in RELEASED_LADDER)
        return cls(
            sizes=config.train_sizes or tuple(range(low, high + 1, GRANULE)),
            max_size=config.train_max_size or config.eval_size * 1333 // RELEASED_EVAL_SIZE,
            flip=config.flip,
            crop=config.crop,
            crop_resize=tuple(max(round(side * ratio), GRANULE) for side in RELEASED_CROP_RESIZE),
            crop_range=(round(RELEASED_CROP[0] * ratio), round(RELEASED_CROP[1] * ratio)),
        )

    def draw(self, size: tuple[int, int], random: np.random.Generator) -> "Geometry":
        """What becomes of a picture of `size` (height, width) this time."""
        flip = self.flip and random.random() < 0.5
        area, crop = size, None
        if self.crop and random.random() < 0.5:
            before = resized_shape(*size, int(random.choice(self.crop_resize)))
            crop = Crop(before, *self._crop_area(before, random))
            area = crop.height, crop.width
        shape = resized_shape(*area, int(random.choice(self.sizes)), self.max_size)
        return Geometry(size, flip, crop, shape)

    def __call__(
        self, image: Image.Image, boxes: Tensor, labels: Tensor, random: np.random.Generator
    ) -> tuple[Image.Image, Tensor, Tensor]:
        """boxes [N, 4] xyxy pixels, labels [N]; objects that a crop leaves nothing of are gone from
        both.
        """
        geometry = self.draw((image.height, image.width), random)
        boxes, kept = geometry.on_boxes(boxes)
        return geometry.on_image(image), boxes, labels[kept]

    def _crop_area(
        self, size: tuple[int, int], random: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width inside a picture of `size`."""
        low, high = self.crop_range
        height, width = (int(random.integers(min(low, side), min(high, side) + 1)) for side in size)
        top = int(random.integers(0, size[0] - height + 1))
        left = int(random.integers(0, size[1] - width + 1))
        return top, left, height, width


@dataclass(frozen=True)
class Crop:
    """A part of a picture, in pixels, after it was resized to `before` (height, width)."""

    before: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> tuple[int, int, int, int]:
        return self.top, self.left, self.height, self.width


@dataclass(frozen=True)
class Geometry:
    """One drawing of an augmentation, the same for pixels, boxes and masks: mirror, crop, resize
    from `size` to `shape`, both (height, width).
    """

    size: tuple[int, int]
    flip: bool
    crop: Crop | None
    shape: tuple[int, int]

    def on_image(self, image: Image.Image) -> Image.Image:
        if self.flip:
            image = F.horizontal_flip(image)
        if self.crop:
            image = F.crop(resize(image, self.crop.before), *self.crop.area)
        return resize(image, self.shape)

    def on_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [N, 4] xyxy pixels to those of which a crop leaves something, and which these are:
        bool [N].
        """
        framed = BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=self.size)
        kept = torch.ones(len(boxes), dtype=torch.bool)
        if self.flip:
            framed = F.horizontal_flip(framed)
        if self.crop:
            framed = F.crop(F.resize(framed, list(self.crop.before)), *self.crop.area)
            framed = F.clamp_bounding_boxes(framed)
            kept = (framed[:, 2:] > framed[:, :2]).all(dim=1).as_subclass(Tensor)
            framed = wrap(framed[kept], like=framed)
        return F.resize(framed, list(self.shape)).as_subclass(Tensor), kept

    def on_masks(self, masks: Tensor) -> Tensor:
        """Masks [N, *size] to [N, *shape]: each pixel is the one that its centre came from."""
        rows, columns = (torch.arange(side) for side in self.size)
        if self.flip:
            columns = columns.flip(0)
        if self.crop:
            top, left, height, width = self.crop.area
            rows = _nearest(rows, self.crop.before[0])[top : top + height]
            columns = _nearest(columns, self.crop.before[1])[left : left + width]
        rows, columns = _nearest(rows, self.shape[0]), _nearest(columns, self.shape[1])
        # Masks lie column by column: whole columns are picked, then whole rows.
        picked = masks.transpose(1, 2).index_select(1, columns).transpose(1, 2).contiguous()
        return picked.index_select(1, rows)


def _nearest(places: Tensor, length: int) -> Tensor:
    """An axis resized to `length`: of each new pixel the place that its centre falls on."""
    return places[(2 * torch.arange(length) + 1) * len(places) // (2 * length)]


class DetectionDataset(Dataset):
    """Training pictures and their targets, addressed by (epoch, index).

    A picture that cannot be read is replaced by the next one that can, and marked in `unreadable`,
    which all workers share; the caller decides how many are too many.
    """

    def __init__(
        self,
        samples: SampleTable,
        augmentation: Augmentation,
        preprocessing: Preprocessing,
        *,
        seed: int,
        noised_queries: int = 0,
    ) -> None:
        self.samples, self.augmentation, self.preprocessing = samples, augmentation, preprocessing
        self.seed, self.noised_queries = seed, noised_queries
        self.reported = 0  # unreadable pictures that the caller has spoken of
        self.unreadable = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """`image` [3, h, w]; `target` with `labels` [N], `boxes` [N, 4] cxcywh in 0..1, `image_id`
        and, if asked for, `noised_boxes` [copies * N, 4]. Where the table has masks, `masks` [N, h,
        w] bool, `mask_boxes` [N, 4] xyxy in pixels of them, and `has_mask` [N] bool: False for an
        object without, whose `masks` are empty.

        Raises ValueError only if no picture of the dataset can be read.
        """
        epoch, wanted = key
        sample, image = self._read_from(wanted)
        random = np.random.default_rng((self.seed, epoch, wanted))
        objects = ~sample.crowd  # crowd regions are for scoring
        geometry = self.augmentation.draw((image.height, image.width), random)
        pixel_boxes, kept = geometry.on_boxes(sample.boxes[objects])
        image = geometry.on_image(image)
        scale = pixel_boxes.new_tensor([image.width, image.height] * 2)
        boxes = box_convert(pixel_boxes, "xyxy", "cxcywh") / scale
        labels = sample.labels[objects][kept]
        target = {"labels": labels, "boxes": boxes, "image_id": sample.image_id}
        if sample.masks is not None:
            rows = objects.nonzero()[kept, 0].tolist()
            target |= _mask_target([sample.masks[row] for row in rows], geometry, pixel_boxes)
        if self.noised_queries:
            target["noised_boxes"] = noise_boxes(boxes, self.noised_queries, random)
        return {"image": self.preprocessing.normalise(image), "target": target}

    def _read_from(self, wanted: int) -> tuple[Sample, Image.Image]:
        for offset in range(len(self.samples)):
            index = (wanted + offset) % len(self.samples)
            sample = self.samples[index]
            try:
                return sample, read_image(sample.path, sample.size)
            except ValueError as error:  # damaged, gone, or no longer the size that was checked
                self.unreadable[index] = True
                last = error
        raise last


def _mask_target(masks: list[RunLengths], geometry: Geometry, boxes: Tensor) -> dict[str, Tensor]:
    """What a target says of the masks in boxes [N, 4], xyxy in pixels after the augmentation."""
    return {
        "masks": geometry.on_masks(decode(masks, geometry.size)),
        "mask_boxes": boxes,
        "has_mask": torch.tensor([bool(mask) for mask in masks], dtype=torch.bool),
    }


def noise_boxes(boxes: Tensor, queries: int, random: np.random.Generator) -> Tensor:
    """As many whole copies of boxes [N, 4] cxcywh as fit into `queries` (at least one), each box
    moved by up to NOISE half sizes and its sides changed by up to NOISE: [copies * N, 4].
    """
    copies = max(queries // max(len(boxes), 1), 1)
    noise = torch.from_numpy(random.uniform(-NOISE, NOISE, (copies, *boxes.shape))).to(boxes)
    reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], dim=1)
    return (boxes + noise * reach).clamp(1e-3, 1.0).flatten(0, 1)


def noised_batch(targets: list[dict[str, Any]]) -> Tensor | None:
    """The targets' `noised_boxes` as [B, N, 4], N a multiple of NOISED_GRANULE; places past an
    image's own hold a box in the middle. None without.
    """
    if "noised_boxes" not in targets[0]:
        return None
    boxes = pad_sequence([t["noised_boxes"] for t in targets], batch_first=True, padding_value=0.5)
    return torch.nn.functional.pad(boxes, (0, 0, 0, -boxes.shape[1] % NOISED_GRANULE), value=0.5)


class EvaluationDataset(Dataset):
    """Validation pictures as they are evaluated and predicted; None where one cannot be read."""

    def __init__(self, samples: SampleTable, preprocessing: Preprocessing) -> None:
        self.samples, self.preprocessing = samples, preprocessing

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        """(index, image [3, h, w])."""
        sample = self.samples[index]
        try:
            return index, self.preprocessing(read_image(sample.path, sample.size))
        except ValueError:
            return index, None


class RunSampler(Sampler):
    """The micro-batches of a whole run, from any optimiser step on, as lists of (epoch, index).

    Each epoch is a permutation of its own, filled up from its own start to whole optimiser steps. A
    step's images are the same however many processes and micro-batches share them.
    """

    def __init__(
        self, num_images: int, *, step_images: int, micro_batch: int, seed: int, steps: range
    ) -> None:
        self.num_images, self.step_images, self.micro_batch = num_images, step_images, micro_batch
        self.seed, self.steps = seed, steps
        self.batch_size, self.drop_last = micro_batch, False  # Accelerate reads both

    def __len__(self) -> int:
        return len(self.steps) * (self.step_images // self.micro_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = steps_per_epoch(self.num_images, self.step_images)
        order, order_epoch = np.empty(0, np.int64), -1
        for step in self.steps:
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch, per_epoch * self.step_images), epoch
            images = order[position * self.step_images : (position + 1) * self.step_images]
            for start in range(0, self.step_images, self.micro_batch):
                yield [(epoch, int(index)) for index in images[start : start + self.micro_batch]]

    def _order(self, epoch: int, length: int) -> np.ndarray:
        permutation = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
        return np.resize(permutation, length)


def steps_per_epoch(num_images: int, step_images: int) -> int:
    """Optimiser steps that show every image at least once."""
    return -(-num_images // step_images)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`images` [B, 3, H, W], `padding` [B, H, W] bool (True = padding), `targets`: a list of B
    dictionaries.
    """
    images, padding = pad_batch([item["image"] for item in items])
    return {"images": images, "padding": padding, "targets": [item["target"] for item in items]}


def training_loader(
    dataset: DetectionDataset,
    config: TrainConfig,
    *,
    num_processes: int,
    micro_batch: int,
    steps: range,
) -> DataLoader:
    """Micro-batches of all processes for the given optimiser steps; `Accelerator.prepare` deals
    them out in turn.
    """
    sampler = RunSampler(
        len(dataset),
        step_images=config.batch_size * num_processes,
        micro_batch=micro_batch,
        seed=config.seed,
        steps=steps,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        # Else the loader would draw its workers' seed from the generator that drives dropout.
        generator=torch.Generator().manual_seed(config.seed),
        worker_init_fn=leave_signals_to_the_parent,
    )


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, but the step in hand still needs its images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def pad_to(batch: dict[str, Any], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images and padding of a batch, grown right and below to the (height, width) of the whole
    step.
    """
    images, padding = batch["images"], batch["padding"]
    right, below = canvas[1] - images.shape[3], canvas[0] - images.shape[2]
    if right == 0 and below == 0:
        return images, padding
    grow = (0, right, 0, below)
    return torch.nn.functional.pad(images, grow), torch.nn.functional.pad(padding, grow, value=True)
