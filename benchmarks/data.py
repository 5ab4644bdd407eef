"""Images per second of the training loader: reading, decoding, augmentation and batching, and
nothing else.

    python benchmarks/data.py
    python benchmarks/data.py --dataset_file coco --coco_path DIR --eval_size 640 --workers 0 1 2 4

Every flag of the trainer is taken beside the ones of this program. Compare the figure with
`images_per_second` of a training run: a loader that is not well above it holds the run up.
"""

import argparse
import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trainer.config import ConfigError, HelpRequested, TrainConfig, parse
from trainer.data import Augmentation, DetectionDataset, training_loader
from trainer.datasets import read_datasets
from trainer.samples import SampleTable
from vidt.preprocessing import Preprocessing

PREFETCH = 2  # batches that each worker of a DataLoader holds ready


@dataclass(frozen=True)
class Rate:
    """Of one number of workers: time until the first batch is there, then the steady speed."""

    workers: int
    first_batch_seconds: float
    images_per_second: float


def measure(config: TrainConfig, samples: SampleTable, workers: int, images: int) -> Rate:
    """Takes `images` images or a few more from the loader of a single process."""
    dataset = DetectionDataset(
        samples,
        Augmentation.from_config(config),
        Preprocessing(eval_size=config.eval_size),
        seed=config.seed,
        noised_queries=config.denoising,
    )
    # The batches that workers made while the first was awaited are not counted.
    ahead = 1 + workers * PREFETCH
    counted = -(-images // config.batch_size)
    loader = iter(
        training_loader(
            dataset,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Images per second of the loader.", allow_abbrev=False
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=400, help="images that are counted")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    own, flags = parser.parse_known_args()
    if own.images < 1 or min(own.workers) < 0:
        parser.error("--images must be 1 or more, --workers 0 or more")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)  # as in a worker
    try:
        config, model_fields = parse(flags)
        samples, _, _ = read_datasets(
            config, num_queries=model_fields["det_token_num"], num_classes=None
        )
    except (ConfigError, HelpRequested, ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{samples.source}: {len(samples)} images; --eval_size {config.eval_size}, ", end="")
    print(f"--batch_size {config.batch_size}")
    print(f"{'workers':>7} {'first batch s':>14} {'images/s':>10}")
    rates = []
    for workers in own.workers:
        rate = measure(config, samples, workers, own.images)
        rates.append(rate)
        print(f"{workers:>7} {rate.first_batch_seconds:>14.2f} {rate.images_per_second:>10.1f}")
    if own.json is not None:
        content = {"eval_size": config.eval_size, "results": [vars(rate) for rate in rates]}
        own.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
