"""Reads and checks the dataset of a run: settings in, sample tables and findings out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger

from trainer.data.data_folder import CocoPart, VocPart, XmlPart
from trainer.data.dataset_advice import (
    implausible_boxes,
    look_alikes,
    near_duplicates,
    rare_classes,
)
from trainer.data.dataset_check import check, clean, crowded_images, shared_images
from trainer.data.recognise import recognise
from trainer.data.shapes import write_shapes
from trainer.data.unused_files import unused_files
from trainer.readers.coco import coco_folder, read_coco
from trainer.readers.findings import (
    BadDataset,
    FilesSeen,
    Finding,
    format_findings,
    write_findings,
)
from trainer.readers.samples import SampleTable
from trainer.readers.voc import read_voc, read_xml_files
from trainer.readers.yolo import read_yolo
from trainer.settings.config import TrainConfig
from vidt.errors import UserError, counted

# Takes a split of `recognise.PARTS`, the class names to match, whether to read masks, and the files
# seen.
Reader = Callable[[str, Sequence[str] | None, bool, FilesSeen], tuple[SampleTable, list[Finding]]]
SHAPES_CACHE = Path("~/.cache/vidt")  # the embedded images are written here, once

logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Datasets:
    """The usable samples of a dataset's parts, and all findings. `recognised` is a line on what
    --data is, "" without it.
    """

    train: SampleTable
    val: SampleTable
    findings: list[Finding]
    test: SampleTable | None = None
    recognised: str = ""


def reader_of(config: TrainConfig) -> Reader:
    """A function that reads one split; only COCO files have masks."""
    if config.dataset_file == "auto":
        return RecognisedReader(config)
    if config.val_json is not None:
        files = {
            "train": (config.train_json, config.train_images),
            "val": (config.val_json, config.val_images),
        }
        names_differ = len({Path(str(json_path)).name for json_path, _ in files.values()}) == 2
        return lambda split, names, masks, seen: read_coco(
            *files[split],  # type: ignore[arg-type]
            names,
            masks=masks,
            seen=seen,
            source=None if names_differ else f"{Path(str(files[split][0])).name} {split}",
        )
    if config.dataset_file == "voc":
        return lambda split, names, _, seen: read_voc(str(config.voc_path), split, names, seen=seen)
    if config.dataset_file == "yolo":
        path = str(config.yolo_path)
        return lambda split, names, _, seen: read_yolo(path, split, names, seen=seen)
    root = config.coco_path
    if config.dataset_file == "shapes":
        root = str(write_shapes(SHAPES_CACHE.expanduser()))
    return lambda split, names, masks, seen: read_coco(
        *coco_folder(str(root), split), names, masks=masks, seen=seen
    )


class RecognisedReader:
    """Reads the parts of --data. Without a validation part, `hold_out` makes one of the training
    part, which is read once.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.data = recognise(str(config.data))
        self.held: SampleTable | None = None
        self.how = ""  # a validation part was made
        self._fraction = config.val_fraction

    def __call__(
        self, split: str, names: Sequence[str] | None, masks: bool, seen: FilesSeen
    ) -> tuple[SampleTable, list[Finding]]:
        """Raises UserError if the part is not there, as the readers do, and as `hold_out`."""
        if split == "val" and self.held is not None:  # it came with the training part
            return self.held if masks else replace(self.held, masks=None), []
        if split in self.data.parts:
            table, findings = self._read(split, names, masks, seen)
            if split == "train" and "val" not in self.data.parts:
                table, self.held, self.how = hold_out(table, self._fraction)
            return table, findings
        if split == "val" and "train" in self.data.parts:
            _, findings = self("train", names, masks, seen)
            return self("val", names, masks, seen)[0], findings
        parts = ", ".join(self.data.parts)
        raise UserError(
            f"--data {self.data.path}: {self.data.layout} has no {split} part, only {parts}"
        )

    def _read(
        self, split: str, names: Sequence[str] | None, masks: bool, seen: FilesSeen
    ) -> tuple[SampleTable, list[Finding]]:
        part, source = self.data.parts[split], self.data.source(split)
        if isinstance(part, CocoPart):
            return read_coco(
                part.json_path,
                part.image_dir,
                names,
                masks=masks,
                seen=seen,
                source=source,
                drop_unused_parents=True,
            )
        if isinstance(part, VocPart):
            return read_voc(part.root, part.list_name, names, seen=seen)
        if isinstance(part, XmlPart):
            return read_xml_files(part.pairs, source, names, seen=seen)
        config = None if part.config is None else dict(part.config)
        return read_yolo(part.root_or_yaml, part.split, names, seen=seen, config=config)

    def line(self, tables: Mapping[str, SampleTable]) -> str:
        """What was recognised, in one line; tables by their parts."""
        words = {"train": "to train on", "val": "to validate", "test": "to test"}
        sizes = [f"{counted(len(t), 'image')} {words[name]}" for name, t in tables.items()]
        classes = counted(len(next(iter(tables.values())).class_names), "class", "classes")
        parts = [", ".join([*sizes, classes]), self.how, *self.data.notes]
        return f"--data {self.data.path}: {self.data.layout}, {'; '.join(filter(None, parts))}"


def hold_out(table: SampleTable, fraction: float) -> tuple[SampleTable, SampleTable, str]:
    """Splits a table into one to train on and one to validate on, and says how.

    A picture's side follows from the bytes of its file: other names, folders and more pictures
    change nothing. Pictures that look alike stay together, on the side of the one whose hash is
    smallest; a group of more than half of the pictures is for training. If that leaves a side
    without boxes, the group that a slightly larger or smaller fraction would move changes sides.

    Raises UserError for fewer than two pictures.
    """
    if len(table) < 2:
        raise UserError(
            f"{table.source}: {counted(len(table), 'image')} cannot be split into a training and a "
            "validation part"
        )
    groups, digests = look_alikes(table)
    how = f"grouped by near-duplicates, {counted(len({*groups.tolist()}), 'group')}"
    if groups.max() == groups.min():
        groups = np.arange(len(table))
        how = "by single images: all are near-duplicates, so validation flatters"
    smallest = np.full(groups.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, groups, digests)
    large = np.bincount(groups) > len(table) / 2
    held = (smallest < np.uint64(fraction * 2.0**64)) & ~large
    boxed = np.zeros(len(held), np.bool_)
    boxed[groups[table.box_counts.numpy() > 0]] = True
    # The groups with boxes first: both sides need some, to learn from and to score.
    order = np.lexsort((smallest, large, ~boxed))
    if not held[boxed].any():
        held[order[0]] = True
    if held[boxed].all():
        held[order[boxed.sum() - 1]] = False
    if not held.any():
        held[order[-1]] = True
    in_val = held[groups]
    val = table.subset(np.flatnonzero(in_val).tolist())
    val = replace(val, source=f"{table.source} (held out)")
    how = f"validation held out by --val_fraction {fraction:g}, {how}"
    return table.subset(np.flatnonzero(~in_val).tolist()), val, how


def read_datasets(
    config: TrainConfig,
    *,
    num_queries: int,
    num_classes: int | None,
    masks: bool = False,
    token_label: bool = False,
    compare_pictures: bool = False,
    tell: Callable[[str], None] = lambda stage: None,
) -> tuple[SampleTable, SampleTable, list[Finding]]:
    """The training and the validation part of `read_parts`, and all findings."""
    found = read_parts(
        config,
        num_queries=num_queries,
        num_classes=num_classes,
        masks=masks,
        token_label=token_label,
        compare_pictures=compare_pictures,
        tell=tell,
    )
    return found.train, found.val, found.findings


def read_parts(
    config: TrainConfig,
    *,
    num_queries: int | None,
    num_classes: int | None,
    masks: bool = False,
    token_label: bool = False,
    compare_pictures: bool = False,
    sizes_of: Callable[[SampleTable], tuple[int, int]] | None = None,
    tell: Callable[[str], None] = lambda stage: None,
) -> Datasets:
    """The usable samples of all parts, and all findings. `masks` reads the masks of all parts;
    `token_label`, and --copy_paste, those of the training part, if it has any. `compare_pictures`
    decodes all pictures to find near-duplicates between the parts. `tell` is called as each stage
    begins.

    `num_queries`, the number of [DET] tokens, and --eval_size are what objects may be too many and
    too small for. `sizes_of` returns both for the checked training part instead; then give None.

    Raises UserError for an unreadable file, too many damaged images, no box to learn from, `masks`
    without any mask, or a number of classes other than `num_classes`.
    """
    read, seen = reader_of(config), FilesSeen()
    in_train = masks or token_label or config.copy_paste > 0
    tell("reading the training annotations")
    train, findings = read("train", None, in_train, seen)
    if masks and train.masks is None:
        raise UserError(
            f"{train.source}: no object has a mask to learn from; leave --with_vector out"
        )
    found = len(train.class_names)
    if num_classes is not None and num_classes != found:
        raise UserError(
            f"--num_classes {num_classes}, but {train.source} has "
            f"{counted(found, 'class', 'classes')} (first {', '.join(train.class_names[:5])}); "
            "leave the flag out"
        )
    tell("reading the other annotations")
    others = {}
    for part in ("val", *other_parts(read)):
        try:
            others[part], more = read(part, train.class_names, masks, seen)
        except BadDataset as error:
            raise BadDataset(str(error), [*findings, *error.findings]) from error
        findings += more
    tell(f"checking {counted(sum(map(len, (train, *others.values()))), 'image file')}")
    train, val, findings = check(
        train,
        others["val"],
        num_queries=num_queries,
        max_bad_fraction=config.max_bad_fraction,
        strict_images=config.strict_images,
        found=[*findings, *unused_files(seen)],
    )
    test = others.get("test")
    if test is not None:
        test, findings = clean(
            test,
            max_bad_fraction=config.max_bad_fraction,
            strict_images=config.strict_images,
            found=findings,
        )
        findings += shared_images(train, test, "test")
    tables = {"train": train, "val": val} | ({} if test is None else {"test": test})
    tokens, eval_size = (None, config.eval_size) if sizes_of is None else sizes_of(train)
    for table in tables.values():
        findings += [] if tokens is None else crowded_images(table, tokens)
        findings += implausible_boxes(table, eval_size)
    findings += rare_classes(train)
    if compare_pictures:
        tell(f"decoding {counted(len(train) + len(val), 'image')} to find look-alikes")
        findings += near_duplicates(train, val)
        findings += near_duplicates(train, test) if test is not None else []
    line = read.line(tables) if isinstance(read, RecognisedReader) else ""
    return Datasets(train, val, findings, test, line)


def other_parts(read: Reader) -> list[str]:
    """The parts that a dataset has beside training and validation."""
    has_test = isinstance(read, RecognisedReader) and "test" in read.data.parts
    return ["test"] if has_test else []


def read_split(
    config: TrainConfig, split: str, class_names: Sequence[str], *, masks: bool = False
) -> tuple[SampleTable, list[Finding], str]:
    """The samples of one split, labelled by the class names of a weights file, findings, and what
    --data is. Raises UserError as `read_parts` does, but not for missing masks.
    """
    read = reader_of(config)
    table, findings = read(split, class_names, masks, FilesSeen())
    table, findings = clean(
        table,
        max_bad_fraction=config.max_bad_fraction,
        strict_images=config.strict_images,
        found=findings,
    )
    line = read.line({split: table}) if isinstance(read, RecognisedReader) else ""
    return table, findings, line


def read_validation(
    config: TrainConfig, class_names: Sequence[str], *, masks: bool = False
) -> tuple[SampleTable, list[Finding]]:
    """The validation samples of `read_split`; what --data is, and the findings that led to an
    error, are logged.
    """
    try:
        val, findings, line = read_split(config, "val", class_names, masks=masks)
    except BadDataset as error:
        logger.info(format_findings(error.findings))
        raise
    if line:
        logger.info(line)
    return val, findings


def read_and_log(
    output: Path, read: Callable[[], tuple[SampleTable, SampleTable, list[Finding]]]
) -> tuple[SampleTable, SampleTable]:
    """Reads both splits, logs a summary, and writes all findings to `findings.csv` in the output
    folder, even if the dataset is rejected.
    """
    found = read_and_log_parts(output, lambda: Datasets(*read()))
    return found.train, found.val


def read_and_log_parts(output: Path, read: Callable[[], Datasets]) -> Datasets:
    """`read_and_log` for all parts."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        found = read()
    except BadDataset as error:
        write_findings(output / "findings.csv", error.findings)
        logger.info(format_findings(error.findings))
        raise
    findings = found.findings
    write_findings(output / "findings.csv", findings)
    if found.recognised:
        logger.info(found.recognised)
    for table in filter(None, (found.train, found.val, found.test)):
        boxes = counted(len(table.labels), "box", "boxes")
        logger.info(f"{table.source}: {counted(len(table), 'image')}, {boxes}")
    logger.info(f"classes: {', '.join(found.train.class_names)}")
    if findings:
        logger.info(f"{format_findings(findings)}\nall findings are in {output / 'findings.csv'}")
    return found
