"""What a folder of data is: COCO, YOLO or Pascal VOC of any maker, told by the files' content.

A JSON file is COCO if it has COCO's three lists, a YAML file is YOLO's if it has names and a split,
an XML file is Pascal VOC's if it holds an annotation, and a text file is YOLO's if it lies where
labels do and its first line is a box. Names only tell the parts: training, validation, test.
"""

import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data.data_folder import (
    PART_WORDS,
    PARTS,
    CocoPart,
    DataFolder,
    Part,
    Recognised,
    VocPart,
    XmlPart,
    YoloPart,
    grouped_by_part,
    names_of,
    part_of,
    picture_finder,
    scan,
)
from trainer.readers.findings import FilesSeen
from trainer.readers.json_stream import NotJSON, read_members
from trainer.readers.values import number_of, read_text
from trainer.readers.voc import annotation_of
from trainer.readers.yolo import label_path, load_data_yaml, pictures_of, resolve_entry
from vidt.errors import UserError, counted, shown
from vidt.images.formats import ending

_COCO_LISTS = ("images", "annotations", "categories")
_CLASS_FILES = ("classes.txt", "obj.names", "labels.txt")  # of YOLO, one name a line
_FEW = 200  # files or names that are looked at to learn what the others are
_LOOKED_FOR = (
    'COCO (JSON with "images", "annotations" and "categories"), YOLO (YAML with "names" and '
    '"train", or pictures with label files), Pascal VOC (XML with an "annotation")'
)


def recognise(path: str | os.PathLike[str]) -> Recognised:
    """What `path`, a folder or an annotation file, holds. It reads names and the start of files.

    Raises UserError, in one line, if there is no such path, if nothing is recognised, and if there
    is more than one thing to choose from.
    """
    name = os.fspath(path)
    if os.path.isfile(name):
        return _of_file(name)
    if not os.path.isdir(name):
        raise UserError(f"--data {shown(name, 300)}: no such file or folder")
    tree = scan(name)
    found = [(kind, each) for kind, look in _KINDS.items() if (each := look(tree))]
    if not found:
        raise UserError(f"--data {name}: {_inventory(tree)}; looked for {_LOOKED_FOR}")
    if len(found) > 1:
        both = " and ".join(f"{kind} ({names_of(tree, files)})" for kind, files in found)
        remedy = "name one annotation file or folder inside as --data"
        raise UserError(f"--data {name}: ambiguous, it holds {both}; {remedy}")
    kind, files = found[0]
    return _BUILD[kind](tree, files)


def _of_file(path: str) -> Recognised:
    if ending(path) in (".yaml", ".yml") and _is_yolo_yaml(path):
        return _yolo_of_yaml(path, path)
    if _is_coco(path):
        folder = os.path.dirname(path) or "."
        above = os.path.join(folder, os.pardir)
        for root in (folder, os.path.normpath(above)):
            if os.path.dirname(os.path.abspath(root)) == os.path.abspath(root):
                continue  # all of the file system
            tree = scan(root)
            image_dir = _image_folder(path, tree, part_of(os.path.basename(path)))
            if image_dir is not None:
                part = part_of(os.path.basename(path)) or "train"
                parts = {part: CocoPart(path, image_dir)}
                return Recognised(path, f"COCO, images in {image_dir}", parts)
        raise _no_images(path, path, [folder, above])
    raise UserError(
        f"--data {shown(path, 300)}: neither COCO's JSON nor YOLO's YAML; name the folder of the "
        "data, or such a file"
    )


def _inventory(tree: DataFolder) -> str:
    kinds = [counted(len(tree.pictures), "picture")] if tree.pictures else []
    for each in (".json", ".yaml", ".yml", ".xml", ".txt", ".zip"):
        files = tree.of(each)
        if files:
            kinds.append(f"{len(files)} {each} ({tree.relative(files[0])})")
    if len(kinds) == 1 and tree.pictures:
        kinds.append("no annotation file")
    return f"nothing recognised, found {', '.join(kinds) or 'no picture and no annotation file'}"


# COCO


def _coco_files(tree: DataFolder) -> list[str]:
    return [path for path in tree.of(".json") if _is_coco(path)]


def _is_coco(path: str) -> bool:
    """Whether a file has COCO's three lists. This searches its bytes: a file may have gigabytes."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return all(
                re.search(rb'"%s"\s*:\s*\[' % name.encode(), text) is not None
                for name in _COCO_LISTS
            )
    except (OSError, ValueError):  # unreadable, or empty
        return False


def _coco(tree: DataFolder, files: Sequence[str]) -> Recognised:
    by_part: dict[str | None, list[str]] = {}
    for path in files:
        by_part.setdefault(part_of(tree.relative(path)), []).append(path)
    if "train" not in by_part and None in by_part:
        by_part["train"] = by_part.pop(None)
    notes = [f"{tree.relative(path)} is not used" for path in by_part.pop(None, [])]
    parts: dict[str, Part] = {}
    for part in PARTS:
        if part in by_part:
            path, others = _one_of(tree, by_part[part], part)
            notes += [f"{tree.relative(each)} is not used" for each in others]
            image_dir = _image_folder(path, tree, part)
            if image_dir is None:
                raise _no_images(tree.root, path, [tree.root])
            parts[part] = CocoPart(path, image_dir)
    named = ", ".join(tree.relative(each.json_path) for each in parts.values())  # type: ignore[union-attr]
    return Recognised(tree.root, f"COCO ({named})", parts, tuple(notes))


def _one_of(tree: DataFolder, paths: list[str], part: str) -> tuple[str, list[str]]:
    """The file of a part, and those beside it: COCO names the one with boxes "instances"."""
    boxes = [path for path in paths if os.path.basename(path).startswith("instances")]
    chosen = paths if len(paths) == 1 else boxes
    if len(chosen) != 1:
        raise UserError(
            f"--data {tree.root}: ambiguous, {len(paths)} COCO files can be the {part} part "
            f"({names_of(tree, paths)}); name one as --data, or give --train_json, --train_images, "
            "--val_json and --val_images"
        )
    return chosen[0], [path for path in paths if path != chosen[0]]


def _image_folder(json_path: str, tree: DataFolder, part: str | None) -> str | None:
    """The folder to which the file names of a COCO file are relative: the one in which most of them
    exist, then the one of the same part, then the one nearest to the file; None for none.
    """
    names = list(islice(_image_names(json_path), _FEW))
    pictures = set(tree.pictures)

    def rank(folder: str) -> tuple[int, bool, int, int]:
        paths = [os.path.normpath(os.path.join(folder, name)) for name in names]
        found = sum(
            path in pictures or (os.path.isabs(name) and os.path.isfile(name))
            for name, path in zip(names, paths, strict=True)
        )
        near = len(os.path.commonpath([os.path.abspath(folder), os.path.abspath(json_path)]))
        relative = tree.relative(folder)
        return found, part_of(relative) == part, near, -len(Path(relative).parts)

    ranked = {folder: rank(folder) for folder in _folders(tree)}
    best = max(ranked, key=lambda folder: ranked[folder], default=None)
    return best if best is not None and ranked[best][0] else None


def _folders(tree: DataFolder) -> list[str]:
    """The folders that hold pictures, and those above them up to the root, in order."""
    found: set[str] = set()
    for folder in {os.path.dirname(path) or "." for path in tree.pictures}:
        while folder not in found:
            found.add(folder)
            if folder == tree.root:
                break
            folder = os.path.dirname(folder) or "."
    return sorted(found)


def _image_names(json_path: str) -> Iterator[str]:
    try:
        for key, rows in read_members(json_path):
            for row in rows if key == "images" and isinstance(rows, list) else ():
                if isinstance(row, dict) and isinstance(row.get("file_name"), str):
                    yield row["file_name"].replace("\\", "/")
    except (OSError, NotJSON) as error:
        raise UserError(f"--data {json_path}: not JSON ({error})") from error


def _no_images(path: str, json_path: str, folders: Sequence[str]) -> UserError:
    first = next(_image_names(json_path), None)
    named = f"none of its images, such as {shown(first, 200)}, is" if first else "it names no image"
    return UserError(
        f"--data {path}: COCO ({json_path}), but {named} in {' or '.join(folders)}; give "
        "--train_json, --train_images, --val_json and --val_images"
    )


# YOLO


def _yolo_files(tree: DataFolder) -> list[str]:
    """The YAML files of YOLO that are nearest to the root; without any, the first label files."""
    yamls = [path for path in tree.of(".yaml", ".yml") if _is_yolo_yaml(path)]
    depth = min((path.count(os.sep) for path in yamls), default=0)
    nearest = [path for path in yamls if path.count(os.sep) == depth]
    labels = [] if nearest else _labels_of(tree)
    for path in tree.of(".yaml", ".yml") if labels else ():
        if re.search(rb"^names\s*:", Path(path).read_bytes(), re.MULTILINE):
            load_data_yaml(Path(path))  # tells what is wrong with the names and parts in it
    return nearest or labels[:_FEW]


def _is_yolo_yaml(path: str) -> bool:
    try:
        config = load_data_yaml(Path(path))
    except UserError:
        return False
    return "names" in config and any(split in config for split in (*PARTS, "valid"))


def _labels_of(tree: DataFolder) -> list[str]:
    """Label files of YOLO: each has a picture, and one of the first has a box in its first line."""
    texts = set(tree.of(".txt"))
    labels = [label for path in tree.pictures if (label := str(label_path(path))) in texts]
    filled = (label for label in labels if os.path.getsize(label))
    return labels if any(map(_starts_with_a_box, islice(filled, _FEW))) else []


def _starts_with_a_box(label: str) -> bool:
    words = next((line for line in read_text(label).splitlines() if line.strip()), "").split()
    values = [number_of(word) for word in words]
    return len(values) >= 5 and values[0] >= 0 and all(-1 <= value <= 2 for value in values[1:5])


def _yolo(tree: DataFolder, files: Sequence[str]) -> Recognised:
    if ending(files[0]) == ".txt":
        return _yolo_without_yaml(tree)
    if len(files) > 1:
        raise UserError(
            f"--data {tree.root}: ambiguous, {len(files)} YAML files of YOLO "
            f"({names_of(tree, files)}); name one as --data"
        )
    return _yolo_of_yaml(tree.root, files[0])


def _yolo_of_yaml(path: str, yaml_path: str) -> Recognised:
    """The splits that have images. Roboflow's YAML names those that an export lacks, too."""
    config = load_data_yaml(Path(yaml_path))
    parts: dict[str, Part] = {}
    notes: list[str] = []
    for split in PARTS:
        entry = config.get(split) or (config.get("valid") if split == "val" else None)
        if entry and (split == "train" or _has_images(yaml_path, config, entry)):
            parts[split] = YoloPart(yaml_path, split)
        elif entry:
            notes.append(
                f"{os.path.basename(yaml_path)} names {split}: {shown(str(entry), 200)}, "
                "which holds no image"
            )
    return Recognised(path, f"YOLO ({os.path.basename(yaml_path)})", parts, tuple(notes))


def _has_images(yaml_path: str, config: dict[str, Any], entries: Any) -> bool:
    for entry in entries if isinstance(entries, list) else [entries]:
        try:
            source = resolve_entry(Path(yaml_path), config, str(entry))
        except UserError:
            continue
        if any(True for _ in pictures_of(source, FilesSeen())):
            return True
    return False


def _yolo_without_yaml(tree: DataFolder) -> Recognised:
    labels = {*_labels_of(tree)}
    folders = {os.path.dirname(path) for path in tree.pictures if str(label_path(path)) in labels}
    pictures = [path for path in tree.pictures if os.path.dirname(path) in folders]
    by_part = _listed_parts(tree, labels, pictures)
    by_part = by_part or grouped_by_part(tree, [(path, path) for path in pictures])
    used = {path for pairs in by_part.values() for path, _ in pairs}
    class_file, names = _class_names(tree, labels)
    config: dict[str, Any] = {"path": os.path.basename(tree.root), "names": names}
    config |= {part: [tree.relative(path) for path, _ in by_part[part]] for part in by_part}
    parts = {part: YoloPart(tree.root, part, config) for part in by_part}
    named = f"classes of {class_file}" if class_file else "classes named by their numbers"
    notes = _not_used(len(tree.pictures) - len(pictures), "in folders without label files")
    notes += _not_used(len(pictures) - len(used), "in none of the lists")
    return Recognised(tree.root, f"YOLO without a YAML file, {named}", parts, notes)


def _listed_parts(
    tree: DataFolder, labels: set[str], pictures: Sequence[str]
) -> dict[str, list[tuple[str, str]]]:
    """The pictures of Darknet's lists, train.txt and valid.txt, by part; empty without a list of
    training images. A line may name another machine's folder: the picture's name decides then.
    """
    known, by_name = set(pictures), {os.path.basename(path): path for path in pictures}
    parts: dict[str, list[tuple[str, str]]] = {}
    for path in tree.of(".txt"):
        part = PART_WORDS.get(Path(path).stem.lower())
        if part is None or path in labels:
            continue
        lines = [line.strip().replace("\\", "/") for line in read_text(path).splitlines()]
        inside = [os.path.normpath(os.path.join(tree.root, line)) for line in lines if line]
        named = [each if each in known else by_name.get(os.path.basename(each)) for each in inside]
        found = [each for each in dict.fromkeys(named) if each is not None]
        if len(found) > len(inside) / 2:
            parts.setdefault(part, [(each, each) for each in found])
    return parts if "train" in parts else {}


def _class_names(tree: DataFolder, labels: set[str]) -> tuple[str, list[str]]:
    """The class names and the file that lists them, "" for none."""
    for path in sorted(tree.of(".txt", ".names"), key=lambda path: path.count(os.sep)):
        if os.path.basename(path) in _CLASS_FILES and path not in labels:
            names = [line.strip() for line in read_text(path).rstrip().splitlines()]
            if names:  # an empty line keeps its number, as labelImg counts
                named = [name or f"class {number}" for number, name in enumerate(names)]
                return tree.relative(path), named
    numbers = [
        number_of(line.split()[0])
        for label in labels
        for line in read_text(label).splitlines()
        if line.strip()
    ]
    most = int(max((n for n in numbers if n.is_integer() and 0 <= n < 10_000), default=0))
    return "", [str(number) for number in range(most + 1)]


# Pascal VOC


def _voc_files(tree: DataFolder) -> list[str]:
    xmls = tree.of(".xml")
    return xmls if any(map(_is_annotation, xmls[:_FEW])) else []


def _is_annotation(path: str) -> bool:
    with open(path, "rb") as file:
        start = file.read(4096)
    start = start.replace(b"\0", b"")  # of UTF-16
    return re.search(rb"<annotation[\s>]", start) is not None  # CVAT's own has <annotations>


def _voc(tree: DataFolder, files: Sequence[str]) -> Recognised:
    lists = [path for path in tree.of(".txt") if Path(path).parts[-3:-1] == ("ImageSets", "Main")]
    by_root: dict[Path, set[str]] = {}
    for path in lists:
        by_root.setdefault(Path(path).parents[2], set()).add(Path(path).stem)
    names = _list_names({name for stems in by_root.values() for name in stems})
    parts: dict[str, Part] = {}
    notes: list[str] = []
    root = str(next(iter(by_root))) if len(by_root) == 1 else tree.root
    for part, name in names.items():
        used = [path for path in lists if Path(path).stem == name]
        if any(map(_lists_annotations, used)):
            parts[part] = VocPart(root, name)
        else:
            notes.append(f"ImageSets/Main/{name}.txt names no image with annotations")
    if "train" not in parts:
        return _xml(tree, files)
    named = ", ".join(f"{names[part]}.txt" for part in parts)
    return Recognised(tree.root, f"Pascal VOC (ImageSets/Main: {named})", parts, tuple(notes))


def _list_names(stems: set[str]) -> dict[str, str]:
    """The list of each part. Lists of one class, such as cat_train, are none."""
    names = {PART_WORDS[s.lower()]: s for s in sorted(stems) if s.lower() in PART_WORDS}
    if "train" not in names:
        others = [stem for stem in stems if part_of(stem) is None and "_" not in stem]
        whole = [stem for stem in others if stem == "trainval"] or others
        names |= {"train": whole[0]} if len(whole) == 1 else {}
    return names


def _lists_annotations(path: str) -> bool:
    folder = Path(path).parents[2] / "Annotations"
    lines = filter(str.strip, read_text(path).splitlines())
    return any(annotation_of(line, folder) is not None for line in islice(lines, _FEW))


def _xml(tree: DataFolder, files: Sequence[str]) -> Recognised:
    """XML files and pictures that belong together by their names, as labelImg leaves them."""
    find = picture_finder(tree)
    pairs = [(picture, xml) for xml in files if (picture := find(xml))]
    if not pairs:
        raise UserError(
            f"--data {tree.root}: {counted(len(files), 'XML file')} of Pascal VOC "
            f"({names_of(tree, files)}), but no picture belongs to one by its name"
        )
    used = {picture for picture, _ in pairs}
    notes = _not_used(len(tree.pictures) - len(used), "without an XML file")
    if len(pairs) < len(files):
        notes += (f"{counted(len(files) - len(pairs), 'XML file')} without a picture not used",)
    parts = {part: XmlPart(tuple(each)) for part, each in grouped_by_part(tree, pairs).items()}
    return Recognised(tree.root, "Pascal VOC without ImageSets", parts, notes)


def _not_used(count: int, why: str) -> tuple[str, ...]:
    return (f"{counted(count, 'picture')} {why} not used",) if count else ()


_KINDS: dict[str, Callable[[DataFolder], list[str]]] = {
    "COCO": _coco_files,
    "YOLO": _yolo_files,
    "Pascal VOC": _voc_files,
}
_BUILD: dict[str, Callable[[DataFolder, Sequence[str]], Recognised]] = {
    "COCO": _coco,
    "YOLO": _yolo,
    "Pascal VOC": _voc,
}
