"""The strong parts of the augmentation: boxes, masks and pixels move together, random numbers
follow from (seed, epoch, image), the last epochs are plain.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import (
    Crash,
    Picture,
    differences,
    end_of,
    random_pictures,
    run,
    settings,
    tables,
    write_coco,
)

from trainer.augmentation.denoising import Denoising
from trainer.augmentation.mixing import copy_paste, mixup, mosaic
from trainer.augmentation.preview import preview
from trainer.augmentation.recipe import Augmentation
from trainer.augmentation.scene import LARGE_SHARE, LEAST_SHARE, Scene
from trainer.augmentation.single import (
    affine,
    covering,
    iou_area,
    jittered,
    photometric,
    zoomed_out,
)
from trainer.backward.memory import largest_batch, largest_canvas
from trainer.data.loader import DetectionDataset, training_loader, unpacked
from trainer.data.order import Key
from trainer.readers.masks import encode
from trainer.readers.samples import Sample, SampleTable
from trainer.report.progress import Progress
from trainer.settings.flags import ConfigError
from trainer.settings.limits import STRONG_PARTS
from trainer.settings.parsing import parse
from vidt.errors import UserError
from vidt.images.preprocessing import Preprocessing

SIZE = (120, 160)
BOX = (40, 30, 110, 80)  # xyxy
NO_MASKS = [name for name in STRONG_PARTS if name != "copy_paste"]
ALL = " ".join(f"--{name} 0.5" for name in NO_MASKS)


def flags_of(*names: str, probability: float = 1) -> str:
    return " ".join(f"--{name} {probability}" for name in names)


def scene_of(*boxes: tuple[int, int, int, int], value: int = 255, masks: bool = True) -> Scene:
    """Rectangles of one brightness on black, with their masks."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    inside = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(inside, boxes, strict=True):
        pixels[top:bottom, left:right] = value
        mask[top:bottom, left:right] = True
    return Scene(
        Image.fromarray(pixels),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.arange(len(boxes)),
        image_id=7,
        masks=inside if masks else None,
        has_mask=torch.ones(len(boxes), dtype=torch.bool) if masks else None,
    )


def extent(mask: np.ndarray) -> list[int]:
    """The box xyxy around the true pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def covered(scene: Scene, random: np.random.Generator) -> Scene:
    area = iou_area(scene.size, scene.boxes, random)
    return scene.moved(covering(scene.size, area, (96, 128), random), visible=True)


MOVES: dict[str, Callable[[Scene, np.random.Generator], Scene]] = {
    "iou_crop": covered,
    "zoom_out": zoomed_out,
    "scale_jitter": lambda scene, random: jittered(scene, (0.5, 2.0), random),
    "affine": lambda scene, random: affine(scene, 10, random),
}


@pytest.mark.parametrize("part", MOVES)
def test_boxes_and_masks_follow_the_pixels(part: str) -> None:
    """A white rectangle, found again by its pixels."""
    places = set()
    for number in range(40):
        moved = MOVES[part](scene_of(BOX), np.random.default_rng(number))
        bright = np.asarray(moved.image).min(2) > 127
        if not len(moved.boxes):
            assert bright.mean() < LARGE_SHARE + 0.02
            continue
        # What a shift pushes out of the image is cut off the box around the turned corners.
        assert moved.boxes[0].tolist() == pytest.approx(extent(bright), abs=2.5)
        mask = moved.masks[0].numpy()  # type: ignore[index]
        assert mask.shape == bright.shape and (mask != bright).mean() < 0.02
        places.add(tuple(extent(bright)))
    assert len(places) >= 20


def partner_of(scene: Scene) -> Callable[[tuple[int, int]], Scene]:
    def partner(shape: tuple[int, int]) -> Scene:
        whole = (0, 0, *scene.size)
        geometry = covering(scene.size, whole, shape, np.random.default_rng(0))
        return scene.moved(geometry, visible=True)

    return partner


def test_a_mosaic_shows_four_images_with_their_objects() -> None:
    sides = set()
    for number in range(20):
        random = np.random.default_rng(number)
        mixed = mosaic(scene_of(BOX), partner_of(scene_of(BOX, value=200)), random)
        assert mixed.size == SIZE and mixed.image_id == 7
        grey = np.asarray(mixed.image).min(2)
        own = 0
        for box, mask in zip(mixed.boxes, mixed.masks, strict=True):  # type: ignore[arg-type]
            left, top, right, bottom = box.round().int().tolist()
            inside = grey[top + 1 : bottom - 1, left + 1 : right - 1]
            assert inside.min() > 100
            own += int(inside.mean() > 228)
            assert extent(mask.numpy()) == pytest.approx(box.tolist(), abs=1.01)
        assert own <= 1 and 2 <= len(mixed.boxes) <= 4
        # Nothing bright is without a box.
        union = mixed.masks.any(0).numpy()  # type: ignore[union-attr]
        assert ((grey > 100) & ~union).mean() < 0.12
        sides.add(tuple(mixed.boxes[0].round().int().tolist()))
    assert len(sides) > 10


def test_mixup_keeps_the_objects_of_both() -> None:
    other = scene_of((0, 0, 20, 30))
    mixed = mixup(scene_of(BOX), partner_of(other), np.random.default_rng(0))
    assert mixed.boxes.tolist() == [[*BOX], [0, 0, 20, 30]]
    grey = np.asarray(mixed.image).min(2)
    for mask, share in zip(mixed.masks, (0.5, 0.5), strict=True):  # type: ignore[arg-type]
        assert grey[mask.numpy()].mean() / 255 == pytest.approx(share, abs=0.25)
    assert not grey[~mixed.masks.any(0).numpy()].any()  # type: ignore[union-attr]


def test_what_a_pasted_object_hides_leaves_mask_and_box() -> None:
    front = scene_of((60, 10, 130, 110), value=128)
    seen = set()
    for number in range(10):
        random = np.random.default_rng(number)
        mixed = copy_paste(scene_of(BOX, (60, 20, 70, 100)), partner_of(front), random)
        grey = np.asarray(mixed.image).min(2)
        seen.add(bool((grey == 128).any()))
        if (grey == 128).any():  # pasted: what lay behind it is gone, or less wide
            # The pasted object comes first: without masks, earlier objects are in front.
            assert mixed.boxes.tolist() == [[60, 10, 130, 110], [40, 30, 60, 80]]
            assert np.array_equal(mixed.masks[0].numpy(), grey == 128)  # type: ignore[index]
            assert np.array_equal(mixed.masks[1].numpy(), grey == 255)  # type: ignore[index]
            assert mixed.image_id == 7
    assert len(seen) == 2


def test_objects_without_a_mask_are_not_pasted() -> None:
    front = replace(scene_of(BOX), has_mask=torch.tensor([False]))
    scene = scene_of((0, 0, 20, 20))
    mixed = [copy_paste(scene, partner_of(front), np.random.default_rng(n)) for n in range(5)]
    assert all(each.boxes.tolist() == scene.boxes.tolist() for each in mixed)


def test_a_mask_without_a_pixel_teaches_nothing() -> None:
    scene = scene_of((0, 0, 40, 40), (50, 50, 90, 90))
    assert scene.masks is not None
    masks = scene.masks.clone()
    masks[0] = False
    seen = scene.with_masks(masks)
    assert seen.has_mask is not None and seen.has_mask.tolist() == [False, True]


def test_there_is_nothing_to_paste_on_an_image_without_masks() -> None:
    bare = scene_of(BOX, masks=False)
    assert copy_paste(bare, partner_of(bare), np.random.default_rng(0)) is bare


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("part", [*MOVES, "mosaic", "mixup", "copy_paste"])
def test_an_image_without_objects(part: str, masks: bool) -> None:
    empty = scene_of(masks=masks)
    mixing = {"mosaic": mosaic, "mixup": mixup, "copy_paste": copy_paste}
    for number in range(5):
        random = np.random.default_rng(number)
        if part in mixing:
            moved = mixing[part](empty, partner_of(empty), random)
        else:
            moved = MOVES[part](empty, random)
        assert moved.boxes.shape == (0, 4) and not len(moved.labels)
        assert (moved.masks is None) != masks
        if moved.masks is not None:
            assert moved.masks.shape == (0, *moved.size)


def test_little_that_is_left_of_an_object_is_dropped_unless_it_fills_the_image() -> None:
    scene = scene_of((0, 0, 4, 100), (0, 0, 160, 120))
    crop = (0, 3, 40, 40)
    whole = torch.tensor([400.0, 160.0 * 120])
    cut = replace(scene, boxes=torch.tensor([[0.0, 0, 1, 40], [0, 0, 40, 40]])).visible(whole)
    assert LEAST_SHARE > 0.1 and LARGE_SHARE > 40 * 40 / (120 * 160)
    assert not len(cut.boxes)
    moved = scene.moved(covering(SIZE, crop, (40, 40), np.random.default_rng(0)), visible=True)
    assert moved.labels.tolist() == [1]


def test_colours_change_and_nothing_else() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    image = Image.fromarray(pixels)
    changed = [photometric(image, np.random.default_rng(number)) for number in range(8)]
    assert {each.size for each in changed} == {image.size}
    means = [np.asarray(each).mean() for each in changed]
    assert np.std(means) > 2
    for each in changed:
        assert 1 < np.abs(np.asarray(each, int) - pixels).mean() < 60


def test_iou_crops_hold_an_object_and_are_not_too_long() -> None:
    boxes = torch.tensor([[*BOX], [0, 0, 20, 20]], dtype=torch.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    for number in range(60):
        top, left, height, width = iou_area(SIZE, boxes, np.random.default_rng(number))
        assert 0 <= top <= top + height <= SIZE[0] and 0 <= left <= left + width <= SIZE[1]
        assert 0.5 <= width / height <= 2
        x, y = centres.unbind(1)
        assert bool(((x > left) & (x < left + width) & (y > top) & (y < top + height)).any())
    assert iou_area(SIZE, boxes[:0], np.random.default_rng(0)) == (0, 0, *SIZE)


def dataset_of(data: Path, *flags: str, **changed: Any) -> DetectionDataset:
    config, fields = settings(data, data, *flags)
    return DetectionDataset(
        tables(config, fields)[0],
        Augmentation.from_config(config),
        Preprocessing(config.eval_size),
        seed=config.seed,
        denoising=Denoising(config.denoising),
        **changed,
    )


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if first["image"].shape != second["image"].shape:
        return False
    targets = first["target"], second["target"]
    return torch.equal(first["image"], second["image"]) and all(
        torch.as_tensor(targets[0][name]).shape == torch.as_tensor(targets[1][name]).shape
        and torch.equal(*(torch.as_tensor(target[name]) for target in targets))
        for name in targets[0]
    )


@pytest.mark.parametrize("flags", [*(flags_of(name) for name in NO_MASKS), ALL], ids=str)
def test_random_numbers_follow_from_seed_epoch_and_image(tiny_data: Path, flags: str) -> None:
    dataset, plain = dataset_of(tiny_data, flags, "--denoising 9"), dataset_of(tiny_data)
    keys = [Key(epoch, index) for epoch in range(2) for index in range(12)]
    items = {key: dataset[key] for key in keys}
    before = torch.random.get_rng_state()
    np.random.seed(5)
    assert all(equal(items[key], dataset[key]) for key in reversed(keys))
    assert torch.equal(before, torch.random.get_rng_state())
    changed = [key for key in keys if not equal(plain[key], items[key])]
    assert len(changed) > (18 if flags != flags_of("iou_crop") else 10)
    for item in items.values():
        boxes = item["target"]["boxes"]
        assert bool((boxes[:, :2] - boxes[:, 2:] / 2 > -1e-4).all())
        assert bool((boxes[:, :2] + boxes[:, 2:] / 2 < 1 + 1e-4).all())
        assert len(boxes) == len(item["target"]["labels"]) <= dataset.most_boxes


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_do_not_matter(tiny_data: Path) -> None:
    def batches(workers: int) -> Iterator[dict[str, Any]]:
        flags = f"{ALL} --denoising 9 --num_workers {workers}"
        config, _ = settings(tiny_data, tiny_data, flags)
        dataset = dataset_of(tiny_data, flags)
        loader = training_loader(dataset, config, num_processes=1, micro_batch=2, steps=range(1, 5))
        return map(unpacked, loader)

    for first, second in zip(batches(0), batches(2), strict=True):
        assert torch.equal(first["images"], second["images"])
        for ours, theirs in zip(first["targets"], second["targets"], strict=True):
            assert differences(ours, theirs) == []


@pytest.mark.parametrize("flags", [ALL, flags_of("iou_crop"), "--iou_crop 0.7 --no-crop"])
def test_aspects_are_those_of_the_images(tiny_data: Path, flags: str) -> None:
    dataset = dataset_of(tiny_data, flags, "--train_sizes 320 --train_max_size 1000")
    for key in [Key(epoch, index, 320) for epoch in range(3) for index in range(12)]:
        _, height, width = dataset[key]["image"].shape
        assert height / width == pytest.approx(dataset.aspect(*key[:2]), rel=0.08)


def test_the_last_epochs_are_plain(tiny_data: Path) -> None:
    strong, plain = dataset_of(tiny_data, ALL, strong_epochs=2), dataset_of(tiny_data)
    keys = [Key(2, index) for index in range(12)]
    assert all(equal(strong[key], plain[key]) for key in keys)
    assert all(strong.aspect(2, index) == plain.aspect(2, index) for index in range(12))
    assert not all(equal(strong[Key(1, index)], plain[Key(1, index)]) for index in range(12))


def test_nothing_is_on_by_default() -> None:
    config, _ = parse([])
    assert Augmentation.from_config(config).strong.on == {}
    assert config.plain_epochs == 0 and config.preview is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--mosaic 1.5", "mosaic"),
        ("--photometric -0.1", "photometric"),
        ("--scale_jitter_range 2,0.5", "scale_jitter_range"),
        ("--scale_jitter_range 1", "scale_jitter_range"),
        ("--rotation 181", "rotation"),
        ("--plain_epochs -1", "plain_epochs"),
    ],
)
def test_values_out_of_range_are_refused(flags: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(flags.split())


def test_crowd_regions_are_never_objects(tmp_path: Path) -> None:
    crowd = (0, 0, 60, 60, 1, 1)
    pictures = [Picture(64, 64, (*each.boxes, crowd)) for each in random_pictures(8, seed=0)]
    write_coco(tmp_path, pictures, pictures)
    dataset = dataset_of(tmp_path, flags_of("iou_crop", "mosaic", "mixup"))
    counts = dataset.samples.box_counts.tolist()
    assert [len(dataset.samples.objects_of(index)) + 1 for index in range(8)] == counts
    seen = [len(dataset[Key(epoch, 0)]["target"]["labels"]) for epoch in range(20)]
    assert max(seen) <= 5 * (max(counts) - 1)


def test_an_unreadable_partner_is_replaced_by_the_next(tmp_path: Path) -> None:
    data = write_coco(tmp_path, random_pictures(6, 0), random_pictures(2, 1))
    dataset = dataset_of(data, flags_of("mosaic", "mixup"))
    for number in (102, 103, 105):
        (data / f"train2017/{number}.png").write_bytes(b"torn")
    items = [dataset[Key(epoch, 0)] for epoch in range(6)]
    assert {item["target"]["image_id"] for item in items} == {101}
    assert dataset.unreadable.nonzero().flatten().tolist() == [1, 2, 4]
    for path in (data / "train2017").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"\.png"):
        dataset[Key(0, 0)]


def masked_table(folder: Path, size: tuple[int, int] = SIZE) -> SampleTable:
    """Images of two rectangles, the second without a mask."""
    samples = []
    for number in range(6):
        scene = scene_of((10 + 5 * number, 20, 60, 70), (100, 30, 150, 90), value=60 + 30 * number)
        path = folder / f"{number}.png"
        scene.image.save(path)
        (mask, _) = encode(scene.masks)  # type: ignore[arg-type]
        samples.append(
            Sample(
                path=str(path),
                image_id=number,
                size=size,
                boxes=scene.boxes,
                labels=scene.labels,
                areas=torch.ones(2),
                crowd=torch.zeros(2, dtype=torch.bool),
                masks=(mask, b""),
            )
        )
    return SampleTable.from_samples(samples, ["with", "without"])


def test_masks_stay_with_their_objects(tmp_path: Path) -> None:
    config, _ = parse((flags_of(*STRONG_PARTS, probability=0.5) + " --eval_size 96").split())
    dataset = DetectionDataset(
        masked_table(tmp_path), Augmentation.from_config(config), Preprocessing(96), seed=0
    )
    seen = 0
    for key in [Key(epoch, index) for epoch in range(6) for index in range(6)]:
        item = dataset[key]
        target, (_, height, width) = item["target"], item["image"].shape
        count = len(target["labels"])
        assert target["masks"].shape == (count, height, width)
        assert target["mask_boxes"].shape == (count, 4) and target["has_mask"].shape == (count,)
        assert torch.equal(target["has_mask"], target["labels"] == 0)
        assert not target["masks"][~target["has_mask"]].any()
        for mask, box in zip(target["masks"], target["mask_boxes"], strict=True):
            if mask.any():
                assert extent(mask.numpy()) == pytest.approx(box.tolist(), abs=4)
                seen += 1
    assert seen > 20
    without = DetectionDataset(
        dataset.samples, dataset.augmentation, Preprocessing(96), seed=0, masks=False
    )
    keys = [Key(0, index) for index in range(6)]
    assert all("masks" not in without[key]["target"] for key in keys)
    assert all(torch.equal(without[key]["image"], dataset[key]["image"]) for key in keys)


def test_the_probe_tries_the_most_boxes_and_the_largest_canvas(tiny_data: Path) -> None:
    dataset = dataset_of(tiny_data, ALL)
    most = int(dataset.samples.box_counts.max())
    canvas = largest_canvas(dataset.augmentation, dataset.samples.sizes.tolist(), mixed=True)
    batch = largest_batch(dataset, 1, canvas, torch.device("cpu"))
    assert len(batch["targets"][0]["labels"]) == 5 * most
    for key in [Key(epoch, index) for epoch in range(4) for index in range(12)]:
        _, height, width = dataset[key]["image"].shape
        assert height <= canvas[0] and width <= canvas[1]


def test_a_preview_shows_items_with_their_boxes() -> None:
    image = torch.full((3, 50, 100), 200, dtype=torch.uint8)
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    target = {"boxes": box, "labels": torch.tensor([1])}
    grid = preview([{"image": image, "target": target}] * 6, ["a", "b"])
    assert grid.width > 1600 and 400 < grid.height < 450
    middle = grid.getpixel((8 + 100, 8 + 100))  # on the left side of the box
    assert isinstance(middle, tuple) and middle[2] - middle[0] > 100  # blue, the second colour


@pytest.mark.slow
def test_a_run_writes_its_preview_and_resumes_exactly(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    flags = f"{ALL} --epochs 3 --plain_epochs 1 --preview {tmp_path / 'seen'} --save_steps 1"
    run(tiny_data, tmp_path / "whole", flags)
    assert "in the first 2 epochs of 3" in caplog.text
    # Three steps are an epoch; of five, the only whole epoch is a plain one.
    run(tiny_data, tmp_path / "part", f"{ALL} --epochs 3 --plain_epochs 1 --max_steps 5")
    assert "in the first 0 epochs of 2" in caplog.text
    pictures = [tmp_path / "seen/preview.jpg", tmp_path / "whole/preview.jpg"]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert Image.open(pictures[0]).width > 1600

    def crash(progress: Progress) -> None:
        if progress.event == "saved" and progress.step == 4:
            raise Crash

    with pytest.raises(Crash):
        run(tiny_data, tmp_path / "broken", flags, report=crash)
    run(tiny_data, tmp_path / "broken", flags, "--resume")
    assert differences(end_of(tmp_path / "whole"), end_of(tmp_path / "broken")) == []


def test_a_run_without_strong_parts_draws_no_preview(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_data, tmp_path, "--epochs 1")
    assert not (tmp_path / "preview.jpg").exists()


def test_copy_paste_without_masks_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--copy_paste 0\.5"):
        run(tiny_data, tmp_path, "--copy_paste 0.5")
