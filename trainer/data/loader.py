"""Samples to batches: images and their targets.

Every random number follows from (seed, epoch, image). A run does not depend on the number of
workers.

Inside this file boxes are xyxy in pixels; in targets they are cxcywh in 0..1 of the unpadded image.
"""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.augmentation import Augmentation, Geometry
from trainer.data.denoising import NO_DENOISING, Denoising
from trainer.data.image_cache import ImageCache
from trainer.data.order import Key, RunSampler, repeat_factors
from trainer.readers.masks import decode
from trainer.readers.run_lengths import RunLengths
from trainer.readers.samples import Sample, SampleTable
from trainer.settings.config import TrainConfig
from vidt.errors import UserError
from vidt.images.files import read_image
from vidt.images.preprocessing import Preprocessing, pad_batch, to_pixels

PREFETCH = 4  # batches that each worker loads ahead
# [N, ...] in targets
ROWS = ("labels", "boxes", "denoising_boxes", "denoising_labels", "mask_boxes", "has_mask")


class DetectionDataset(Dataset):
    """Training images and their targets, addressed by `Key`.

    The next readable image replaces one that cannot be read, which is marked in `unreadable`. All
    workers share that tensor; the caller decides how many are too many.
    """

    def __init__(
        self,
        samples: SampleTable,
        augmentation: Augmentation,
        preprocessing: Preprocessing,
        *,
        seed: int,
        denoising: Denoising = NO_DENOISING,
        cache: ImageCache | None = None,
    ) -> None:
        self.cache = cache
        self.samples, self.augmentation, self.preprocessing = samples, augmentation, preprocessing
        self.seed, self.denoising = seed, denoising
        self.reported = 0  # unreadable images that the caller has reported
        self.unreadable = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """`image` uint8 [3, h, w]; `target` with `labels` [N], `boxes` [N, 4] cxcywh in 0..1,
        `image_id` and, with denoising queries, what `Denoising.of_target` adds. If the table has
        masks: `masks` [N, h, w] bool, `mask_boxes` [N, 4] xyxy in pixels of these masks, and
        `has_mask` [N] bool, False for an object without a mask, whose mask is empty.

        Raises UserError if no image of the dataset can be read.
        """
        sample, geometry, image, random = self._read_from(*key)
        objects = ~sample.crowd  # crowd regions only matter in scoring
        pixel_boxes, kept = geometry.on_boxes(sample.boxes[objects])
        boxes = _relative(pixel_boxes, geometry.shape)
        labels = sample.labels[objects][kept]
        target = {"labels": labels, "boxes": boxes, "image_id": sample.image_id}
        if sample.masks is not None:
            rows = objects.nonzero()[kept, 0].tolist()
            target |= _mask_target([sample.masks[row] for row in rows], geometry, pixel_boxes)
        target |= self.denoising.of_target(boxes, labels, random)
        return {"image": to_pixels(image), "target": target}

    def aspect(self, epoch: int, index: int) -> float:
        """Height over width of an image as augmented in an epoch, before the last resize; index as
        in `Key`.
        """
        height, width = self.samples.sizes[index % len(self)].tolist()
        random = random_of(self.seed, epoch, index)
        _, crop = self.augmentation.draw_flip_and_crop((height, width), random)
        return crop.height / crop.width if crop else height / width

    def _read_from(
        self, epoch: int, wanted: int, short_side: int | None = None
    ) -> tuple[Sample, Geometry, Image.Image, np.random.Generator]:
        """The sample at `wanted` or the next readable one, its geometry, its augmented image, and
        the generator after drawing the geometry.
        """
        for offset in range(len(self.samples)):
            index = (wanted + offset) % len(self.samples)
            sample = self.samples[index]
            random = random_of(self.seed, epoch, wanted)
            geometry = self.augmentation.draw(sample.size, random, short_side)
            try:
                return sample, geometry, self._augmented(index, sample, geometry), random
            except UserError as error:  # damaged, gone, or no longer the size that was checked
                self.unreadable[index] = True
                last = error
        raise last

    def _augmented(self, index: int, sample: Sample, geometry: Geometry) -> Image.Image:
        if self.cache is not None:
            return geometry.on_image(self.cache.read(index, sample), shrunk=True)
        return geometry.on_image(read_image(sample.path, sample.size, at_least=geometry.needed))


def random_of(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator from which all random numbers of an image in an epoch are drawn."""
    return np.random.default_rng((seed, epoch, index))


def _relative(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] xyxy in pixels of an image of `size` (height, width) to cxcywh in 0..1."""
    corners = boxes.numpy()
    low, high = corners[:, :2], corners[:, 2:]
    scale = np.array([size[1], size[0]] * 2, corners.dtype)
    return torch.from_numpy(np.concatenate([(low + high) / 2, high - low], axis=1) / scale)


def _mask_target(masks: list[RunLengths], geometry: Geometry, boxes: Tensor) -> dict[str, Tensor]:
    """The entries of a target about masks; boxes [N, 4] are xyxy in pixels, augmented."""
    return {
        "masks": geometry.on_masks(decode(masks, geometry.size)),
        "mask_boxes": boxes,
        "has_mask": torch.tensor([bool(mask) for mask in masks], dtype=torch.bool),
    }


class EvaluationDataset(Dataset):
    """Validation images, resized for evaluation; None for an unreadable one."""

    def __init__(self, samples: SampleTable, preprocessing: Preprocessing) -> None:
        self.samples, self.preprocessing = samples, preprocessing

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        """(index, image uint8 [3, h, w])."""
        sample = self.samples[index]
        try:
            return index, self.preprocessing.pixels(read_image(sample.path, sample.size))
        except UserError:
            return index, None


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`images` uint8 [B, 3, H, W], `padding` [B, H, W] bool (True = padding), `targets`: a list of
    B dictionaries.
    """
    images, padding = pad_batch([item["image"] for item in items])
    return {"images": images, "padding": padding, "targets": [item["target"] for item in items]}


def packed_batch(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Like `collate`, for transfer from a worker: each of the targets' tensors in ROWS is joined
    over the images, since every tensor costs a file handle and a copy to the device. Masks differ
    in size and stay separate. `unpacked` is the inverse.
    """
    batch = collate(items)
    targets = batch["targets"]
    rows = {
        name: (torch.cat([t[name] for t in targets]), [len(t[name]) for t in targets])
        for name in ROWS
        if name in targets[0]
    }
    rest = [{name: each for name, each in t.items() if name not in rows} for t in targets]
    return {**batch, "targets": (rows, rest)}


def unpacked(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as `collate` returns it; the targets' tensors are views."""
    rows, rest = batch["targets"]
    parts = {name: joined.split(counts) for name, (joined, counts) in rows.items()}
    targets = [
        {**each, **{name: of_images[image] for name, of_images in parts.items()}}
        for image, each in enumerate(rest)
    ]
    return {**batch, "targets": targets}


def evaluation_batch(
    items: Sequence[tuple[int, Tensor | None]],
) -> tuple[list[int], Tensor | None, Tensor | None]:
    """Of the pictures that could be read: indices, images uint8 [B, 3, H, W] and padding [B, H, W]
    bool; None for both if there are none.
    """
    readable = [(index, image) for index, image in items if image is not None]
    if not readable:
        return [], None, None
    indices, images = zip(*readable, strict=True)
    return [*indices], *pad_batch(images)


def training_loader(
    dataset: DetectionDataset,
    config: TrainConfig,
    *,
    num_processes: int,
    micro_batch: int,
    steps: range,
) -> DataLoader:
    """Micro-batches (see `packed_batch`) of all processes for the given optimiser steps;
    `Accelerator.prepare_data_loader` distributes them in turn.
    """
    thresh = config.repeat_thresh
    sampler = RunSampler(
        len(dataset),
        step_images=config.batch_size * num_processes,
        micro_batch=micro_batch,
        seed=config.seed,
        steps=steps,
        short_sides=dataset.augmentation.sizes if config.scale_per == "step" else (None,),
        aspect_of=dataset.aspect if config.group_by_aspect else None,
        repeats=repeat_factors(dataset.samples, thresh) if thresh else None,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=packed_batch,
        prefetch_factor=PREFETCH if config.num_workers else None,
        pin_memory=torch.cuda.is_available(),
        # Otherwise the loader draws its workers' seed from the generator that drives dropout.
        generator=torch.Generator().manual_seed(config.seed),
        worker_init_fn=leave_signals_to_the_parent,
    )


def micro_batches(
    dataset: DetectionDataset,
    config: TrainConfig,
    n_iter_to_acc: int,
    steps: range,
    accelerator: Accelerator,
) -> Iterator[dict[str, Any]]:
    """This process's micro-batches of the steps, on its device, with images float32, normalised."""
    loader = training_loader(
        dataset,
        config,
        num_processes=accelerator.num_processes,
        micro_batch=config.batch_size // n_iter_to_acc,
        steps=steps,
    )
    for batch in accelerator.prepare_data_loader(loader):
        images = dataset.preprocessing.normalise(batch["images"], batch["padding"])
        yield {**unpacked(batch), "images": images}


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, but the current step still needs its images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def pad_to(batch: dict[str, Any], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images and padding of a batch, padded on the right and below to the step's canvas, (height,
    width).
    """
    images, padding = batch["images"], batch["padding"]
    right, below = canvas[1] - images.shape[3], canvas[0] - images.shape[2]
    if right == 0 and below == 0:
        return images, padding
    grow = (0, right, 0, below)
    return torch.nn.functional.pad(images, grow), torch.nn.functional.pad(padding, grow, value=True)
