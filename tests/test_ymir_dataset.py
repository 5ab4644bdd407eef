"""The platform's indexes, annotations and pictures, whole or not, become the right samples."""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ymir_task import (
    FORMATS,
    NAMES,
    PROTOCOLS,
    SHOTS,
    Shot,
    Tree,
    ark,
    coco,
    make_tree,
    voc,
    write_index,
)

from trainer.readers.findings import MOST_OF_A_KIND, Finding
from trainer.readers.samples import SampleTable
from vidt.images.files import read_image
from ymir_adapter.dataset.annotations import AnnotationReader
from ymir_adapter.dataset.ark import read_ark_files
from ymir_adapter.dataset.columns import Classes, Columns, Notes
from ymir_adapter.dataset.tables import candidates, locate, read_index, read_split, read_tables
from ymir_adapter.protocol.errors import Code, TaskError

EXPECTED = [  # of SHOTS: xyxy, continuous
    ([[2, 3, 12, 13], [10, 10, 21, 20]], [0, 1]),
    ([[0, 0, 20, 20]], [1]),
    ([], []),
]


def contents(table: SampleTable) -> list[tuple[list[list[float]], list[int]]]:
    return [(sample.boxes.tolist(), sample.labels.tolist()) for sample in table]


def tables(tree: Tree, **more: Any) -> tuple[SampleTable, SampleTable, list[Finding]]:
    return read_tables(tree.read(), num_queries=100, **more)


def kinds(findings: list[Finding]) -> set[str]:
    return {finding.kind for finding in findings}


def refused(tree: Tree) -> TaskError:
    with pytest.raises(TaskError) as caught:
        tables(tree)
    assert "\n" not in str(caught.value)
    return caught.value


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_samples(tmp_path: Path, protocol: str | None, kind: str):
    # The key says another format: the file counts.
    config = {"export_format": "seg-mask:raw"}
    tree = make_tree(tmp_path, protocol=protocol, kind=kind, config=config)
    train, val, findings = tables(tree)
    assert contents(train) == EXPECTED and contents(val) == EXPECTED[:2]
    assert train.class_names == val.class_names == NAMES
    assert [Path(path).name for path in train.paths()] == [shot.name for shot in SHOTS]
    assert train.sizes.tolist() == [list(shot.size) for shot in SHOTS]
    assert train.areas.tolist() == [100, 110, 400] and not train.crowd.any()
    assert kinds(findings) <= {"image without boxes", "image in both training and validation"}


def test_formats_may_be_mixed(tmp_path: Path):
    tree = make_tree(tmp_path)
    rows = read_index(tree.input / "train-index.tsv", tree.input)
    (tree.input / "annotations" / "a1.txt").write_text(voc(SHOTS[0]))  # the name lies
    whole = tree.input / "annotations" / "b2.dat"
    whole.write_text(json.dumps(coco(SHOTS)))
    write_index(tree.input / "train-index.tsv", [rows[0], (rows[1][0], whole), rows[2]])
    assert contents(tables(tree)[0]) == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        "0, 2, 3, 11, 12, -1.0, 0.0\n1, 10, 10, 20, 19, 0.6000000238418579, 0.5\n",
        "0,2,3,11,12\n1,10,10,20,19",
        "\ufeff0, 2, 3, 11, 12\r\n1, 10, 10, 20, 19\r\n",
        "\n  \n0, 2.0, 3.0, 11.0, 12.0\n\n1, 10, 10, 20, 19, 0.5\n \t \n",
        "0 , 2 , 3 , 11 , 12\n  1, 1e1, 10, 2e1, 19, what, ever, comes, after\n",
    ],
)
def test_ark_lines_of_any_make(tmp_path: Path, text: str):
    tree = make_tree(tmp_path)
    (tree.input / "annotations" / "a1.txt").write_bytes(text.encode())
    train, _, findings = tables(tree)
    assert contents(train) == EXPECTED and "malformed line" not in kinds(findings)


def test_the_quick_way_and_the_careful_way_agree():
    """On files of every make, alone and together; the quick way is used for the plain ones."""
    random = np.random.default_rng(0)
    plain = []
    for _ in range(40):
        rows = [(int(random.integers(3)), *random.integers(-3, 99, 4)) for _ in range(4)]
        rows = [(k, min(a, c), min(b, d), max(a, c), max(b, d)) for k, a, b, c, d in rows]
        plain.append(ark(rows[: random.integers(5)], 5 + 2 * int(random.integers(2))).encode())
    odd = [
        *(b"0, 1, 2, 3\n", b"0, 1, 2, x, 4\n", b"0, 1-2, 3, 4, 5\n", b"7, 1, 1, 2, 2\n"),
        *(b"-1, 1, 1, 2, 2\n", b"0, 5, 5, 4, 9\n", b"0,,1,2,3,4\n", b"0, 1, 2, 3, 4 5\n"),
        *(b"\n\n", b" ", b"0, 1, 2, 3, 99999999999\n", b"0, --1, 2, 3, 4\n", b"0, 1, 2, 3, \n"),
        *(b"\xff\xfe\x00", b"0,1,2,3,4", b",,,,\n", b"0, 1_0, 2, 30, 4\n", b"+0, 1, 2, 3, 4\n"),
    ]
    groups = [plain, odd, plain + odd, *([one] for one in plain + odd)]
    for group in groups:
        files = [(owner, "f", data) for owner, data in enumerate(group)]
        careful, quick = Columns(), Columns()
        notes = Notes(""), Notes("")
        for one in files:
            read_ark_files([one, (99, "g", b"0, 1.0, 1, 2, 2")], Classes("abc"), careful, notes[0])
        read_ark_files(files, Classes("abc"), quick, notes[1])
        keep = np.frombuffer(careful.owners, np.int64) != 99
        boxes = np.frombuffer(careful.boxes).reshape(-1, 4)[keep]
        assert np.frombuffer(quick.boxes).tolist() == boxes.ravel().tolist()
        assert quick.owners.tolist() == np.frombuffer(careful.owners, np.int64)[keep].tolist()
        assert quick.labels.tolist() == np.frombuffer(careful.labels, np.int64)[keep].tolist()
        assert notes[0].findings() == notes[1].findings()


@pytest.mark.parametrize(
    "document",
    [
        voc(SHOTS[0], ("Cat ", " DOG")),
        '<?xml version="1.0" encoding="utf-8"?>' + voc(SHOTS[0]),
        voc(SHOTS[0]).replace("<difficult>0</difficult>", "").replace("2<", "2.0<"),
        voc(SHOTS[0]).replace("<size>", "<gone>").replace("</size>", "</gone>"),
        voc(SHOTS[0]).replace("<width>32", "<width>999"),
        "\n " + voc(SHOTS[0]),
        voc(SHOTS[0]).replace("<difficult>0<", "<difficult>False<"),
        '<?xml version="1.0" encoding="UTF-16"?>' + voc(SHOTS[0]),
    ],
    ids=["names", "declared", "optional", "no-size", "other-size", "blanks", "words", "utf-16"],
)
def test_voc_files_of_any_make(tmp_path: Path, document: str):
    tree = make_tree(tmp_path, kind="voc")
    encoding = "utf-16" if "UTF-16" in document else "utf-8"
    (tree.input / "annotations" / "a1.xml").write_bytes(document.encode(encoding))
    train = tables(tree)[0]
    assert contents(train) == EXPECTED and not train.crowd.any()


def test_xml_entities_are_never_resolved(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("cat")
    tree = make_tree(tmp_path / "task", kind="voc")
    for entity in (f'SYSTEM "file://{secret}"', '"cat"'):
        text = voc(SHOTS[0]).replace(">cat<", ">&e;<")
        document = f"<!DOCTYPE a [<!ENTITY e {entity}>]>{text}"
        for encoding in ("utf-8", "utf-16"):
            path = tree.input / "annotations" / "a1.xml"
            path.write_bytes(document.encode(encoding))
            train, _, findings = tables(tree)
            assert contents(train) == EXPECTED[1:]
            assert "unreadable annotations" in kinds(findings)


def test_coco_categories_go_by_name_and_else_by_id(tmp_path: Path):
    tree = make_tree(tmp_path, kind="coco")
    path = tree.input / "annotations" / "coco-annotations.json"
    document = coco(SHOTS)
    for row in document["annotations"]:
        row["category_id"] = {0: 7, 1: 1}[row["category_id"]]
    document["categories"] = [{"id": 7, "name": "CAT"}]
    path.write_text(json.dumps(document))
    assert contents(tables(tree)[0]) == EXPECTED


@pytest.mark.parametrize(
    ("value", "crowd"), [(1, True), ("1", True), ("0", False), ("False", False), ([0], False)]
)
def test_a_crowd_is_kept_as_one(tmp_path: Path, value: Any, crowd: bool):
    tree = make_tree(tmp_path, kind="coco")
    path = tree.input / "annotations" / "coco-annotations.json"
    document = coco(SHOTS)
    document["annotations"][1]["iscrowd"] = value
    path.write_text(json.dumps(document))
    train, _, findings = tables(tree)
    assert train.crowd.tolist() == [False, crowd, False]
    assert ("malformed iscrowd" in kinds(findings)) == (value == [0])


# ---------------------------------------------------------------- defects, all of section 7.5

MANY = tuple(Shot(f"m{number}.png", rows=((0, 2, 3, 11, 12),)) for number in range(4))
GOOD = [[2.0, 3.0, 12.0, 13.0]]


@dataclass(frozen=True)
class Defect:
    """What is done to the first training image's annotation, and what must come of it."""

    name: str
    data: bytes | None  # of the file; None removes it
    boxes: list[list[float]] | None = field(default_factory=list)  # None: the image is left out
    finding: str = ""
    kind: str = "ark"


PLAIN = b"0, 2, 3, 11, 12\n"
XML = voc(MANY[0]).encode()
LINE, BOX, EXTENT = "malformed line", "malformed box", "box without extent"
FOREIGN, NONE = "class outside the task", "image without annotations"
BROKEN = "unreadable annotations"
DEFECTS = [
    Defect("empty file", b""),
    Defect("file does not exist", None, finding=NONE),
    Defect("blank lines", b"\n \n0, 2, 3, 11, 12\n\t\n", GOOD),
    Defect("four fields", b"0, 2, 3, 11\n" + PLAIN, GOOD, LINE),
    Defect("text in a number", b"0, two, 3, 11, 12\n" + PLAIN, GOOD, LINE),
    Defect("NaN", b"0, nan, 3, 11, 12\n" + PLAIN, GOOD, LINE),
    Defect("infinity", b"0, 2, 3, inf, 12\n" + PLAIN, GOOD, LINE),
    Defect("too large for a float", b"0, 1, 1, 1e999, 5\n" + PLAIN, GOOD, LINE),
    Defect("half a class", b"0.5, 2, 3, 11, 12\n" + PLAIN, GOOD, LINE),
    Defect("bytes of no encoding", b"\xff\x00\xfe\n" + PLAIN, GOOD, LINE),
    Defect("float coordinates", b"0, 2.0, 3.0, 11.0, 12.0\n", GOOD),
    Defect("class below 0", b"-1, 2, 3, 11, 12\n" + PLAIN, GOOD, FOREIGN),
    Defect("class too high", b"2, 2, 3, 11, 12\n" + PLAIN, GOOD, FOREIGN),
    Defect("xmax below xmin", b"0, 5, 3, 4, 12\n" + PLAIN, GOOD, EXTENT),
    Defect("ymax below ymin", b"0, 5, 9, 9, 3\n" + PLAIN, GOOD, EXTENT),
    Defect("half a pixel too few", b"0, 5, 3, 4.5, 9\n" + PLAIN, GOOD, EXTENT),
    Defect("one pixel wide", b"0, 5, 5, 5, 5\n", [[5.0, 5.0, 6.0, 6.0]]),
    Defect(
        "partly outside", b"0, 20, -4, 99, 99\n", [[20.0, 0.0, 32.0, 24.0]], "box beyond the image"
    ),
    Defect("fully outside", b"0, 40, 3, 50, 12\n" + PLAIN, GOOD, "box outside the image"),
    Defect("above and left", b"0, -9, -9, -2, -2\n" + PLAIN, GOOD, "box outside the image"),
    Defect("cut XML", XML[:60], None, BROKEN, "voc"),
    Defect("XML of no encoding", b"<a>\xff\xfe</a>", None, BROKEN, "voc"),
    Defect(
        "XML of an unknown encoding", b'<?xml version="1.0" encoding="x"?><a/>', None, BROKEN, "voc"
    ),
    Defect("no XML at all", b"junk", None, BROKEN, "voc"),
    Defect("empty XML file", b"", [], "", "voc"),
    Defect("XML without objects", b"<annotation/>", [], "", "voc"),
    Defect("no bndbox", XML.replace(b"bndbox", b"x"), [], BOX, "voc"),
    Defect("text in a corner", XML.replace(b">11<", b">x<"), [], BOX, "voc"),
    Defect("corners swapped", XML.replace(b">11<", b">1<"), [], EXTENT, "voc"),
    Defect("another class", XML.replace(b"cat", b"cow"), [], FOREIGN, "voc"),
    Defect("no class", XML.replace(b"name>", b"x>"), [], FOREIGN, "voc"),
    Defect("cut JSON", b'{"images": [', None, BROKEN),
    Defect(
        "JSON of another tool", b'[{"annotations": []}]', None, "annotations of an unknown format"
    ),
    Defect("deep JSON", b"[" * 100_000, None, BROKEN),
    Defect("JSON without the image", b'{"images": [], "annotations": []}', [], NONE),
]


def spoil(tree: Tree, defect: Defect, index: int = 0) -> None:
    path = tree.input / "annotations" / f"m{index}.{'txt' if defect.kind == 'ark' else 'xml'}"
    path.unlink()
    if defect.data is not None:
        path.write_bytes(defect.data)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_costs_no_more_than_itself(tmp_path: Path, defect: Defect):
    tree = make_tree(tmp_path, kind=defect.kind, train=MANY)
    spoil(tree, defect)
    train, _, findings = tables(tree)
    kept = [] if defect.boxes is None else [defect.boxes]
    assert [boxes for boxes, _ in contents(train)] == [*kept, GOOD, GOOD, GOOD]
    assert not defect.finding or defect.finding in kinds(findings)
    harmless = {"image without boxes", "class without training boxes"}
    harmless |= {"class without validation boxes"}
    assert kinds(findings) - harmless == ({defect.finding} - {""})
    told = [one for one in findings if one.kind == defect.finding]
    assert all(one.severity in ("warning", "error") and one.line() for one in told)


def test_all_defects_at_once_lose_nothing_of_each_other(tmp_path: Path):
    shots = [Shot(f"d{number}.png") for number in range(len(DEFECTS))]
    tree = make_tree(tmp_path, train=shots, val=MANY)
    rows = read_index(tree.input / "train-index.tsv", tree.input)
    for number, ((image, path), defect) in enumerate(zip(rows, DEFECTS, strict=True)):
        named = Path(path).with_suffix(".txt" if defect.kind == "ark" else ".xml")
        Path(path).unlink()
        if defect.data is not None:
            named.write_bytes(defect.data)
        rows[number] = (image, str(named))
    write_index(tree.input / "train-index.tsv", rows)
    train, _, findings = tables(tree)
    kept = [defect.boxes for defect in DEFECTS if defect.boxes is not None]
    assert [boxes for boxes, _ in contents(train)] == kept
    told = [one for one in findings if one.source == "train-index.tsv"]
    for kind in {defect.finding for defect in DEFECTS} - {""}:
        expected = sum(defect.finding == kind for defect in DEFECTS)
        assert sum(one.count for one in told if one.kind == kind) == expected, kind
    gone = len(DEFECTS) - len(kept)
    print(f"{len(DEFECTS)} bad files: {len(kept)} images kept, {gone} left out, all told")


@pytest.mark.parametrize(
    "text", ["0, 1", "x, 1, 2, 3, 4", "9, 1, 2, 3, 4", "0, 5, 5, 1, 1", "0, 900, 900, 950, 950"]
)
def test_nothing_valid_in_the_whole_training_set(tmp_path: Path, text: str):
    tree = make_tree(tmp_path, train=MANY)
    for index in range(4):
        spoil(tree, Defect("", text.encode()), index)
    error = refused(tree)
    assert error.code == Code.DATASET and "train-index.tsv" in str(error)
    kinds_of_fault = "malformed line|class outside the task|box without extent|box outside"
    assert re.search(f"4 boxes left out, the first: ({kinds_of_fault})", str(error))


@pytest.mark.parametrize(("data", "kind"), [(None, "ark"), (b"<a", "voc"), (b"{", "ark")])
def test_all_annotations_missing_or_broken(tmp_path: Path, data: bytes | None, kind: str):
    tree = make_tree(tmp_path, kind=kind, train=MANY)
    tree.config["export_format"] = "none:raw"
    tree.write()
    for index in range(4):
        spoil(tree, Defect("", data, kind=kind), index)
    error = refused(tree)
    assert error.code == Code.DATASET and "annotations/m0." in str(error)
    assert "none:raw" in str(error)


def test_annotations_of_another_tool_only(tmp_path: Path):
    tree = make_tree(tmp_path, train=MANY)
    for index in range(4):
        spoil(tree, Defect("", b'{"data": {"image": "m0.png"}}'), index)
    error = refused(tree)
    assert error.code == Code.CONFIG and "COCO" in str(error) and "export_format" in str(error)


def test_a_shared_json_that_is_broken(tmp_path: Path):
    tree = make_tree(tmp_path, kind="coco", train=MANY)
    (tree.input / "annotations" / "coco-annotations.json").write_text('{"images": [')
    assert refused(tree).code == Code.DATASET


def test_rows_of_a_json_that_cannot_be_used(tmp_path: Path):
    tree = make_tree(tmp_path, kind="coco", train=MANY)
    path = tree.input / "annotations" / "coco-annotations.json"
    document = coco((*MANY, *SHOTS))
    good = document["annotations"][0]
    bad = [
        {"image_id": 999},
        {"image_id": [1]},
        {"category_id": 9},
        {"category_id": None},
        {"bbox": None},
        {"bbox": [1, 2, 3]},
        {"bbox": [1, 2, "x", 4]},
        {"bbox": [1, 2, float("nan"), 4]},
        {"bbox": [1, 2, 0, 4]},
        {"bbox": [1, 2, -3, 4]},
        {"bbox": [10**400, 2, 3, 4]},
    ]
    document["annotations"] += [{**good, **change} for change in bad] + ["no object", None]
    document["images"] += ["no object", {"id": 1000}, {"file_name": 3, "id": 1001}]
    document["images"] += [{"file_name": "m1.png", "id": None}]  # and one without an image id
    document["annotations"] += [{key: good[key] for key in ("id", "category_id", "bbox")}]
    path.write_text(json.dumps(document))
    train, _, findings = tables(tree)
    assert [boxes for boxes, _ in contents(train)] == [GOOD] * 4
    told = [one for one in findings if one.action == "dropped"]
    assert len(told) == len(bad) + 3
    print(f"{len(told)} bad rows, all told")


def test_of_many_defects_every_one_is_counted_and_every_good_line_is_kept(tmp_path: Path):
    """Nothing is lost: what is not in the table is in the findings."""
    shots = tuple(Shot(f"m{number}.png", (8, 8)) for number in range(300))
    tree = make_tree(tmp_path, train=shots, val=shots[:1])
    bad = (
        b"0, 1\n",
        b"x, 1, 1, 2, 2\n",
        b"5, 1, 1, 2, 2\n",
        b"0, 5, 5, 1, 1\n",
        b"0, 9, 9, 10, 10\n",
    )
    for index in range(300):
        spoil(tree, Defect("", b"0, 1, 1, 4, 4\n" + bad[index % 5] * 6 + b"1, 0, 0, 7, 7\n"), index)
    train, _, findings = tables(tree)
    told = sum(one.count for one in findings if one.action == "dropped")
    worded = [one for one in findings if one.kind == "class outside the task" and one.file]
    # Six bad lines in each of 300 files; the validation image has the first one's file.
    print(f"{told} bad lines in {len(shots)} files, {len(train.boxes)} good boxes")
    assert told == 6 * 300 + 6
    assert len(train) == 300 and len(train.boxes) == 600
    assert len(worded) == MOST_OF_A_KIND
    assert worded[0].file.endswith("m2.txt") and worded[0].detail.startswith("line 2")


# ---------------------------------------------------------------- index files


INDEX_LINES: list[tuple[bytes, list[tuple[str, str]]]] = [
    (b"/a.jpg\t/a.txt\n", [("/a.jpg", "/a.txt")]),
    (b"/a.jpg\t/a.txt", [("/a.jpg", "/a.txt")]),
    (b"\xef\xbb\xbf/a.jpg\t/a.txt\r\n", [("/a.jpg", "/a.txt")]),
    (b"\n \t \n\xef\xbb\xbf\n/a.jpg\t/a.txt\n\n", [("/a.jpg", "/a.txt")]),
    (b"  /a.jpg\t/a.txt \r\n", [("/a.jpg", "/a.txt")]),
    (b"/a.jpg \t /a.txt\n", [("/a.jpg", "/a.txt")]),
    (b"/a b.jpg\t/c d.txt\n", [("/a b.jpg", "/c d.txt")]),
    (b"/a.jpg\t/a.txt\tmore\tand more\n", [("/a.jpg", "/a.txt")]),
    (b"/a.jpg\n", [("/a.jpg", "")]),
    (b"/a.jpg\t\n", [("/a.jpg", "")]),
    (b"a.jpg\tb/a.txt\n", [("/root/a.jpg", "/root/b/a.txt")]),
    ("/\u732b.jpg\t/\u00fc.txt\n".encode(), [("/\u732b.jpg", "/\u00fc.txt")]),
    (b"/\xff.jpg\t/a.txt\n", [("/\udcff.jpg", "/a.txt")]),
    (b"/a.jpg\t/1.txt\n/a.jpg\t/2.txt\n", [("/a.jpg", "/1.txt"), ("/a.jpg", "/2.txt")]),
]


@pytest.mark.parametrize(("data", "expected"), INDEX_LINES, ids=str)
def test_index_lines(tmp_path: Path, data: bytes, expected: list[tuple[str, str]]):
    (tmp_path / "index.tsv").write_bytes(data)
    assert read_index(tmp_path / "index.tsv", Path("/root")) == expected


@pytest.mark.parametrize("data", [None, b"", b"\n \r\n\xef\xbb\xbf\n"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_index_with_nothing_in_it(tmp_path: Path, split: str, data: bytes | None):
    tree = make_tree(tmp_path, config={"export_format": "none:raw"})
    path = tree.input / f"{split}-index.tsv"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    error = refused(tree)
    assert error.code == Code.DATASET and str(path) in str(error) and "none:raw" in str(error)


def test_candidates_are_verbatim_and_come_once(tmp_path: Path):
    tree = make_tree(tmp_path, "mining")
    index = tree.input / "candidate-index.tsv"
    index.write_bytes(b"\xef\xbb\xbfz b.jpg\r\n\n/x/\xff.jpg\tsource\nz b.jpg\n a.jpg \n")
    task = tree.read()
    found = candidates(task)
    assert found == ["z b.jpg", "/x/\udcff.jpg", "a.jpg"]
    assert locate(task, found[0]) == f"{tree.input}/z b.jpg"
    assert locate(task, found[1]) == "/x/\udcff.jpg"
    for data in (b"", b"\n\n"):
        index.write_bytes(data)
        with pytest.raises(TaskError) as caught:
            candidates(task)
        assert caught.value.code == Code.DATASET and str(index) in str(caught.value)


def test_a_duplicate_line_and_a_missing_second_column_are_tolerated(tmp_path: Path):
    tree = make_tree(tmp_path)
    rows = read_index(tree.input / "train-index.tsv", tree.input)
    write_index(tree.input / "train-index.tsv", [rows[0], rows[0], (rows[1][0],)])
    train, _, findings = tables(tree)
    assert contents(train) == [EXPECTED[0], EXPECTED[0], ([], [])]
    (missing,) = (one for one in findings if one.kind == "image without annotations")
    assert missing.count == 1


# ---------------------------------------------------------------- pictures, all of section 7.6


def gradient(height: int, width: int) -> Image.Image:
    rows = np.linspace(0, 255, height * width).reshape(height, width)
    return Image.fromarray(rows.astype(np.uint8))


def save_png(mode: str) -> Callable[[Path], None]:
    return lambda path: gradient(24, 32).convert(mode).save(path, "PNG")


def save_deep(path: Path) -> None:
    Image.fromarray((np.arange(24 * 32).reshape(24, 32) * 80).astype(np.uint16)).save(path, "PNG")


def save_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient(24, 32).convert("RGB").save(path, "JPEG", exif=exif)


PICTURES: dict[str, Callable[[Path], None]] = {
    **{mode: save_png(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "I;16": save_deep,
    "CMYK": lambda path: gradient(24, 32).convert("CMYK").save(path, "JPEG"),
    "grey JPEG": lambda path: gradient(24, 32).save(path, "JPEG"),
    "BMP named png": lambda path: gradient(24, 32).save(path, "BMP"),
    "EXIF turned": save_turned,
}


@pytest.mark.parametrize("mode", PICTURES)
def test_pictures_of_any_mode_keep_their_stored_pixels(tmp_path: Path, mode: str):
    for kind in FORMATS:
        tree = make_tree(tmp_path / kind, kind=kind, train=MANY)
        path = tree.input / "assets" / "m0.png"
        PICTURES[mode](path)
        train, _, _ = tables(tree)
        assert contents(train)[0][0] == GOOD and train[0].size == (24, 32), kind
    picture = read_image(path, train[0].size)
    assert (picture.mode, picture.size) == ("RGB", (32, 24))
    stored = np.asarray(gradient(24, 32)).astype(int)
    shown = np.asarray(picture.convert("L")).astype(int)
    assert abs(stored - shown).mean() < (130 if mode == "1" else 12)  # neither turned nor clipped


@pytest.mark.parametrize(
    "data",
    [None, b"", b"junk", b"\xff\xd8\xff\xe0 cut", b"\x89PNG\r\n\x1a\n", "truncated", "folder"],
    ids=lambda data: str(data)[:12],
)
def test_a_picture_that_cannot_be_read_is_left_out(tmp_path: Path, data: bytes | str | None):
    tree = make_tree(tmp_path, train=MANY, val=MANY)
    path = tree.input / "assets" / "m0.png"
    whole = path.read_bytes()
    path.unlink()
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(whole[: len(whole) // 2] if data == "truncated" else data)
    train, val, findings = tables(tree)
    assert len(train) == len(val) == 3
    removed = [one for one in findings if one.action == "removed"]
    assert [one.file for one in removed] == [str(path)] * 2


@pytest.mark.parametrize("listed", [1, 300])
@pytest.mark.parametrize("split", ["train", "val"])
def test_no_picture_can_be_read(
    tmp_path: Path, split: str, listed: int, monkeypatch: pytest.MonkeyPatch
):
    """However many of the pictures have a finding of their own."""
    monkeypatch.setattr("trainer.readers.findings.MOST_OF_A_KIND", listed)
    tree = make_tree(tmp_path, train=MANY, val=tuple(Shot(f"v{n}.png") for n in range(2)))
    for path in (tree.input / "assets").glob("m*" if split == "train" else "v*"):
        path.write_bytes(b"junk")
    error = refused(tree)
    assert error.code == Code.IMAGE_FORMAT and f"{split}-index.tsv" in str(error)


def test_a_limit_to_damaged_pictures_may_be_asked_for(tmp_path: Path):
    tree = make_tree(tmp_path, train=MANY)
    (tree.input / "assets" / "m0.png").write_bytes(b"junk")
    assert len(tables(tree, max_bad_fraction=0.3)[0]) == 3
    with pytest.raises(TaskError) as caught:
        tables(tree, max_bad_fraction=0.2)
    assert caught.value.code == Code.DATASET


def test_images_lost_with_their_annotations_count_for_that_limit(tmp_path: Path):
    tree = make_tree(tmp_path, train=MANY)
    spoil(tree, Defect("", b"{"))
    assert len(tables(tree, max_bad_fraction=0.3)[0]) == 3
    with pytest.raises(TaskError, match="1 of 4 images"):
        tables(tree, max_bad_fraction=0.2)


def test_truncated_pictures_are_left_out_if_asked(tmp_path: Path):
    tree = make_tree(tmp_path, train=MANY)
    picture = tree.input / "assets" / "m0.png"
    whole = picture.with_suffix(".jpg")
    Image.open(picture).convert("RGB").resize((64, 64)).save(whole, quality=95)
    picture.write_bytes(whole.read_bytes()[:-40])
    assert len(tables(tree)[0]) == 4 and len(tables(tree, strict_images=True)[0]) == 3


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")  # the last one
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (10_100, 10_000)])
def test_extreme_sizes_stop_nothing(tmp_path: Path, size: tuple[int, int]):
    tree = make_tree(tmp_path, train=MANY)
    Image.new("1", size[::-1]).save(tree.input / "assets" / "m0.png")
    (tree.input / "annotations" / "m0.txt").write_text("0, 0, 0, 9, 9\n")
    train, _, _ = tables(tree)
    assert train[0].size == size
    assert contents(train)[0][0] == [[0, 0, min(10, size[1]), min(10, size[0])]]


# ---------------------------------------------------------------- size


def test_progress_is_told_and_reaches_its_end(tmp_path: Path):
    told: list[float] = []
    tables(make_tree(tmp_path), progress=told.append)
    assert told == sorted(told) and told[-1] == pytest.approx(1.0)


def test_a_large_index_is_kept_flat(tmp_path: Path):
    """Prints what it takes."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    for number in range(2000):
        rows = [(number % 3, 1, 2, 3 + number % 50, 9)] * 5
        (folder / f"{number}.txt").write_text(ark(rows))
    index = tmp_path / "train-index.tsv"
    with index.open("w") as file:
        for number in range(100_000):
            file.write(f"/in/assets/{number:040x}.jpg\t{folder}/{number % 2000}.txt\n")
    start = time.perf_counter()
    lines = read_index(index, tmp_path)
    read = time.perf_counter() - start
    some = lines[:20_000]
    start = time.perf_counter()
    split = read_split("train", some, AnnotationReader("abc"))
    parsed = time.perf_counter() - start
    print(f"{len(lines)} lines in {read:.2f} s, {len(some)} ark files in {parsed:.2f} s")
    assert len(lines) == 100_000 and split.table.box_counts.tolist() == [5] * len(some)
    kinds = {type(value) for value in vars(split.table).values() if value is not None}
    assert kinds == {str, tuple, torch.Tensor}


def test_a_json_of_all_images_is_parsed_once(tmp_path: Path):
    shots = [Shot(f"{number}.jpg") for number in range(3000)]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco(shots)))
    lines = [(f"/in/assets/{shot.name}", os.fspath(path)) for shot in shots]
    reader = AnnotationReader(NAMES)
    split = read_split("train", lines, reader)
    assert split.table.box_counts.tolist() == [1] * 3000
    assert len(reader._documents) == 1
