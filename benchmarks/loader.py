"""What one loader process needs for photographs, which are made here: coloured shapes on blurred
colours, with a camera's noise, as JPEG of quality 90.

    python benchmarks/loader.py
    python benchmarks/loader.py --sizes 1920x1080 --eval_size 800 --json FILE
    python benchmarks/loader.py --parts --sizes 640x480

It decodes and augments as training does, on one core, without and with `--cache_images`, in turns.
With `--parts` it tries each strong part of the augmentation alone, for every image, and then all of
them for half of the images each, with and without copy-paste. Rates are images per second of the
core's own time, so that other work on the machine counts less. The files are in memory; a disk can
be slower.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from contestants import OBJECTS, random_objects
from data import measure
from trainer.augmentation.recipe import Augmentation
from trainer.data.image_cache import ImageCache
from trainer.data.loader import DetectionDataset
from trainer.data.order import Key
from trainer.readers.masks import encode
from trainer.readers.samples import Sample, SampleTable
from trainer.settings.config import TrainConfig
from trainer.settings.limits import STRONG_PARTS
from vidt.images.preprocessing import Preprocessing

PHOTOGRAPH = (480, 640)  # height, width: the most common ones in COCO
PHOTOGRAPHS = 16
SIZES = ("640x480", "1920x1080", "4000x3000")
FILES = 4  # photographs of each size
SHAPES = 60  # on each photograph


@dataclass(frozen=True)
class LoaderRate:
    """Images per second of one core, without the cache, while it is filled, and with it. Megabytes
    of an original and of a cached image.
    """

    size: str
    plain: float
    filling: float
    cached: float
    original_mb: float
    cached_mb: float


@dataclass(frozen=True)
class PartRate:
    """Images per second of one core with a strong part for every image, without the cache. The
    mean, since parts differ in which images they make expensive.
    """

    size: str
    part: str
    rate: float


def loader_seconds(size: tuple[int, int, int], *, count: int) -> float:
    """For a batch of `size` (images, height, width), augmented as in training, on one thread."""
    config = TrainConfig(batch_size=size[0], eval_size=min(size[1:]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            samples = write_photographs(Path(folder))
            return size[0] / measure(config, samples, workers=0, images=count).images_per_second
    finally:
        torch.set_num_threads(threads)


def write_photographs(
    folder: Path, size: tuple[int, int] = PHOTOGRAPH, count: int = PHOTOGRAPHS
) -> SampleTable:
    """JPEG files of `size` (height, width), and random boxes."""
    samples = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        photograph(size, np.random.default_rng(number)).save(path, quality=90)
        samples.append(_annotated(path, number, size))
    return SampleTable.from_samples(samples, [str(label) for label in range(OBJECTS)])


def photograph(size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    height, width = size
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for number in range(SHAPES):
        left, top = int(random.integers(width)), int(random.integers(height))
        sides = random.integers(width // 100, width // 6, 2)
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        shape = draw.ellipse if number % 2 else draw.rectangle
        shape((left, top, left + int(sides[0]), top + int(sides[1])), fill=colour)
    noise = random.normal(0, 4, (height, width, 1)).astype(np.float32)
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _annotated(path: Path, number: int, size: tuple[int, int]) -> Sample:
    height, width = size
    target = random_objects(torch.device("cpu"))
    centres, sides = target["boxes"].split(2, dim=1)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    boxes = boxes.clamp(0, 1) * torch.tensor([width, height, width, height])
    return Sample(
        path=str(path),
        image_id=number,
        size=size,
        boxes=boxes,
        labels=target["labels"],
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=torch.zeros(OBJECTS, dtype=torch.bool),
    )


def compare(size: tuple[int, int], config: TrainConfig, rounds: int) -> LoaderRate:
    """Rates of photographs of `size` (height, width): medians of single images."""
    with tempfile.TemporaryDirectory() as folder:
        originals = Path(folder) / "originals"
        originals.mkdir()
        samples = write_photographs(originals, size, FILES)
        augmentation = Augmentation.from_config(config)
        cache = ImageCache(Path(folder) / "cache", samples, augmentation)
        plain, cached = (
            DetectionDataset(
                samples,
                augmentation,
                Preprocessing(config.eval_size),
                seed=config.seed,
                cache=each,
            )
            for each in (None, cache)
        )
        filling = [_seconds(cached, 0, index) for index in range(FILES)]
        keys = [(epoch, index) for epoch in range(1, rounds + 1) for index in range(FILES)]
        pairs = [(_seconds(plain, *key), _seconds(cached, *key)) for key in keys]
        without, with_cache = (statistics.median(column) for column in zip(*pairs, strict=True))
        return LoaderRate(
            f"{size[1]}x{size[0]}",
            1 / without,
            1 / statistics.median(filling),
            1 / with_cache,
            _megabytes(originals),
            _megabytes(cache.folder),
        )


def compare_parts(size: tuple[int, int], config: TrainConfig, rounds: int) -> list[PartRate]:
    """Rates of photographs of `size` (height, width) under each part, in turns."""
    settings: dict[str, dict[str, Any]] = {
        "none": {},
        **{name: {name: 1.0} for name in STRONG_PARTS},
        "all at 0.5": dict.fromkeys(STRONG_PARTS, 0.5),
        "but copy_paste": {**dict.fromkeys(STRONG_PARTS, 0.5), "copy_paste": 0.0},
    }
    with tempfile.TemporaryDirectory() as folder:
        samples = with_masks(write_photographs(Path(folder), size, FILES))
        datasets = {
            name: DetectionDataset(
                samples,
                Augmentation.from_config(replace(config, **parts)),
                Preprocessing(config.eval_size),
                seed=config.seed,
                masks=False,
            )
            for name, parts in settings.items()
        }
        keys = [(epoch, index) for epoch in range(rounds + 1) for index in range(FILES)]
        seconds = {
            name: [_seconds(dataset, *key) for key in keys][FILES:]
            for name, dataset in datasets.items()
        }
    name_of_size = f"{size[1]}x{size[0]}"
    return [
        PartRate(name_of_size, name, 1 / statistics.mean(each)) for name, each in seconds.items()
    ]


def with_masks(samples: SampleTable) -> SampleTable:
    """The same samples; the mask of each object fills its box."""
    each = []
    for sample in samples:
        masks = torch.zeros(len(sample.boxes), *sample.size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(
            masks, sample.boxes.int().tolist(), strict=True
        ):
            mask[top:bottom, left:right] = True
        each.append(replace(sample, masks=tuple(encode(masks))))
    return SampleTable.from_samples(each, samples.class_names)


def _seconds(dataset: DetectionDataset, epoch: int, index: int) -> float:
    start = time.process_time()
    dataset[Key(epoch, index)]
    return time.process_time() - start


def _megabytes(folder: Path) -> float:
    """Of a file in the folder, on average."""
    return statistics.mean(path.stat().st_size for path in folder.rglob("*.*")) / 1e6


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Images per second of a core.", allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="WIDTHxHEIGHT of the photographs")
    parser.add_argument("--eval_size", type=int, default=640, help="as in training")
    parser.add_argument("--rounds", type=int, default=10, help="of each photograph")
    parser.add_argument("--parts", action="store_true", help="try the strong parts instead")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args(words)
    try:
        given.sizes = [tuple(int(side) for side in size.split("x"))[::-1] for size in given.sizes]
        if any(len(size) != 2 or min(size) < 100 for size in given.sizes) or given.rounds < 1:
            raise ValueError
    except ValueError:
        parser.error("--sizes must be like 640x480, of 100 pixels or more; --rounds 1 or more")
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    config = TrainConfig(eval_size=given.eval_size)
    print(f"images per second of one core, --eval_size {given.eval_size}")
    rates = [asdict(rate) for rate in (print_parts if given.parts else print_cache)(given, config)]
    if given.json is not None:
        given.json.write_text(json.dumps(rates, indent=1))


def print_cache(given: argparse.Namespace, config: TrainConfig) -> list[LoaderRate]:
    print(f"{'size':>10} {'no cache':>9} {'filling':>8} {'cached':>7} {'MB':>6} {'cached MB':>10}")
    rates = []
    for size in given.sizes:
        rate = compare(size, config, given.rounds)
        rates.append(rate)
        print(
            f"{rate.size:>10} {rate.plain:>9.0f} {rate.filling:>8.0f} {rate.cached:>7.0f} "
            f"{rate.original_mb:>6.2f} {rate.cached_mb:>10.2f}"
        )
    return rates


def print_parts(given: argparse.Namespace, config: TrainConfig) -> list[PartRate]:
    print(f"{'size':>10} {'part':>14} {'images/s':>9}")
    rates = []
    for size in given.sizes:
        for rate in compare_parts(size, config, given.rounds):
            rates.append(rate)
            print(f"{rate.size:>10} {rate.part:>14} {rate.rate:>9.1f}")
    return rates


if __name__ == "__main__":
    main()
