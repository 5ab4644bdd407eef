"""Cached training images: the pixels are near those of no cache and never depend on what is cached,
a changed image is never served stale, and a folder that fails costs nothing but time.
"""

import errno
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import argv, cpu, differences, end_of, main_here, random_pictures, run, write_coco

from trainer.augmentation.geometry import SPARE
from trainer.augmentation.mixing import CENTRE
from trainer.augmentation.recipe import Augmentation
from trainer.augmentation.single import covering, iou_area
from trainer.augmentation.strong import StrongParts
from trainer.data import image_cache
from trainer.data.image_cache import CACHED_SPARE, ImageCache
from trainer.data.loader import DetectionDataset
from trainer.loop.agreement import Agreement
from trainer.loop.step import check_readable
from trainer.readers.samples import Sample, SampleTable
from vidt import atomic
from vidt.errors import UserError
from vidt.images.files import read_image
from vidt.images.preprocessing import Preprocessing

RECIPE = Augmentation(
    sizes=(96, 112, 128), max_size=210, crop_resize=(80, 100, 120), crop_range=(60, 100)
)
SIZES = ((600, 800), (800, 599), (403, 777), (150, 140), (97, 400))  # whole and shrunk ones


@pytest.fixture(autouse=True)
def any_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a full disk nor the age of a file decides what a test sees."""
    monkeypatch.setattr(image_cache, "ROOM_LEFT", 0)
    monkeypatch.setattr(image_cache, "SETTLED", -(10**18))


def photograph(size: tuple[int, int], seed: int) -> Image.Image:
    """Blurred colours with a camera's noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
    smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), int)
    return Image.fromarray(
        (smooth + random.integers(-15, 16, (*size, 3))).clip(0, 255).astype(np.uint8)
    )


def table_of(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> SampleTable:
    """A JPEG of each size, with a box."""
    folder.mkdir(exist_ok=True)
    samples = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.jpg"
        photograph(size, number).save(path, quality=92)
        box = torch.tensor([[5.0, 6.0, 60.0, 70.0]])
        none = torch.zeros(1, dtype=torch.int64)
        samples.append(Sample(str(path), number, size, box, none, torch.ones(1), none.bool()))
    return SampleTable.from_samples(samples, ["thing"])


def dataset_of(table: SampleTable, cache: ImageCache | None) -> DetectionDataset:
    return DetectionDataset(table, RECIPE, Preprocessing(eval_size=128), seed=3, cache=cache)


def pixels(table: SampleTable, cache: ImageCache | None, epochs: range) -> list[np.ndarray]:
    dataset = dataset_of(table, cache)
    keys = [(epoch, index) for epoch in epochs for index in range(len(table))]
    return [dataset[key]["image"].numpy() for key in keys]


def equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def cached_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def table(tmp_path: Path) -> SampleTable:
    return table_of(tmp_path / "images")


@pytest.fixture
def cache(table: SampleTable, tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "cache", table, RECIPE)


# Sizes and pixels


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [*SIZES, (2160, 3840), (64, 5000), (5000, 64), (1, 1)])
def test_a_cached_image_is_as_large_as_any_draw_needs(
    size: tuple[int, int], crop: bool, table: SampleTable, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, crop=crop)
    height, width = ImageCache(tmp_path, table, recipe).shape_of(size)
    assert height <= size[0] and width <= size[1]
    draws = [recipe.draw(size, np.random.default_rng(seed)) for seed in range(200)]
    for geometry in draws:
        wanted = (side / SPARE * CACHED_SPARE for side in geometry.needed)
        for cached, side, whole in zip((height, width), wanted, size, strict=True):
            assert cached >= min(side, whole)
    if (height, width) != size:  # and no larger than that of the largest
        largest = [max(geometry.needed[axis] for geometry in draws) for axis in (0, 1)]
        spare = min((height - 1) / largest[0], (width - 1) / largest[1]) * SPARE
        assert spare <= CACHED_SPARE


@pytest.mark.parametrize("part", ["iou_crop", "mosaic", "mixup", "copy_paste"])
@pytest.mark.parametrize("size", [*SIZES, (2160, 3840), (64, 5000)])
def test_a_cached_image_is_as_large_as_the_strong_parts_need(
    part: str, size: tuple[int, int], table: SampleTable, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, strong=StrongParts(**{part: 1.0}))
    cached = ImageCache(tmp_path, table, recipe).shape_of(size)
    box = torch.tensor([[size[1] / 3, size[0] / 3, size[1] / 2, size[0] / 2]])
    for seed in range(100):
        random = np.random.default_rng(seed)
        other = SIZES[int(random.integers(len(SIZES)))]
        area, shape = (0, 0, *size), recipe.canvas(*other)
        if part == "iou_crop":
            area = iou_area(size, box, random)
            shape = recipe.canvas(*area[2:])
        elif part == "mosaic":
            down, across = random.uniform(*CENTRE, 2)
            shape = round(shape[0] * down), round(shape[1] * across)
        needed = covering(size, area, shape, random).needed
        assert all(
            have >= min(each, most) for have, each, most in zip(cached, needed, size, strict=True)
        )


def test_pixels_are_near_those_of_images_decoded_in_full(
    table: SampleTable, cache: ImageCache
) -> None:
    """Nearer than with another resampling filter, as images decoded at SPARE times the size are."""
    dataset, shrunk = dataset_of(table, cache), 0
    for key in [(epoch, index) for epoch in range(12) for index in range(len(table))]:
        sample = table[key[1]]
        geometry = RECIPE.draw(sample.size, np.random.default_rng((3, *key)))
        whole = read_image(sample.path, sample.size)
        expected = np.asarray(geometry.on_image(whole), int).transpose(2, 0, 1)
        found = dataset[key]["image"].numpy().astype(int)
        far = np.abs(found - expected)
        if cache.shape_of(sample.size) == sample.size:
            assert far.max() == 0
            continue
        shrunk += 1
        assert far.mean() < 0.7 and far.max() <= 8
        # Nothing has moved: a shift by a hundredth of the image would be far larger.
        moved = np.abs(np.roll(found, 2, axis=2) - expected).mean()
        assert moved > 1.5 * far.mean()
    assert shrunk >= 20


def test_the_first_read_and_later_ones_and_a_folder_that_fails_give_the_same(
    table: SampleTable, cache: ImageCache, tmp_path: Path
) -> None:
    first = pixels(table, cache, range(2))
    assert equal(first, pixels(table, cache, range(2)))
    blocked = ImageCache(tmp_path / "blocked", table, RECIPE)
    (tmp_path / "blocked").write_text("not a folder")
    assert equal(first, pixels(table, blocked, range(2)))
    later = ImageCache(cache.folder, table, RECIPE)  # another run
    assert equal(first, pixels(table, later, range(2)))
    shutil.rmtree(cache.folder)
    assert equal(first, pixels(table, later, range(2)))
    assert len(cached_files(cache.folder)) == len(SIZES)


def test_cached_images_are_read_and_not_the_originals(
    table: SampleTable, cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels(table, cache, range(1))

    def decoded(*args: Any, **more: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_cache, "read_image", decoded)
    expected = pixels(table, ImageCache(cache.folder, table, RECIPE), range(1))
    monkeypatch.setattr(image_cache, "_digest", decoded)  # this run has read the originals once
    assert equal(pixels(table, cache, range(1)), expected)


# What is served


def test_a_changed_image_is_cached_anew(table: SampleTable, cache: ImageCache) -> None:
    path, before = table.path(0), pixels(table, cache, range(1))
    status = os.stat(path)
    content = bytearray(Path(path).read_bytes())
    photograph(SIZES[0], seed=77).save(path, quality=92)
    changed = Path(path).read_bytes()[: len(content)]
    Path(path).write_bytes(changed + b"\0" * (len(content) - len(changed)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as some copying tools do
    assert os.stat(path).st_mtime_ns == status.st_mtime_ns
    assert os.stat(path).st_size == status.st_size
    after = pixels(table, cache, range(1))
    assert not np.array_equal(before[0], after[0])
    assert equal(before[1:], after[1:])
    assert equal(after, pixels(table, ImageCache(cache.folder, table, RECIPE), range(1)))


def test_an_image_that_has_just_changed_is_always_read(
    table: SampleTable, cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes within one tick of the file system's clock leave the same times."""
    monkeypatch.setattr(image_cache, "SETTLED", 10**18)
    pixels(table, cache, range(1))
    assert not cache.notes.any()


def test_a_note_that_is_read_half_written_is_not_believed(
    table: SampleTable, cache: ImageCache
) -> None:
    expected = pixels(table, cache, range(1))
    whole = cache.notes.clone()
    for column in range(3):
        cache.notes.copy_(whole)
        cache.notes[:, column] = 0
        assert all(cache._remembered(index, table.path(index)) is None for index in range(5))
        assert equal(pixels(table, cache, range(1)), expected)


def test_other_recipes_and_other_data_share_a_folder(tmp_path: Path, table: SampleTable) -> None:
    """Equal pictures of one recipe are stored once; another recipe has pictures of its own."""
    shared = tmp_path / "cache"
    pixels(table, ImageCache(shared, table, RECIPE), range(1))
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    copy = table_of(tmp_path / "copy")
    pixels(copy, ImageCache(shared, copy, RECIPE), range(1))
    assert len(cached_files(shared)) == len(SIZES)
    small = replace(RECIPE, sizes=(48,), crop=False)
    shapes = [ImageCache(shared, table, recipe).shape_of(SIZES[0]) for recipe in (RECIPE, small)]
    assert shapes[1] < shapes[0]
    image = ImageCache(shared, table, small).read(0, table[0])
    assert (image.height, image.width) == shapes[1]
    assert len(cached_files(shared)) == len(SIZES) + 1


@pytest.mark.parametrize("damage", ["shorter", "empty", "longer", "other"])
def test_a_damaged_file_is_replaced(table: SampleTable, cache: ImageCache, damage: str) -> None:
    expected = pixels(table, cache, range(1))
    files = cached_files(cache.folder)
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents, strict=True):
        damaged = {
            "shorter": content[:-1],
            "empty": b"",
            "longer": content + b"\0",
            "other": b"\0" * len(content),
        }
        path.write_bytes(damaged[damage])
    assert equal(pixels(table, cache, range(1)), expected)
    assert [path.read_bytes() for path in files] == contents


def test_a_cached_image_whose_original_is_gone_counts_as_unreadable(
    table: SampleTable, cache: ImageCache
) -> None:
    pixels(table, cache, range(1))
    Path(table.path(1)).unlink()
    with pytest.raises(UserError, match=r"1\.jpg: No such file"):
        cache.read(1, table[1])
    dataset = dataset_of(table, cache)
    assert dataset[0, 1]["target"]["image_id"] == 2
    assert dataset.unreadable.tolist() == [False, True, False, False, False]


def test_an_image_that_its_orientation_turns(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph((600, 800), 0).save(folder / "0.jpg", exif=exif)
    box, none = torch.tensor([[5.0, 6.0, 60.0, 70.0]]), torch.zeros(1, dtype=torch.int64)
    for size in ((800, 600), (600, 800)):
        sample = Sample(str(folder / "0.jpg"), 0, size, box, none, torch.ones(1), none.bool())
        table = SampleTable.from_samples([sample], ["thing"])
        for _ in range(2):
            image = ImageCache(tmp_path / "cache", table, RECIPE).read(0, sample)
            whole = read_image(sample.path, size).resize(image.size, Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(image, int) - np.asarray(whole, int)).mean() < 2


# The folder


def fill(cache: ImageCache, table: SampleTable, seed: int) -> None:
    for index in np.random.default_rng(seed).permutation(len(table)):
        cache.read(int(index), table[int(index)])


def test_processes_fill_a_folder_together(tmp_path: Path) -> None:
    """Each finds whole files only, and leaves nothing else."""
    table = table_of(tmp_path / "images", SIZES * 3)
    cache = ImageCache(tmp_path / "cache", table, RECIPE)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(cache, table, n % 2)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone = ImageCache(tmp_path / "alone", table, RECIPE)
    assert equal(pixels(table, cache, range(1)), pixels(table, alone, range(1)))
    contents = [
        {path.name: path.read_bytes() for path in cached_files(each.folder)}
        for each in (cache, alone)
    ]
    assert contents[0] == contents[1] and len(contents[0]) == len(table)


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with atomic.atomic_file(target) as first:
        first.write(b"1" * 9)
        atomic.atomic_write(target, b"2" * 5)
        assert target.read_bytes() == b"2" * 5
    assert target.read_bytes() == b"1" * 9
    assert cached_files(tmp_path) == [target]


def test_what_a_kill_left_behind_is_removed_and_the_fill_goes_on(
    table: SampleTable, cache: ImageCache
) -> None:
    fill(cache, table, seed=0)
    first, second, *_ = cached_files(cache.folder)
    old, new = (first.with_name(f".{first.name}.{name}.tmp") for name in ("old", "new"))
    old.write_bytes(second.read_bytes()[:100])
    new.write_bytes(b"another run writes this")
    os.utime(old, (1, 1))
    first.unlink()
    later = ImageCache(cache.folder, table, RECIPE)
    assert "5 images take 0.0 GiB" in later.open_folder()
    assert not old.exists() and new.exists()
    fill(later, table, seed=0)
    assert first.exists() and not later.new_problem()


@pytest.fixture(params=[errno.ENOSPC, errno.EROFS, "reserve"])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A disk that takes one file and then fails, half way through the second."""
    if request.param == "reserve":
        monkeypatch.setattr(image_cache, "ROOM_LEFT", 2**80)
        yield errno.ENOSPC
        return
    written: list[Path] = []

    def write(path: Path, content: bytes, **more: Any) -> None:
        with atomic.atomic_file(path, **more) as file:
            file.write(content[: len(content) // (1 + len(written))])
            if written:
                raise OSError(request.param, os.strerror(request.param))
            written.append(path)

    monkeypatch.setattr(image_cache, "atomic_write", write)
    yield request.param


def test_a_full_or_read_only_disk_is_said_once_and_costs_nothing_else(
    table: SampleTable, cache: ImageCache, failing: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache.open_folder()
    dataset = dataset_of(table, cache)
    for index in range(len(table)):
        dataset[0, index]
    whole = [path for path in cached_files(cache.folder) if path.suffix == ".ppm"]
    assert cached_files(cache.folder) == whole and len(whole) <= 1
    for _ in range(2):
        check_readable(dataset, 0.0, Agreement(cpu()))
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"--cache_images {cache.folder}: {os.strerror(failing)}" in line
    assert "--resume" in line and "\n" not in line


def test_a_folder_that_cannot_be_made_is_an_error(
    tiny_data: Path, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (room / "file").write_text("")
    words = argv(tiny_data, room / "out", f"--max_steps 1 --cache_images {room}/file/cache")
    assert main_here(words) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error")]
    assert f"--cache_images {room}/file/cache: Not a directory" in line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_does_not_depend_on_what_is_cached(
    room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Filled by workers, read by a second run, and read in part by one that is resumed."""
    sizes = ((300, 280), (200, 260), (64, 96))
    data = write_coco(room / "data", random_pictures(8, 0, sizes), random_pictures(3, 1, sizes))
    flags = "--epochs 2 --save_steps 1 --dropout 0.1 --cache_images"
    run(data, room / "first", f"{flags} {room}/a --num_workers 2")
    assert f"--cache_images {room}/a: training images are cached" in caplog.text
    assert len(cached_files(room / "a")) == 8
    expected = end_of(room / "first")
    run(data, room / "second", f"{flags} {room}/a")
    assert differences(end_of(room / "second"), expected) == []
    run(data, room / "third", f"{flags} {room}/b --max_steps 4")
    for number, path in enumerate(cached_files(room / "b")):
        if number % 2:
            path.unlink()
    shutil.rmtree(room / "third/checkpoints/step-00000004")
    run(data, room / "third", f"{flags} {room}/b --resume --num_workers 1")
    assert differences(end_of(room / "third"), expected) == []
