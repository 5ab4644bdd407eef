"""YOLO (data.yaml, images/, labels/) to a sample table."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.readers.classes import ClassMatch, foreign_class_findings, match_classes
from trainer.readers.findings import Finding, fold
from trainer.readers.samples import Sample, SampleTable
from trainer.settings.yaml_text import load_yaml, read_text
from vidt.errors import UserError, counted, shown
from vidt.images.files import ImageHeader, probe_images

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_yolo(
    root_or_yaml: str | os.PathLike[str], split: str, class_names: Sequence[str] | None = None
) -> tuple[SampleTable, list[Finding]]:
    """Read a split, "train" or "val", of a data.yaml or of the folder that holds it.

    Labels follow the yaml's names, or `class_names` if given; boxes of other classes are left out
    with a finding. A line is "class cx cy w h", optionally with a score, which is ignored, or
    "class x1 y1 x2 y2 ..." for a polygon, which becomes its bounding box. An image without a label
    file has no boxes. Coordinates are relative to the image as YOLO tools show it, rotated by its
    EXIF orientation. Images are numbered from 1 in the order of their paths.

    Raises UserError if the yaml or the split is missing or malformed, or has no image.
    """
    yaml_path = _yaml_path(Path(root_or_yaml))
    config = _load(yaml_path)
    classes = match_classes(str(yaml_path), _names(yaml_path, config.get("names")), class_names)
    paths = _image_paths(yaml_path, config, split)
    source = f"{yaml_path.name} {split}"
    findings: list[Finding] = []
    foreign: list[str] = []
    samples = []
    for image_id, (path, header) in enumerate(zip(paths, probe_images(paths), strict=True), 1):
        rows = _read_labels(path, source, image_id, classes, findings)
        foreign += [_own_name(config, row) for row in rows if classes.label_of[int(row[0])] < 0]
        size = _shown_size(header) if isinstance(header, ImageHeader) else (0, 0)
        samples.append(_to_sample(path, image_id, size, rows, classes))
    findings += foreign_class_findings(source, foreign)
    table = SampleTable.from_samples(samples, classes.names, classes.category_ids, source)
    return table, fold(findings)


def _yaml_path(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "data.yaml").is_file():
        return path / "data.yaml"
    found = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if len(found) != 1:
        raise UserError(f"{path}: {counted(len(found), 'yaml file')} in it; name the right one")
    return found[0]


def _load(yaml_path: Path) -> dict[str, Any]:
    try:
        config = load_yaml(read_text(yaml_path), yaml_path)
    except OSError as error:
        raise UserError(f"{yaml_path}: cannot be read ({error.strerror})") from error
    if not isinstance(config, dict):
        raise UserError(f"{yaml_path}: needs the keys names, train and val")
    return config


def _names(yaml_path: Path, names: Any) -> dict[int, str]:
    pairs = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(pairs, dict) or not all(isinstance(key, int) for key in pairs):
        raise UserError(f'{yaml_path}: "names" must list the class names, but is {shown(names)}')
    return {key: str(name) for key, name in pairs.items()}


def _own_name(config: dict[str, Any], row: list[float]) -> str:
    return str(config["names"][int(row[0])])


def _image_paths(yaml_path: Path, config: dict[str, Any], split: str) -> list[str]:
    """Images of a split: its entries are folders, or text files that list images."""
    entries = config.get(split) or (config.get("valid") if split == "val" else None)
    if not entries:
        raise UserError(f'{yaml_path}: has no entry "{split}"')
    paths: list[str] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        source = _resolve(yaml_path, config, str(entry))
        if source.is_file():
            lines = source.read_text().split("\n")
            paths += [str(source.parent / line.strip()) for line in lines if line.strip()]
        else:
            files = (Path(top) / name for top, _, names in os.walk(source) for name in names)
            paths += [str(file) for file in files if file.suffix.lower() in _SUFFIXES]
    if not paths:
        raise UserError(f'{yaml_path}: empty dataset: no images at "{split}: {entries}"')
    return sorted(set(paths))


def _resolve(yaml_path: Path, config: dict[str, Any], entry: str) -> Path:
    base = yaml_path.parent / str(config.get("path") or "")
    # In many exports entries start with ../ although the folders are next to the yaml.
    candidates = [base / entry, yaml_path.parent / entry, base / entry.removeprefix("../")]
    for path in candidates:
        if os.path.exists(path):  # False, too, for a name too long
            return path
    raise UserError(
        f"{yaml_path}: {shown(str(candidates[0]), 300)}: no such folder or list of images"
    )


def _label_path(image_path: str) -> Path:
    """The path with its last folder `images` replaced by `labels`; else next to the image."""
    parts = list(Path(image_path).parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_labels(
    image_path: str, source: str, image_id: int, classes: ClassMatch, findings: list[Finding]
) -> list[list[float]]:
    """Rows [class, cx, cy, w, h], relative, of known classes."""
    try:
        lines = _label_path(image_path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None:
            kind, detail = "malformed box", f"line {number}: {line[:80]!r} is no box or polygon"
        elif row[0] not in classes.label_of:
            kind, detail = "unknown category id", f"line {number}: class {row[0]:g} has no name"
        else:
            rows.append(row)
            continue
        findings.append(Finding(kind, "warning", "dropped", detail, source, image_path, image_id))
    return rows


def _parse(line: str) -> list[float] | None:
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        return None
    if len(values) in (5, 6):
        return values[:5]
    if len(values) < 7 or len(values) % 2 == 0:
        return None
    xs, ys = values[1::2], values[2::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return [values[0], (left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def _shown_size(header: ImageHeader) -> tuple[int, int]:
    height, width = header.size
    return (width, height) if header.orientation >= 5 else (height, width)


def _to_sample(
    path: str,
    image_id: int,
    size: tuple[int, int],
    rows: list[list[float]],
    classes: ClassMatch,
) -> Sample:
    known = [row for row in rows if classes.label_of[int(row[0])] >= 0]
    centre, extent = torch.tensor(known).reshape(-1, 5)[:, 1:].split(2, dim=1)
    scale = torch.tensor([size[1], size[0]] * 2)
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], 1) * scale
    return Sample(
        path=path,
        image_id=image_id,
        size=size,
        boxes=boxes,
        labels=torch.tensor([classes.label_of[int(row[0])] for row in known], dtype=torch.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=torch.zeros(len(known), dtype=torch.bool),
    )
