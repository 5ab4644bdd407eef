"""How many planted annotation errors `vidt audit` finds: 50 of each kind in embedded images.

    python benchmarks/audit.py --folder planted
        audited by a detector that was trained on the errors
    python benchmarks/audit.py --folder planted --images_seed 1 --weights output/best.safetensors
        other images of the same kind, audited by a detector of the main job, which never saw them

Writes the images with the errors to FOLDER/data, trains on them by the recipe of the embedded
dataset (skipped with --weights), runs `vidt audit`, and prints how many errors of each kind are
among the first 100 rows of that kind. The audit reads the annotations as they are; the list of
errors, FOLDER/planted.json, is for this program alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from trainer.data.shapes import CLASS_NAMES, write_shapes
from trainer.settings import config

PER_KIND = 50
ROWS = 100  # of each kind that are read
KINDS = {  # the name of each kind of error in audit.json
    "removed": "forgotten object",
    "moved": "wrong box",
    "relabelled": "wrong class",
    "invented": "unsupported object",
    "doubled": "doubled picture",
}
RECIPE = Path(config.__file__).parent / "recipes" / "shapes.yaml"
Boxes = list[list[float]]  # xywh, pixels


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Of boxes xywh."""
    low = [max(one[axis], other[axis]) for axis in (0, 1)]
    high = [min(one[axis] + one[axis + 2], other[axis] + other[axis + 2]) for axis in (0, 1)]
    common = max(0.0, high[0] - low[0]) * max(0.0, high[1] - low[1])
    return common / (one[2] * one[3] + other[2] * other[3] - common)


def plant(folder: Path, seed: int = 0, images_seed: int = 0) -> list[dict[str, Any]]:
    """Writes the dataset to folder/data and the list of errors to folder/planted.json. An image has
    one error at most.
    """
    source = write_shapes(folder, seed=images_seed)
    shutil.copytree(source, folder / "data")
    path = folder / "data" / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    random = np.random.default_rng(seed)
    images = {each["id"]: each for each in document["images"]}
    order = random.permutation(sorted(images)).tolist()
    planted: list[dict[str, Any]] = []
    for number, image_id in enumerate(order[: PER_KIND * len(KINDS)]):
        kind = list(KINDS)[number % len(KINDS)]
        if kind == "doubled":
            planted.append(_double(document, images[image_id], folder / "data/train2017", random))
        else:
            planted.append(_change(document, images[image_id], kind, random))
    path.write_text(json.dumps(document))
    (folder / "planted.json").write_text(json.dumps(planted, indent=1))
    return planted


def _change(
    document: dict[str, Any], image: dict[str, Any], kind: str, random: np.random.Generator
) -> dict[str, Any]:
    """An error in the annotations of an image, made in the document."""
    rows = [each for each in document["annotations"] if each["image_id"] == image["id"]]
    chosen = rows[int(random.integers(len(rows)))]
    error = {"kind": kind, "image_id": image["id"], "annotation_id": chosen["id"]}
    error["bbox"] = chosen["bbox"]
    if kind == "removed":
        document["annotations"].remove(chosen)
    elif kind == "moved":
        _set_box(chosen, _moved(chosen["bbox"], image, random))
    elif kind == "relabelled":
        others = list(range(1, len(CLASS_NAMES) + 1))
        others.remove(chosen["category_id"])
        chosen["category_id"] = int(random.choice(others))
    else:
        box = _empty_place([each["bbox"] for each in rows], image, random)
        label = int(random.integers(1, len(CLASS_NAMES) + 1))
        new = {"id": max(each["id"] for each in document["annotations"]) + 1, "iscrowd": 0}
        new |= {"image_id": image["id"], "category_id": label}
        _set_box(new, box)
        document["annotations"].append(new)
        error |= {"annotation_id": new["id"], "bbox": box}
    return error


def _set_box(annotation: dict[str, Any], box: list[float]) -> None:
    annotation |= {"bbox": box, "area": box[2] * box[3], "segmentation": []}


def _moved(box: Sequence[float], image: dict[str, Any], random: np.random.Generator) -> list[float]:
    """The box shifted and stretched until its IoU with itself is from 0.3 to 0.6."""
    while True:
        x, y, width, height = box
        new_width, new_height = np.array([width, height]) * random.uniform(0.7, 1.4, 2)
        new_x, new_y = np.array([x, y]) + np.array([width, height]) * random.uniform(-0.5, 0.5, 2)
        new = [round(float(value), 1) for value in (new_x, new_y, new_width, new_height)]
        if _inside(new, image) and 0.3 <= iou(box, new) <= 0.6:
            return new


def _empty_place(boxes: Boxes, image: dict[str, Any], random: np.random.Generator) -> list[float]:
    """A box of an object's size that hardly touches the others."""
    side = image["width"]
    most = 0.0
    while True:
        most += 0.001  # in an image that is full, more may be touched
        size = random.uniform(side / 8, side / 3, 2)
        corner = random.uniform(0, side - size)
        new = [round(float(value), 1) for value in (*corner, *size)]
        if _inside(new, image) and all(iou(box, new) <= most for box in boxes):
            return new


def _inside(box: Sequence[float], image: dict[str, Any]) -> bool:
    x, y, width, height = box
    return x >= 0 and y >= 0 and x + width <= image["width"] and y + height <= image["height"]


def _double(
    document: dict[str, Any], image: dict[str, Any], folder: Path, random: np.random.Generator
) -> dict[str, Any]:
    """A copy of an image with its annotations: another size and brightness, saved as JPEG."""
    scale, brightness = float(random.uniform(0.8, 1.3)), float(random.uniform(0.9, 1.1))
    side = round(scale * image["width"])
    copy = Image.open(folder / image["file_name"]).resize((side, side), Image.Resampling.BICUBIC)
    twin = max(each["id"] for each in document["images"]) + 1
    name = f"{twin:06d}.jpg"
    ImageEnhance.Brightness(copy).enhance(brightness).save(folder / name, quality=80)
    document["images"].append({"id": twin, "file_name": name, "width": side, "height": side})
    scale = side / image["width"]
    for each in [each for each in document["annotations"] if each["image_id"] == image["id"]]:
        new = each | {"id": max(each["id"] for each in document["annotations"]) + 1}
        new["image_id"] = twin
        _set_box(new, [round(scale * value, 2) for value in each["bbox"]])
        document["annotations"].append(new)
    return {"kind": "doubled", "image_id": image["id"], "twin": twin}


def is_found(error: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    """Whether one of the rows, all of the error's kind, is about the error."""
    if error["kind"] == "doubled":
        return any(
            {each["image_id"], each["twin_id"]} == {error["image_id"], error["twin"]}
            for each in rows
        )
    if error["kind"] == "removed":
        return any(
            each["image_id"] == error["image_id"]
            and iou(_xywh(each["suggested"]["box"]), error["bbox"]) >= 0.5
            for each in rows
        )
    return any(each["annotation_id"] == error["annotation_id"] for each in rows)


def _xywh(box: Sequence[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def vidt(*words: object) -> None:
    """Runs a subcommand of `vidt`; ends the program if it fails."""
    command = [sys.executable, "-m", "trainer.commands.command_line", *map(str, words)]
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--folder", type=Path, required=True, help="folder of what is written")
    flags.add_argument("--weights", type=Path, help="audit by these; default: train on FOLDER/data")
    flags.add_argument("--seed", type=int, default=0, help="of the errors")
    flags.add_argument("--images_seed", type=int, default=0, help="of the images; 0: embedded")
    given = flags.parse_args()
    folder, list_path = given.folder, given.folder / "planted.json"
    if not list_path.exists():
        plant(folder, given.seed, given.images_seed)
    planted = json.loads(list_path.read_text())
    data = ("--coco_path", folder / "data")
    weights = given.weights
    if weights is None:
        vidt("train", "--config", RECIPE, *data, "--output_dir", folder / "run")
        weights = folder / "run" / "last.safetensors"
    vidt("audit", weights, *data, "--split", "train", "--output_dir", folder / "audit")
    document = json.loads((folder / "audit" / "audit.json").read_text())
    for kind, name in KINDS.items():
        errors = [each for each in planted if each["kind"] == kind]
        rows = [each for each in document["findings"] if each["kind"] == name]
        found = sum(is_found(error, rows[:ROWS]) for error in errors)
        print(
            f"{kind:<11} {found:>3} of {len(errors)} among the first {min(ROWS, len(rows))} "
            f"of {len(rows)} rows ({name})"
        )


if __name__ == "__main__":
    main()
