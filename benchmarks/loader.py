"""What one loader process needs for a batch of photographs; they are made here."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contestants import OBJECTS, random_objects
from data import measure
from trainer.readers.samples import Sample, SampleTable
from trainer.settings.config import TrainConfig

PHOTOGRAPH = (480, 640)  # height, width: the most common ones in COCO
PHOTOGRAPHS = 16


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


def write_photographs(folder: Path) -> SampleTable:
    """JPEG files: coarse colours blurred over the picture, and a camera's noise."""
    height, width = PHOTOGRAPH
    samples = []
    for number in range(PHOTOGRAPHS):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        pixels = (smooth + random.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        samples.append(_annotated(path, number))
    return SampleTable.from_samples(samples, [str(label) for label in range(OBJECTS)])


def _annotated(path: Path, number: int) -> Sample:
    height, width = PHOTOGRAPH
    target = random_objects(torch.device("cpu"))
    centres, sides = target["boxes"].split(2, dim=1)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    boxes = boxes.clamp(0, 1) * torch.tensor([width, height, width, height])
    return Sample(
        path=str(path),
        image_id=number,
        size=PHOTOGRAPH,
        boxes=boxes,
        labels=target["labels"],
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=torch.zeros(OBJECTS, dtype=torch.bool),
    )
