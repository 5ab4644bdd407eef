"""YOLO (data.yaml, images/, labels/) to a sample table."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.readers.classes import ClassMatch, foreign_class_findings, match_classes
from trainer.readers.findings import FilesSeen, Finding, FindingList, fold
from trainer.readers.samples import Sample, SampleTable
from trainer.readers.values import (
    existing_name,
    number_of,
    read_text,
    shortened,
    walk,
    whole_number,
)
from trainer.settings.yaml_text import load_yaml, read_limited
from vidt.errors import UserError, counted, shown
from vidt.images.files import ImageHeader, probe_images
from vidt.images.formats import is_picture

_FORM = '"class x y width height" in fractions of the image'
_LARGEST_FRACTION = 2.0  # beyond this, coordinates are taken for pixels
# What lines other than boxes become.
_FORMS = {
    "polygon": "its bounding box is used",
    "score": "a sixth number is read as a score and ignored",
    "keypoints": "the first four numbers are the box; keypoints are ignored",
}
_NOTHING = ("", "~", "null", "Null", "NULL")  # YAML's null


def read_yolo(
    root_or_yaml: str | os.PathLike[str],
    split: str,
    class_names: Sequence[str] | None = None,
    *,
    seen: FilesSeen | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[SampleTable, list[Finding]]:
    """Read a split, "train", "val" or "test", of a data.yaml or of the folder that holds it; for a
    folder without one, `config` stands for its entries.

    Labels follow the yaml's names, or `class_names` if given; boxes of other classes are left out
    with a finding. A line is "class cx cy w h", optionally with a score, which is ignored, or
    "class x1 y1 x2 y2 ..." for a polygon, which becomes its bounding box; where the yaml has
    `kpt_shape`, keypoints follow the box and are ignored. An image without a label file has no
    boxes; one whose label file has lines but none that can be read is left out. Coordinates are
    relative to the image with its sides as YOLO tools take them: EXIF orientations 5 to 8 exchange
    width and height, and the image is turned; one that is square or only mirrored or upside down
    (2 to 4) stays as stored, because its size does not tell, and the dataset check says so. Images
    are numbered from 1 in the order of their paths. Files that are dealt with are added to `seen`.

    Raises UserError if the yaml or the split is missing or malformed, or has no image.
    """
    yaml_path = Path(root_or_yaml) if config is not None else _yaml_path(Path(root_or_yaml))
    config = load_data_yaml(yaml_path) if config is None else config
    own_names = _names(yaml_path, config.get("names"))
    classes = match_classes(str(yaml_path), own_names, class_names)
    reader = _Reader(f"{yaml_path.name} {split}", classes, _num_keypoint_values(yaml_path, config))
    reader.check_count(config, len(own_names), yaml_path)
    seen = seen or FilesSeen()
    seen.files.add(os.path.normpath(yaml_path))
    paths = _image_paths(yaml_path, config, split, reader, seen)
    foreign: list[str] = []
    samples = []
    for image_id, (path, header) in enumerate(zip(paths, probe_images(paths), strict=True), 1):
        rows = reader.read_labels(path, image_id)
        seen.files.update((os.path.normpath(path), os.path.normpath(label_path(path))))
        seen.folders.update((os.path.dirname(path), str(label_path(path).parent)))
        if rows is None:
            continue
        foreign += [own_names[int(row[0])] for row in rows if classes.label_of[int(row[0])] < 0]
        size = _shown_size(header) if isinstance(header, ImageHeader) else (0, 0)
        samples.append(_to_sample(path, image_id, size, rows, classes))
    findings = [*reader.findings, *reader.summary(paths)]
    findings += foreign_class_findings(reader.source, foreign, classes.names)
    table = SampleTable.from_samples(samples, classes.names, classes.category_ids, reader.source)
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


def load_data_yaml(yaml_path: Path) -> dict[str, Any]:
    """The entries; every value is text, so that classes may be called yes, no, 1.0 or 007."""
    try:
        config = load_yaml(read_limited(yaml_path), yaml_path, as_text=True)
    except OSError as error:
        raise UserError(f"{yaml_path}: cannot be read ({error.strerror})") from error
    if not isinstance(config, dict):
        raise UserError(f"{yaml_path}: needs the keys names, train and val")
    return {key: value for key, value in config.items() if value not in _NOTHING}


def _names(yaml_path: Path, names: Any) -> dict[int, str]:
    pairs = dict(enumerate(names)) if isinstance(names, list) else names
    keys = [whole_number(key) for key in pairs] if isinstance(pairs, dict) else [None]
    if None in keys or not all(isinstance(name, str) for name in pairs.values()):
        raise UserError(
            f'{yaml_path}: "names" must list the class names, but is '
            f"{names if names is None else shortened(_flat(names))}"
        )
    named = zip(keys, pairs.values(), strict=True)
    return {key: name for key, name in named if key is not None}


def _flat(value: Any) -> Any:
    """A value without what is nested in it, which aliases can make endless."""
    return [type(each).__name__ for each in value][:5] if isinstance(value, list | dict) else value


def _num_keypoint_values(yaml_path: Path, config: dict[str, Any]) -> int:
    """Numbers after the box of a line: of kpt_shape [keypoints, 2 or 3]; 0 without it."""
    shape = config.get("kpt_shape")
    if shape is None:
        return 0
    sides = [whole_number(side) for side in shape] if isinstance(shape, list) else []
    if len(sides) != 2 or not all(side and 0 < side < 10_000 for side in sides):
        raise UserError(
            f'{yaml_path}: "kpt_shape" must be two numbers, the keypoints and 2 or 3, but is '
            f"{shortened(_flat(shape))}"
        )
    return (sides[0] or 0) * (sides[1] or 0)


def _image_paths(
    yaml_path: Path, config: dict[str, Any], split: str, reader: "_Reader", seen: FilesSeen
) -> list[str]:
    """Images of a split: its entries are folders, or text files that list images."""
    entries = config.get(split) or (config.get("valid") if split == "val" else None)
    if not entries:
        raise UserError(f'{yaml_path}: has no entry "{split}"')
    found: dict[str, str] = {}  # path to where it was found
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            raise UserError(f'{yaml_path}: "{split}" must name folders or lists of images')
        source = resolve_entry(yaml_path, config, entry)
        seen.files.add(os.path.normpath(source))
        for place, path in pictures_of(source, seen):
            if path in found:
                reader.report("image twice", "warning", "counted once", place, path)
            found[path] = place
    if not found:
        raise UserError(f'{yaml_path}: empty dataset: no images at "{split}: {entries}"')
    return sorted(found)


def pictures_of(source: Path, seen: FilesSeen) -> Iterator[tuple[str, str]]:
    """(Place, path) of the images of an entry: a folder, a list of images, or one image."""
    if not source.is_file():
        return _in_folder(source, seen)
    if is_picture(source.name):
        return iter([(str(source.parent), str(source))])
    return _listed(source)


def _listed(source: Path) -> Iterator[tuple[str, str]]:
    """The images in a list, with their places in it."""
    for number, line in enumerate(read_text(source).split("\n"), 1):
        if line.strip():
            name = existing_name(source.parent, line.strip())
            yield f"{source.name} line {number}", os.path.normpath(source.parent / name)


def _in_folder(source: Path, seen: FilesSeen) -> Iterator[tuple[str, str]]:
    for top, names in walk(source):
        seen.folders.add(top)
        yield from ((top, os.path.join(top, name)) for name in names if is_picture(name))


def resolve_entry(yaml_path: Path, config: dict[str, Any], entry: str) -> Path:
    base = yaml_path.parent / existing_name(yaml_path.parent, str(config.get("path") or ""))
    # In many exports entries start with ../ although the folders are next to the yaml.
    folders = ((base, entry), (yaml_path.parent, entry), (base, entry.removeprefix("../")))
    candidates = [folder / existing_name(folder, name) for folder, name in folders]
    for path in candidates:
        if os.path.exists(path):  # False, too, for a name too long
            return path
    raise UserError(
        f"{yaml_path}: {shown(str(candidates[0]), 300)}: no such folder or list of images"
    )


def label_path(image_path: str) -> Path:
    """The path with its last folder `images` replaced by `labels`, if there is such a folder; else
    next to the image. It ends in .txt, or in .TXT where only that file exists.
    """
    parts = list(Path(image_path).parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
        if not os.path.isdir(os.path.join(*parts[:-1])):
            parts[last] = "images"  # as labelImg leaves them
    path = Path(*parts).with_suffix(".txt")
    upper = path.with_suffix(".TXT")
    return upper if upper.exists() and not path.exists() else path


@dataclass(frozen=True)
class _Line:
    """A line of a label file: [class, cx, cy, w, h], relative, or a fault's kind and detail."""

    row: list[float]
    kind: str = ""
    detail: str = ""
    form: str = ""  # of _FORMS


class _Reader(FindingList):
    """Reads label files and collects findings."""

    def __init__(self, source: str, classes: ClassMatch, num_keypoint_values: int) -> None:
        super().__init__(source)
        self.classes = classes
        self.num_keypoint_values = num_keypoint_values
        self._without_labels: list[str] = []
        self._image_of: dict[Path, str] = {}  # of each label file, the first
        self._forms = Counter[str]()
        self._first_of_form: dict[str, tuple[str, str]] = {}  # label file and line

    def check_count(self, config: dict[str, Any], num_names: int, yaml_path: Path) -> None:
        """Compares the yaml's number of classes with its names."""
        given = config.get("nc")
        if given is not None and whole_number(given) != num_names:
            detail = f"nc is {shortened(_flat(given))}, but names has {num_names}; names counts"
            kind = "number of classes that does not fit the names"
            self.report(kind, "warning", "ignored", detail, str(yaml_path))

    def read_labels(self, image_path: str, image_id: int) -> list[list[float]] | None:
        """Rows [class, cx, cy, w, h], relative, of known classes; None if the file has lines but
        none that can be read: without its boxes the image would train objects as background.
        """
        path = label_path(image_path)
        first_image = self._image_of.setdefault(path, image_path)
        if first_image != image_path:
            kind = "label file of two images"
            detail = f"{path.name} also belongs to {os.path.basename(first_image)}"
            self.report(kind, "warning", "used for both", detail, image_path, image_id)
        try:
            lines = read_text(path).splitlines()
        except (FileNotFoundError, NotADirectoryError):
            self._without_labels.append(str(path))
            return []
        except OSError as error:
            detail = f"cannot be read ({error.strerror})"
            self.report("unreadable annotations", "error", "removed", detail, str(path), image_id)
            return None
        rows: list[list[float]] = []
        first = ""
        malformed = 0
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            line = _parse(text, self.num_keypoint_values, self.classes)
            if not line.kind:
                rows.append(line.row)
                self._count_form(line.form, str(path), number)
                continue
            detail = f"line {number}: {line.detail}"
            self.report(line.kind, "warning", "dropped", detail, str(path), image_id)
            if line.kind != "unknown category id":
                malformed, first = malformed + 1, first or detail
        if malformed and not rows:
            kind = "unreadable annotations"
            self.report(
                kind, "error", "removed", f"no line has a box; {first}", str(path), image_id
            )
            return None
        return rows

    def _count_form(self, form: str, path: str, number: int) -> None:
        if form:
            self._forms[form] += 1
            self._first_of_form.setdefault(form, (path, f"the first is line {number}"))

    def summary(self, paths: Sequence[str]) -> list[Finding]:
        """Findings that cover many lines or images."""
        found = []
        without = self._without_labels
        if len(without) == len(paths):
            folders = sorted({os.path.dirname(path) for path in without})
            detail = (
                f"none of {counted(len(paths), 'image')} has one; looked in {folders[0]}, since "
                "labels/ stands for the last images/ of a path"
            )
            kind, action = "no label file", "used as background"
            found.append(Finding(kind, "error", action, detail, self.source, count=len(without)))
        elif without:
            detail = f"the first that is not there: {without[0]}"
            kind, action = "image without a label file", "used as background"
            found.append(Finding(kind, "info", action, detail, self.source, count=len(without)))
        for form, count in self._forms.items():
            file, detail = self._first_of_form[form]
            kind = f"label line with {'a ' if form != 'keypoints' else ''}{form}"
            finding = Finding(kind, "info", _FORMS[form], detail, self.source, file, count=count)
            found.append(finding)
        return found


def _parse(line: str, num_keypoint_values: int, classes: ClassMatch) -> _Line:
    values = [number_of(word) for word in line.split()]
    if any(math.isnan(value) for value in values):
        return _Line([], "malformed box", f"{shortened(line)} is not {_FORM}")
    row, form = _box_of(values, num_keypoint_values)
    if row is None:
        detail = f"{shortened(line)} has {len(values)} numbers, not {_FORM}"
        return _Line([], "malformed box", detail)
    if row[0] not in classes.label_of:
        return _Line([], "unknown category id", f"class {row[0]:g} has no name")
    if max(row[1:]) > _LARGEST_FRACTION:
        detail = f"{shortened(line)} seems to be in pixels; expected {_FORM}"
        return _Line([], "coordinates not normalised", detail)
    return _Line(row, form=form)


def _box_of(values: list[float], num_keypoint_values: int) -> tuple[list[float] | None, str]:
    """[class, cx, cy, w, h] of the numbers of a line, None if it has another form; and the form."""
    if len(values) == 5:
        return values, ""
    if num_keypoint_values:
        is_pose = len(values) == 5 + num_keypoint_values
        return (values[:5], "keypoints") if is_pose else (None, "")
    if len(values) == 6:
        return values[:5], "score"
    if len(values) < 7 or len(values) % 2 == 0:
        return None, ""
    xs, ys = values[1::2], values[2::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    box = [values[0], (left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    return box, "polygon"


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
