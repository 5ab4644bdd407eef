"""Kinds of faults that people have in their datasets: each is read, told or refused, and nothing of
it passes silently.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.commands import evaluate
from trainer.commands.check import run
from trainer.data.dataset_advice import difference_hash, near_duplicates
from trainer.data.load import read_datasets
from trainer.readers.coco import read_coco
from trainer.readers.coco_columns import repeated_boxes
from trainer.readers.findings import BadDataset, Finding
from trainer.readers.samples import SampleTable
from trainer.readers.values import number_of, parse_xml, text_of, truth, whole_number
from trainer.scoring.coco_scores import judge
from trainer.scoring.prediction_formats import ImagePredictions
from trainer.settings.config import TrainConfig
from vidt.errors import UserError

BOM = b"\xef\xbb\xbf"
BOX = [2, 4, 20, 10]  # xywh
CORNERS = [2, 4, 22, 14]
SPLITS = {"train": (0, 1, 2, 3), "val": (4, 5)}  # numbers of the pictures


def draw(path: Path, seed: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def read(**settings: Any) -> tuple[SampleTable, SampleTable, list[Finding]]:
    config = TrainConfig(**{"dataset_file": "coco", **settings})
    return read_datasets(config, num_queries=100, num_classes=None)


def kinds(findings: list[Finding]) -> Counter[str]:
    """Without the findings about classes that such a small dataset always has."""
    found = Counter[str]()
    for finding in findings:
        found[finding.kind] += finding.count
    for kind in ("class with fewer than 10", "class without"):
        found = Counter({k: count for k, count in found.items() if not k.startswith(kind)})
    return found


# ---- COCO


def coco(folder: Path, change: Any = lambda document: None, **settings: Any) -> Any:
    paths = {}
    for split, numbers in SPLITS.items():
        for number in numbers:
            draw(folder / "images" / f"{number}.png", number)
        images = [
            {"id": number + 1, "file_name": f"{number}.png", "height": 64, "width": 96}
            for number in numbers
        ]
        annotations = [
            {"id": n + 1, "image_id": n + 1, "category_id": 7, "bbox": BOX, "area": 9, "iscrowd": 0}
            for n in numbers
        ]
        categories = [{"id": 7, "name": "cat"}]
        document = {"images": images, "annotations": annotations, "categories": categories}
        change(document)
        (folder / f"{split}.json").write_text(json.dumps(document))
        paths |= {f"{split}_json": str(folder / f"{split}.json")}
        paths |= {f"{split}_images": str(folder / "images")}
    return read(**paths, **settings)


def each(key: str, value: Any, rows: str = "annotations") -> Any:
    """A change of a document: `value(row)` under `key` in each row."""

    def change(document: dict[str, Any]) -> None:
        for row in document[rows]:
            row[key] = value(row)

    return change


@pytest.mark.parametrize(
    "change",
    [
        each("bbox", lambda row: [str(number) for number in BOX]),
        each("image_id", lambda row: str(row["image_id"])),
        each("image_id", lambda row: float(row["image_id"])),
        each("category_id", lambda row: "7"),
        each("iscrowd", lambda row: "0"),
        each("iscrowd", lambda row: "False"),
        each("id", lambda row: f" {row['id']}.0"),
        each("id", lambda row: str(row["id"]), "images"),
    ],
)
def test_coco_numbers_in_another_form_are_read_and_told(tmp_path: Path, change: Any) -> None:
    train, val, findings = coco(tmp_path, change)
    assert train.boxes.tolist() == [CORNERS] * 4 and not train.crowd.any()
    assert val.image_ids.tolist() == [5, 6] and val.annotation_ids.tolist() == [5, 6]
    assert kinds(findings) == {"number in another form": 6}
    assert all("number 1 of the list" in finding.detail for finding in findings[:2])


def test_coco_truth_values(tmp_path: Path) -> None:
    _, _, findings = coco(tmp_path / "a", each("iscrowd", lambda row: "maybe"))
    assert kinds(findings) == {"iscrowd that is neither 0 nor 1": 6}
    train, _, _ = coco(tmp_path / "b", each("iscrowd", lambda row: "yes" if row["id"] > 1 else 0))
    assert train.crowd.tolist() == [False, True, True, True]


def test_coco_box_of_a_polygon_alone(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for row in document["annotations"]:
            del row["bbox"]
            row["segmentation"] = [[2, 4, 22, 5, 10, 14], [3, 5, 4, 6, 5, 5]]

    train, _, findings = coco(tmp_path, change)
    assert train.boxes.tolist() == [CORNERS] * 4
    assert kinds(findings) == {"box that only a polygon states": 6}


def test_coco_findings_come_before_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadDataset, match="; 4 boxes left out, the first: malformed box") as caught:
        coco(tmp_path, each("bbox", lambda row: "2 4 20 10"))
    assert kinds(caught.value.findings)["malformed box"] == 6
    assert "bbox '2 4 20 10' is not four numbers" in str(caught.value)
    words = [f"--{split}_{what}" for split in SPLITS for what in ("json", "images")]
    files = [tmp_path / name for name in ("train.json", "images", "val.json", "images")]
    with pytest.raises(BadDataset):
        run([str(word) for pair in zip(words, files, strict=True) for word in pair])
    assert "malformed box, dropped: 6" in capsys.readouterr().out


def test_coco_ids_beyond_64_bits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"id of 64 bits .*20240101123456789001"):
        coco(tmp_path, each("id", lambda row: 20240101123456789000 + row["id"], "images"))


def test_coco_backslashes(tmp_path: Path) -> None:
    coco(tmp_path)
    for path in [*(tmp_path / "images").iterdir()]:
        (tmp_path / "images" / "sub").mkdir(exist_ok=True)
        path.rename(path.parent / "sub" / path.name)

    def windows(row: dict[str, Any]) -> str:
        return f"sub\\{row['id'] - 1}.png"

    (tmp_path / "other").mkdir()
    coco(tmp_path / "other")  # files where a backslash is a letter stay as they are
    for path in [*(tmp_path / "other/images").iterdir()]:
        path.rename(path.with_name(f"sub\\{path.name}"))
    for folder, told in ((tmp_path, 6), (tmp_path / "other", 0)):
        paths = {}
        for split in SPLITS:
            document = json.loads((folder / f"{split}.json").read_text())
            each("file_name", windows, "images")(document)
            (folder / f"{split}.json").write_text(json.dumps(document))
            paths |= {f"{split}_json": str(folder / f"{split}.json")}
            paths |= {f"{split}_images": str(folder / "images")}
        train, val, findings = read(**paths)
        assert (len(train), len(val)) == (4, 2)
        assert kinds(findings)["file name with backslashes"] == told


def test_coco_pictures_and_boxes_twice_count_once(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        first = document["images"][0]
        document["images"].append({**first, "id": 90})
        document["annotations"].append({**document["annotations"][0], "id": 91})  # again
        other = {**document["annotations"][0], "id": 92, "image_id": 90, "bbox": [5, 5, 9, 9]}
        document["annotations"].append(other)

    train, val, findings = coco(tmp_path, change)
    assert (len(train), len(val)) == (4, 2)
    assert train[0].boxes.tolist() == [CORNERS, [5, 5, 14, 14]]
    assert train.box_counts.tolist() == [2, 1, 1, 1]
    assert kinds(findings) == {"image twice": 2, "box twice": 2}
    doubled = next(finding for finding in findings if finding.kind == "box twice")
    assert doubled.annotation_id == 91 and doubled.file.endswith("0.png")


def test_coco_normalised_boxes(tmp_path: Path) -> None:
    _, _, findings = coco(tmp_path, each("bbox", lambda row: [0.1, 0.2, 0.5, 0.3]))
    found = kinds(findings)
    assert found["coordinates that look normalised"] == 6
    assert found["object too small to be found"] == 4 + 2


def test_small_objects_by_the_size_at_evaluation(tmp_path: Path) -> None:
    change = each("bbox", lambda row: [5, 5, 3, 3] if row["id"] == 1 else BOX)
    _, _, findings = coco(tmp_path / "a", change, eval_size=64)
    (small,) = [each for each in findings if each.kind == "object too small to be found"]
    assert small.count == 1 and "25.0%" in small.detail and "--eval_size 64" in small.detail
    _, _, findings = coco(tmp_path / "b", change, eval_size=128)
    assert "object too small to be found" not in kinds(findings)
    _, _, findings = coco(tmp_path / "c", each("bbox", lambda row: [50, 5, 0.5, 0.5]))
    assert kinds(findings)["box below one pixel"] == 6


def test_rare_classes(tmp_path: Path) -> None:
    *_, findings = coco(tmp_path)
    (rare,) = [each for each in findings if each.kind.startswith("class with fewer")]
    assert rare.detail == "cat: 4"


def test_files_that_nothing_uses(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "test.png", 9)
    for name in ("photo.heic", "label.txt", ".hidden", "Thumbs.db"):
        (tmp_path / "images" / name).touch()
    *_, findings = coco(tmp_path)
    assert {(each.kind, Path(each.file).name) for each in findings if each.file} == {
        ("picture without a split", "test.png"),
        ("not an image file", "photo.heic"),
        ("annotation file without a picture", "label.txt"),
    }


def test_coco_splits_whose_files_have_one_name(tmp_path: Path) -> None:
    """The layout of Roboflow's exports: a split's losses count for that split alone, and its JSON
    lies among the images.
    """
    coco(tmp_path)
    paths = {}
    for split, numbers in SPLITS.items():
        folder = tmp_path / split
        folder.mkdir()
        json_path = (tmp_path / f"{split}.json").rename(folder / "_annotations.coco.json")
        for number in numbers:
            (tmp_path / "images" / f"{number}.png").rename(folder / f"{number}.png")
        paths |= {f"{split}_json": str(json_path), f"{split}_images": str(folder)}
    assert not kinds(read(**paths)[2])
    (tmp_path / "train/0.png").unlink()
    train, val, findings = read(**paths, max_bad_fraction=0.25)
    assert (len(train), len(val), kinds(findings)) == (3, 2, {"missing image": 1})
    assert train.source == "_annotations.coco.json train"
    with pytest.raises(BadDataset, match="1 of 4 images"):
        read(**paths, max_bad_fraction=0.2)


def test_a_class_that_differs_only_in_case_is_named(tmp_path: Path) -> None:
    coco(tmp_path)
    path = tmp_path / "val.json"
    path.write_text(path.read_text().replace('"cat"', '"Cat"'))
    paths = {f"{split}_json": str(tmp_path / f"{split}.json") for split in SPLITS}
    images = {f"{split}_images": str(tmp_path / "images") for split in SPLITS}
    *_, findings = read(**paths, **images)
    told = [each.detail for each in findings if each.kind == "class not trained"]
    assert len(told) == 1 and "'cat' is, and differs only in case" in told[0]


def test_coco_a_file_by_two_names_counts_once(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        first = document["images"][0]
        document["images"].append(first | {"id": 99, "file_name": f"./{first['file_name']}"})

    train, val, findings = coco(tmp_path, change)
    assert (len(train), len(val), kinds(findings)["image twice"]) == (4, 2, 2)


def test_pictures_that_look_alike(tmp_path: Path) -> None:
    """A copy in another size and compression, but not another picture or a flat one."""
    smooth = np.random.default_rng(3).uniform(0, 255, (6, 6, 3)).astype(np.uint8)
    picture = Image.fromarray(smooth).resize((96, 64), Image.Resampling.BICUBIC)
    flat = Image.new("RGB", (96, 64), "grey")
    coco(tmp_path)
    picture.save(tmp_path / "images" / "0.png")
    picture.resize((192, 128)).convert("L").save(tmp_path / "x.jpg", quality=60)
    Image.open(tmp_path / "x.jpg").resize((96, 64)).save(tmp_path / "images" / "4.png")
    flat.save(tmp_path / "images" / "1.png")
    flat.save(tmp_path / "images" / "5.png")
    train, val, _ = (
        read_coco(tmp_path / f"{s}.json", tmp_path / "images")[0] for s in [*SPLITS, "val"]
    )
    (finding,) = near_duplicates(train, val)
    assert finding.file.endswith("4.png") and "0.png, image 1 of training" in finding.detail
    assert difference_hash(flat) == 0
    gradient = Image.fromarray(np.tile(np.arange(0, 90, 10, np.uint8), (8, 1)))
    assert difference_hash(gradient) == 2**64 - 1


def test_an_equal_file_in_both_splits_is_told_once(tmp_path: Path) -> None:
    coco(tmp_path)
    images = tmp_path / "images"
    (images / "4.png").write_bytes((images / "0.png").read_bytes())
    paths = {f"{split}_json": str(tmp_path / f"{split}.json") for split in SPLITS}
    config = TrainConfig(
        dataset_file="coco", train_images=str(images), val_images=str(images), **paths
    )
    *_, findings = read_datasets(config, num_queries=100, num_classes=None, compare_pictures=True)
    assert kinds(findings) == {"image in both training and validation": 1}


def test_evaluate_reads_and_tells_the_same(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        each("bbox", lambda row: [str(number) for number in BOX])(document)
        document["annotations"].append({**document["annotations"][0], "id": 91})
        document["images"].append({"id": 2**70, "file_name": "x.png"})

    with pytest.raises(BadDataset, match=rf"1 of 5 images .*{2**70}"):
        coco(tmp_path, change)
    file = evaluate.read(str(tmp_path / "train.json"), str(tmp_path / "images"), ["cat"])
    found = {i: ImagePredictions("", (64, 96), np.zeros((0, 4)), [], []) for i in range(4)}
    truth_boxes = judge(file, found)
    assert truth_boxes.boxes.tolist() == [CORNERS] * 4
    lines = "\n".join(evaluate.remarks(file, truth_boxes.left_out, [], 0))
    assert "number in another form, read: 5" in lines
    assert "1 object whose box is there twice left out" in lines
    assert "1 image without a file_name or an id of 64 bits" in lines and str(2**70) in lines


# ---- YOLO


def yolo(
    folder: Path, label: bytes = b"0 0.5 0.5 0.25 0.25\n", config: bytes = b"", **more: Any
) -> Any:
    for split, numbers in SPLITS.items():
        for number in numbers:
            draw(folder / "images" / split / f"{number}.png", number)
            path = folder / "labels" / split / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(label)
    text = config or b"train: images/train\nval: images/val\nnames: [cat, dog]\n"
    (folder / "data.yaml").write_bytes(text)
    return read(dataset_file="yolo", yolo_path=str(folder), **more)


@pytest.mark.parametrize(
    "label",
    [b"0,0.5,0.5,0.25,0.25\n", b"imagesource:GoogleEarth\ngsd:0.1\n1 1 3 1 3 3 1 3 cat 0\n"],
)
def test_yolo_labels_of_another_form_are_refused_with_their_lines(
    tmp_path: Path, label: bytes
) -> None:
    with pytest.raises(
        BadDataset, match=r"4 of 4 images .* line 1: .* is not .class x y"
    ) as caught:
        yolo(tmp_path, label)
    lost = [each for each in caught.value.findings if each.action == "removed"]
    assert len(lost) == 6 and lost[0].file.endswith("labels/train/0.txt")


def test_yolo_a_lost_label_file_counts_as_a_lost_image(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "labels/train/2.txt").write_text("cat 0.5 0.5 0.1 0.1")
    with pytest.raises(BadDataset, match="1 of 4 images"):
        read(dataset_file="yolo", yolo_path=str(tmp_path))
    train, _, _ = read(dataset_file="yolo", yolo_path=str(tmp_path), max_bad_fraction=0.25)
    assert [Path(path).name for path in train.paths()] == ["0.png", "1.png", "3.png"]


def test_yolo_says_where_it_looked_for_labels(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "Labels")
    (tmp_path / "images").rename(tmp_path / "Images")
    (tmp_path / "data.yaml").write_text("train: Images/train\nval: Images/val\nnames: [cat]\n")
    with pytest.raises(
        BadDataset, match=r"no label file: none of 4 images .*Images/train"
    ) as caught:
        read(dataset_file="yolo", yolo_path=str(tmp_path))
    assert kinds(caught.value.findings)["no label file"] == 6


def test_yolo_keypoints_are_no_polygon(tmp_path: Path) -> None:
    config = b"train: images/train\nval: images/val\nnames: [cat]\nkpt_shape: [3, 2]\n"
    train, _, findings = yolo(tmp_path, b"0 0.5 0.5 0.25 0.25 0.1 0.1 0.9 0.9 0.8 0.1\n", config)
    assert train.boxes.tolist() == [[36, 24, 60, 40]] * 4
    assert kinds(findings) == {"label line with keypoints": 6}
    with pytest.raises(BadDataset, match="has 7 numbers"):
        yolo(tmp_path, b"0 0.1 0.1 0.9 0.9 0.8 0.1\n", config)


def test_yolo_folders_hidden_and_linked(tmp_path: Path) -> None:
    """Hidden folders hold no images; linked ones do, once, even if they lead back."""
    yolo(tmp_path)
    draw(tmp_path / "images/train/.ipynb_checkpoints/0-checkpoint.png", 7)
    draw(tmp_path / "elsewhere/9.png", 9)
    (tmp_path / "images/train/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/train/again").symlink_to(tmp_path / "images/train")
    (tmp_path / "labels/train/linked").mkdir()
    (tmp_path / "labels/train/linked/9.txt").write_text("1 0.5 0.5 0.25 0.25\n")
    train, _, findings = read(dataset_file="yolo", yolo_path=str(tmp_path))
    assert (len(train), int(train.labels.sum()), kinds(findings)) == (5, 1, {})


def test_yolo_two_images_of_one_label_file(tmp_path: Path) -> None:
    yolo(tmp_path)
    draw(tmp_path / "images/train/0.jpg", 9)
    train, _, findings = read(dataset_file="yolo", yolo_path=str(tmp_path))
    assert len(train) == 5 and kinds(findings) == {"label file of two images": 1}


def test_yolo_lists_beside_the_images_are_used(tmp_path: Path) -> None:
    yolo(tmp_path)
    for split, numbers in SPLITS.items():
        lines = "".join(f"{split}/{number}.png\n" for number in numbers)
        (tmp_path / "images" / f"{split}.txt").write_text(lines)
    draw(tmp_path / "images/6.png", 6)
    (tmp_path / "labels/6.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    with (tmp_path / "images/train.txt").open("a") as file:  # makes images/ a folder of the split
        file.write("6.png\n")
    config = b"train: images/train.txt\nval: images/val.txt\nnames: [cat, dog]\n"
    (tmp_path / "data.yaml").write_bytes(config)
    train, _, findings = read(dataset_file="yolo", yolo_path=str(tmp_path))
    assert len(train) == 5 and not kinds(findings)


def test_yolo_byte_order_marks(tmp_path: Path) -> None:
    lists = b"train: train.txt\r\nval: val.txt\r\nnames: [cat, dog]\r\n"
    for split, numbers in SPLITS.items():
        lines = "".join(f"images\\{split}\\{number}.png\r\n" for number in numbers)
        tmp_path.joinpath(f"{split}.txt").write_bytes(BOM + lines.encode())
    train, val, findings = yolo(tmp_path, BOM + b"1 0.5 0.5 0.25 0.25\r\n", BOM + lists)
    assert (len(train), len(val), kinds(findings)) == (4, 2, {})
    assert train.labels.tolist() == [1] * 4


def test_yolo_names_stay_words_and_are_counted(tmp_path: Path) -> None:
    config = b"train: images/train\nval: images/val\nnc: 3\nnames: [yes, no, 1.0, 007]\ntest:\n"
    train, _, findings = yolo(tmp_path, config=config)
    assert train.class_names == ("yes", "no", "1.0", "007")
    assert kinds(findings)["number of classes that does not fit the names"] == 2
    assert "nc is '3', but names has 4" in findings[0].detail


def test_yolo_implausible_values(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match="seems to be in pixels"):
        yolo(tmp_path / "a", b"0 48 32 24 16\n")
    train, _, findings = yolo(tmp_path / "b", b"0 0.5 0.5 0.25 0.25\n0 0.5 0.5 0.25 0.25\n")
    assert train.box_counts.tolist() == [1] * 4
    assert kinds(findings) == {"box twice": 6}
    (tmp_path / "b/list.txt").write_text("images/train/0.png\nimages/train/0.png\n")
    config = b"train: list.txt\nval: images/val\nnames: [cat]\n"
    train, _, findings = yolo(tmp_path / "b", config=config)
    assert len(train) == 1
    twice = [each for each in findings if each.kind == "image twice"]
    assert [each.detail for each in twice] == ["list.txt line 2"]


def test_yolo_pictures_of_every_kind_are_read_and_labels_without_one_are_told(
    tmp_path: Path,
) -> None:
    yolo(tmp_path)
    for number, ending in enumerate(("gif", "ppm", "jp2", "avif"), 10):
        draw(tmp_path / "images" / "train" / f"{number}.{ending}", number)
        (tmp_path / "labels/train" / f"{number}.txt").write_text("1 0.5 0.5 0.25 0.25\n")
    (tmp_path / "labels/train/77.txt").write_text("1 0.5 0.5 0.25 0.25\n")
    (tmp_path / "images/train/77.heic").touch()
    train, _, findings = read(dataset_file="yolo", yolo_path=str(tmp_path))
    assert len(train) == 8 and train.labels.sum() == 4
    found = kinds(findings)
    assert found["annotation file without a picture"] == found["not an image file"] == 1


# ---- Pascal VOC


def xml(difficult: str = "0", name: str = "cat", width: str = "96", box: str = "") -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (3, 5, 22, 14), strict=True)
    )
    return (
        f"<annotation><size><width>{width}</width><height>64</height></size><object>"
        f"<name>{name}</name><difficult>{difficult}</difficult>"
        f"{box or f'<bndbox>{corners}</bndbox>'}</object></annotation>"
    )


def voc(
    folder: Path, annotation: bytes, lists: str = "{}\n", mark: bytes = b"", **more: Any
) -> Any:
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, numbers in SPLITS.items():
        lines = "".join(lists.format(number) for number in numbers)
        (folder / "ImageSets/Main" / f"{split}.txt").write_bytes(mark + lines.encode())
        for number in numbers:
            draw(folder / "JPEGImages" / f"{number}.png", number)
            (folder / "Annotations" / f"{number}.xml").write_bytes(annotation)
    return read(dataset_file="voc", voc_path=str(folder), **more)


@pytest.mark.parametrize(
    ("annotation", "lists", "told"),
    [
        (BOM + xml().encode(), "{}\r\n", {}),
        (xml().encode("utf-16"), "{}\n", {}),
        (xml("False").encode(), "{}\n", {"truth value in another form": 6}),
        (xml("perhaps").encode(), "{}\n", {"difficult that is neither 0 nor 1": 6}),
        (xml().encode(), "{}.png\n", {"name in another form": 6}),
        (xml().encode(), "JPEGImages\\{}.png\n", {"name in another form": 6}),
        (xml().encode(), "{0}\n{0}\n", {"image twice": 6}),
        (
            xml(width="9" * 23).encode(),
            "{}\n",
            {"invalid image size": 6, "size not annotated": 6},
        ),
        (xml(width="96.0").encode(), "{}\n", {}),
        (
            xml().replace("cat", "cat &amp; dog").replace("&amp;", "&").encode(),
            "{}\n",
            {"XML that had to be mended": 6},
        ),
        (
            b"<?xml version='1.0' encoding='foo'?>" + xml().encode(),
            "{}\n",
            {"XML that had to be mended": 6},
        ),
        (
            xml(box="<polygon><x1>3</x1><y1>5</y1><x2>22</x2><y2>5</y2><x3>9</x3><y3>14</y3>"
                "</polygon>").encode(),
            "{}\n",
            {"box that only a polygon states": 6},
        ),
    ],
)  # fmt: skip
def test_voc_forms_are_read_and_told(
    tmp_path: Path, annotation: bytes, lists: str, told: dict[str, int]
) -> None:
    train, val, findings = voc(tmp_path, annotation, lists, mark=BOM)
    assert (len(train), len(val)) == (4, 2)
    assert train.boxes.tolist() == [CORNERS] * 4 and not train.crowd.any()
    assert kinds(findings) == told


@pytest.mark.parametrize(
    ("encoding", "name"), [("gbk", "\u72d7"), ("shift_jis", "\u72ac"), ("latin-1", "caf\xe9")]
)
def test_voc_encodings_are_decoded(tmp_path: Path, encoding: str, name: str) -> None:
    text = f'<?xml version="1.0" encoding="{encoding}"?>{xml(name=name)}'
    train, _, findings = voc(tmp_path, text.encode(encoding))
    assert train.class_names == (name,) and kinds(findings) == {}


@pytest.mark.parametrize(
    "annotation",
    [
        b"<annotation><object>",
        xml(name="caf\xe9").encode("latin-1"),
        b"<!DOCTYPE x [<!ENTITY a 'b'>]>" + xml(name="&a;").encode(),
        b"",
    ],
)
def test_voc_what_cannot_be_parsed_is_named_and_counts(tmp_path: Path, annotation: bytes) -> None:
    voc(tmp_path, xml().encode())
    (tmp_path / "Annotations/1.xml").write_bytes(annotation)
    with pytest.raises(BadDataset, match=r"1 of 4 images .*1\.xml cannot be read"):
        read(dataset_file="voc", voc_path=str(tmp_path))
    train, _, findings = read(dataset_file="voc", voc_path=str(tmp_path), max_bad_fraction=0.3)
    assert len(train) == 3 and kinds(findings) == {"unreadable annotations": 1}
    lost = next(each for each in findings if each.action == "removed")
    assert lost.image_id is None and lost.file.endswith(".xml")  # ids are those of kept images
    with pytest.raises(BadDataset, match=r"empty dataset.*0\.xml cannot be read") as caught:
        voc(tmp_path, annotation)
    assert kinds(caught.value.findings) == {"unreadable annotations": 4}


def test_voc_two_pictures_of_one_name_and_files_of_no_list(tmp_path: Path) -> None:
    voc(tmp_path, xml().encode())
    draw(tmp_path / "JPEGImages/0.bmp", 8)
    draw(tmp_path / "JPEGImages/test.png", 9)
    (tmp_path / "Annotations/test.xml").write_text(xml())
    train, _, findings = read(dataset_file="voc", voc_path=str(tmp_path))
    assert train.path(0).endswith("0.bmp")
    assert {(each.kind, Path(each.file).name) for each in findings if each.file} == {
        ("picture that no list can name", "0.png"),
        ("picture without a split", "test.png"),
        ("annotation file without a split", "test.xml"),
    }


def test_a_truncated_picture_is_used_unless_strict(tmp_path: Path) -> None:
    voc(tmp_path, xml().encode())
    (tmp_path / "JPEGImages/1.png").unlink()
    draw(tmp_path / "JPEGImages/1.jpg", 1)
    data = (tmp_path / "JPEGImages/1.jpg").read_bytes()
    (tmp_path / "JPEGImages/1.jpg").write_bytes(data[:-50])
    train, _, findings = read(dataset_file="voc", voc_path=str(tmp_path))
    assert len(train) == 4 and kinds(findings) == {"truncated image": 1}
    with pytest.raises(BadDataset, match=r"1 of 4 .*truncated"):
        read(dataset_file="voc", voc_path=str(tmp_path), strict_images=True)


# ---- values


@pytest.mark.parametrize(
    ("value", "whole"),
    [
        (3, 3), (3.0, 3), ("3", 3), (" -3.0 ", -3), ("3e2", 300), (3.5, None), ("3.5", None),
        (True, None), (None, None), ("", None), ("1_0", None), ("nan", None), (float("nan"), None),
        (2**63, None), (-(2**63), -(2**63)), (str(2**63), None), (1e300, None), ([], None),
        (str(2**62 + 1), 2**62 + 1), ("9" * 400, None),
    ],
)  # fmt: skip
def test_whole_numbers(value: Any, whole: int | None) -> None:
    assert whole_number(value) == whole


def test_values() -> None:
    assert [truth(v) for v in (None, 0, "no", "False", "0", " 1 ", True, 1.0, "TRUE")] == [
        *[False] * 5, *[True] * 4,
    ]  # fmt: skip
    assert [truth(v) for v in (2, -1, "maybe", [], {})] == [None] * 5
    assert number_of("1e3") == 1000 and np.isnan(number_of("0x10")) and np.isnan(number_of("1,5"))
    assert text_of(BOM + b"a\xff") == "a\udcff" and text_of("\ufeffa".encode("utf-16-le")) == "a"
    root, remark = parse_xml(b"<a>x & y &amp; &#65;</a>")
    assert root.text == "x & y & A" and "&" in remark


def test_repeated_boxes_are_those_of_a_plain_search() -> None:
    random = np.random.default_rng(0)
    owners, labels = random.integers(0, 4, 300), random.integers(0, 2, 300)
    crowd, boxes = random.integers(0, 2, 300) > 0, random.integers(0, 3, (300, 4)) * 1.5
    seen: set[tuple[Any, ...]] = set()
    expected = []
    for row in zip(owners, labels, crowd, map(tuple, boxes), strict=True):
        expected.append(row in seen)
        seen.add(row)
    found = repeated_boxes(owners, labels, crowd, boxes.astype(np.float32))
    assert found.tolist() == expected and 20 < found.sum() < 250
    assert repeated_boxes(*(np.zeros((0,)),) * 3, np.zeros((0, 4))).tolist() == []
    nan = np.full((2, 4), np.nan, np.float32)
    assert not repeated_boxes(np.zeros(2), np.zeros(2), np.zeros(2, bool), nan).any()
    assert torch.tensor(expected).any()
