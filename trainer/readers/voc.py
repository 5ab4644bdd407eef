"""Pascal VOC (Annotations, ImageSets/Main, JPEGImages) to a sample table."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from trainer.readers.classes import ClassMatch, foreign_class_findings, match_classes
from trainer.readers.findings import (
    BadDataset,
    FilesSeen,
    Finding,
    FindingList,
    Severity,
    fold,
)
from trainer.readers.samples import Sample, SampleTable
from trainer.readers.values import number_of, parse_xml, read_text, shortened, truth, walk
from vidt.errors import UserError, shown
from vidt.images.formats import is_picture

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_LARGEST_SIDE = 2**31
_IMAGES = ("JPEGImages", "images", "Images")  # VOC's own name first
# Folders of a year: as unpacked, and of several archives unpacked side by side.
_YEARS = ("VOC20*", "VOCdevkit/VOC20*", "*/VOCdevkit/VOC20*")


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


@dataclass(frozen=True)
class _Line:
    """One name of a list, with the files that belong to it."""

    place: str  # in messages; "" for a file that no list names
    picture: Path
    xml: Path
    odd: str = ""  # the line, if it has another form


def read_voc(
    root: str | os.PathLike[str],
    split: str,
    class_names: Sequence[str] | None = None,
    *,
    seen: FilesSeen | None = None,
) -> tuple[SampleTable, list[Finding]]:
    """Read a split of one VOC folder, or of all VOC20xx folders in `root` that have the split.

    Labels follow the sorted class names, or `class_names` if given; boxes of other classes are
    left out with a finding. VOC counts pixels from 1 and includes both corners, so a box becomes
    (xmin - 1, ymin - 1, xmax, ymax). Difficult objects become crowd regions, which training and
    scoring ignore. Images are numbered from 1. Files that are dealt with are added to `seen`.

    Raises UserError if no folder has the split, BadDataset if none of its annotations can be read.
    """
    reader = _Reader(f"{Path(root).name}/{split}.txt", seen or FilesSeen())
    split_files = _split_files(Path(root), split)
    for split_file in split_files:
        reader.read_year(split_file)
    return _table(reader, class_names, split_files[0])


def read_xml_files(
    pairs: Sequence[tuple[str, str]],
    source: str,
    class_names: Sequence[str] | None = None,
    *,
    seen: FilesSeen | None = None,
) -> tuple[SampleTable, list[Finding]]:
    """Read pictures, each with an XML file of its own, wherever both are: (picture, XML) paths.
    Apart from the lists of a split, all is as in `read_voc`; `source` names the split.
    """
    reader = _Reader(source, seen or FilesSeen())
    first: dict[str, str] = {}  # the XML file of each picture
    # The XML beside the picture first: it is the likelier one of two.
    for picture, xml in sorted(pairs, key=lambda pair: _apart(*pair)):
        reader.seen.folders.update((os.path.dirname(picture), os.path.dirname(xml)))
        reader.seen.files.update((os.path.normpath(picture), os.path.normpath(xml)))
        if first.setdefault(picture, xml) != xml:
            detail = f"{xml}: its picture has {first[picture]} too, which is used"
            reader.report("image twice", "warning", "counted once", detail, picture)
            continue
        reader.read_picture(_Line("", Path(picture), Path(xml)))
    return _table(reader, class_names, source)


def _apart(picture: str, xml: str) -> bool:
    """Whether the two lie in different folders."""
    return os.path.dirname(picture) != os.path.dirname(xml)


def _table(
    reader: "_Reader", class_names: Sequence[str] | None, where: str | Path
) -> tuple[SampleTable, list[Finding]]:
    """The table of what was read; messages name the split as `where`."""
    pictures, findings = reader.pictures, fold(reader.findings)
    if not pictures:
        lost = [finding for finding in findings if finding.action == "removed"]
        first = f": {lost[0].text}" if lost else ""
        raise BadDataset(
            f"{where}: empty dataset: no image in it has annotations that can be read{first}",
            findings,
        )
    own_names = sorted({thing.name for picture in pictures for thing in picture.objects})
    if class_names is not None:
        own_names = sorted({*own_names, *class_names})
    if not own_names:
        raise BadDataset(f"{where}: no object in its annotations has a box", findings)
    classes = match_classes(reader.source, dict(enumerate(own_names, 1)), class_names)
    names = (thing.name for picture in pictures for thing in picture.objects)
    foreign = (name for name in names if name not in classes.names)
    findings += foreign_class_findings(reader.source, foreign, classes.names)
    samples = [_to_sample(index, picture, classes) for index, picture in enumerate(pictures, 1)]
    table = SampleTable.from_samples(samples, classes.names, classes.category_ids, reader.source)
    return table, findings


def _split_files(root: Path, split: str) -> list[Path]:
    folders = [root, *(each for kind in _YEARS for each in sorted(root.glob(kind)))]
    files = [folder / "ImageSets" / "Main" / f"{split}.txt" for folder in folders]
    found = [file for file in files if file.is_file()]
    if not found:
        raise UserError(f"{files[0]}: not found; {root} must be a VOC folder or hold VOC20xx ones")
    return found


class _Reader(FindingList):
    """Collects the pictures and findings of a split."""

    def __init__(self, source: str, seen: FilesSeen) -> None:
        super().__init__(source)
        self.seen = seen
        self.pictures: list[_Picture] = []

    def read_year(self, split_file: Path) -> None:
        folder = split_file.parents[2]
        image_dir, xml_dir = folder / _IMAGES[0], folder / "Annotations"
        if not image_dir.is_dir():
            image_dir = next((folder / n for n in _IMAGES if (folder / n).is_dir()), image_dir)
        if not image_dir.is_dir():
            raise UserError(f"{image_dir}: no such image folder")
        self.seen.folders.update((str(image_dir), str(xml_dir)))
        file_names = self._file_names(image_dir)
        first: dict[Path, str] = {}  # the place of each file that was named
        for line in _lines(split_file, image_dir, xml_dir, file_names):
            self.seen.files.update(os.path.normpath(each) for each in (line.picture, line.xml))
            if line.xml in first:
                detail = f"{line.place}: named before in {first[line.xml]}"
                self.report("image twice", "warning", "counted once", detail, str(line.picture))
                continue
            if line.odd:
                kind = "name in another form"
                self.report(kind, "info", "read", f"{line.place}: {line.odd}", str(line.picture))
            first[line.xml] = line.place
            self.read_picture(line)

    def report_picture(
        self, kind: str, severity: Severity, action: str, detail: str, file: str
    ) -> None:
        """A finding about the picture that is being read."""
        self.report(kind, severity, action, detail, file, len(self.pictures) + 1)

    def _file_names(self, image_dir: Path) -> dict[str, str]:
        """Name without ending to name, of the pictures in a folder and the folders inside, relative
        to it.
        """
        file_names: dict[str, str] = {}
        paths = (Path(top) / name for top, names in walk(image_dir) for name in sorted(names))
        for name in (path.relative_to(image_dir).as_posix() for path in paths):
            if not is_picture(name):
                continue
            used = file_names.setdefault(name.rsplit(".", 1)[0], name)
            if used != name:
                detail = f"{used} has the same name without its ending and is used"
                file = str(image_dir / name)
                kind = "picture that no list can name"
                self.report(kind, "warning", "not used", detail, file)
                self.seen.files.add(os.path.normpath(file))
        return file_names

    def read_picture(self, line: _Line) -> None:
        path = str(line.picture)
        try:
            tree, remark = parse_xml(line.xml.read_bytes())
        except (OSError, ElementTree.ParseError, ValueError) as error:
            # Kept without boxes, the image would train its objects as background.
            reason = error.strerror if isinstance(error, OSError) else error
            named = f", named in {line.place}" if line.place else ""
            detail = f"{shown(line.xml.name, 300)} cannot be read ({reason}){named}"
            self.report("unreadable annotations", "error", "removed", detail, str(line.xml))
            return
        if remark:
            self.report_picture(
                "XML that had to be mended", "warning", "read", remark, str(line.xml)
            )
        objects = [
            found
            for number, element in enumerate(tree.findall("object"), 1)
            if (found := self._object(element, number, str(line.xml)))
        ]
        size, odd = _size(tree)
        if odd:
            detail = f"{odd}: the size of the file is used"
            self.report_picture("invalid image size", "warning", "ignored", detail, str(line.xml))
        self.pictures.append(_Picture(path, size, objects))

    def _object(self, element: ElementTree.Element, number: int, file: str) -> _Object | None:
        name = (element.findtext("name") or "").strip()
        corners = [number_of(element.findtext(f"bndbox/{key}")) for key in _CORNERS]
        if element.find("bndbox") is None and (around := _box_around(element)):
            corners = around
            detail = f"object {number} has a polygon and no bndbox"
            self.report_picture("box that only a polygon states", "info", "computed", detail, file)
        if not name or any(math.isnan(corner) for corner in corners):
            values = ", ".join(element.findtext(f"bndbox/{key}", "nothing") for key in _CORNERS)
            detail = (
                f"object {number} needs a name and a bndbox of four numbers, xmin, ymin, xmax, "
                f"ymax; it has the name {shortened(name)} and {shortened(values)}"
            )
            self.report_picture("malformed box", "warning", "dropped", detail, file)
            return None
        value = element.findtext("difficult") or "0"
        difficult = truth(value)
        if difficult is None:
            detail = f"object {number}: {shortened(value)}"
            kind = "difficult that is neither 0 nor 1"
            self.report_picture(kind, "warning", "read as 0", detail, file)
        elif value.strip() not in ("0", "1"):
            detail = f"object {number}: difficult {shortened(value)} is read as {int(difficult)}"
            self.report_picture("truth value in another form", "info", "read", detail, file)
        xmin, ymin, xmax, ymax = corners
        return _Object(name, (xmin - 1, ymin - 1, xmax, ymax), bool(difficult))


def _lines(
    split_file: Path, image_dir: Path, xml_dir: Path, file_names: dict[str, str]
) -> Iterator[_Line]:
    """The names in a list. A line is a name without its ending, and in the lists of one class a
    space and 1 or -1; a name with its ending, its folder or spaces is understood if its annotations
    exist.
    """
    for number, line in enumerate(read_text(split_file).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        name, xml = annotation_of(line, xml_dir) or (words[0], f"{words[0]}.xml")
        picture = image_dir / file_names.get(name, f"{name}.jpg")
        odd = shortened(line.strip()) if name != words[0] else ""
        yield _Line(f"{split_file.name} line {number}", picture, xml_dir / xml, odd)


def annotation_of(line: str, xml_dir: Path) -> tuple[str, str] | None:
    """The name, without its ending, and the XML file that a line of a list means, both relative;
    None if there is no such file.
    """
    for form in (line.strip(), *line.split()[:1]):
        path = form.replace("\\", "/")
        whole = [] if path.startswith("/") or ".." in path.split("/") else [path]
        for name in (*whole, path.rsplit("/", 1)[-1]):
            named = is_picture(name) or name.lower().endswith(".xml")
            for stem in (name, *([name.rsplit(".", 1)[0]] if named else [])):
                for xml in (f"{stem}.xml", f"{stem}.XML"):
                    if os.path.isfile(xml_dir / xml):  # False for a name too long
                        return stem, xml
    return None


def _box_around(element: ElementTree.Element) -> list[float] | None:
    """The corners of the box around a polygon: x and y elements of points, or x1, y1, x2, ..."""
    parts = [part for part in element.findall("polygon//*") if not len(part)]
    xs = [number_of(part.text) for part in parts if part.tag.startswith("x")]
    ys = [number_of(part.text) for part in parts if part.tag.startswith("y")]
    if len(xs) < 3 or len(xs) != len(ys):
        return None
    return [min(xs), min(ys), max(xs), max(ys)]


def _size(tree: ElementTree.Element) -> tuple[tuple[int, int], str]:
    """(height, width), (0, 0) if not given; and the value that no image can have, "" for none."""
    texts = [tree.findtext("size/height"), tree.findtext("size/width")]
    height, width = (number_of(text) for text in texts)
    if 0 < height < _LARGEST_SIDE and 0 < width < _LARGEST_SIDE:
        return (int(height), int(width)), ""
    not_given = all(text is None or text.strip() in ("", "0") for text in texts)
    return (0, 0), "" if not_given else f"height {shortened(texts[0])}, width {shortened(texts[1])}"


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
