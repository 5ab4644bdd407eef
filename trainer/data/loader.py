"""Samples to batches: images and their targets.

Every random number follows from (seed, epoch, image). A run does not depend on the number of
workers.

Inside this file boxes are xyxy in pixels; in targets they are cxcywh in 0..1 of the unpadded image.
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.augmentation.denoising import NO_DENOISING, Denoising
from trainer.augmentation.geometry import Geometry
from trainer.augmentation.recipe import Augmentation
from trainer.augmentation.scene import Scene
from trainer.augmentation.single import photometric
from trainer.augmentation.strong import area_of, compose
from trainer.data.image_cache import ImageCache
from trainer.data.order import Key, RunSampler, repeat_factors
from trainer.readers.samples import Sample, SampleTable
from trainer.settings.config import TrainConfig
from vidt.errors import UserError
from vidt.images.files import read_image
from vidt.images.preprocessing import Preprocessing, pad_batch, to_pixels

PREFETCH = 4  # batches that each worker loads ahead
# [N, ...] in targets
ROWS = ("labels", "boxes", "denoising_boxes", "denoising_labels", "mask_boxes", "has_mask")
STRONG = 1  # the stream of random numbers of the strong parts


class DetectionDataset(Dataset):
    """Training images and their targets, addressed by `Key`.

    The next readable image replaces one that cannot be read, which is marked in `unreadable`. All
    workers share that tensor; the caller decides how many are too many. The strong parts of the
    augmentation apply in the first `strong_epochs` epochs. `masks`: whether targets hold masks, if
    the table does.
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
        strong_epochs: float = math.inf,
        masks: bool = True,
    ) -> None:
        self.cache = cache
        self.samples, self.augmentation, self.preprocessing = samples, augmentation, preprocessing
        self.seed, self.denoising = seed, denoising
        self.strong_epochs = strong_epochs
        self.with_masks = masks and samples.masks is not None
        self.reported = 0  # unreadable images that the caller has reported
        self.unreadable = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def most_boxes(self) -> int:
        """The most boxes that a target can have."""
        return self.augmentation.strong.most_boxes(int(self.samples.box_counts.max()))

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """`image` uint8 [3, h, w]; `target` with `labels` [N], `boxes` [N, 4] cxcywh in 0..1,
        `image_id` and, with denoising queries, what `Denoising.of_target` adds. If the table has
        masks: `masks` [N, h, w] bool, `mask_boxes` [N, 4] xyxy in pixels of these masks, and
        `has_mask` [N] bool, False for an object without a mask, whose mask is empty.

        Raises UserError if no image of the dataset can be read.
        """
        scene, random = self._augmented(*key)
        boxes = _relative(scene.boxes, scene.size)
        target = {"labels": scene.labels, "boxes": boxes, "image_id": scene.image_id}
        if self.with_masks:
            masks = {"masks": scene.masks, "mask_boxes": scene.boxes, "has_mask": scene.has_mask}
            target |= masks
        target |= self.denoising.of_target(boxes, scene.labels, random)
        return {"image": to_pixels(scene.image), "target": target}

    def aspect(self, epoch: int, index: int) -> float:
        """Height over width of an image as augmented in an epoch, before the last resize; index as
        in `Key`. Of the strong parts only the IoU crop changes it.
        """
        image = index % len(self)
        height, width = self.samples.sizes[image].tolist()
        parts, strong_random = self._strong_parts(epoch, index)
        if parts - {"photometric"}:
            boxes = self.samples.objects_of(image) if "iou_crop" in parts else torch.zeros(0, 4)
            area = area_of(parts, (height, width), boxes, strong_random)
            height, width = self.augmentation.canvas(*area[2:])
        random = random_of(self.seed, epoch, index)
        _, crop = self.augmentation.draw_flip_and_crop((height, width), random)
        return crop.height / crop.width if crop else height / width

    def _augmented(
        self, epoch: int, wanted: int, short_side: int | None = None
    ) -> tuple[Scene, np.random.Generator]:
        """The scene to train on, and the generator after drawing the released geometry."""
        parts, strong_random = self._strong_parts(epoch, wanted)
        if parts - {"photometric"}:
            scene = compose(
                self.augmentation.strong,
                parts,
                wanted % len(self),
                len(self),
                partial(self._read_from, visible=True, masks="copy_paste" in parts),
                self.augmentation.canvas,
                strong_random,
            )
            random = random_of(self.seed, epoch, wanted)
            scene = scene.moved(self.augmentation.draw(scene.size, random, short_side))
        else:

            def draw(sample: Sample) -> Geometry:
                nonlocal random
                random = random_of(self.seed, epoch, wanted)
                return self.augmentation.draw(sample.size, random, short_side)

            scene = self._read_from(wanted, draw)
        if "photometric" in parts:
            scene = replace(scene, image=photometric(scene.image, strong_random))
        return scene, random

    def _strong_parts(self, epoch: int, index: int) -> tuple[frozenset[str], np.random.Generator]:
        """The strong parts of an image in an epoch, and the generator after drawing them."""
        random = random_of(self.seed, epoch, index, STRONG)
        strong = self.augmentation.strong
        plain = not strong.on or epoch >= self.strong_epochs
        return frozenset() if plain else strong.draw(random), random

    def _read_from(
        self,
        wanted: int,
        draw: Callable[[Sample], Geometry],
        *,
        visible: bool = False,
        masks: bool = False,
    ) -> Scene:
        """The image at `wanted` or the next readable one, under the geometry drawn for it. With
        `masks` the scene has masks even if targets have none.
        """
        for offset in range(len(self.samples)):
            index = (wanted + offset) % len(self.samples)
            sample = self.samples[index]
            geometry = draw(sample)
            try:
                image = self._read_image(index, sample, geometry)
            except UserError as error:  # damaged, gone, or no longer the size that was checked
                self.unreadable[index] = True
                last = error
            else:
                if not (masks or self.with_masks):
                    sample = replace(sample, masks=None)
                return Scene.of(sample, geometry, image, visible=visible)
        raise last

    def _read_image(self, index: int, sample: Sample, geometry: Geometry) -> Image.Image:
        if self.cache is not None:
            return geometry.on_image(self.cache.read(index, sample), shrunk=True)
        return geometry.on_image(read_image(sample.path, sample.size, at_least=geometry.needed))


def random_of(seed: int, epoch: int, index: int, *stream: int) -> np.random.Generator:
    """The generator from which all random numbers of an image in an epoch are drawn; those of the
    strong parts come from the stream STRONG, so that the released recipe draws the same with them.
    """
    return np.random.default_rng((seed, epoch, index, *stream))


def _relative(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] xyxy in pixels of an image of `size` (height, width) to cxcywh in 0..1."""
    corners = boxes.numpy()
    low, high = corners[:, :2], corners[:, 2:]
    scale = np.array([size[1], size[0]] * 2, corners.dtype)
    return torch.from_numpy(np.concatenate([(low + high) / 2, high - low], axis=1) / scale)


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


def training_order(
    dataset: DetectionDataset,
    config: TrainConfig,
    step_images: int,
    micro_batch: int,
    steps: range,
) -> RunSampler:
    """The keys of the images that the given optimiser steps see, in micro-batches."""
    thresh = config.repeat_thresh
    return RunSampler(
        len(dataset),
        step_images=step_images,
        micro_batch=micro_batch,
        seed=config.seed,
        steps=steps,
        short_sides=dataset.augmentation.sizes if config.scale_per == "step" else (None,),
        aspect_of=dataset.aspect if config.group_by_aspect else None,
        repeats=repeat_factors(dataset.samples, thresh) if thresh else None,
    )


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
    step_images = config.batch_size * num_processes
    return DataLoader(
        dataset,
        batch_sampler=training_order(dataset, config, step_images, micro_batch, steps),
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
    """Ctrl-C reaches every process of a terminal, and SIGTERM as `timeout` sends it every process
    of its group, but the current step still needs its images: a worker heeds its parent only.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    """Waits for SIGTERM from the parent, which PyTorch sends to end a worker."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


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
