"""COCO, VOC and YOLO files, good and bad, to sample tables."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.readers.coco import coco_folder, read_coco
from trainer.readers.coco_file import read_coco_file
from trainer.readers.findings import MOST_OF_A_KIND, format_findings, write_findings
from trainer.readers.voc import read_voc
from trainer.readers.yolo import read_yolo


def write_image(path: Path, height: int = 20, width: int = 40, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, **options)


def image_entry(number: int) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.jpg", "height": 20, "width": 40}


def annotation(number: int, image: int, category: Any, box: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, **more}


def write_coco(folder: Path, document: Any) -> tuple[Path, Path]:
    (folder / "images").mkdir(exist_ok=True)
    path = folder / "some.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path, folder / "images"


def coco_document() -> dict[str, Any]:
    return {
        "images": [image_entry(7), image_entry(3), image_entry(5)],
        "annotations": [
            annotation(11, 5, 90, [1, 2, 3, 4], area=7.5, iscrowd=1),
            annotation(12, 7, 2, [0, 0, 10, 10.5], area=99),
            annotation(13, 5, 2, [5, 5, 4, 2]),
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 2, "name": "cat"}],
    }


def test_coco(tmp_path: Path) -> None:
    table, findings = read_coco(*write_coco(tmp_path, coco_document()))
    assert table.source == "some.json"
    assert table.class_names == ("cat", "dog")
    assert table.category_ids == (2, 90)
    assert table.image_ids.tolist() == [7, 3, 5]
    assert list(table.paths()) == [str(tmp_path / "images" / f"{i}.jpg") for i in (7, 3, 5)]
    assert table.sizes.tolist() == [[20, 40]] * 3
    assert table.box_counts.tolist() == [1, 0, 2]
    last = table[2]
    assert last.boxes.tolist() == [[1, 2, 4, 6], [5, 5, 9, 7]]
    assert last.labels.tolist() == [1, 0]
    assert last.areas.tolist() == [7.5, 8]  # the second is not given
    assert last.crowd.tolist() == [True, False]
    assert last.annotation_ids is not None
    assert last.annotation_ids.tolist() == [11, 13]
    assert [(f.kind, f.count) for f in findings] == [("missing area", 1)]


def test_coco_leaves_out_what_a_table_cannot_hold_and_names_it(tmp_path: Path) -> None:
    document = coco_document()
    document["annotations"] = [
        annotation(1, 7, 2, [0, 0, 1, 1], area=1),
        annotation(2, 99, 2, [0, 0, 1, 1]),
        annotation(3, 7, 1, [0, 0, 1, 1]),
        annotation(4, 7, [2], [0, 0, 1, 1]),
        annotation(5, 7, 2, [0, 0, 1]),
        annotation(6, 7, 2, {"x": 1}),
        annotation(7, 7, 2, [0, "wide", 1, 1]),
        {"id": 8, "image_id": 7, "category_id": 2},
        annotation(9, 7, 2, [0, float("nan"), 1, 1], area=1),
    ]
    document["images"].append({"id": 8})
    table, findings = read_coco(*write_coco(tmp_path, document))
    assert table.annotation_ids.tolist() == [1, 9]  # NaN is for the check
    assert table.boxes[1].isnan().any()
    assert [(f.kind, f.annotation_id) for f in findings] == [
        ("malformed image", None),
        ("unknown image id", 2),
        ("unknown category id", 3),
        ("unknown category id", 4),
        ("malformed box", 5),
        ("malformed box", 6),
        ("malformed box", 7),
        ("malformed box", 8),
    ]
    assert all(f.file.endswith("7.jpg") and f.image_id == 7 for f in findings[2:])
    assert "99" in findings[1].detail
    assert len(table) == 3


def test_a_file_name_that_no_file_can_have_is_a_malformed_image(tmp_path: Path) -> None:
    """Half of a character, which JSON can write; a name of raw bytes is one that a file has."""
    document = coco_document()
    document["images"] += [image_entry(8) | {"file_name": f"{half}.jpg"} for half in "\ud800\udcff"]
    document["images"][-1]["id"] = 9
    document["annotations"].append(annotation(14, 7, "\ud800", [0, 0, 1, 1]))
    table, findings = read_coco(*write_coco(tmp_path, document))
    assert table.image_ids.tolist() == [7, 3, 5, 9]
    malformed = [finding for finding in findings if finding.kind == "malformed image"]
    assert [finding.action for finding in malformed] == ["removed"]
    assert "'\\ud800.jpg'" in malformed[0].detail
    format_findings(findings).encode()
    write_findings(tmp_path / "findings.csv", findings)


def test_a_class_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    document = coco_document() | {"categories": [{"id": 2, "name": "\udcff"}]}
    with pytest.raises(ValueError, match=r"some\.json: category .* no text") as caught:
        read_coco(*write_coco(tmp_path, document))
    str(caught.value).encode()


def test_many_faults_are_counted_and_few_are_kept(tmp_path: Path) -> None:
    """Each of five kinds 1000 times; the boxes and categories only after as many that are worse."""
    document = coco_document()
    document["images"] += [{"id": number} for number in range(1000)]
    good = [0, 0, 1, 1]
    document["annotations"] = [
        *(annotation(number, 99, [2], None) for number in range(1000)),
        *(annotation(number, 7, [2], good) for number in range(1000)),
        *(annotation(number, 7, 2, [1, 2, "wide"]) for number in range(1000)),
        *(annotation(number, 7, 2, good, segmentation=[[1]]) for number in range(1000)),
    ]
    path, folder = write_coco(tmp_path, document)
    table, findings = read_coco(path, folder, masks=True)
    assert len(table.boxes) == 1000
    counts, lines = Counter[str](), Counter[str]()
    for finding in findings:
        counts[finding.kind] += finding.count
        lines[finding.kind] += 1
    kinds = ("malformed image", "unknown image id", "unknown category id", "malformed box")
    for kind in (*kinds, "malformed mask"):
        assert counts[kind] == 1000 and lines[kind] == MOST_OF_A_KIND + 1
    assert "category_id (not shown) is not among" in next(
        each.detail for each in findings if each.kind == "unknown category id"
    )
    last = next(each for each in findings if each.count > 1)
    assert (last.detail, last.count) == ("700 more of the same", 700)
    file = read_coco_file(path)
    assert len(file.odd) <= 3 * MOST_OF_A_KIND >= 3 * len(file.images.malformed)


def test_validation_classes_are_matched_by_name(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, coco_document())
    table, findings = read_coco(path, images, class_names=("dog", "bird"))
    assert table.class_names == ("dog", "bird")
    assert table.category_ids == (90, -1)
    assert len(table) == 3
    assert table.labels.tolist() == [0]
    assert [(f.kind, f.count, f.action) for f in findings] == [("class not trained", 2, "dropped")]
    assert "'cat'" in findings[0].detail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no json", "not JSON"),
        ([1, 2], "images"),
        ({"images": None}, '"images"'),
        ({"annotations": {"id": 1}}, '"annotations"'),
        ({"annotations": [1]}, '"annotations"'),
        ({"categories": "cat"}, '"categories"'),
        ({"images": []}, "empty dataset"),
        ({"categories": []}, "no classes"),
        ({"categories": [{"id": 1}]}, "name"),
        ({"categories": [{"id": True, "name": "cat"}]}, "integer id"),
        ({"images": [{"id": True, "file_name": "1.jpg"}]}, "integer id"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "of its own"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]}, "'cat' is used tw"),
        ({"images": [image_entry(7), {"id": 7, "file_name": "8.jpg"}]}, "id 7 is used twice"),
    ],
)
def test_coco_errors_are_one_line_with_the_file(tmp_path: Path, change: Any, message: str) -> None:
    document = {**coco_document(), **change} if isinstance(change, dict) else change
    path, images = write_coco(tmp_path, document)
    with pytest.raises(ValueError, match=message) as caught:
        read_coco(path, images)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_coco_missing_files(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, coco_document())
    with pytest.raises(ValueError, match=r"other\.json"):
        read_coco(tmp_path / "other.json", images)
    with pytest.raises(ValueError, match="nowhere"):
        read_coco(path, tmp_path / "nowhere")


def test_coco_without_annotations(tmp_path: Path) -> None:
    table, findings = read_coco(*write_coco(tmp_path, {**coco_document(), "annotations": []}))
    assert len(table) == 3
    assert table.boxes.shape == (0, 4)
    assert findings == []


def test_coco_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"instances_val2017\.json.*--coco_path"):
        coco_folder(tmp_path, "val")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").touch()
    with pytest.raises(ValueError, match="val2017"):
        coco_folder(tmp_path, "val")
    (tmp_path / "val2017").mkdir()
    json_path, images = coco_folder(tmp_path, "val")
    assert json_path.is_file()
    assert images.is_dir()


VOC_OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{x}</xmin><ymin>3</ymin><xmax>10</xmax><ymax>8</ymax></bndbox></object>"""


def write_voc(root: Path, objects: dict[str, list[tuple[str, int, str]]]) -> None:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("".join(f"{stem}\n" for stem in objects))
    for stem, things in objects.items():
        body = "".join(VOC_OBJECT.format(name=n, difficult=d, x=x) for n, d, x in things)
        size = "<size><width>40</width><height>20</height><depth>3</depth></size>"
        xml = f"<annotation>{size}{body}</annotation>"
        (root / "Annotations" / f"{stem}.xml").write_text(xml)
        write_image(root / "JPEGImages" / f"{stem}.png")


def test_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2007"
    write_voc(root, {"b": [("dog", 0, "1"), ("cat", 1, "5")], "a": []})
    for given in (root, root.parent, tmp_path):
        table, findings = read_voc(given, "train")
        assert findings == []
        assert table.class_names == ("cat", "dog")
        assert list(table.paths()) == [str(root / "JPEGImages" / f"{s}.png") for s in "ba"]
        assert table.image_ids.tolist() == [1, 2]
        assert table.sizes.tolist() == [[20, 40]] * 2
        # Pixels 1 to 10 in x and 3 to 8 in y, counted from 1: 10 x 6 of them.
        assert table[0].boxes.tolist() == [[0, 2, 10, 8], [4, 2, 10, 8]]
        assert table[0].areas.tolist() == [60, 36]
        assert table[0].labels.tolist() == [1, 0]
        assert table[0].crowd.tolist() == [False, True]


def test_voc_findings(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [("dog", 0, "left"), ("cow", 0, "2")], "b": [], "c": []})
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation>")
    (tmp_path / "Annotations" / "c.xml").unlink()
    (tmp_path / "ImageSets/Main/train.txt").write_text("a  1\nb -1\n\nc  1\n")
    table, findings = read_voc(tmp_path, "train", class_names=["dog", "cat"])
    assert len(table) == 1
    assert table.class_names == ("dog", "cat")
    assert len(table.boxes) == 0
    kinds = [finding.kind for finding in findings]
    assert kinds == ["malformed box"] + ["unreadable annotations"] * 2 + ["class not trained"]
    assert findings[0].file.endswith("a.xml") and "'left, 3, 10, 8'" in findings[0].detail
    assert findings[1].file.endswith("b.xml") and "train.txt line 2" in findings[1].detail


def test_voc_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val\.txt"):
        read_voc(tmp_path, "val")
    write_voc(tmp_path, {})
    with pytest.raises(ValueError, match="empty dataset"):
        read_voc(tmp_path, "train")


def write_yolo(root: Path, config: str, labels: dict[str, str], **options: Any) -> Path:
    for stem, text in labels.items():
        write_image(root / "train/images" / f"{stem}.png", **options)
        (root / "train/labels").mkdir(exist_ok=True)
        (root / "train/labels" / f"{stem}.txt").write_text(text)
    write_image(root / "train/images" / "z_empty.png", **options)
    (root / "data.yaml").write_text(config)
    return root


@pytest.mark.parametrize(
    "config",
    [
        "names: [cat, dog]\ntrain: train/images",
        "names: {0: cat, 1: dog}\ntrain: [train/images]\npath: .",
        "names: [cat, dog]\ntrain: ../train/images\nnc: 2",
        "names: [cat, dog]\ntrain: list.txt",
    ],
)
def test_yolo(tmp_path: Path, config: str) -> None:
    labels = {
        "a": "1 0.5 0.5 0.25 0.5\n\n0 0.25 0.2 0.1 0.1 0.875\n",
        "b": "1 0 0 0.5 0 0.5 0.5 0 1\n",
    }
    root = write_yolo(tmp_path / "set", config, labels)
    lines = "".join(f"train/images/{stem}.png\n" for stem in ("a", "b", "z_empty"))
    (root / "list.txt").write_text(lines)
    for given in (root, root / "data.yaml"):
        table, findings = read_yolo(given, "train")
        assert [(f.kind, f.count) for f in findings] == [
            ("image without a label file", 1),
            ("label line with a score", 1),
            ("label line with a polygon", 1),
        ]
        assert findings[1].file.endswith("a.txt") and findings[1].detail.endswith("line 3")
        assert table.class_names == ("cat", "dog")
        assert table.box_counts.tolist() == [2, 1, 0]
        assert table.sizes.tolist() == [[20, 40]] * 3
        assert table[0].labels.tolist() == [1, 0]  # its second line has a score
        expected = torch.tensor([[15.0, 5, 25, 15], [8, 3, 12, 5], [0, 0, 20, 20]])
        torch.testing.assert_close(table.boxes, expected)  # the last is of a polygon
        torch.testing.assert_close(table.areas, torch.tensor([100.0, 8, 400]))


def test_yolo_labels_may_end_in_capitals(tmp_path: Path) -> None:
    config = "names: [cat]\ntrain: train/images"
    root = write_yolo(tmp_path, config, {"a": "0 0.5 0.5 0.5 0.5", "b": "0 0.5 0.5 0.5 0.5"})
    label = root / "train/labels/b.txt"
    label.rename(label.with_suffix(".TXT"))
    table, findings = read_yolo(root, "train")
    assert table.box_counts.tolist() == [1, 1, 0]
    assert [(f.kind, f.count) for f in findings] == [("image without a label file", 1)]


def test_yolo_coordinates_are_of_the_turned_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    config = "names: [cat]\ntrain: train/images"
    root = write_yolo(tmp_path, config, {"a": "0 0.5 0.5 0.5 0.5"}, exif=exif)
    table, _ = read_yolo(root, "train")
    assert table[0].size == (40, 20)
    assert table[0].boxes.tolist() == [[5, 10, 15, 30]]


def test_yolo_findings(tmp_path: Path) -> None:
    labels = {"a": "0 0.5 0.5\nx 1 1 1 1\n2 0.5 0.5 1 1\n0.5 0.5 0.5 1 1\n0 nan 0.5 1 1\n1 0 0 1 1"}
    root = write_yolo(tmp_path, "names: [cat, dog]\ntrain: train/images", labels)
    (root / "train/images/broken.jpg").write_text("no picture")
    table, findings = read_yolo(root, "train", class_names=["cat"])
    assert [(f.kind, f.image_id) for f in findings] == [
        ("malformed box", 1),
        ("malformed box", 1),
        ("malformed box", 1),
        ("unknown category id", 1),
        ("unknown category id", 1),
        ("image without a label file", None),
        ("class not trained", None),
    ]
    assert [f.detail.split(":")[0] for f in findings[:5]] == [f"line {n}" for n in (1, 2, 5, 3, 4)]
    assert all(f.file.endswith("labels/a.txt") for f in findings[:5])
    assert table.box_counts.tolist() == [0, 0, 0]
    assert table.category_ids == (0,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[", "not YAML"),
        ("[" * 3000, "nested more than 50 levels"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]\ntrain: train/images", "names"),
        ("names: [a]\nkpt_shape: [17]\ntrain: train/images", "kpt_shape"),
        ("just text", "names"),
        ("train: train/images", "names"),
        ("names: [a, a]\ntrain: train/images", "'a' is used twice"),
        ('names: [a, "b\\nc"]\ntrain: train/images', "is not one line; rename it"),
        ("names: [a]", '"train"'),
        ("names: [a]\ntrain: nowhere", "nowhere"),
        ("names: [a]\ntrain: nothing", "empty dataset"),
    ],
)
def test_yolo_errors(tmp_path: Path, config: str, message: str) -> None:
    write_yolo(tmp_path, config, {})
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=message) as caught:
        read_yolo(tmp_path, "train")
    assert "data.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
