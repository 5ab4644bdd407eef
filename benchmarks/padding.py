"""How many pixels of a training run are padding: one scale a step and grouping by aspect ratio
beside the released way, on images of COCO's sizes.

    python benchmarks/padding.py
    python benchmarks/padding.py --eval_size 800 --no-crop --images 20000

Every flag of the trainer is taken beside --images. A figure is the pixels of all canvases over the
pixels of the augmented images, in one epoch; 1.00 is no padding. Nothing is decoded or trained.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from trainer.augmentation.recipe import Augmentation
from trainer.data.loader import DetectionDataset, random_of, training_loader
from trainer.data.order import Key, steps_per_epoch
from trainer.readers.samples import SampleTable
from trainer.settings.config import TrainConfig
from trainer.settings.flags import ConfigError, HelpRequested
from trainer.settings.parsing import parse
from vidt.images.preprocessing import Preprocessing

LAYOUTS = ((1, 2), (2, 2), (8, 2), (1, 16))  # processes, images per process and step
# Counted in the `images` of COCO's annotations for its 5,000 validation images of 2017, which are
# drawn from the same photographs as the training images (https://cocodataset.org).
COMMON = {  # (width, height): images; each size that at least 20 images have
    **{(640, 480): 1061, (640, 427): 606, (480, 640): 336, (500, 375): 240, (640, 426): 215},
    **{(427, 640): 171, (640, 428): 161, (640, 425): 146, (612, 612): 106, (375, 500): 94},
    **{(500, 333): 80, (426, 640): 73, (640, 640): 54, (640, 360): 53, (640, 424): 51},
    **{(428, 640): 47, (425, 640): 41, (640, 478): 35, (478, 640): 31, (333, 500): 28},
    **{(424, 640): 24, (500, 334): 23, (640, 457): 22, (640, 429): 21, (640, 359): 21},
}
# The other 1,260 by width over height: bounds, and the images between each and the next. Their long
# side is taken as 640, as in most of them.
BOUNDS = (
    *(0.35, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0, 1.1, 1.2),
    *(1.3, 1.4, 1.45, 1.5, 1.55, 1.6, 1.7, 1.8, 2.0, 2.5, 4.1),
)
OTHERS = (
    *(6, 36, 30, 93, 67, 52, 54, 45, 41, 41, 106),
    *(186, 73, 92, 94, 42, 73, 52, 24, 38, 15),
)
LONG_SIDE = 640


def coco_sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """`count` sizes (height, width) of that distribution."""
    random = np.random.default_rng(seed)
    numbers = np.array([*COMMON.values(), *OTHERS])
    common = [(height, width) for width, height in COMMON]
    sizes = []
    for kind in random.choice(len(numbers), count, p=numbers / numbers.sum()).tolist():
        if kind < len(common):
            sizes.append(common[kind])
            continue
        low, high = BOUNDS[kind - len(common) :][:2]
        aspect = random.uniform(low, high)
        sizes.append((round(LONG_SIDE / max(aspect, 1)), round(LONG_SIDE * min(aspect, 1))))
    return sizes


def table_of(sizes: Sequence[tuple[int, int]]) -> SampleTable:
    """Images of these sizes, without files and boxes."""
    return SampleTable.from_columns(
        source="sizes of COCO",
        class_names=["object"],
        category_ids=[1],
        paths=["" for _ in sizes],
        image_ids=range(len(sizes)),
        sizes=sizes,
        owners=[],
        boxes=np.zeros((0, 4)),
        labels=[],
        areas=[],
        crowd=[],
        annotation_ids=[],
    )


def steps_of(dataset: DetectionDataset, config: TrainConfig, processes: int) -> Iterator[list[Key]]:
    """The images of each optimiser step of an epoch, over all processes."""
    images = processes * config.batch_size
    loader = training_loader(
        dataset,
        replace(config, num_workers=0),
        num_processes=processes,
        micro_batch=config.batch_size,
        steps=range(steps_per_epoch(len(dataset), images)),
    )
    batches = iter(loader.batch_sampler or ())
    for batch in batches:
        yield [*batch, *(key for _ in range(processes - 1) for key in next(batches))]


def shape_of(dataset: DetectionDataset, key: Key) -> tuple[int, int]:
    """(height, width) of an augmented image."""
    height, width = dataset.samples.sizes[key.image].tolist()
    random = random_of(dataset.seed, key.epoch, key.image)
    return dataset.augmentation.draw((height, width), random, key.short_side).shape


def padded_over_own(config: TrainConfig, samples: SampleTable, processes: int) -> float:
    """Pixels of all canvases over those of the augmented images."""
    dataset = DetectionDataset(
        samples, Augmentation.from_config(config), Preprocessing(config.eval_size), seed=config.seed
    )
    padded = own = 0
    for keys in steps_of(dataset, config, processes):
        shapes = np.array([shape_of(dataset, key) for key in keys])
        padded += len(keys) * int(shapes.max(0).prod())
        own += int(shapes.prod(1).sum())
    return padded / own


def main() -> None:
    parser = argparse.ArgumentParser(description="Padding of training images.", allow_abbrev=False)
    parser.add_argument("--images", type=int, default=5000)
    own, flags = parser.parse_known_args()
    if own.images < 1:
        parser.error("--images must be 1 or more")
    try:
        config, _ = parse(flags, own_data=True)
    except (ConfigError, HelpRequested) as error:
        parser.error(str(error))
    samples = table_of(coco_sizes(own.images))
    released = replace(config, scale_per="image", group_by_aspect=False)
    ways = {
        "as released": released,
        "one scale a step": replace(released, scale_per="step"),
        "and grouped": replace(released, scale_per="step", group_by_aspect=True),
    }
    print(f"{'processes x images':>18}" + "".join(f"{way:>18}" for way in ways))
    for processes, batch in LAYOUTS:
        figures = [
            padded_over_own(replace(each, batch_size=batch), samples, processes)
            for each in ways.values()
        ]
        print(f"{f'{processes} x {batch}':>18}" + "".join(f"{each:>18.3f}" for each in figures))


if __name__ == "__main__":
    main()
