"""The embedded pictures: what they promise, and that they are written whole, once, by anyone."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from trainer.data.dataset_check import check
from trainer.data.shapes import CLASS_NAMES, draw_picture, write_shapes
from trainer.readers.coco import coco_folder, read_coco


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_pictures_keep_their_promises() -> None:
    labels, counts = [], []
    for index in range(60):
        pixels, shapes = draw_picture(0, "train", index, 128)
        assert pixels.shape == (128, 128, 3)
        assert pixels.dtype == np.uint8
        counts.append(len(shapes))
        above = np.zeros((128, 128), bool)
        for shape in reversed(shapes):
            labels.append(shape.label)
            left, top, right, bottom = shape.box
            assert shape.mask[top:bottom, left:right].sum() == shape.mask.sum()
            assert 0 <= left < right <= 128
            assert 0 <= top < bottom <= 128
            assert all(128 / 8 <= side <= 128 / 3 for side in (right - left, bottom - top))
            visible = shape.mask & ~above
            assert visible.sum() >= 0.8 * shape.mask.sum()
            assert np.abs(pixels[visible].mean(0) - shape.colour).max() < 20  # clipping of noise
            assert pixels[visible].std(0).max() > 3
            above |= shape.mask
        background = pixels[~above].astype(float)
        assert background.std(0).max() > 3
        for shape in shapes:
            assert np.linalg.norm(shape.colour - background.mean(0)) > 25
    assert set(counts) == set(range(1, 7))
    assert np.bincount(labels).min() > 0.25 * len(labels)


def test_a_picture_depends_on_seed_split_and_index_alone() -> None:
    first = draw_picture(0, "train", 5, 64)[0]
    draw_picture(0, "train", 6, 64)
    assert np.array_equal(first, draw_picture(0, "train", 5, 64)[0])
    for other in ((1, "train", 5), (0, "val", 5), (0, "train", 6)):
        assert not np.array_equal(first, draw_picture(*other, 64)[0])


def test_the_folder_is_a_clean_coco_dataset(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path, num_train=12, num_val=6, size=64)
    train, findings = read_coco(*coco_folder(folder, "train"))
    val, val_findings = read_coco(*coco_folder(folder, "val"), train.class_names)
    assert findings == val_findings == []
    assert train.class_names == CLASS_NAMES
    assert (len(train), len(val)) == (12, 6)
    assert check(train, val, num_queries=50)[2] == []
    pixels, shapes = draw_picture(0, "train", 3, 64)
    assert np.array_equal(np.asarray(Image.open(train.path(3))), pixels)
    assert train[3].boxes.tolist() == [list(shape.box) for shape in shapes]
    assert train[3].labels.tolist() == [shape.label for shape in shapes]


def test_polygons_outline_the_masks(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path, num_train=1, num_val=10, size=128)
    json_path, _ = coco_folder(folder, "val")
    annotations = iter(json.loads(json_path.read_text())["annotations"])
    for index in range(10):
        for shape in draw_picture(0, "val", index, 128)[1]:
            polygons = next(annotations)["segmentation"]
            encoded = coco_mask.merge(coco_mask.frPyObjects(polygons, 128, 128))
            mask = coco_mask.decode(encoded).astype(bool)
            assert (mask & shape.mask).sum() > 0.85 * (mask | shape.mask).sum()


def test_a_whole_folder_is_reused_and_a_damaged_one_written_again(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path, num_train=3, num_val=2, size=32)
    before = contents(folder)
    stamp = os.stat(folder).st_ino
    assert write_shapes(tmp_path, num_train=3, num_val=2, size=32) == folder
    assert os.stat(folder).st_ino == stamp
    (folder / "train2017" / "000002.png").unlink()
    (folder / "val2017" / "000001.png").write_bytes(b"")
    write_shapes(tmp_path, num_train=3, num_val=2, size=32)
    assert contents(folder) == before
    assert os.listdir(tmp_path) == [folder.name]
    assert write_shapes(tmp_path, num_train=3, num_val=2, size=32, seed=1) != folder


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_write_at_once_end_with_one_folder(tmp_path: Path, damaged: bool) -> None:
    arguments = (tmp_path / "at once", 8, 4, 32)
    if damaged:
        folder = write_shapes(*arguments)
        (folder / "val2017" / "000001.png").unlink()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_shapes, args=arguments) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    expected = write_shapes(tmp_path / "alone", *arguments[1:])
    assert os.listdir(arguments[0]) == [expected.name]
    assert contents(arguments[0] / expected.name) == contents(expected)
