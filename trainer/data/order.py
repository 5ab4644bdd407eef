"""The order in which a run sees its images: the micro-batches of each optimiser step.

Every random number follows from (seed, epoch). Any step can be repeated from its number alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from trainer.readers.samples import SampleTable

WINDOW = 32  # images are grouped by aspect ratio within about so many steps
# Classes of aspect ratios from one to its double. More of them would pad less, but the images of a
# step would be more alike: those that were not cropped, for example, would meet each other only.
CLASSES = 3


class Key(NamedTuple):
    """What `DetectionDataset` loads: an image, as augmented in an epoch."""

    epoch: int
    # Plus the number of images each time that `repeats` has the epoch show it again. What fills the
    # last step has equal keys: as released, it is what the first steps showed.
    image: int
    short_side: int | None = None  # pixels; None: the image draws its own


class RunSampler(Sampler):
    """The micro-batches of all processes, from any optimiser step on, as lists of `Key`.
    Accelerate distributes them over the processes.

    Each epoch has its own permutation, which repeats from its start to fill the last optimiser
    step. A step has the same images for any number of processes and micro-batches. With `repeats`
    (see `repeat_factors`) an epoch shows some images more often.

    All images of a step are padded to one canvas. So that it is small, each step draws one of
    `short_sides` for all of its images, unless that is None, and takes images of similar aspect
    ratio, if `aspect_of` returns the height over width of (epoch, index).
    """

    def __init__(
        self,
        num_images: int,
        *,
        step_images: int,
        micro_batch: int,
        seed: int,
        steps: range,
        short_sides: Sequence[int | None] = (None,),
        aspect_of: Callable[[int, int], float] | None = None,
        repeats: np.ndarray | None = None,
    ) -> None:
        self.num_images, self.step_images, self.micro_batch = num_images, step_images, micro_batch
        self.seed, self.steps = seed, steps
        self.short_sides, self.aspect_of, self.repeats = short_sides, aspect_of, repeats
        self.batch_size, self.drop_last = micro_batch, False  # Accelerate reads both

    def __len__(self) -> int:
        return len(self.steps) * (self.step_images // self.micro_batch)

    def __iter__(self) -> Iterator[list[Key]]:
        shown = self.num_images if self.repeats is None else epoch_images(self.repeats)
        per_epoch = steps_per_epoch(shown, self.step_images)
        for step in self.steps:
            epoch, position = divmod(step, per_epoch)
            if position == 0 or step == self.steps.start:
                epoch_steps = self._epoch(epoch, position, per_epoch)
            images, short_side = next(epoch_steps)
            keys = [Key(epoch, index, short_side) for index in images.tolist()]
            for start in range(0, self.step_images, self.micro_batch):
                yield keys[start : start + self.micro_batch]

    def _epoch(
        self, epoch: int, first: int, per_epoch: int
    ) -> Iterator[tuple[np.ndarray, int | None]]:
        """The images and the short side of each step of an epoch, from its step `first` on."""
        random = np.random.default_rng((self.seed, epoch))
        if self.repeats is None:
            images = random.permutation(self.num_images)
        else:
            images = repeated(self.repeats, random)
        steps = np.resize(images, (per_epoch, self.step_images))
        drawn = random.integers(len(self.short_sides), size=per_epoch)[first:]
        order: Iterable[np.ndarray] = steps[first:]
        if self.aspect_of is not None:
            order = grouped_by_aspect(steps, first, partial(self.aspect_of, epoch), random)
        yield from zip(order, (self.short_sides[number] for number in drawn), strict=True)


def grouped_by_aspect(
    steps: np.ndarray, first: int, aspect_of: Callable[[int], float], random: np.random.Generator
) -> Iterator[np.ndarray]:
    """The steps [S, B] of an epoch from `first` on, regrouped: the images of each window of steps
    are sorted by the class of their `aspect_of`, then cut into steps, which are shuffled.
    """
    # At least two windows, because the images that fill the last step also occur in the first:
    # sorted together, both copies of an image would end in one step.
    windows = min(max(len(steps) // WINDOW, 2), len(steps))
    for positions in np.array_split(np.arange(len(steps)), windows):
        shuffled = random.permutation(len(positions))
        if positions[-1] < first:
            continue
        images = steps[positions].ravel()
        aspects = np.array([aspect_of(index) for index in images.tolist()])
        by_aspect = np.argsort(np.round(np.log2(aspects) * CLASSES), kind="stable")
        regrouped = images[by_aspect].reshape(-1, steps.shape[1])[shuffled]
        yield from regrouped[max(first - positions[0], 0) :]


def steps_per_epoch(num_images: int, step_images: int) -> int:
    """Optimiser steps that show every image at least once."""
    return -(-num_images // step_images)


def repeat_factors(samples: SampleTable, threshold: float) -> np.ndarray:
    """How often an epoch shows each image on average, float64 [N], 1 or more (LVIS, arXiv
    1908.03195, appendix B.2): sqrt(threshold / f) of the rarest class in it, where f is the share
    of images that hold the class. Crowd boxes do not count, because training ignores them.
    """
    objects = ~samples.crowd
    held = torch.stack([samples.box_owners[objects], samples.labels[objects]])
    owners, labels = held.unique(dim=1).numpy()  # each class of an image once
    shares = np.bincount(labels, minlength=len(samples.class_names)) / len(samples)
    factors = np.ones(len(samples))
    np.maximum.at(factors, owners, np.sqrt(threshold / shares[labels]))
    return factors


def epoch_images(repeats: np.ndarray) -> int:
    """How many images an epoch shows, the same number in every epoch."""
    whole = np.floor(repeats)
    return int(whole.sum() + np.ceil((repeats - whole).sum()))


def repeated(repeats: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The images of an epoch in order, as in `Key`. Each is there as often as its repeat factor
    says, rounded up or down at random so that the average over the epochs is the factor; what an
    image is repeated for is spread over the epoch.
    """
    count = len(repeats)
    # Systematic sampling: one random number places a grid of step 1 on the fractions, end to end in
    # random order, and the images it meets are rounded up. So their number varies by 1 at most.
    order, times = random.permutation(count), np.floor(repeats)
    ends = np.floor(np.cumsum((repeats - times)[order]) + random.random())
    times[order] += np.diff(ends, prepend=0)
    times = times.astype(int)
    images = np.repeat(np.arange(count), times)
    again = np.arange(len(images)) - np.repeat(np.cumsum(times) - times, times)  # 0, 1, ... of each
    places = (again + random.random(count)[images]) / times[images]  # in the epoch, 0 to 1
    return (again * count + images)[np.argsort(places, kind="stable")]
