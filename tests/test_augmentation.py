"""Training pictures: random numbers that follow from (seed, epoch, image) alone, boxes that stay on
their pixels, and pictures that can no longer be read.
"""

import os
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import (
    argv,
    cpu,
    main_here,
    random_pictures,
    run,
    settings,
    tables,
    write_coco,
)
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from trainer.augmentation.denoising import Denoising
from trainer.augmentation.geometry import Geometry
from trainer.augmentation.recipe import Augmentation
from trainer.data.loader import (
    DetectionDataset,
    training_loader,
    unpacked,
)
from trainer.loop.agreement import Agreement
from trainer.loop.step import check_readable
from trainer.report.progress import Progress
from vidt.images.files import read_image
from vidt.images.preprocessing import Preprocessing

RELEASED = Augmentation(sizes=(480, 800), max_size=1333)
SMALL = Augmentation(
    sizes=(96, 128, 160), max_size=200, crop_resize=(100, 120, 150), crop_range=(60, 120)
)


def dataset_of(data: Path, *flags: str, **changed: Any) -> DetectionDataset:
    config, fields = settings(data, data, *flags)
    return DetectionDataset(
        tables(config, fields)[0],
        Augmentation.from_config(config),
        Preprocessing(config.eval_size),
        seed=changed.get("seed", config.seed),
        denoising=Denoising(config.denoising),
    )


def equal_items(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if first["image"].shape != second["image"].shape:
        return False
    targets = first["target"], second["target"]
    return torch.equal(first["image"], second["image"]) and all(
        torch.equal(*(torch.as_tensor(target[name]) for target in targets)) for name in targets[0]
    )


def test_random_numbers_follow_from_seed_epoch_and_image(tiny_data: Path) -> None:
    dataset = dataset_of(tiny_data, "--denoising 9")
    keys = [(epoch, index) for epoch in range(3) for index in range(12)]
    items = {key: dataset[key] for key in keys}
    torch.manual_seed(5)
    np.random.seed(5)
    again = {key: dataset[key] for key in reversed(keys)}
    assert all(equal_items(items[key], again[key]) for key in keys)
    others = dataset_of(tiny_data, "--denoising 9", seed=43)
    for key in keys:
        assert not equal_items(items[key], others[key]) or not len(items[key]["target"]["labels"])
    changed = [i for i in range(12) if not equal_items(items[0, i], items[1, i])]
    assert len(changed) >= 10


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_do_not_matter(tiny_data: Path, num_workers: int) -> None:
    def batches(workers: int) -> list[dict[str, Any]]:
        flags = f"--denoising 9 --num_workers {workers}"
        config, _ = settings(tiny_data, tiny_data, flags)
        dataset = dataset_of(tiny_data, flags)
        loader = training_loader(dataset, config, num_processes=1, micro_batch=2, steps=range(1, 5))
        return [unpacked(batch) for batch in loader]

    alone, shared = batches(0), batches(num_workers)
    assert len(alone) == len(shared) == 8
    for first, second in zip(alone, shared, strict=True):
        assert torch.equal(first["images"], second["images"])
        assert torch.equal(first["padding"], second["padding"])
        for ours, theirs in zip(first["targets"], second["targets"], strict=True):
            assert ours["image_id"] == theirs["image_id"]
            assert torch.equal(ours["boxes"], theirs["boxes"])
            assert torch.equal(ours["denoising_boxes"], theirs["denoising_boxes"])


def bright(image: Image.Image) -> tuple[list[float], float]:
    """Extent, xyxy, of the bright pixels, and their share of it."""
    mask = np.asarray(image.convert("L")) > 127
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return [left, top, right, bottom], mask.sum() / ((right - left) * (bottom - top))


def augmented(
    augmentation: Augmentation,
    image: Image.Image,
    boxes: Tensor,
    labels: Tensor,
    random: np.random.Generator,
) -> tuple[Image.Image, Tensor, Tensor]:
    """boxes [N, 4] xyxy pixels, labels [N]; without those that a crop leaves nothing of."""
    geometry = augmentation.draw((image.height, image.width), random)
    boxes, kept = geometry.on_boxes(boxes)
    return geometry.on_image(image), boxes, labels[kept]


@pytest.mark.parametrize("augmentation", [SMALL, RELEASED], ids=["small", "released"])
@pytest.mark.parametrize("size", [(120, 200), (260, 90)])
def test_boxes_follow_the_pixels(augmentation: Augmentation, size: tuple[int, int]) -> None:
    """A white rectangle on black, augmented in many ways and found again by its pixels."""
    height, width = size
    box = [round(0.3 * width), round(0.2 * height), round(0.7 * width), round(0.9 * height)]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    kinds = set()
    for number in range(60):
        image, boxes, labels = augmented(
            augmentation,
            Image.fromarray(pixels),
            torch.tensor([box], dtype=torch.float32),
            torch.tensor([4]),
            np.random.default_rng(number),
        )
        assert image.height % 16 == image.width % 16 == 0
        assert len(boxes) == len(labels)
        if not len(boxes):
            assert not (np.asarray(image) > 127).any()
            continue
        extent, share = bright(image)
        assert labels.tolist() == [4] and share > 0.95
        # Enlarged, a pixel is several wide and its edge is blurred over as many.
        blur = 1.0 + max(image.height / 60, image.width / 60)
        assert boxes[0].tolist() == pytest.approx(extent, abs=blur)
        sides = torch.tensor([image.width, image.height])
        assert boxes.min() >= 0 and bool((boxes[0, 2:] <= sides + 1e-3).all())
        kinds.add(tuple(round(value / 40) for value in extent))
    assert len(kinds) >= 8


def drawings(size: tuple[int, int]) -> list[Geometry]:
    """Mirrored or not, cropped or not."""
    drawn = [SMALL.draw(size, np.random.default_rng(number)) for number in range(30)]
    kinds = {(each.flip, each.crop is None) for each in drawn}
    assert kinds == set(product((True, False), repeat=2))
    return drawn


@pytest.mark.parametrize("size", [(120, 200), (333, 97)])
def test_boxes_are_those_of_torchvision(size: tuple[int, int]) -> None:
    corners = torch.rand(40, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    boxes = corners.flatten(1) * torch.tensor([*size[::-1]] * 2)
    for geometry in drawings(size):
        framed = BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        framed = F.horizontal_flip(framed) if geometry.flip else framed
        kept = torch.ones(len(boxes), dtype=torch.bool)
        if geometry.crop is not None:
            framed = F.crop(F.resize(framed, list(geometry.crop.before)), *geometry.crop.area)
            kept = (framed[:, 2:] > framed[:, :2]).all(dim=1).as_subclass(Tensor)
        expected = F.resize(framed, list(geometry.shape)).as_subclass(Tensor)[kept]
        found, found_kept = geometry.on_boxes(boxes)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected) and torch.equal(found_kept, kept)


def test_pixels_are_those_of_one_step_after_the_other() -> None:
    """Mirror, resize, crop and resize: the order of the recipe, whatever is quicker."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    image, bilinear = Image.fromarray(noise), Image.Resampling.BILINEAR
    for geometry in drawings((90, 150)):
        expected = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.flip else image
        if geometry.crop is not None:
            top, left, height, width = geometry.crop.area
            expected = expected.resize(geometry.crop.before[::-1], bilinear)
            expected = expected.crop((left, top, left + width, top + height))
        expected = expected.resize(geometry.shape[::-1], bilinear)
        far = np.abs(np.asarray(geometry.on_image(image), int) - np.asarray(expected, int))
        assert far.max() <= 2 and (far > 0).mean() < 0.01


@pytest.mark.parametrize("size", [(700, 1001), (1024, 768)])
def test_a_large_photograph_is_decoded_smaller_and_looks_the_same(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    fine = np.random.default_rng(1).integers(-20, 21, (*size, 3))
    smooth = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))
    Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8)).save(tmp_path / "a.jpg")
    whole = read_image(tmp_path / "a.jpg")
    for geometry in drawings(size):
        image = read_image(tmp_path / "a.jpg", size, at_least=geometry.needed)
        assert whole.width > 1.9 * image.width
        assert image.height >= geometry.needed[0] and image.width >= geometry.needed[1]
        found, expected = (geometry.on_image(each) for each in (image, whole))
        assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < 1


def test_mirrored_half_of_the_time_and_never_if_told_so() -> None:
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[:, :40] = 255
    box = torch.tensor([[0.0, 0.0, 40.0, 128.0]])

    def lefts(**settings: bool) -> list[float]:
        augmentation = Augmentation(sizes=(128,), max_size=200, crop=False, **settings)
        found = []
        for number in range(100):
            random = np.random.default_rng(number)
            picture = Image.fromarray(pixels)
            image, boxes, _ = augmented(augmentation, picture, box, torch.tensor([0]), random)
            assert bright(image)[0] == boxes[0].tolist()
            found.append(float(boxes[0, 0]))
        return found

    mirrored = lefts()
    assert set(mirrored) == {0.0, 88.0} and 35 <= mirrored.count(88.0) <= 65
    assert set(lefts(flip=False)) == {0.0}


def test_what_a_crop_leaves_nothing_of_is_gone_with_its_label() -> None:
    """A picture of a hundred small objects, of which crops keep some."""
    image = Image.new("RGB", (200, 200))
    corners = torch.cartesian_prod(torch.arange(10) * 20.0, torch.arange(10) * 20.0)
    boxes = torch.cat([corners, corners + 10], dim=1)
    counts = set()
    for number in range(40):
        random = np.random.default_rng(number)
        _, kept, labels = augmented(SMALL, image, boxes, torch.arange(100), random)
        assert len(kept) == len(labels) == len(set(labels.tolist()))
        assert bool((kept[:, 2:] > kept[:, :2]).all())
        # Objects keep their order, and so their places relative to one another.
        order = boxes[labels][:, 1].argsort(stable=True)
        assert bool((kept[order][:, 1].diff() >= -1e-3).all())
        counts.add(len(kept))
    assert max(counts) == 100 and min(counts) < 60


@pytest.mark.parametrize("size", [(120, 200), (300, 60), (64, 64)])
def test_sizes_are_among_those_asked_for(size: tuple[int, int]) -> None:
    augmentation = Augmentation(sizes=(96, 128), max_size=192, crop=False)
    for number in range(20):
        image, _, _ = augmented(
            augmentation,
            Image.new("RGB", size[::-1]),
            torch.zeros(0, 4),
            torch.zeros(0, dtype=torch.int64),
            np.random.default_rng(number),
        )
        assert max(image.size) <= 192
        if max(size) / min(size) < 1.5:
            assert min(image.size) in (96, 128)


def test_targets_are_relative_and_without_crowds(tmp_path: Path) -> None:
    pictures = random_pictures(1, seed=0)
    x, y, width, height, label, _ = pictures[0].boxes[0]
    crowd = pictures[0].__class__(64, 64, ((x, y, width, height, label, 0), (0, 0, 60, 60, 1, 1)))
    write_coco(tmp_path, [crowd], pictures)
    flags = "--no-flip --no-crop --train_sizes 64"
    target = dataset_of(tmp_path, flags)[0, 0]["target"]
    expected = [(x + width / 2) / 64, (y + height / 2) / 64, width / 64, height / 64]
    assert target["boxes"].tolist() == [pytest.approx(expected, abs=1e-5)]
    assert target["image_id"] == 101 and len(target["labels"]) == 1


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """Pictures that a test may damage."""
    return write_coco(tmp_path / "data", random_pictures(12, 0), random_pictures(2, 1))


def test_an_unreadable_picture_is_replaced_by_the_next(own_data: Path) -> None:
    dataset = dataset_of(own_data)
    (own_data / "train2017/102.png").write_bytes(b"torn")
    (own_data / "train2017/112.png").unlink()
    assert dataset[0, 1]["target"]["image_id"] == 103
    assert dataset[0, 11]["target"]["image_id"] == 101
    assert dataset.unreadable.nonzero().flatten().tolist() == [1, 11]
    for path in (own_data / "train2017").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"\.png"):
        dataset[1, 0]


def test_unreadable_pictures_are_counted_said_once_and_limited(
    own_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, agreement = dataset_of(own_data), Agreement(cpu())
    check_readable(dataset, 0.0, agreement)
    assert not caplog.messages
    dataset.unreadable[3] = True
    for _ in range(3):
        check_readable(dataset, 0.1, agreement)
    (line,) = caplog.messages
    assert "1 image can no longer be read" in line and "104.png" in line
    dataset.unreadable[5] = True
    with pytest.raises(ValueError, match=r"2 of 12 .* --max_bad_fraction 0\.1") as caught:
        check_readable(dataset, 0.1, agreement)
    assert "\n" not in str(caught.value)


def damage_at(step: int, data: Path, names: list[str]) -> Any:
    def report(progress: Progress) -> None:
        if (progress.event, progress.step) == ("step", step):
            for name in names:
                os.unlink(data / "train2017" / name)

    return report


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pictures_that_vanish_while_training(
    own_data: Path, room: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One of twelve is borne and named, three are too many."""
    seldom = "--eval_interval 5 --save_interval 5 --no-ema"
    # Long enough that no worker has read all there is to read before the pictures vanish.
    flags = f"--epochs 5 --max_steps 15 --num_workers {num_workers} {seldom}"
    one = damage_at(2, own_data, ["105.png"])
    run(own_data, room, flags, "--max_bad_fraction 0.1", report=one)
    (line,) = [line for line in caplog.messages if "no longer be read" in line]
    assert "105.png" in line
    write_coco(own_data, random_pictures(12, 0), random_pictures(2, 1))
    three = damage_at(2, own_data, ["101.png", "106.png", "110.png"])
    with pytest.raises(ValueError, match=r"--max_bad_fraction 0\.1"):
        run(own_data, room / "again", flags, "--max_bad_fraction 0.1", report=three)


def test_a_disk_that_vanishes_ends_in_one_line(
    own_data: Path,
    room: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All pictures are gone after the check, and it is a worker that finds out."""
    read = DetectionDataset._read_from

    def gone(self: DetectionDataset, *key: int) -> Any:
        for path in (own_data / "train2017").iterdir():
            path.unlink()
        return read(self, *key)

    monkeypatch.setattr(DetectionDataset, "_read_from", gone)
    assert main_here(argv(own_data, room, "--num_workers 1")) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and ".png: no such file" in lines[0]
