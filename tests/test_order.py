"""The order in which a run sees its images: the same for every layout and after a resume, with one
scale a step and images of similar aspect ratio, or as released.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from tiny_runs import settings, tables

from trainer.augmentation.geometry import Crop, Geometry
from trainer.augmentation.recipe import Augmentation
from trainer.data.loader import DetectionDataset, random_of, training_loader
from trainer.data.order import (
    WINDOW,
    Key,
    RunSampler,
    epoch_images,
    repeat_factors,
    repeated,
    steps_per_epoch,
)
from trainer.readers.samples import Sample, SampleTable
from trainer.settings.config import TrainConfig
from vidt.errors import UserError
from vidt.images.canvas import resized_shape
from vidt.images.files import read_image
from vidt.images.preprocessing import Preprocessing

SIZES = ((480, 640), (427, 640), (640, 480), (375, 500), (640, 427), (612, 612), (240, 600))
CONFIG = TrainConfig(num_workers=0, seed=7)
RELEASED = replace(CONFIG, scale_per="image", group_by_aspect=False)


def dataset_of(count: int, config: TrainConfig = CONFIG) -> DetectionDataset:
    """Images of SIZES in turn, without files and boxes."""
    none = torch.zeros(0)
    samples = [
        Sample("", i, SIZES[i % len(SIZES)], none.reshape(0, 4), none.long(), none, none.bool())
        for i in range(count)
    ]
    table = SampleTable.from_samples(samples, ["object"])
    augmentation = Augmentation.from_config(config)
    return DetectionDataset(table, augmentation, Preprocessing(config.eval_size), seed=config.seed)


def steps_of(
    dataset: DetectionDataset,
    config: TrainConfig,
    steps: range,
    *,
    processes: int = 1,
    micro_batches: int = 1,
) -> list[list[Key]]:
    """The keys of each step, of all processes as Accelerate deals them out, in a fixed order."""
    loader = training_loader(
        dataset,
        config,
        num_processes=processes,
        micro_batch=config.batch_size // micro_batches,
        steps=steps,
    )
    sampler = loader.batch_sampler
    shares = [list(BatchSamplerShard(sampler, processes, index)) for index in range(processes)]
    assert {len(share) for share in shares} == {len(steps) * micro_batches}
    parts = [
        [batch for share in shares for batch in share[start : start + micro_batches]]
        for start in range(0, len(steps) * micro_batches, micro_batches)
    ]
    return [sorted(key for batch in batches for key in batch) for batches in parts]


def epoch_of(dataset: DetectionDataset, config: TrainConfig, epoch: int) -> list[list[Key]]:
    per_epoch = steps_per_epoch(len(dataset), config.batch_size)
    return steps_of(dataset, config, range(epoch * per_epoch, (epoch + 1) * per_epoch))


def released_order(images: int, step_images: int, seed: int, epoch: int) -> np.ndarray:
    """[steps, step_images]: as of commit dbdf99f."""
    permutation = np.random.default_rng((seed, epoch)).permutation(images)
    return np.resize(permutation, (-(-images // step_images), step_images))


def released_geometry(
    recipe: Augmentation, size: tuple[int, int], random: np.random.Generator
) -> Geometry:
    """As of commit dbdf99f, with flip and crop."""
    flip = random.random() < 0.5
    area, crop = size, None
    if random.random() < 0.5:
        before = resized_shape(*size, recipe.crop_resize[int(random.integers(3))])
        low, high = recipe.crop_range
        sides = [int(random.integers(min(low, side), min(high, side) + 1)) for side in before]
        corner = [int(random.integers(0, before[axis] - sides[axis] + 1)) for axis in (0, 1)]
        crop = Crop(before, *corner, *sides)
        area = crop.height, crop.width
    side = recipe.sizes[int(random.integers(len(recipe.sizes)))]
    return Geometry(size, flip, crop, resized_shape(*area, side, recipe.max_size))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_released_way_is_as_it_was(micro_batches: int) -> None:
    dataset, config = dataset_of(70), replace(RELEASED, batch_size=8)
    for epoch in range(3):
        steps = range(9 * epoch, 9 * epoch + 9)
        found = steps_of(dataset, config, steps, micro_batches=micro_batches)
        expected = released_order(70, 8, config.seed, epoch).tolist()
        assert found == [sorted(Key(epoch, image) for image in images) for images in expected]
    plain = RunSampler(70, step_images=8, micro_batch=2, seed=7, steps=range(9))
    in_order = [key.image for batch in plain for key in batch]
    assert in_order == released_order(70, 8, 7, 0).ravel().tolist()


def test_geometry_without_a_short_side_is_as_it_was() -> None:
    recipe = Augmentation.from_config(CONFIG)
    for image in range(300):
        size = SIZES[image % len(SIZES)]
        random, same = random_of(7, 3, image), random_of(7, 3, image)
        assert recipe.draw(size, random) == released_geometry(recipe, size, same)
        assert random.random() == same.random()  # which draws the noise of denoising boxes


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("scale_per", ["step", "image"])
def test_a_step_is_the_same_however_it_is_dealt_out(group: bool, scale_per: str) -> None:
    dataset = dataset_of(400)
    config = replace(CONFIG, group_by_aspect=group, scale_per=scale_per)
    steps = range(20, 60)  # over the ends of two epochs of 25 steps
    whole = steps_of(dataset, replace(config, batch_size=16), steps)
    for processes, batch, micro_batches in ((2, 8, 1), (8, 2, 1), (1, 16, 4), (2, 8, 4)):
        layout = replace(config, batch_size=batch)
        dealt = steps_of(dataset, layout, steps, processes=processes, micro_batches=micro_batches)
        assert dealt == whole


def test_a_resumed_run_sees_the_same() -> None:
    """From any step: the first and last of an epoch, of a window, and between."""
    dataset, config = dataset_of(301), replace(CONFIG, batch_size=2)
    whole = steps_of(dataset, config, range(310))
    assert len({key.short_side for keys in whole for key in keys}) > 5
    for first in (1, WINDOW, 36, 37, 38, 75, 76, 150, 151, 300):
        assert steps_of(dataset, config, range(first, 310)) == whole[first:]
    assert steps_of(dataset, config, range(40, 42)) == whole[40:42]


@pytest.mark.parametrize("images", [3, 8, 9, 15, 16, 17, 100, 515, 1023])
def test_an_epoch_shows_the_images_of_the_released_one(images: int) -> None:
    """Each image once; as many again, and the same, fill up the last step. No step has an image
    twice, unless there are fewer than a step has.
    """
    dataset, config = dataset_of(images), replace(CONFIG, batch_size=8)
    for epoch in range(2):
        steps = epoch_of(dataset, config, epoch)
        seen = Counter(key.image for keys in steps for key in keys)
        assert set(seen) == set(range(images))
        assert seen == Counter(released_order(images, 8, config.seed, epoch).ravel().tolist())
        if images >= 8:
            assert all(len({key.image for key in keys}) == 8 for keys in steps)


def test_images_move_within_windows_of_the_released_order() -> None:
    dataset, config = dataset_of(1600), replace(CONFIG, batch_size=8)  # 200 steps
    order = released_order(1600, 8, config.seed, 0)
    windows = np.array_split(np.arange(200), 200 // WINDOW)
    assert {len(window) for window in windows} == {33, 34}
    found = np.array([[key.image for key in keys] for keys in epoch_of(dataset, config, 0)])
    for window in windows:
        assert sorted(found[window].ravel()) == sorted(order[window].ravel())


def test_grouped_steps_have_similar_aspect_ratios_in_random_order() -> None:
    dataset, config = dataset_of(1600), replace(CONFIG, batch_size=8)

    def spreads(config: TrainConfig) -> tuple[float, np.ndarray]:
        """Mean of log(largest over smallest aspect ratio of a step); the mean ratio of each."""
        steps = epoch_of(dataset, config, 0)
        ratios = np.log([[dataset.aspect(key.epoch, key.image) for key in keys] for keys in steps])
        return float(np.ptp(ratios, axis=1).mean()), ratios.mean(1)

    grouped, means = spreads(config)
    spread, _ = spreads(replace(config, group_by_aspect=False))
    assert grouped < 0.2 * spread
    # Sorted, neighbours would be alike; shuffled, they are not.
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_the_aspect_ratio_is_that_of_the_geometry() -> None:
    dataset = dataset_of(200)
    for image in range(200):
        size = SIZES[image % len(SIZES)]
        crop = dataset.augmentation.draw(size, random_of(7, 2, image), 400).crop
        height, width = crop.area[2:] if crop else size
        assert dataset.aspect(2, image) == height / width


def test_a_step_has_one_short_side() -> None:
    """Drawn for each step anew, each of them about equally often."""
    dataset, config = dataset_of(1600), replace(CONFIG, batch_size=2)
    sides = []
    for keys in epoch_of(dataset, config, 0):
        (side,) = {key.short_side for key in keys}
        sides.append(side)
    counts = Counter(sides)
    assert set(counts) == set(dataset.augmentation.sizes)
    assert max(counts.values()) < 2.5 * min(counts.values())
    recipe = replace(dataset.augmentation, crop=False)
    for side in dataset.augmentation.sizes:
        shape = recipe.draw((480, 640), random_of(7, 0, 0), side).shape
        assert min(shape) == side


def test_images_of_one_size_meet_others_in_each_epoch() -> None:
    """Without crops all aspect ratios are equal, and sorting must not undo the permutation."""

    def pairs(epoch: int) -> set[tuple[int, ...]]:
        sampler = RunSampler(
            400,
            step_images=2,
            micro_batch=2,
            seed=7,
            steps=range(200 * epoch, 200 * epoch + 200),
            aspect_of=lambda epoch, index: 0.75,
        )
        return {tuple(sorted(key.image for key in batch)) for batch in sampler}

    assert len(pairs(0) & pairs(1)) < 5


def table_of(labels: Sequence[Sequence[int]], classes: int = 3) -> SampleTable:
    """Images of SIZES in turn, without files, with boxes of these classes; -1 is a crowd of 2."""
    samples = []
    for image, own in enumerate(labels):
        label = torch.tensor(own, dtype=torch.int64)
        boxes = torch.tensor([[0.0, 0.0, 50.0, 50.0]]).expand(len(own), 4)
        crowd, areas = label < 0, torch.ones(len(own))
        size = SIZES[image % len(SIZES)]
        samples.append(Sample("", image, size, boxes, label % classes, areas, crowd))
    return SampleTable.from_samples(samples, [f"class {number}" for number in range(classes)])


def skewed(count: int) -> DetectionDataset:
    """A class in every image, one in every tenth, one in every fiftieth."""
    labels = [[0, *[1] * (i % 10 == 0), *[2] * (i % 50 == 0)] for i in range(count)]
    augmentation = Augmentation.from_config(CONFIG)
    return DetectionDataset(table_of(labels), augmentation, Preprocessing(640), seed=CONFIG.seed)


BALANCED = replace(CONFIG, repeat_thresh=0.2)


def test_repeat_factors_by_hand() -> None:
    """Shares of the ten images: class 0 all but two, class 1 four, class 2 one; an image with two
    boxes of a class counts once, and a crowd not at all.
    """
    labels = [[0], [0, 1], [0, 1, 1, 2], [0, 1], [0, -1], [0], [1, 1], [0], [0], []]
    found = repeat_factors(table_of(labels), 0.9)
    once, four, two = (0.9 / 0.8) ** 0.5, 1.5, 3.0
    assert found == pytest.approx([once, four, two, four, once, once, four, once, once, 1.0])
    assert repeat_factors(table_of(labels), 0.1).tolist() == [1.0] * 10
    assert repeat_factors(table_of([[], []]), 0.5).tolist() == [1.0, 1.0]
    # 5 * 1.06 + 3 * 1.5 + 3 + 1 = 13.8; whole numbers repeat exactly.
    assert epoch_images(found) == 14 and epoch_images(np.array([1.0, 2.0, 3.0])) == 6
    order = repeated(np.array([1.0, 2.0, 3.0]), np.random.default_rng(0))
    assert sorted(order.tolist()) == [0, 1, 2, 4, 5, 8]


def test_an_epoch_repeats_images_by_their_factors() -> None:
    """Each factor rounded up or down, on average as it is, in epochs of one length."""
    factors = repeat_factors(skewed(400).samples, BALANCED.repeat_thresh)
    assert sorted({*factors.round(3)}) == [1.0, 1.414, 3.162]
    length, sums = epoch_images(factors), np.zeros(400)
    for epoch in range(300):
        images = repeated(factors, np.random.default_rng((7, epoch)))
        assert length - 1 <= len(images) <= length and len({*images.tolist()}) == len(images)
        times = np.bincount(images % 400, minlength=400)
        assert ((times == np.floor(factors)) | (times == np.ceil(factors))).all()
        for image in (0, 50):  # shown three or four times, spread over the epoch
            places = np.flatnonzero(images % 400 == image) / len(images)
            assert np.diff(places).min() > 0.15
        sums += times
    assert np.abs(sums / 300 - factors).max() < 0.15


@pytest.mark.parametrize("group", [True, False])
def test_a_balanced_run_is_the_same_however_dealt_out_and_resumed(group: bool) -> None:
    dataset = skewed(200)
    config = replace(BALANCED, group_by_aspect=group, batch_size=8)
    per_epoch = steps_per_epoch(epoch_images(repeat_factors(dataset.samples, 0.2)), 8)
    assert per_epoch > steps_per_epoch(200, 8)
    steps = range(3 * per_epoch)
    whole = steps_of(dataset, config, steps)
    for processes, batch, micro_batches in ((2, 4, 1), (4, 2, 1), (1, 8, 4), (2, 4, 2)):
        layout = replace(config, batch_size=batch)
        dealt = steps_of(dataset, layout, steps, processes=processes, micro_batches=micro_batches)
        assert dealt == whole
    for first in (1, per_epoch - 1, per_epoch, per_epoch + 7):
        assert steps_of(dataset, config, range(first, len(steps))) == whole[first:]
    for epoch in range(3):
        keys = [key for step in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for key in step]
        assert {key.epoch for key in keys} == {epoch}
        assert {key.image % 200 for key in keys} == {*range(200)}


def test_a_repeated_image_is_augmented_anew(tiny_data: Path) -> None:
    config, fields = settings(tiny_data, tiny_data, "--train_sizes 32,48,64")
    table = tables(config, fields)[0]
    augmentation = Augmentation.from_config(config)
    dataset = DetectionDataset(table, augmentation, Preprocessing(64), seed=7)
    for image in range(len(table)):
        first, again = (dataset[Key(0, image + copy * len(table), 48)] for copy in range(2))
        assert first["target"]["image_id"] == again["target"]["image_id"]
    aspects = {dataset.aspect(0, 2 + copy * len(table)) for copy in range(9)}
    assert len(aspects) > 2


def test_an_unreadable_image_is_replaced_at_the_scale_of_its_step(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, fields = settings(tiny_data, tiny_data, "--no-crop --train_sizes 32,48,64")
    table = tables(config, fields)[0]
    augmentation = Augmentation.from_config(config)
    dataset = DetectionDataset(table, augmentation, Preprocessing(64), seed=7)
    for side in (32, 48, 64):
        expected = dataset[Key(0, 5, side)]["image"].shape
        with monkeypatch.context() as patch:
            patch.setattr("trainer.data.loader.read_image", failing(table.path(4)))
            found = dataset[Key(0, 4, side)]
        assert found["image"].shape == expected and min(expected[1:]) == side
        assert found["target"]["image_id"] == table[5].image_id


def failing(path: str) -> Callable:
    def read(wanted: str, *rest, **more):
        if wanted == path:
            raise UserError(f"{path}: torn")
        return read_image(wanted, *rest, **more)

    return read
