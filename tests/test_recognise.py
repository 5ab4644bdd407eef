"""`--data`: each layout is recognised by its content and gives the same samples; the split that is
held out is stable.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doc_pages import write_voc, write_yolo
from PIL import Image, ImageOps
from tiny_runs import FLAGS, Learnt, differences, end_of, main_here, random_pictures, write_coco

from trainer.commands import command_line
from trainer.commands.evaluate import coco_file_of
from trainer.data.load import Datasets, hold_out, read_parts
from trainer.data.recognise import recognise
from trainer.loop import resume
from trainer.readers.coco import coco_folder, read_coco
from trainer.readers.coco_file import read_coco_file, read_masks
from trainer.readers.samples import SampleTable
from trainer.settings.config import TrainConfig
from trainer.settings.flags import ConfigError
from trainer.settings.parsing import parse
from vidt.errors import UserError

NAMES = ("cat", "dog")
WIDTH, HEIGHT = 80, 64
# Pictures of each part, and (class, x, y, width, height) of the boxes in each.
PARTS = {"train": (0, 1, 2, 3), "val": (4, 5), "test": (6,)}
BOXES = {
    number: [(number % 2, 4 + number, 6, 20, 10), (1, 30, 16, 16, 24 + number)]
    for number in range(7)
}


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), np.uint8)
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT))


def draw(path: Path, number: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path, quality=95)
    return path.name


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def coco(path: Path, names: dict[int, str], first_id: int = 1, parent: bool = False) -> None:
    """A COCO file; names are the file names of its pictures, by number."""
    categories = [{"id": first_id + i, "name": name} for i, name in enumerate(NAMES)]
    if parent:  # Roboflow's category 0, here of the name of a class
        categories = [{**each, "supercategory": "cat"} for each in categories]
        categories.insert(0, {"id": 0, "name": "cat", "supercategory": "none"})
    rows = [
        {"image_id": number, "category_id": first_id + label, "bbox": box}
        for number in names
        for label, *box in BOXES[number]
    ]
    write(
        path,
        {
            "info": {"description": "generated"},
            "images": [
                {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
                for number, name in names.items()
            ],
            "categories": categories,
            "annotations": [{"id": i, "iscrowd": 0, **row} for i, row in enumerate(rows, 1)],
        },
    )


def xml(path: Path, number: int, **more: str) -> None:
    objects = "".join(
        f"<object><name>{NAMES[label]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for label, x, y, w, h in BOXES[number]
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    named = "".join(f"<{key}>{value}</{key}>" for key, value in more.items())
    write(path, f"<annotation>{named}{size}{objects}</annotation>")


def label(path: Path, number: int) -> None:
    lines = [
        f"{kind} {(x + w / 2) / WIDTH} {(y + h / 2) / HEIGHT} {w / WIDTH} {h / HEIGHT}"
        for kind, x, y, w, h in BOXES[number]
    ]
    write(path, "\n".join(lines))


def coco_own(root: Path) -> None:
    for part, numbers in PARTS.items():
        names = {n: draw(root / f"{part}2017/{i:06}.jpg", n) for i, n in enumerate(numbers)}
        coco(root / f"annotations/instances_{part}2017.json", names, first_id=7)
        write(root / f"annotations/captions_{part}2017.json", {"images": [], "annotations": []})
        coco(root / f"annotations/person_keypoints_{part}2017.json", names)


def coco_roboflow(root: Path) -> None:
    for part, folder in {"train": "train", "val": "valid", "test": "test"}.items():
        names = {n: draw(root / f"{folder}/{n}_jpg.rf.0a1b.jpg", n) for n in PARTS[part]}
        coco(root / f"{folder}/_annotations.coco.json", names, parent=True)
    write(root / "README.roboflow.txt", "made by hand")


def coco_beside(root: Path) -> None:
    for part, numbers in PARTS.items():
        coco(root / f"{part}.json", {n: draw(root / f"images/{n}.jpg", n) for n in numbers})


def coco_with_folders(root: Path) -> None:
    for part, numbers in PARTS.items():
        names = {n: f"{part}/" + draw(root / f"photos/{part}/{n}.jpg", n) for n in numbers}
        coco(root / f"labels/{part}.json", names)


def yolo_yaml(root: Path, folders: tuple[str, ...] = ("train", "val", "test")) -> None:
    for folder, numbers in zip(folders, PARTS.values(), strict=True):
        for n in numbers:
            draw(root / f"images/{folder}/{n}.jpg", n)
            label(root / f"labels/{folder}/{n}.txt", n)
    data = {part: f"images/{folder}" for part, folder in zip(PARTS, folders, strict=True)}
    write(root / "data.yaml", {**data, "names": NAMES, "nc": 2})


def yolo_roboflow(root: Path) -> None:
    folders = {"train": "train", "val": "valid", "test": "test"}
    for part, folder in folders.items():
        for n in PARTS[part]:
            draw(root / f"{folder}/images/{n}.jpg", n)
            label(root / f"{folder}/labels/{n}.txt", n)
    data = {part: f"../{folder}/images" for part, folder in folders.items()}
    write(root / "data.yaml", {**data, "names": NAMES, "nc": 2, "roboflow": {"version": 1}})


def yolo_folder(root: Path) -> None:
    yolo_yaml(root)
    (root / "data.yaml").unlink()
    write(root / "classes.txt", "\n".join(NAMES))


def voc(root: Path) -> None:
    for part, numbers in PARTS.items():
        for n in numbers:
            draw(root / f"JPEGImages/{n}.jpg", n)
            xml(root / f"Annotations/{n}.xml", n)
        write(root / f"ImageSets/Main/{part}.txt", "\n".join(map(str, numbers)))
        write(root / f"ImageSets/Main/cat_{part}.txt", "\n".join(f"{n} 1" for n in numbers))


def voc_year(root: Path) -> None:
    voc(root / "VOCdevkit/VOC2012")


def voc_roboflow(root: Path) -> None:
    for part, folder in {"train": "train", "val": "valid", "test": "test"}.items():
        for n in PARTS[part]:
            draw(root / f"{folder}/{n}.jpg", n)
            xml(root / f"{folder}/{n}.xml", n)


def labelimg_apart(root: Path) -> None:
    for part, numbers in PARTS.items():
        for n in numbers:
            draw(root / f"photos/{part}/{n}.jpg", n)
            xml(root / f"xml/{part}/{n}.xml", n)


def voc_other_lists(root: Path) -> None:
    """Lists of other names, and names with dots, blanks and folders, as other tools write them."""
    names = dict(enumerate(("a.rf.x0", "my cat 1", "s/2", "s/t.3", "4", "5", "6")))
    for part, numbers in PARTS.items():
        for n in numbers:
            draw(root / f"JPEGImages/{names[n]}.JPEG", n)
            xml(root / f"Annotations/{names[n]}.xml", n)
        list_name = {"train": "Train", "val": "Validation", "test": "Test"}[part]
        write(root / f"ImageSets/Main/{list_name}.txt", "\n".join(names[n] for n in numbers))


def voc_archives(root: Path) -> None:
    """The archives of a year, unpacked side by side."""
    voc(root / "VOCtrainval/VOCdevkit/VOC2007")
    test = root / "VOCtest/VOCdevkit/VOC2007"
    for n in PARTS["test"]:
        draw(test / f"JPEGImages/{n}.jpg", n)
        xml(test / f"Annotations/{n}.xml", n)
    write(test / "ImageSets/Main/test.txt", "\n".join(map(str, PARTS["test"])))
    (root / "VOCtrainval/VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()


def darknet(root: Path) -> None:
    """Lists name the pictures in a folder of another machine."""
    for n in BOXES:
        draw(root / f"obj/{n}.jpg", n)
        label(root / f"obj/{n}.txt", n)
    for part, name in {"train": "train", "val": "valid", "test": "test"}.items():
        write(root / f"{name}.txt", "\n".join(f"data/obj/{n}.jpg" for n in PARTS[part]))
    write(root / "obj.names", "\n".join(NAMES))


WHOLE = {
    "coco's own": coco_own,
    "coco, Roboflow": coco_roboflow,
    "coco, one folder": coco_beside,
    "coco, folders in names": coco_with_folders,
    "yolo": yolo_yaml,
    "yolo, Roboflow": yolo_roboflow,
    "yolo, no yaml": yolo_folder,
    "voc": voc,
    "voc, a year": voc_year,
    "voc, Roboflow": voc_roboflow,
    "labelImg, apart": labelimg_apart,
    "voc, other lists": voc_other_lists,
    "voc, archives": voc_archives,
    "yolo, Darknet's lists": darknet,
}


def read(path: Path, **settings: Any) -> Datasets:
    config = TrainConfig(dataset_file="auto", data=str(path), **settings)
    return read_parts(config, num_queries=100, num_classes=None)


def contents(table: SampleTable) -> list[Any]:
    """What each picture shows: its pixels' hash, size, and boxes with labels, whatever its name."""
    found = []
    for sample in table:
        with Image.open(sample.path) as image:
            pixels = hash(image.tobytes())
        rows = zip(sample.boxes.tolist(), sample.labels.tolist(), strict=True)
        boxes = sorted((*box, n) for box, n in rows)
        found.append((pixels, sample.size, np.round(boxes, 3).tolist()))
    return sorted(found)


def expected(numbers: tuple[int, ...], folder: Path) -> list[Any]:
    rows = []
    for n in numbers:
        draw(folder / f"{n}.jpg", n)
        with Image.open(folder / f"{n}.jpg") as image:
            pixels = hash(image.tobytes())
        boxes = sorted([x, y, x + w, y + h, kind] for kind, x, y, w, h in BOXES[n])
        rows.append((pixels, (HEIGHT, WIDTH), [list(map(float, box)) for box in boxes]))
    return sorted(rows)


@pytest.mark.parametrize("layout", WHOLE)
def test_every_layout_gives_the_same_samples(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    WHOLE[layout](root)
    found = read(root)
    assert found.test is not None
    for table, part in ((found.train, "train"), (found.val, "val"), (found.test, "test")):
        assert table.class_names == NAMES
        assert contents(table) == expected(PARTS[part], tmp_path / "same")
    sizes = "4 images to train on, 2 images to validate, 1 image to test, 2 classes"
    assert sizes in found.recognised and found.recognised.startswith(f"--data {root}: ")
    assert "\n" not in found.recognised


def cvat(root: Path) -> None:
    names = {n: draw(root / f"images/default/{n}.jpg", n) for n in BOXES}
    coco(root / "annotations/instances_default.json", names)


def coco_single(root: Path) -> None:
    coco(root / "result.json", {n: "images/" + draw(root / f"images/{n}.jpg", n) for n in BOXES})


def labelimg(root: Path) -> None:
    for n in BOXES:
        draw(root / f"{n}.jpg", n)
        xml(root / f"{n}.xml", n)


def labelimg_renamed(root: Path) -> None:
    """XML files that only name their pictures."""
    for n in BOXES:
        draw(root / f"pictures/{n}.jpg", n)
        xml(root / f"done/object {n}.xml", n, filename=f"{n}.jpg")


def voc_cvat(root: Path) -> None:
    voc(root)
    shutil.rmtree(root / "ImageSets")
    write(root / "ImageSets/Main/default.txt", "\n".join(map(str, BOXES)))


def voc_without_lists(root: Path) -> None:
    voc(root)
    shutil.rmtree(root / "ImageSets")


def yolo_labelimg(root: Path) -> None:
    for n in BOXES:
        draw(root / f"{n}.jpg", n)
        label(root / f"{n}.txt", n)
    write(root / "classes.txt", "\n".join(NAMES))


def yolo_roboflow_train_only(root: Path) -> None:
    for n in BOXES:
        draw(root / f"train/images/{n}.jpg", n)
        label(root / f"train/labels/{n}.txt", n)
    parts = {part: f"../{part}/images" for part in ("train", "valid", "test")}
    write(root / "data.yaml", {**parts, "val": parts["valid"], "names": NAMES})


def masks_beside(root: Path) -> None:
    """Masks with the names of the pictures, nearer to the XML files (Oxford-IIIT Pet)."""
    for n in BOXES:
        draw(root / f"images/{n}.jpg", n)
        draw(root / f"annotations/trimaps/{n}.png", n + 1)
        xml(root / f"annotations/xmls/{n}.xml", n, filename=f"{n}.jpg")


def narrow_utf_16(root: Path) -> None:
    """XML that C# writes: it declares UTF-16 and has one byte a letter."""
    labelimg(root)
    for path in root.glob("*.xml"):
        write(path, f'<?xml version="1.0" encoding="utf-16"?>{path.read_text()}')


def two_xml_files(root: Path) -> None:
    """Older annotations in a folder of their own."""
    labelimg(root)
    for n in BOXES:
        xml(root / f"older/{n}.xml", (n + 1) % len(BOXES))


def yolo_beside_in_images(root: Path) -> None:
    yolo_labelimg(root / "images")


ONE_PART = {
    "XML with masks beside": masks_beside,
    "XML that declares UTF-16": narrow_utf_16,
    "two XML files of a picture": two_xml_files,
    "YOLO beside the pictures in images/": yolo_beside_in_images,
    "CVAT": cvat,
    "a JSON and its images": coco_single,
    "labelImg": labelimg,
    "labelImg, renamed": labelimg_renamed,
    "VOC of CVAT": voc_cvat,
    "VOC without lists": voc_without_lists,
    "YOLO of labelImg": yolo_labelimg,
    "YOLO, only a training part": yolo_roboflow_train_only,
}


@pytest.mark.parametrize("layout", ONE_PART)
def test_without_a_validation_part_one_is_held_out(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    ONE_PART[layout](root)
    found = read(root, val_fraction=0.4)
    assert found.train.class_names == NAMES and found.test is None
    assert len(found.train) and len(found.val) and len(found.train) + len(found.val) == 7
    together = sorted(contents(found.train) + contents(found.val))
    assert together == expected(tuple(BOXES), tmp_path / "same")
    assert "held out by --val_fraction 0.4" in found.recognised
    assert found.val.source != found.train.source


def test_the_split_is_that_of_the_pictures(tmp_path: Path) -> None:
    """All layouts of the same pictures are split alike."""
    splits = set()
    for name, layout in ONE_PART.items():
        layout(tmp_path / name)
        splits.add(str(contents(read(tmp_path / name, val_fraction=0.4).val)))
    assert len(splits) == 1


def test_a_json_file_alone(tmp_path: Path) -> None:
    cvat(tmp_path)
    file = tmp_path / "annotations/instances_default.json"
    assert len(read(file).train) + len(read(file).val) == 7
    yolo_yaml(tmp_path / "yolo")
    assert len(read(tmp_path / "yolo/data.yaml").train) == 4


def labelled(root: Path, seeds: range, folder: str = "") -> None:
    for seed in seeds:
        draw(root / folder / f"{seed}.jpg", seed)
        xml(root / folder / f"{seed}.xml", seed % 7)


def held(root: Path) -> set[int]:
    return {int(Path(path).stem) for path in read(root).val.paths()}


def test_more_pictures_move_none(tmp_path: Path) -> None:
    labelled(tmp_path / "a", range(60))
    before = held(tmp_path / "a")
    assert 4 <= len(before) <= 22  # 12 expected
    labelled(tmp_path / "a", range(60, 90), folder="more")
    assert held(tmp_path / "a") & {*range(60)} == before
    for folder in ("a", "a/more"):  # moved, and in another order
        for path in list((tmp_path / folder).glob("*.*")):
            (tmp_path / "b").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "b")
    assert held(tmp_path / "b") & {*range(60)} == before


def test_near_duplicates_stay_together(tmp_path: Path) -> None:
    """Each picture is there in three qualities, which look alike and differ in every byte."""
    for seed in range(30):
        for number, quality in enumerate((95, 90, 80)):
            name = f"{seed * 3 + number}"
            tmp_path.joinpath("photos").mkdir(exist_ok=True)
            picture(seed).save(tmp_path / f"photos/{name}.jpg", quality=quality)
            xml(tmp_path / f"photos/{name}.xml", seed % 7)
    found = read(tmp_path / "photos")
    sides = [
        {int(Path(path).stem) // 3 for path in table.paths()} for table in (found.train, found.val)
    ]
    assert sides[1] and not sides[0] & sides[1]
    assert len(found.train) + len(found.val) == 90
    assert "30 groups" in found.recognised


def test_pictures_that_all_look_alike_are_split_one_by_one(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / "photos").mkdir(exist_ok=True)
        image = picture(1)
        image.putpixel((number, 3), (number, 0, 0))
        image.save(tmp_path / f"photos/{number}.png")
        xml(tmp_path / f"photos/{number}.xml", 1)
    found = read(tmp_path / "photos")
    assert (
        2 <= len(found.val) <= 16 and "near-duplicates, so validation flatters" in found.recognised
    )


def test_one_picture_cannot_be_split(tmp_path: Path) -> None:
    labelled(tmp_path, range(1))
    with pytest.raises(UserError, match="1 image cannot be split"):
        read(tmp_path)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_no_side_is_empty(fraction: float, tmp_path: Path) -> None:
    labelled(tmp_path, range(5))
    table = read(tmp_path).train
    whole = SampleTable.from_samples([*table, *read(tmp_path).val], table.class_names)
    train, val, _ = hold_out(whole, fraction)
    assert len(train) and len(val) and len(train) + len(val) == 5


@pytest.mark.parametrize("num_boxed", [0, 1, 2, 5])
def test_both_sides_have_boxes_if_two_groups_have(num_boxed: int, tmp_path: Path) -> None:
    labelled(tmp_path, range(12))
    found = read(tmp_path)
    samples = sorted([*found.train, *found.val], key=lambda sample: sample.path)
    for boxed in range(0, 12, 3):
        which = {(boxed + i) % 12 for i in range(num_boxed)}
        whole = SampleTable.from_samples(samples, NAMES)
        keep = np.isin(whole.box_owners.numpy(), list(which))
        train, val, _ = hold_out(whole.keep_boxes(torch.from_numpy(keep)), 0.2)
        assert len(train) and len(val)
        assert len(train.labels) > 0 or num_boxed == 0
        assert len(val.labels) > 0 or num_boxed <= 1


def test_an_unused_super_category_is_no_class_and_is_told(tmp_path: Path) -> None:
    coco_roboflow(tmp_path)
    kinds = {finding.kind: finding for finding in read(tmp_path).findings}
    assert "'cat'" in kinds["unused super-category"].detail


def test_an_unused_class_stays(tmp_path: Path) -> None:
    coco_beside(tmp_path)
    for part in PARTS:
        file = tmp_path / f"{part}.json"
        document = json.loads(file.read_text())
        document["categories"].append({"id": 9, "name": "cow", "supercategory": "animal"})
        file.write_text(json.dumps(document))
    assert read(tmp_path).train.class_names == (*NAMES, "cow")


def empty(root: Path) -> None:
    root.mkdir()


def pictures_alone(root: Path) -> None:
    draw(root / "a.jpg", 0)


def zipped(root: Path) -> None:
    write(root / "data.zip", "PK")


def labelme(root: Path) -> None:
    draw(root / "a.jpg", 0)
    write(root / "a.json", {"shapes": [], "imagePath": "a.jpg"})


def two_kinds(root: Path) -> None:
    cvat(root)
    labelimg(root / "again")


def two_files(root: Path) -> None:
    cvat(root)
    shutil.copy(root / "annotations/instances_default.json", root / "annotations/instances_2.json")


def two_yamls(root: Path) -> None:
    yolo_yaml(root)
    shutil.copy(root / "data.yaml", root / "other.yaml")


def images_elsewhere(root: Path) -> None:
    cvat(root)
    shutil.rmtree(root / "images")
    draw(root / "images/another.jpg", 0)


def xml_elsewhere(root: Path) -> None:
    draw(root / "a.jpg", 0)
    xml(root / "b.xml", 0)


def no_training_part(root: Path) -> None:
    coco_beside(root)
    (root / "train.json").unlink()


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing there": (lambda root: None, "no such file or folder"),
    "an empty folder": (empty, "no picture and no annotation file"),
    "pictures alone": (pictures_alone, "found 1 picture, no annotation file; looked for COCO"),
    "an archive": (zipped, r"1 \.zip \(data.zip\)"),
    "labelme": (labelme, r"1 picture, 1 \.json \(a.json\)"),
    "two kinds": (two_kinds, r"ambiguous, it holds COCO \(annotations/.* and Pascal VOC \(again/"),
    "two COCO files": (two_files, "ambiguous, 2 COCO files can be the train part"),
    "two YAML files": (two_yamls, r"ambiguous, 2 YAML files of YOLO \(data.yaml, other.yaml\)"),
    "images elsewhere": (images_elsewhere, "none of its images, such as 0.jpg, is in"),
    "XML elsewhere": (xml_elsewhere, "no picture belongs to one by its name"),
    "no training part": (no_training_part, "has no train part, only val, test"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_what_was_found(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    make(tmp_path / "photos")
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "photos")
    assert "\n" not in str(caught.value) and str(tmp_path / "photos") in str(caught.value)


def test_what_is_not_used_is_told(tmp_path: Path) -> None:
    labelimg(tmp_path)
    draw(tmp_path / "new.jpg", 9)
    xml(tmp_path / "lost.xml", 1)
    found = read(tmp_path)
    assert "1 picture without an XML file not used" in found.recognised
    assert "1 XML file without a picture not used" in found.recognised
    kinds = {finding.kind for finding in found.findings}
    assert {"picture without a split", "annotation file without a picture"} <= kinds


def test_a_training_image_in_the_test_part_is_told(tmp_path: Path) -> None:
    labelimg_apart(tmp_path)
    shutil.copy(tmp_path / "photos/train/1.jpg", tmp_path / "photos/test/again.jpg")
    shutil.copy(tmp_path / "xml/train/1.xml", tmp_path / "xml/test/again.xml")
    kinds = {finding.kind for finding in read(tmp_path).findings}
    assert "image in both training and test" in kinds


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    labelimg(tmp_path)
    for name in ("a.json", "a.yaml", "a.xml", "a.txt"):
        os.mkfifo(tmp_path / name)
    assert recognise(tmp_path).layout == "Pascal VOC without ImageSets"


def test_roboflows_copies_of_a_picture_stay_together(tmp_path: Path) -> None:
    for seed in range(40):
        for copy, image in enumerate((picture(seed), ImageOps.mirror(picture(seed)))):
            name = f"{seed}_jpg.rf.{copy}"
            image.save(tmp_path / f"{name}.jpg")
            xml(tmp_path / f"{name}.xml", seed % 7)
    found = read(tmp_path)
    sides = [
        {Path(path).name.partition("_")[0] for path in table.paths()}
        for table in (found.train, found.val)
    ]
    assert all(sides) and not sides[0] & sides[1]


def test_an_empty_test_part_is_told(tmp_path: Path) -> None:
    yolo_roboflow_train_only(tmp_path)
    line = read(tmp_path).recognised
    assert "data.yaml names val: ../valid/images, which holds no image" in line


def test_recognise_can_be_used_alone(tmp_path: Path) -> None:
    voc_roboflow(tmp_path)
    data = recognise(tmp_path)
    assert list(data.parts) == ["train", "val", "test"]
    assert data.layout == "Pascal VOC without ImageSets"


def test_data_excludes_the_other_flags(tmp_path: Path) -> None:
    config, _ = parse(["--data", str(tmp_path)])
    assert config.dataset_file == "auto" and config.val_fraction == 0.2
    for flags in (["--coco_path", "x"], ["--voc_path", "x"], ["--yolo_path", "x"]):
        with pytest.raises(ConfigError, match="--data and"):
            parse(["--data", str(tmp_path), *flags])
    with pytest.raises(ConfigError, match="--data and"):
        parse(["--data", "x", "--val_json", "a", "--val_images", "b", "--eval"])
    with pytest.raises(ConfigError, match="needs a path; give data"):
        parse(["--dataset_file", "auto"])
    for value in ("0", "1", "nan", "-1"):
        with pytest.raises(ConfigError, match="val_fraction"):
            parse(["--data", "x", "--val_fraction", value])


def train(data: Path, output: Path, *flags: str) -> int:
    return main_here([*FLAGS[2:], "--data", str(data), "--output_dir", str(output), *flags])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data with a training and a test part, and the folder of a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_coco(folder / "data", random_pictures(12, 0), random_pictures(4, 1))
    (data / "annotations/instances_val2017.json").rename(
        data / "annotations/instances_test2017.json"
    )
    (data / "val2017").rename(data / "test2017")
    assert train(data, folder / "output") == 0
    return data, folder / "output"


def test_a_test_part_is_evaluated_with_the_best_weights(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    data, output = trained
    found = json.loads((output / "test.json").read_text())
    words = ["evaluate", str(output / "best.safetensors"), "--data", str(data), "--split", "test"]
    assert command_line.main([*words, "--out", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores and all(found[f"test_{name}"] == pytest.approx(n) for name, n in scores.items())
    assert "best weights on the test images" in (output / "report.html").read_text()


def test_a_run_resumes_on_the_same_split(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Also after the folder was moved; another share is another training set."""
    data, output = trained
    shutil.copytree(data, tmp_path / "moved")
    assert train(tmp_path / "moved", tmp_path / "run", "--max_steps", "3", "--epochs", "2") == 0
    shutil.rmtree(output.parent / "again", ignore_errors=True)
    steps = json.loads((resume.checkpoints(output / "checkpoints")[0] / "state.json").read_text())
    saved = json.loads(
        (resume.checkpoints(tmp_path / "run/checkpoints")[0] / "state.json").read_text()
    )
    assert saved["state"]["dataset"] == steps["state"]["dataset"]
    assert train(tmp_path / "moved", tmp_path / "run", "--resume", "--val_fraction", "0.6") == 2


@pytest.mark.slow
def test_an_interrupted_run_ends_like_a_whole_one(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    data, output = trained
    half = tmp_path / "half"
    shutil.copytree(output, half)
    newest, *older = resume.checkpoints(half / "checkpoints")
    assert older
    shutil.rmtree(newest)
    (half / "test.json").unlink()
    assert train(data, half, "--resume") == 0
    assert not differences(end_of(output), end_of(half))
    assert (half / "test.json").read_text() == (output / "test.json").read_text()


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_evaluation_scores_as_on_the_coco_file(layout: str, learnt: Learnt, tmp_path: Path) -> None:
    root = {"coco": learnt.data}.get(layout, tmp_path / layout)
    if layout != "coco":
        {"voc": write_voc, "yolo": write_yolo}[layout](learnt.data, root)
    json_path, images = coco_folder(learnt.data, "val")
    scores = []
    for words in (["--data", str(root)], ["--json", str(json_path), "--images", str(images)]):
        out = tmp_path / f"{len(scores)}.json"
        assert command_line.main(["evaluate", str(learnt.weights), *words, "--out", str(out)]) == 0
        scores.append(json.loads(out.read_text()))
    if layout == "voc":  # JPEG in place of PNG changes the pixels
        assert scores[0]["map50"] == pytest.approx(scores[1]["map50"], abs=0.2)
    else:
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_masks_are_those_of_the_file(masked_data: Path) -> None:
    json_path, images = coco_folder(masked_data, "val")
    table, _ = read_coco(json_path, images, masks=True)
    file, again = read_coco_file(json_path), coco_file_of(table, [])
    found = [
        {int(each.annotations.ids[row]): mask for row, mask, _ in read_masks(each, keep, sizes)}
        for each in (file, again)
        for keep, sizes in [(each.faults >= 0, each.images.sizes)]
    ]
    assert any(found[0].values()) and found[0] == found[1]


def test_check_says_what_data_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco_beside(tmp_path / "photos")
    out = tmp_path / "photos/val.json"
    assert command_line.main(["check", "--data", str(tmp_path / "photos"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [split["images"] for split in facts["splits"]] == [4, 2, 1]
    assert facts["recognised"].startswith(f"--data {tmp_path / 'photos'}: COCO (train.json, val")
    before = out.read_text()
    words = ["check", "--data", str(tmp_path / "photos"), "--out", str(out)]
    assert command_line.main(words) == 2 and out.read_text() == before


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "{w}", "--data", "x", "--json", "y", "--images", "z"],
        ["evaluate", "{w}"],
        ["evaluate", "{w}", "--json", "y"],
        ["check", "--data", "x", "--coco_path", "y"],
        ["export", "{w}", "{w}.onnx", "--data", "x", "--json", "y", "--coco_images", "z"],
    ],
)
def test_commands_refuse_two_data_sets(
    words: list[str], learnt: Learnt, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main([word.replace("{w}", str(learnt.weights)) for word in words]) == 2
    assert capsys.readouterr().err.startswith("error: --")


def test_backgrounds_first_are_recognised(tmp_path: Path) -> None:
    yolo_labelimg(tmp_path)
    for n in range(205):
        draw(tmp_path / f"0 {n}.jpg", 0)
        write(tmp_path / f"0 {n}.txt", "")
    assert recognise(tmp_path).layout.startswith("YOLO")


def test_a_broken_yaml_is_named_rather_than_passed_over(tmp_path: Path) -> None:
    yolo_yaml(tmp_path)
    write(tmp_path / "data.yaml", "names: [cat, dog]\n\ttrain: images/train\n")
    with pytest.raises(UserError, match=r"data\.yaml.*line 2"):
        recognise(tmp_path)


def test_class_names_of_another_encoding_are_refused(tmp_path: Path) -> None:
    yolo_labelimg(tmp_path)
    (tmp_path / "classes.txt").write_bytes("\u732b\n\u72d7\n".encode("gbk"))
    with pytest.raises(UserError, match="is not text of UTF-8; save the file as UTF-8"):
        read(tmp_path)


def test_an_empty_line_keeps_its_number(tmp_path: Path) -> None:
    yolo_labelimg(tmp_path)
    write(tmp_path / "classes.txt", "cat\n\ndog\n\n")
    assert read(tmp_path).train.class_names == ("cat", "class 1", "dog")


def test_absolute_names_however_the_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "img/0.jpg", 0)
    coco(tmp_path / "all.json", {0: str(tmp_path / "img/0.jpg")})
    monkeypatch.chdir(tmp_path.parent)
    for name in (str(tmp_path), tmp_path.name):
        assert recognise(name).parts.keys() == {"train"}


def test_cvats_own_xml_is_no_pascal_voc(tmp_path: Path) -> None:
    draw(tmp_path / "0.jpg", 0)
    write(tmp_path / "annotations.xml", "<annotations><version>1.1</version></annotations>")
    with pytest.raises(UserError, match="nothing recognised"):
        recognise(tmp_path)
