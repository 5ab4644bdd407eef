"""The platform's `/in` and `/out` in a test's folder: settings, indexes, pictures, annotations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ymir_adapter.protocol.task import Task, read_task

PROTOCOLS = (None, "1.0.0", "1.1.0")
FORMATS = ("ark", "voc", "coco")
NAMES = ("cat", "dog")
# (class, xmin, ymin, xmax, ymax), corners inclusive.
Row = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Shot:
    """A picture of grey noise and its annotated boxes."""

    name: str
    size: tuple[int, int] = (24, 32)  # (height, width)
    rows: Sequence[Row] = ((0, 2, 3, 11, 12),)


SHOTS = (
    Shot("a1.jpg", rows=((0, 2, 3, 11, 12), (1, 10, 10, 20, 19))),
    Shot("b2.png", size=(20, 20), rows=((1, 0, 0, 19, 19),)),
    Shot("c3.bmp", rows=()),
)


@dataclass
class Tree:
    """`root/in` and `root/out`; `read()` gives the task."""

    root: Path
    config: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)

    @property
    def input(self) -> Path:
        return self.root / "in"

    @property
    def output(self) -> Path:
        return self.root / "out"

    @property
    def env_file(self) -> Path:
        return self.input / "env.yaml"

    def write(self) -> "Tree":
        """Write both YAML files again."""
        self.env_file.write_text(yaml.safe_dump(self.env))
        (self.input / "config.yaml").write_text(yaml.safe_dump(self.config))
        return self

    def read(self) -> Task:
        return read_task(self.env_file)


def make_tree(
    root: Path,
    task: str = "training",
    *,
    protocol: str | None = "1.1.0",
    kind: str = "ark",
    config: Mapping[str, Any] | None = None,
    train: Sequence[Shot] = SHOTS,
    val: Sequence[Shot] = SHOTS[:2],
) -> Tree:
    """Write a complete task. Mining and inference (`mining`, `infer`, `mining+infer`) get the
    training pictures as candidates. An old platform (protocol None) writes five ark fields.
    """
    tree = Tree(root)
    for folder in ("in/assets", "in/annotations", "in/models", "out/models", "out/tensorboard"):
        (root / folder).mkdir(parents=True)
    flags = {f"run_{name}": name in task.split("+") for name in ("training", "mining", "infer")}
    tree.env = {
        "task_id": "t0000001",
        **flags,
        "input": {
            "root_dir": str(tree.input),
            "assets_dir": str(tree.input / "assets"),
            "annotations_dir": str(tree.input / "annotations"),
            "models_dir": str(tree.input / "models"),
            "config_file": str(tree.input / "config.yaml"),
        },
        "output": {
            "root_dir": str(tree.output),
            "models_dir": str(tree.output / "models"),
            "tensorboard_dir": str(tree.output / "tensorboard"),
            "training_result_file": str(tree.output / "models" / "result.yaml"),
            "mining_result_file": str(tree.output / "result.tsv"),
            "infer_result_file": str(tree.output / "infer-result.json"),
            "monitor_file": str(tree.output / "monitor.txt"),
        },
    }
    if protocol is not None:
        tree.env["protocol_version"] = protocol
        tree.env["output"]["executor_log_file"] = str(tree.output / "ymir-executor-out.log")
    tree.config = {
        "task_id": "t0000001",
        "class_names": list(NAMES),
        "gpu_id": "",
        "gpu_count": 0,
        **(config or {}),
    }
    fields = 5 if protocol is None else 7
    if task == "training":
        for split, shots in (("training", train), ("val", val)):
            index = tree.input / f"{'train' if split == 'training' else 'val'}-index.tsv"
            tree.env["input"][f"{split}_index_file"] = str(index)
            write_index(
                index, [(write_image(tree, s), annotate(tree, s, kind, fields)) for s in shots]
            )
        if kind == "coco":
            write_coco(tree, {shot.name: shot for shot in (*train, *val)}.values())
    else:
        index = tree.input / "candidate-index.tsv"
        tree.env["input"]["candidate_index_file"] = str(index)
        write_index(index, [(write_image(tree, shot),) for shot in train])
    return tree.write()


def write_index(path: Path, rows: Sequence[tuple[object, ...]]) -> None:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def write_image(tree: Tree, shot: Shot) -> Path:
    path = tree.input / "assets" / shot.name
    seed = sum(shot.name.encode())
    pixels = np.random.default_rng(seed).integers(60, 200, (*shot.size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def annotate(tree: Tree, shot: Shot, kind: str, fields: int = 7) -> Path:
    folder, stem = tree.input / "annotations", Path(shot.name).stem
    if kind == "coco":
        return folder / "coco-annotations.json"
    path = folder / f"{stem}.{'txt' if kind == 'ark' else 'xml'}"
    path.write_text(ark(shot.rows, fields) if kind == "ark" else voc(shot))
    return path


def ark(rows: Sequence[Row], fields: int = 7) -> str:
    more = ", -1.0, 0.0" if fields == 7 else ""
    return "".join(", ".join(map(str, row)) + more + "\n" for row in rows)


def voc(shot: Shot, names: Sequence[str] = NAMES) -> str:
    height, width = shot.size
    objects = "".join(
        f"<object><name>{names[kind]}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax><rotate_angle>0.0</rotate_angle>"
        "</bndbox></object>"
        for kind, x1, y1, x2, y2 in shot.rows
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{shot.name}</filename>{size}{objects}</annotation>"


def coco(shots: Sequence[Shot]) -> dict[str, Any]:
    images, annotations = [], []
    for number, shot in enumerate(shots, 1):
        height, width = shot.size
        images.append({"id": number, "file_name": shot.name, "height": height, "width": width})
        for kind, x1, y1, x2, y2 in shot.rows:
            box = [x1, y1, x2 - x1 + 1, y2 - y1 + 1]
            row = {"image_id": number, "category_id": kind, "bbox": box, "area": 0, "iscrowd": 0}
            annotations.append({"id": len(annotations), "segmentation": {}, **row})
    used = sorted({row["category_id"] for row in annotations})
    categories = [{"id": kind, "name": NAMES[kind]} for kind in used]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(tree: Tree, shots: Any) -> None:
    path = tree.input / "annotations" / "coco-annotations.json"
    path.write_text(json.dumps(coco(list(shots))))
