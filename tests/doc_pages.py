"""The blocks of the documentation's pages, and the small data sets that their commands read, as
COCO, Pascal VOC and YOLO files.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tiny_runs import random_pictures, write_split

MARK = re.compile(r"<!-- not run here: (.+) -->")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str  # the word after the fence
    title: str  # the words after that: a file of which the block is the content
    text: str
    why_not: str | None  # the page's reason why it is not run

    @property
    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    mark, open_at, body = None, 0, [""]
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```") and not open_at:
            open_at, head, body = number, line[3:], []
        elif line.startswith("```"):
            kind, _, title = head.partition(" ")
            text = "\n".join(body) + "\n"
            found.append(Block(page.name, open_at, kind, title, text, mark))
            mark, open_at = None, 0
        elif open_at:
            body.append(line)
        elif line.strip():
            match = MARK.fullmatch(line)
            mark = match.group(1) if match else None
    assert not open_at, f"{page.name}: the block of line {open_at} does not end"
    return found


def loose_coco(root: Path, folder: str) -> None:
    """Write train.json, val.json and one folder with the images of both."""
    for split, seed in (("train", 5), ("val", 6)):
        write_split(root, split, random_pictures(6, seed))
        file = root / f"annotations/instances_{split}2017.json"
        document = json.loads(file.read_text())
        (root / folder).mkdir(exist_ok=True)
        for image in document["images"]:
            source = root / f"{split}2017" / image["file_name"]
            image["file_name"] = f"{split}-{image['file_name']}"
            source.rename(root / folder / image["file_name"])
        (root / f"{split}.json").write_text(json.dumps(document))
        shutil.rmtree(root / f"{split}2017")
    shutil.rmtree(root / "annotations")


def objects_of(coco: Path, split: str) -> Iterator[tuple[Path, int, int, list[tuple]]]:
    """Path, width, height and (class index, name, x, y, width, height) of objects, by image."""
    document = json.loads((coco / f"annotations/instances_{split}2017.json").read_text())
    ids = sorted(category["id"] for category in document["categories"])
    names = {category["id"]: category["name"] for category in document["categories"]}
    for image in document["images"]:
        rows = [row for row in document["annotations"] if row["image_id"] == image["id"]]
        objects = [
            (ids.index(row["category_id"]), names[row["category_id"]], *row["bbox"]) for row in rows
        ]
        path = coco / f"{split}2017" / image["file_name"]
        yield path, image["width"], image["height"], objects


def write_voc(coco: Path, root: Path) -> None:
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True)
    for split in ("train", "val"):
        stems = []
        for path, width, height, objects in objects_of(coco, split):
            stems.append(f"{split}{path.stem}")
            Image.open(path).save(root / f"JPEGImages/{stems[-1]}.jpg")
            size = f"<size><width>{width}</width><height>{height}</height></size>"
            things = "".join(
                f"<object><name>{name}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
                f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for _, name, x, y, w, h in objects
            )
            (root / f"Annotations/{stems[-1]}.xml").write_text(
                f"<annotation>{size}{things}</annotation>"
            )
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems))


def write_raccoons(voc: Path, root: Path) -> None:
    """The images of a Pascal VOC folder as labelImg leaves them, all objects of one class."""
    shutil.copytree(voc / "JPEGImages", root / "images")
    (root / "annotations").mkdir()
    for path in (voc / "Annotations").iterdir():
        text = re.sub("<name>[^<]+</name>", "<name>raccoon</name>", path.read_text())
        (root / "annotations" / path.name).write_text(text)


def write_yolo(coco: Path, root: Path) -> None:
    names: dict[int, str] = {}
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for path, width, height, objects in objects_of(coco, split):
            shutil.copy(path, root / "images" / split)
            names |= {index: name for index, name, *_ in objects}
            lines = [
                f"{index} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
                for index, _, x, y, w, h in objects
            ]
            (root / "labels" / split / f"{path.stem}.txt").write_text("".join(lines))
    in_order = [names[index] for index in sorted(names)]
    data = {"train": "images/train", "val": "images/val", "names": in_order}
    (root / "data.yaml").write_text(json.dumps(data))  # JSON is YAML
