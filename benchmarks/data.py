"""What the training loader costs: reading, decoding, augmentation and batching, and nothing else.

    python benchmarks/data.py
    python benchmarks/data.py --images FOLDER --eval_size 640
    python benchmarks/data.py --dataset_file coco --coco_path DIR --eval_size 640 --workers 0 1 2 4

Every flag of the trainer is taken beside the ones of this program. Without a data set it measures
the embedded shapes and photographs that it makes itself, of the size of BCCD's.

The first table says how near one core comes to the least that can be done with the same files:
decoding each and resizing it to the size that the loader gave it. Both take turns, batch by batch.
The second is the loader with workers. Compare it with `images_per_second` of a training run: a
loader that is not well above it holds the run up.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.augmentation.denoising import Denoising
from trainer.augmentation.recipe import Augmentation
from trainer.data.load import read_datasets
from trainer.data.loader import (
    PREFETCH,
    DetectionDataset,
    packed_batch,
    training_loader,
)
from trainer.data.order import Key
from trainer.readers.samples import Sample, SampleTable
from trainer.settings.config import TrainConfig
from trainer.settings.flags import ConfigError, HelpRequested
from trainer.settings.parsing import parse
from vidt.images.files import probe_image
from vidt.images.preprocessing import Preprocessing

ROUNDS = 5  # of the comparison; its ratio is their median
OBJECTS = 14  # boxes on a photograph, as on BCCD's
PHOTOGRAPH = (480, 640)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Comparison:
    """Images per second of one core: bare decoding and resizing, and the loader; the ratio of the
    two in the median round.
    """

    bare: float
    loader: float
    ratio: float


@dataclass(frozen=True)
class Rate:
    """Of one number of workers: time until the first batch is there, then the steady speed."""

    workers: int
    first_batch_seconds: float
    images_per_second: float


def dataset_of(config: TrainConfig, samples: SampleTable) -> DetectionDataset:
    return DetectionDataset(
        samples,
        Augmentation.from_config(config),
        Preprocessing(eval_size=config.eval_size),
        seed=config.seed,
        denoising=Denoising(config.denoising),
    )


def compare(config: TrainConfig, samples: SampleTable, images: int) -> Comparison:
    """`images` images a round, or a few more."""
    dataset = dataset_of(config, samples)
    steps = -(-images // config.batch_size)
    loader = training_loader(
        dataset,
        config,
        num_processes=1,
        micro_batch=config.batch_size,
        steps=range((ROUNDS + 1) * steps),
    )
    assert loader.batch_sampler is not None
    batches = iter(loader.batch_sampler)
    rounds = [compare_round(dataset, batches, steps) for _ in range(ROUNDS + 1)][1:]
    ratios = [bare / loader for bare, loader in rounds]
    bare, loader = (steps * config.batch_size / min(column) for column in zip(*rounds, strict=True))
    return Comparison(bare, loader, statistics.median(ratios))


def compare_round(
    dataset: DetectionDataset, batches: Iterator[list[Key]], steps: int
) -> tuple[float, float]:
    """Seconds of bare decoding and resizing, and of the loader."""
    bare = loader = 0.0
    for _ in range(steps):
        keys = next(batches)
        start = time.perf_counter()
        items = [dataset[key] for key in keys]
        packed_batch(items)
        loader += time.perf_counter() - start
        paths = [dataset.samples.path(key.image) for key in keys]
        sizes = [(item["image"].shape[2], item["image"].shape[1]) for item in items]
        start = time.perf_counter()
        for path, size in zip(paths, sizes, strict=True):
            Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR)
        bare += time.perf_counter() - start
    return bare, loader


def measure(config: TrainConfig, samples: SampleTable, workers: int, images: int) -> Rate:
    """Takes `images` images or a few more from the loader of a single process."""
    # The batches that workers made while the first was awaited are not counted.
    ahead = 1 + workers * PREFETCH
    counted = -(-images // config.batch_size)
    loader = iter(
        training_loader(
            dataset_of(config, samples),
            replace(config, num_workers=workers),
            num_processes=1,
            micro_batch=config.batch_size,
            steps=range(ahead + counted + workers * PREFETCH),
        )
    )
    start = time.perf_counter()
    next(loader)
    first = time.perf_counter()
    for _ in range(ahead - 1):
        next(loader)
    since = time.perf_counter()
    for _ in range(counted):
        next(loader)
    speed = counted * config.batch_size / (time.perf_counter() - since)
    return Rate(workers, first - start, speed)


def write_photographs(folder: Path, count: int = 100) -> None:
    """Blurred cells on a blurred ground, with a camera's noise: about as many bytes as BCCD's."""
    height, width = PHOTOGRAPH
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(60, 230, (9, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int64)
        noisy = smooth + random.normal(0, 3, (height, width, 1)).round().astype(np.int64)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.jpg")


def annotated(folder: Path, source: str) -> SampleTable:
    """The pictures of a folder, with random boxes. Raises ValueError if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no pictures ({', '.join(SUFFIXES)})")
    random = np.random.default_rng(0)
    samples = []
    for number, path in enumerate(files):
        height, width = probe_image(path).size
        corners = np.sort(random.uniform(0, 1, (OBJECTS, 2, 2)), axis=1).reshape(OBJECTS, 4)
        boxes = torch.from_numpy(corners * [width, height, width, height]).float()
        samples.append(
            Sample(
                path=str(path),
                image_id=number,
                size=(height, width),
                boxes=boxes,
                labels=torch.zeros(OBJECTS, dtype=torch.int64),
                areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
                crowd=torch.zeros(OBJECTS, dtype=torch.bool),
            )
        )
    return SampleTable.from_samples(samples, ["object"], source=source)


def tables(
    config: TrainConfig, num_queries: int, images: Path | None, room: Path
) -> Iterator[SampleTable]:
    """What is to be measured: the folder, the data set of the flags, or shapes and photographs."""
    if images is not None:
        yield annotated(images, str(images))
        return
    yield read_datasets(config, num_queries=num_queries, num_classes=None)[0]
    if config.dataset_file == "shapes":
        write_photographs(room)
        height, width = PHOTOGRAPH
        yield annotated(room, f"photographs of {width} x {height}")


def report(
    config: TrainConfig, samples: SampleTable, workers: Sequence[int], count: int
) -> tuple[Comparison, list[Rate]]:
    """Measures and prints."""
    print(f"{samples.source}: {len(samples)} images; --eval_size {config.eval_size}, ", end="")
    print(f"--batch_size {config.batch_size}")
    comparison = compare(config, samples, count)
    speeds = f"bare {comparison.bare:.1f} images/s, loader {comparison.loader:.1f}"
    print(f"one core: {speeds}; ratio {comparison.ratio:.2f} (median of {ROUNDS} rounds)")
    print(f"{'workers':>7} {'first batch s':>14} {'images/s':>10}")
    rates = []
    for number in workers:
        rate = measure(config, samples, number, count)
        rates.append(rate)
        print(f"{number:>7} {rate.first_batch_seconds:>14.2f} {rate.images_per_second:>10.1f}")
    return comparison, rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Images per second of the loader.", allow_abbrev=False
    )
    parser.add_argument("--images", type=Path, help="a folder of pictures, instead of a data set")
    parser.add_argument("--workers", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=200, help="images that are counted each time")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    own, flags = parser.parse_known_args()
    if own.count < 1 or min(own.workers, default=0) < 0:
        parser.error("--count must be 1 or more, --workers 0 or more")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)  # as in a worker
    results = []
    try:
        config, model_fields = parse(flags)
        with tempfile.TemporaryDirectory() as room:
            queries = model_fields["det_token_num"]
            for samples in tables(config, queries, own.images, Path(room)):
                comparison, rates = report(config, samples, own.workers, own.count)
                workers = [vars(rate) for rate in rates]
                results.append({"data": samples.source, **vars(comparison), "workers": workers})
    except (ConfigError, HelpRequested, ValueError, OSError) as error:
        parser.error(str(error))
    if own.json is not None:
        content = {"eval_size": config.eval_size, "results": results}
        own.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
