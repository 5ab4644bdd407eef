"""The check before training: every fault is named, repaired or left out, and nothing else is."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data import dataset_check
from trainer.data.dataset_check import BadDataset, check, clean
from trainer.readers.coco import read_coco
from trainer.readers.findings import MOST_OF_A_KIND, Finding, format_findings, write_findings
from trainer.readers.samples import Sample, SampleTable
from vidt.images.files import read_image

BCCD = Path(__file__).parents[2] / "shared" / "data" / "bccd"


def write_image(path: Path, seed: int = 0, mode: str = "RGB", **options: Any) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 40, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return str(path)


def sample(path: str, image_id: int, boxes: Any = ((1, 1, 9, 9),), **changes: Any) -> Sample:
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(tensor)
    columns = {
        "size": (20, 40),
        "labels": torch.zeros(count, dtype=torch.int64),
        "areas": torch.full((count,), 12.0),
        "crowd": torch.zeros(count, dtype=torch.bool),
        "annotation_ids": torch.arange(count) + 100 * image_id,
    }
    return Sample(path=path, image_id=image_id, boxes=tensor, **{**columns, **changes})


def table_of(*samples: Sample, source: str = "train.json", classes: str = "a") -> SampleTable:
    return SampleTable.from_samples(samples, tuple(classes), source=source)


def kinds(findings: list[Finding]) -> Counter[str]:
    return Counter(finding.kind for finding in findings)


def test_nothing_to_find(tmp_path: Path) -> None:
    table = table_of(*(sample(write_image(tmp_path / f"{i}.png", i), i) for i in range(3)))
    cleaned, findings = clean(table)
    assert findings == []
    for before, after in zip(table, cleaned, strict=True):
        assert before.path == after.path
        assert torch.equal(before.boxes, after.boxes)
        assert torch.equal(before.areas, after.areas)


@pytest.mark.parametrize(
    ("box", "kind", "left"),
    [
        ([5, 5, 5, 9], "degenerate box", None),
        ([5, 9, 9, 5], "degenerate box", None),
        ([float("nan"), 1, 2, 3], "box with NaN or infinity", None),
        ([0, 0, float("inf"), 3], "box with NaN or infinity", None),
        ([50, 5, 60, 9], "box outside the image", None),
        ([-9, -9, 0, 0], "box outside the image", None),
        ([-5, 2, 45, 30], "box beyond the image", [0, 2, 40, 20]),
        ([30, 2, 40.25, 20], "box beyond the image by rounding", [30, 2, 40, 20]),
    ],
)
def test_bad_boxes_are_named_and_repaired(
    tmp_path: Path, box: list[float], kind: str, left: list[float] | None
) -> None:
    path = write_image(tmp_path / "a.png")
    good, other = [1.0, 1, 9, 9], [1.0, 1, 9, 10]
    cleaned, findings = clean(table_of(sample(path, 4, [good, box, other])))
    assert len(findings) == 1
    finding = findings[0]
    assert (finding.kind, finding.file, finding.image_id) == (kind, path, 4)
    assert (finding.source, finding.annotation_id) == ("train.json", 401)
    assert finding.action == ("dropped" if left is None else "clipped")
    assert cleaned[0].boxes.tolist() == [good, *([left] if left else []), other]


def test_areas_fit_the_boxes(tmp_path: Path) -> None:
    areas = torch.tensor([12.0, 0.0, float("nan"), 5000.0])
    boxes = [[0, 0, 4, 5], [1, 0, 5, 5], [2, 0, 6, 5], [30, 10, 90, 90]]
    cleaned, _ = clean(table_of(sample(write_image(tmp_path / "a.png"), 1, boxes, areas=areas)))
    assert cleaned[0].areas.tolist() == [12, 20, 20, 100]


def test_bad_images_are_removed_and_named(tmp_path: Path) -> None:
    good = [sample(write_image(tmp_path / f"{i}.png", i), i) for i in range(4)]
    missing = sample(str(tmp_path / "missing.png"), 10)
    text = sample(str(tmp_path / "text.jpg"), 11)
    Path(text.path).write_text("not found")
    half = sample(write_image(tmp_path / "half.jpg"), 12)
    Path(half.path).write_bytes(Path(half.path).read_bytes()[:-800])
    resized = sample(write_image(tmp_path / "resized.png"), 13, size=(20, 41))
    table = table_of(missing, good[0], text, good[1], half, resized, *good[2:])
    cleaned, findings = clean(table, max_bad_fraction=0.5)
    assert cleaned.image_ids.tolist() == [0, 1, 2, 3]
    assert [(f.kind, f.image_id) for f in findings] == [
        ("missing image", 10),
        ("unreadable image", 11),
        ("unreadable image", 12),
        ("size mismatch", 13),
    ]
    assert all(f.action == "removed" and f.severity == "error" for f in findings)
    with pytest.raises(BadDataset, match=r"4 of 8 .*--max_bad_fraction 0\.49.*missing\.png") as bad:
        clean(table, max_bad_fraction=0.49)
    assert len(bad.value.findings) == 4
    assert "\n" not in str(bad.value)
    with pytest.raises(BadDataset, match="1 of 1"):
        clean(table_of(missing), max_bad_fraction=1.0)


@pytest.mark.parametrize(
    ("orientation", "size", "action", "severity"),
    [
        (6, (40, 20), "turned", "info"),
        (6, (20, 40), "kept as stored", "info"),
        (3, (20, 40), "kept as stored", "warning"),
    ],
)
def test_exif_rotation(
    tmp_path: Path, orientation: int, size: tuple[int, int], action: str, severity: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write_image(tmp_path / "a.jpg", exif=exif)
    cleaned, findings = clean(table_of(sample(path, 1, [[0, 0, 5, 40]], size=size)))
    assert findings[0].kind == "EXIF-rotated image"
    assert (findings[0].action, findings[0].severity) == (action, severity)
    assert cleaned[0].size == size
    assert cleaned[0].boxes.tolist() == [[0, 0, 5, size[0]]]  # clipped to the size as annotated
    image = read_image(path, size)
    assert (image.height, image.width) == size


def test_exif_orientation_without_an_annotated_size_is_told(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_image(tmp_path / "a.jpg", exif=exif)
    cleaned, findings = clean(table_of(sample(path, 1, size=(0, 0))))
    assert (findings[0].kind, findings[0].severity) == ("EXIF-rotated image", "warning")
    assert "EXIF orientation 6 not applied" in findings[0].detail and cleaned[0].size == (20, 40)


def test_size_that_is_not_annotated_comes_from_the_file(tmp_path: Path) -> None:
    cleaned, findings = clean(table_of(sample(write_image(tmp_path / "a.png"), 1, size=(0, 0))))
    assert kinds(findings) == {"size not annotated": 1}
    assert cleaned[0].size == (20, 40)
    assert len(cleaned[0].boxes) == 1


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "grey image"),
        ("1", "grey image"),
        ("RGBA", "image with alpha"),
        ("LA", "image with alpha"),
        ("P", "palette image"),
        ("I;16", "image of more than 8 bits"),
    ],
)
def test_unusual_modes_are_information(tmp_path: Path, mode: str, kind: str) -> None:
    path = write_image(tmp_path / "a.png", mode=mode)
    cleaned, findings = clean(table_of(sample(path, 1)))
    assert len(cleaned) == 1
    assert [(f.kind, f.severity) for f in findings] == [(kind, "info")]


def test_images_without_boxes_and_crowds_are_kept(tmp_path: Path) -> None:
    empty = sample(write_image(tmp_path / "a.png"), 1, [])
    crowd = sample(write_image(tmp_path / "b.png"), 2, crowd=torch.tensor([True]))
    cleaned, findings = clean(table_of(empty, crowd))
    assert cleaned.box_counts.tolist() == [0, 1]
    assert cleaned.crowd.tolist() == [True]
    assert kinds(findings) == {"image without boxes": 1, "crowd box": 1}
    assert [f.image_id for f in findings] == [1, 2]


def test_check_compares_the_splits(tmp_path: Path) -> None:
    def boxed(name: str, image_id: int, labels: list[int]) -> Sample:
        path = write_image(tmp_path / name, seed=image_id)
        boxes = [[1, 1, 9, 9 + number] for number in range(len(labels))]
        return sample(path, image_id, boxes, labels=torch.tensor(labels))

    train = table_of(boxed("a.png", 1, [0, 0, 0]), boxed("b.png", 2, [1]), classes="abc")
    same_path = boxed("b.png", 2, [2])
    copy = boxed("c.png", 3, [0])
    Path(copy.path).write_bytes(Path(train.path(0)).read_bytes())
    other = boxed("d.png", 4, [0])
    val = table_of(same_path, copy, other, source="val.json", classes="abc")
    _, _, findings = check(train, val, num_queries=2)
    lines = {(f.kind, f.source, f.image_id, f.detail.split(",")[0]) for f in findings}
    shared = "image in both training and validation"
    assert lines == {
        ("more boxes than [DET] tokens", "train.json", 1, "3 boxes"),
        ("class without training boxes", "train.json", None, "c"),
        ("class without validation boxes", "val.json", None, "b"),
        (shared, "val.json", 2, f"same as {train.path(1)}"),
        (shared, "val.json", 3, f"same as {train.path(0)}"),
    }


def test_equal_size_and_end_are_not_yet_the_same_image(tmp_path: Path) -> None:
    first = write_image(tmp_path / "a.bmp")
    second = str(tmp_path / "b.bmp")
    data = bytearray(Path(first).read_bytes() * 3)  # longer than the end that is compared first
    Path(first).write_bytes(data)
    data[60] ^= 1
    Path(second).write_bytes(data)
    train, val = table_of(sample(first, 1)), table_of(sample(second, 2))
    assert check(train, val, num_queries=9)[2] == []


def test_each_file_is_read_whole_once_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 files in each split, all of the same size and end; two are the same picture."""
    data = bytearray(Path(write_image(tmp_path / "a.bmp")).read_bytes() * 3)

    def files(prefix: str, colours: range) -> list[Sample]:
        samples = []
        for number, colour in enumerate(colours):
            data[60:62] = colour.to_bytes(2, "big")
            path = tmp_path / f"{prefix}{number}.bmp"
            path.write_bytes(data)
            samples.append(sample(str(path), number))
        return samples

    train = table_of(*files("t", range(20)), *files("again", range(19, 20)))
    val = table_of(*files("v", range(19, 39)))
    read = Counter[str]()
    digest = dataset_check._digest

    def counted(path: str) -> bytes:
        read[path] += 1
        return digest(path)

    monkeypatch.setattr(dataset_check, "_digest", counted)
    (finding,) = check(train, val, num_queries=9)[2]
    assert finding.image_id == 0 and "t19.bmp" in finding.detail
    assert set(read) == {*train.paths(), *val.paths()} and set(read.values()) == {1}


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    train = table_of(sample(write_image(tmp_path / "a.png"), 1, [[5, 5, 5, 5]]))
    val = table_of(sample(write_image(tmp_path / "b.png", 1), 1))
    with pytest.raises(BadDataset, match="no image has a box") as caught:
        check(train, val, num_queries=9)
    assert kinds(caught.value.findings)["degenerate box"] == 1


def test_many_faults_are_counted_and_few_are_kept(tmp_path: Path) -> None:
    """Of boxes and of images, in one split and between two."""
    many = MOST_OF_A_KIND + 50
    path = write_image(tmp_path / "a.png", mode="L")
    boxes = [[1, 1, 9, 9], *[[5, 5, 5, 5]] * many]
    train = table_of(sample(path, 0, boxes), *(sample(path, n + 1, []) for n in range(many)))
    absent = [sample(str(tmp_path / f"no{n}.png"), n + 9000) for n in range(many)]
    val = table_of(*absent, *train, source="val.json")
    findings = check(train, val, num_queries=9, max_bad_fraction=0.9)[2]
    counts, lines = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for finding in findings:
        counts[finding.kind, finding.source] += finding.count
        lines[finding.kind, finding.source] += 1
    shared = "image in both training and validation"
    assert counts == {
        ("missing image", "val.json"): many,
        (shared, "val.json"): many + 1,
        **{("grey image", split): many + 1 for split in ("train.json", "val.json")},
        **{("degenerate box", split): many for split in ("train.json", "val.json")},
        **{("image without boxes", split): many for split in ("train.json", "val.json")},
    }
    assert set(lines.values()) == {MOST_OF_A_KIND + 1}
    shown = format_findings(findings, limit=10)
    assert f"degenerate box, dropped: {2 * many}\n" in shown
    assert f"    and {2 * many - 10} more\n" in shown
    crowded = sample(path, 1, [[1, 1, 9, 9 + number] for number in range(9)])
    found = check(table_of(*[crowded] * many), table_of(crowded), num_queries=8)[2]
    of_kind = [each.count for each in found if each.kind.startswith("more boxes")]
    assert sum(of_kind) == many + 1 and len(of_kind) == MOST_OF_A_KIND + 2


def test_findings_are_grouped_counted_and_cut(tmp_path: Path) -> None:
    findings = [Finding("grey image", "info", "kept", "", "train", f"{i}.png") for i in range(5)]
    findings += [
        Finding("bad box", "warning", "dropped", "empty", "train", f"{i}.png", i, 7)
        for i in range(12)
    ]
    findings.append(Finding("lost", "error", "removed", count=40))
    lines = format_findings(findings, limit=10, info_limit=2).splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == [
        "error: lost, removed: 40",
        "warning: bad box, dropped: 12",
        "info: grey image, kept: 5",
    ]
    assert "    train, 3.png, image 3, annotation 7: empty" in lines
    assert "    and 2 more" in lines
    assert "    and 3 more" in lines
    write_findings(tmp_path / "findings.csv", findings)
    with open(tmp_path / "findings.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(findings)
    assert rows[5]["file"] == "0.png"
    assert rows[5]["annotation_id"] == "7"
    assert rows[0]["image_id"] == ""


@pytest.mark.skipif(not BCCD.is_dir(), reason="needs the blood cell pictures in ../shared")
def test_the_two_degenerate_boxes_of_bccd() -> None:
    train, _ = read_coco(BCCD / "train.json", BCCD / "images")
    val, _ = read_coco(BCCD / "val.json", BCCD / "images", train.class_names)
    clean_train, clean_val, findings = check(train, val, num_queries=100)
    assert [(Path(f.file).name, f.image_id, f.annotation_id) for f in findings] == [
        ("BloodImage_00343.jpg", 171, 2288),
        ("BloodImage_00338.jpg", 69, 887),
    ]
    assert {f.kind for f in findings} == {"degenerate box"}
    assert (len(clean_train.boxes), len(clean_val.boxes)) == (2804, 1137)
    text = format_findings(findings)
    assert "BloodImage_00343.jpg, image 171, annotation 2288" in text
