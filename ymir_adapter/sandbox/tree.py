"""Makes the folders that the platform mounts into a container, from COCO data.

File names are hashes of the content, in folders named by the last two characters. The platform uses
whole pixels and inclusive corners: a box from x1 to x2 becomes `x1, x2 - 1`. Before protocol 1.1.0
ark lines have five fields, and weights lie flat.

Faulty data are not repaired: the task must meet them as on the platform.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image

from trainer.readers.samples import Sample, SampleTable
from vidt.errors import UserError
from ymir_adapter.protocol.environment import INPUT_FILES, OUTPUT_FILES

TASKS = ("training", "mining", "infer", "mining+infer")
PROTOCOLS = ("none", "1.0.0", "1.1.0")
EXPORT_FORMATS = {"ark": "det-ark:raw", "voc": "det-voc:raw", "coco": "coco:raw"}
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp"}  # by content, as on the platform
TASK_ID = "sandbox"
STAGE = "default_best_stage"  # the platform's name for weights of an unknown stage


@dataclass(frozen=True)
class Tree:
    """The files below `root`."""

    root: Path

    @property
    def input(self) -> Path:
        return self.root / "in"

    @property
    def output(self) -> Path:
        return self.root / "out"

    @property
    def env_file(self) -> Path:
        return self.input / "env.yaml"

    @property
    def log(self) -> Path:
        return self.output / "ymir-executor-out.log"

    @property
    def monitor(self) -> Path:
        return self.output / "monitor.txt"


@dataclass(frozen=True)
class Request:
    """What a user of the platform chooses in its forms."""

    task: str = "training"
    protocol: str = "1.1.0"
    export_format: str = "ark"
    class_names: tuple[str, ...] = ()
    weights: tuple[Path, ...] = ()
    gpus: int = 0
    settings: Mapping[str, str] | None = None  # of the template, as typed

    @property
    def is_2x(self) -> bool:
        """True for a platform of 2.0 or later."""
        return self.protocol == "1.1.0"

    @property
    def runs(self) -> dict[str, bool]:
        return {f"run_{name}": name in self.task.split("+") for name in TASKS[:3]}


def make_tree(root: Path, request: Request, splits: Mapping[str, SampleTable]) -> Tree:
    """Writes `root/in` and `root/out`. `splits` are "train" and "val", or "candidate".

    Raises UserError if one of the two exists already or a setting cannot be sent.
    """
    tree = Tree(root)
    if request.protocol == "none" and request.export_format != "ark":
        raise UserError(
            f"--export-format {request.export_format}: a platform without a protocol version "
            "writes only ark"
        )
    for folder in (tree.input, tree.output):
        if folder.exists():
            raise UserError(f"{folder} exists already; remove it or choose another folder")
    settings = task_settings(request)
    models = tree.input / "models"
    for folder in (models, tree.input / "assets", tree.input / "annotations"):
        folder.mkdir(parents=True)
    weights = [copy_weights(path, models, request.is_2x) for path in request.weights]
    pictures = {split: copy_assets(table, tree) for split, table in splits.items()}
    indices = {split: write_index(tree, split, pictures[split], request) for split in pictures}
    if request.export_format == "coco" and request.task == "training":
        write_coco(tree.input / "annotations", pictures, request.class_names)
    write_yaml(tree.env_file, environment(tree, request, indices))
    write_yaml(tree.input / "config.yaml", {**settings, **injected(request, weights)})
    make_output(tree, request)
    return tree


def task_settings(request: Request) -> dict[str, Any]:
    """The template(s) of the task as the web forms send them. A field is a number where the
    template has one, and text otherwise. Training sends a cleared number as null and leaves out
    empty text; the other tasks leave out everything that is zero or empty.

    Raises UserError for text where the template has a number.
    """
    names = request.task.split("+")
    values = {key: value for name in names for key, value in read_template(name).items()}
    for key, typed in (request.settings or {}).items():
        values[key] = _as_form(key, typed, values.get(key))
    if "training" in names:
        values["export_format"] = EXPORT_FORMATS[request.export_format]
        return {key: value for key, value in values.items() if value != ""}
    return {key: value for key, value in values.items() if value}


def read_template(name: str) -> dict[str, Any]:
    """The template of "training", "mining" or "infer", with its defaults."""
    path = Path(__file__).parents[1] / "templates" / f"{name}-template.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _as_form(key: str, typed: str, default: object) -> object:
    if isinstance(default, str | bool):
        return typed
    if typed == "":
        return None
    for kind in (int, float):
        try:
            return kind(typed)
        except ValueError:
            continue
    if isinstance(default, int | float):
        raise UserError(f"--set {key}={typed}: the form takes only a number here, as {default}")
    return typed


def injected(request: Request, weights: Sequence[Path]) -> dict[str, Any]:
    """The keys that the platform adds to `config.yaml`."""
    values: dict[str, Any] = {
        "task_id": TASK_ID,
        "class_names": list(request.class_names),
        "gpu_count": request.gpus,
        "gpu_id": ",".join(str(number) for number in range(request.gpus)),
    }
    if request.is_2x:
        values["object_type"] = 2
    if request.task != "training":
        values |= {name: request.runs[name] for name in ("run_infer", "run_mining")}
    if weights:
        training = request.task == "training"
        key = "pretrained_model_params" if training else "model_params_path"
        values[key] = [str(path) for path in weights]
    return values


def environment(tree: Tree, request: Request, indices: Mapping[str, Path]) -> dict[str, Any]:
    """`env.yaml`, with this tree's paths in place of /in and /out."""
    index_files: dict[str, Any] = dict.fromkeys(
        (key for key in INPUT_FILES if key.endswith("index_file")), ""
    )
    names = {"train": "training_index_file", "val": "val_index_file"}
    index_files |= {
        names.get(split, f"{split}_index_file"): path for split, path in indices.items()
    }
    inputs = {key: tree.input / name for key, name in INPUT_FILES.items()}
    outputs = {key: tree.output / name for key, name in OUTPUT_FILES.items()}
    values: dict[str, Any] = {
        "task_id": TASK_ID,
        **request.runs,
        "input": {"root_dir": tree.input, **inputs, **index_files},
        "output": {"root_dir": tree.output, **outputs},
    }
    if request.protocol != "none":
        values["protocol_version"] = request.protocol
    if request.is_2x:
        values["output"]["executor_log_file"] = tree.log
        values["manifest_file"] = "/img-man/manifest.yaml"
    for side in ("input", "output"):
        values[side] = {name: str(path) for name, path in values[side].items()}
    return values


def make_output(tree: Tree, request: Request) -> None:
    """`out` before a start: two folders and a first record, writable by any user."""
    for name in ("models", "tensorboard"):
        (tree.output / name).mkdir(parents=True)
    tree.log.touch()
    if request.task == "training":
        (tree.output / "tensorboard" / "executor.log").symlink_to(tree.log)
    tree.monitor.write_text(f"{TASK_ID}\t{time.time():.6f}\t0.00\t1\n", encoding="utf-8")
    for path in (tree.output, *tree.output.rglob("*")):
        path.chmod(0o777)


def copy_weights(path: Path, models: Path, is_2x: bool) -> Path:
    """Copies a weights file to where the task will find it. Returns the copy."""
    target = (models / STAGE if is_2x else models) / path.name
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
    return target


def copy_assets(table: SampleTable, tree: Tree) -> dict[Path, Sample]:
    """Copies the images of a table. A duplicate counts once: to the platform an image is its
    content.
    """
    pictures: dict[Path, Sample] = {}
    for sample in table:
        pictures.setdefault(copy_asset(Path(sample.path), tree.input / "assets"), sample)
    return pictures


def copy_asset(path: Path, assets: Path) -> Path:
    """Copies an image to the assets. Returns the copy. Raises UserError if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    digest = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    target = assets / digest[-2:] / f"{digest}.{_extension(path)}"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content)
    return target


def _extension(path: Path) -> str:
    try:
        with Image.open(path) as image:
            return EXTENSIONS.get(str(image.format), "unknown")
    except OSError:  # a damaged file: the task must meet it
        return "unknown"


def write_index(tree: Tree, split: str, pictures: Mapping[Path, Sample], request: Request) -> Path:
    """Writes the index file of a split, and the annotation files that it names."""
    index = tree.input / f"{split}-index.tsv"
    with index.open("w", encoding="utf-8") as file:
        for asset, sample in pictures.items():
            columns = [asset]
            if split != "candidate":
                columns.append(write_annotation(tree.input / "annotations", asset, sample, request))
            file.write("\t".join(map(str, columns)) + "\n")
    return index


def write_annotation(annotations: Path, asset: Path, sample: Sample, request: Request) -> Path:
    """Writes the annotation file of an image. Returns its path for the index."""
    if request.export_format == "coco":
        return annotations / "coco-annotations.json"  # one for all, written at the end
    folder = annotations / asset.parent.name
    folder.mkdir(exist_ok=True)
    corners = inclusive_corners(sample)
    if request.export_format == "ark":
        path = folder / f"{asset.stem}.txt"
        path.write_text(ark_text(sample, corners, quality=request.is_2x), encoding="utf-8")
    else:
        path = folder / f"{asset.stem}.xml"
        names = [request.class_names[label] for label in sample.labels.tolist()]
        ElementTree.ElementTree(voc_element(asset, names, corners)).write(path, encoding="utf-8")
    return path


def inclusive_corners(sample: Sample) -> np.ndarray:
    """The first and the last pixel of each box, int64 [n, 4] xyxy. Without width the last is
    before the first.
    """
    corners = np.floor(np.nan_to_num(sample.boxes.numpy().astype(np.float64)) + 0.5)
    return corners.astype(np.int64) - np.array([0, 0, 1, 1])


def ark_text(sample: Sample, corners: np.ndarray, *, quality: bool) -> str:
    """Lines `class, xmin, ymin, xmax, ymax`, since protocol 1.1.0 with quality and angle."""
    more = ", -1.0, 0.0" if quality else ""
    labels = sample.labels.tolist()
    return "".join(
        f"{label}, {', '.join(map(str, row))}{more}\n"
        for label, row in zip(labels, corners.tolist(), strict=True)
    )


def voc_element(asset: Path, names: Sequence[str], corners: np.ndarray) -> ElementTree.Element:
    """As the platform writes it: names in lower case, no bndbox for a box without area."""
    root = ElementTree.Element("annotation")
    _child(root, "filename", asset)
    width, height = _stored_size(asset)
    size = _child(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        _child(size, tag, value)
    for name, row in zip(names, corners.tolist(), strict=True):
        element = _child(root, "object")
        _child(element, "name", name.strip().lower())
        _child(element, "difficult", 0)
        if row[2] >= row[0] and row[3] >= row[1]:
            box = _child(element, "bndbox")
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), row, strict=True):
                _child(box, tag, value)
            _child(box, "rotate_angle", 0.0)
        _child(element, "box_quality", -1.0)
    return root


def _child(parent: ElementTree.Element, tag: str, value: object = "") -> ElementTree.Element:
    child = ElementTree.SubElement(parent, tag)
    child.text = str(value)
    return child


def write_coco(
    annotations: Path, pictures: Mapping[str, Mapping[Path, Sample]], class_names: Sequence[str]
) -> None:
    """One file for all splits. Category ids count from 0; only classes that occur are listed."""
    images: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for asset, sample in {a: s for split in pictures.values() for a, s in split.items()}.items():
        width, height = _stored_size(asset)
        image = {"id": len(images) + 1, "file_name": asset.name, "width": width, "height": height}
        images.append(image)
        for label, crowd, (x1, y1, x2, y2) in zip(
            sample.labels.tolist(),
            sample.crowd.tolist(),
            inclusive_corners(sample).tolist(),
            strict=True,
        ):
            row = {"id": len(rows) + 1, "image_id": image["id"], "category_id": label}
            row |= {"bbox": [x1, y1, x2 - x1 + 1, y2 - y1 + 1], "area": 0, "segmentation": {}}
            rows.append(row | {"iscrowd": int(crowd)})
    occurring = sorted({row["category_id"] for row in rows})
    categories = [{"id": label, "name": class_names[label]} for label in occurring]
    document = {"images": images, "annotations": rows, "categories": categories}
    (annotations / "coco-annotations.json").write_text(json.dumps(document), encoding="utf-8")


def _stored_size(path: Path) -> tuple[int, int]:
    """(width, height) as stored; (0, 0) for a damaged file."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        return 0, 0


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
