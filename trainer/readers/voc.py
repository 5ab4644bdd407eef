"""Pascal VOC (Annotations, ImageSets/Main, JPEGImages) to a sample table."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from trainer.readers.classes import ClassMatch, foreign_class_findings, match_classes
from trainer.readers.findings import Finding, fold
from trainer.readers.samples import Sample, SampleTable
from vidt.errors import UserError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class _Object:
    name: str
    box: tuple[float, float, float, float]  # xyxy, pixels
    difficult: bool


@dataclass(frozen=True)
class _Picture:
    path: str
    size: tuple[int, int]  # (height, width)
    objects: list[_Object]


def read_voc(
    root: str | os.PathLike[str], split: str, class_names: Sequence[str] | None = None
) -> tuple[SampleTable, list[Finding]]:
    """Read a split of one VOC folder, or of all VOC20xx folders in `root` that have the split.

    Labels follow the sorted class names, or `class_names` if given; boxes of other classes are
    left out with a finding. VOC counts pixels from 1 and includes both corners, so a box becomes
    (xmin - 1, ymin - 1, xmax, ymax). Difficult objects become crowd regions, which training and
    scoring ignore. Images are numbered from 1.

    Raises UserError if no folder has the split, or if none of its annotations can be read.
    """
    pictures: list[_Picture] = []
    findings: list[Finding] = []
    split_files = _split_files(Path(root), split)
    for split_file in split_files:
        _read_year(split_file, pictures, findings)
    if not pictures:
        raise UserError(f"{split_files[0]}: empty dataset: no image in it has annotations")
    own_names = sorted({thing.name for picture in pictures for thing in picture.objects})
    if class_names is not None:
        own_names = sorted({*own_names, *class_names})
    source = f"{Path(root).name}/{split}.txt"
    classes = match_classes(source, dict(enumerate(own_names, 1)), class_names)
    names = (thing.name for picture in pictures for thing in picture.objects)
    findings += foreign_class_findings(source, (n for n in names if n not in classes.names))
    samples = [_to_sample(index, picture, classes) for index, picture in enumerate(pictures, 1)]
    table = SampleTable.from_samples(samples, classes.names, classes.category_ids, source)
    return table, fold(findings)


def _split_files(root: Path, split: str) -> list[Path]:
    folders = [root, *sorted(root.glob("VOC20*")), *sorted(root.glob("VOCdevkit/VOC20*"))]
    files = [folder / "ImageSets" / "Main" / f"{split}.txt" for folder in folders]
    found = [file for file in files if file.is_file()]
    if not found:
        raise UserError(f"{files[0]}: not found; {root} must be a VOC folder or hold VOC20xx ones")
    return found


def _read_year(split_file: Path, pictures: list[_Picture], findings: list[Finding]) -> None:
    folder = split_file.parents[2]
    source = f"{folder.name}/{split_file.name}"
    image_dir = folder / "JPEGImages"
    if not image_dir.is_dir():
        raise UserError(f"{image_dir}: no such image folder")
    file_names = {name.rsplit(".", 1)[0]: name for name in sorted(os.listdir(image_dir))}
    for line in split_file.read_text("utf-8-sig", "surrogateescape").splitlines():
        if not line.strip():
            continue
        stem = line.split()[0]  # split files of one class have "stem 1" or "stem -1"
        path = str(image_dir / file_names.get(stem, f"{stem}.jpg"))
        xml_path = folder / "Annotations" / f"{stem}.xml"
        try:
            tree = ElementTree.parse(xml_path).getroot()
        except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
            # Kept without boxes, the image would train its objects as background.
            detail = f"{xml_path.name} cannot be read ({error})"
            findings.append(
                Finding("unreadable annotations", "error", "removed", detail, source, path)
            )
            continue
        pictures.append(_parse(path, tree, source, len(pictures) + 1, findings))


def _parse(
    path: str, tree: ElementTree.Element, source: str, image_id: int, findings: list[Finding]
) -> _Picture:
    objects = []
    for number, element in enumerate(tree.findall("object"), 1):
        name = (element.findtext("name") or "").strip()
        try:
            corners = [float(element.findtext(f"bndbox/{key}", "")) for key in _CORNERS]
        except ValueError:
            corners = []
        if not name or not corners:
            detail = f"object {number} needs a name and a bndbox of four numbers"
            findings.append(
                Finding("malformed box", "warning", "dropped", detail, source, path, image_id)
            )
            continue
        xmin, ymin, xmax, ymax = corners
        difficult = element.findtext("difficult", "0").strip() not in ("0", "")
        objects.append(_Object(name, (xmin - 1, ymin - 1, xmax, ymax), difficult))
    return _Picture(path, _size(tree), objects)


def _size(tree: ElementTree.Element) -> tuple[int, int]:
    """(height, width), (0, 0) if not given."""
    try:
        height, width = int(tree.findtext("size/height", "")), int(tree.findtext("size/width", ""))
    except ValueError:
        return 0, 0
    return (height, width) if height > 0 and width > 0 else (0, 0)


def _to_sample(image_id: int, picture: _Picture, classes: ClassMatch) -> Sample:
    kept = [thing for thing in picture.objects if thing.name in classes.names]
    boxes = torch.tensor([thing.box for thing in kept], dtype=torch.float32).reshape(-1, 4)
    return Sample(
        path=picture.path,
        image_id=image_id,
        size=picture.size,
        boxes=boxes,
        labels=torch.tensor([classes.names.index(thing.name) for thing in kept], dtype=torch.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=torch.tensor([thing.difficult for thing in kept], dtype=torch.bool),
    )
