"""Reads and checks the dataset of a run: settings in, sample tables and findings out."""

from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.logging import get_logger

from trainer.data.dataset_advice import implausible_boxes, near_duplicates, rare_classes
from trainer.data.dataset_check import check, clean
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
from trainer.readers.voc import read_voc
from trainer.readers.yolo import read_yolo
from trainer.settings.config import TrainConfig
from vidt.errors import UserError, counted

# Takes "train" or "val", the class names to match, whether to read masks, and the files seen.
Reader = Callable[[str, Sequence[str] | None, bool, FilesSeen], tuple[SampleTable, list[Finding]]]
SHAPES_CACHE = Path("~/.cache/vidt")  # the embedded images are written here, once

logger = get_logger(__name__)


def reader_of(config: TrainConfig) -> Reader:
    """A function that reads one split; only COCO files have masks."""
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
    """The usable training and validation samples, and all findings. `masks` reads the masks of both
    splits; `token_label` those of the training split, if it has any. `compare_pictures` decodes all
    pictures to find near-duplicates between the splits. `tell` is called as each stage begins.

    Raises UserError for an unreadable file, too many damaged images, no box to learn from, `masks`
    without any mask, or a number of classes other than `num_classes`.
    """
    read, seen = reader_of(config), FilesSeen()
    tell("reading the training annotations")
    train, findings = read("train", None, masks or token_label, seen)
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
    tell("reading the validation annotations")
    try:
        val, in_val = read("val", train.class_names, masks, seen)
    except BadDataset as error:
        raise BadDataset(str(error), [*findings, *error.findings]) from error
    tell(f"checking {counted(len(train) + len(val), 'image file')}")
    train, val, findings = check(
        train,
        val,
        num_queries=num_queries,
        max_bad_fraction=config.max_bad_fraction,
        strict_images=config.strict_images,
        found=[*findings, *in_val, *unused_files(seen)],
    )
    for table in (train, val):
        findings += implausible_boxes(table, config.eval_size)
    findings += rare_classes(train)
    if compare_pictures:
        tell(f"decoding {counted(len(train) + len(val), 'image')} to find look-alikes")
        findings += near_duplicates(train, val)
    return train, val, findings


def read_validation(
    config: TrainConfig, class_names: Sequence[str], *, masks: bool = False
) -> tuple[SampleTable, list[Finding]]:
    """The validation samples, labelled by the class names of a weights file. Raises UserError as
    `read_datasets` does, but not for missing masks; the findings that led to it are logged.
    """
    try:
        val, findings = reader_of(config)("val", class_names, masks, FilesSeen())
        val, findings = clean(
            val,
            max_bad_fraction=config.max_bad_fraction,
            strict_images=config.strict_images,
            found=findings,
        )
    except BadDataset as error:
        logger.info(format_findings(error.findings))
        raise
    return val, findings


def read_and_log(
    output: Path, read: Callable[[], tuple[SampleTable, SampleTable, list[Finding]]]
) -> tuple[SampleTable, SampleTable]:
    """Reads both splits, logs a summary, and writes all findings to `findings.csv` in the output
    folder, even if the dataset is rejected.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        train_set, val_set, findings = read()
    except BadDataset as error:
        write_findings(output / "findings.csv", error.findings)
        logger.info(format_findings(error.findings))
        raise
    write_findings(output / "findings.csv", findings)
    for table in (train_set, val_set):
        boxes = counted(len(table.labels), "box", "boxes")
        logger.info(f"{table.source}: {counted(len(table), 'image')}, {boxes}")
    logger.info(f"classes: {', '.join(train_set.class_names)}")
    if findings:
        logger.info(f"{format_findings(findings)}\nall findings are in {output / 'findings.csv'}")
    return train_set, val_set
