"""`vidt check`: the dataset check that every training begins with, alone. `vidt plan`: the settings
that `--preset auto` chooses for the dataset, and why.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.commands.command_flags import (
    Stages,
    add_val_fraction,
    check_result,
    command_parser,
    count,
    findings_of_refused_data,
    say,
    share,
    side,
    write_json,
)
from trainer.readers.findings import BadDataset, Finding, format_findings
from trainer.settings.config import TrainConfig
from trainer.settings.limits import COCO_FILES, PATH_OF
from trainer.settings.parsing import fixed_settings, parse, resolved
from vidt.arguments import HELP, OneLineParser, plain
from vidt.errors import UserError, counted
from vidt.images.formats import ENDINGS

SUMMARY = """
Reads every annotation and every image, and prints what is wrong with them and what a training would
do about it: boxes dropped or clipped, images left out, files that nothing uses, classes without
examples, images that are in both splits or look alike. It changes nothing.
"""
EXAMPLES = """
examples:
  vidt check --data photos
  vidt check --coco_path data/coco
  vidt check --train_json train.json --train_images images --val_json val.json --val_images images
  vidt check --yolo_path data/yolo --json
  vidt check --voc_path data/voc --out findings.json

as JSON: usable (would a training begin?), error (why not), recognised (what --data is), splits
(images, boxes and boxes of each class), classes, findings (kind, severity, action, detail, source,
file, image_id, annotation_id, count). A dataset whose annotations cannot be read at all has no
JSON, only the line "error: ...".

exit code: 0 a training would begin, 2 it would not, or a mistake; the line "error: ..." says why.
"""
PLAN_SUMMARY = """
Reads a dataset's annotations and prints the settings that vidt train --preset auto would choose for
it on this machine, each with its reason. It trains nothing. It fetches the ImageNet weights from
which that training would start, if it can.
"""
PLAN_EXAMPLES = """
examples:
  vidt plan photos/
  vidt plan data/yolo --hours 0.5
  vidt plan photos/ --hours 0.5 --eval_size 320 --json

Further flags are those of vidt train; a setting that is given wins over the plan.

as JSON: settings (name to value), plan (lines of text).

exit code: 0 done, 2 a mistake, which the line "error: ..." names.
"""
OWN_FLAGS_OF_PLAN = (*HELP, "--json")
DATASET_SUFFIXES = (*ENDINGS, ".txt", ".xml", ".yaml", ".yml")
HELP_OF = {
    "data": "folder of a COCO, YOLO or Pascal VOC dataset of any layout, or its annotation file",
    "coco_path": "folder with annotations/instances_{train,val}2017.json, train2017/, val2017/",
    "voc_path": "folder of a Pascal VOC dataset",
    "yolo_path": "folder of a YOLO dataset, or its yaml file",
    "train_json": "COCO file to train on",
    "train_images": "folder of its images",
    "val_json": "COCO file to validate on",
    "val_images": "folder of its images",
}


def add_data_flags(parser: OneLineParser) -> None:
    """The flags that name a dataset; `settings` reads them."""
    for name, text in HELP_OF.items():
        parser.add_argument(f"--{name}", metavar="PATH", help=text)
    add_val_fraction(parser)


def flags() -> OneLineParser:
    parser = command_parser("check", SUMMARY, EXAMPLES)
    parser.add_argument("folder", metavar="DATA", nargs="?", help="the same as --data DATA")
    add_data_flags(parser)
    parser.add_argument(
        "--det_token_num",
        type=count,
        default=100,
        metavar="N",
        help="most objects that the detector finds in an image (default %(default)s)",
    )
    parser.add_argument(
        "--max_bad_fraction",
        type=share,
        default=TrainConfig.max_bad_fraction,
        metavar="S",
        help="share of unusable images that a training accepts (default %(default)s)",
    )
    parser.add_argument(
        "--eval_size",
        type=side,
        default=TrainConfig.eval_size,
        metavar="N",
        help="short side in pixels at evaluation; used to find objects that are too small "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--strict_images",
        action="store_true",
        help="leave out JPEG files whose end is missing, as a training with this flag does",
    )
    parser.add_argument(
        "--no_look_alikes",
        action="store_true",
        help="do not decode the images to find validation images that look like training images",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON to a file")
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    given = flags().parse_args(argv)
    if given.folder is not None and given.data is not None:
        raise UserError(f"{given.folder} and --data {given.data}: check one dataset at a time")
    given.data = given.data if given.folder is None else given.folder
    config = settings(vars(given))
    check_result("--out", given.out, read_files(config, given.out))
    # Imported here, so that --help does not wait for PyTorch.
    from trainer.data.load import read_parts

    failure: BadDataset | None = None
    findings: list[Finding]
    tables: list[Any] = []
    recognised = ""
    try:
        with Stages() as tell:
            data = read_parts(
                config,
                num_queries=given.det_token_num,
                num_classes=None,
                compare_pictures=not given.no_look_alikes,
                tell=tell,
            )
        tables, findings = [data.train, data.val], data.findings
        tables += [data.test] if data.test is not None else []
        recognised = data.recognised
    except BadDataset as error:
        failure, findings = error, error.findings
    facts = {
        "usable": failure is None,
        "error": str(failure) if failure else None,
        "recognised": recognised,
        "classes": list(tables[0].class_names) if tables else [],
        "splits": [_split(table) for table in tables],
        "findings": [asdict(finding) for finding in findings],
    }
    say(json.dumps(facts, indent=1) if given.json else report(facts, findings))
    write_json(given.out, facts)
    if failure is not None:
        raise failure
    return 0


def settings(given: dict[str, Any]) -> TrainConfig:
    """The settings of a training on the data. Raises UserError unless it is one dataset."""
    paths = {name: given[name] for name in HELP_OF if given[name] is not None}
    kinds = [name for name, path in PATH_OF.items() if path in paths]
    if any(name in paths for name in COCO_FILES):
        kinds.append("coco")
    if not kinds:
        four = ", ".join(f"--{name}" for name in COCO_FILES)
        raise UserError(
            f"no dataset is named; give --data, --coco_path, --voc_path, --yolo_path, or {four}"
        )
    if len(kinds) > 1:
        both = " and ".join(f"--{name}" for name in paths)
        raise UserError(f"{both}: check one dataset at a time")
    others = ("max_bad_fraction", "eval_size", "strict_images", "val_fraction")
    chosen = {name: given[name] for name in others if name in given}
    return TrainConfig(dataset_file=kinds[0], **chosen, **paths)


def read_files(config: TrainConfig, out: Path | None) -> list[Path]:
    """The files of the dataset that `out` could overwrite: annotation files, and `out` itself if it
    exists in a folder of the dataset under a name like that of an image or label.
    """
    files = [Path(each) for each in (config.train_json, config.val_json) if each]
    folders = [Path(each) for each in (config.train_images, config.val_images) if each]
    if config.coco_path:
        files += (Path(config.coco_path) / "annotations").glob("instances_*.json")
    if config.data:
        files += annotation_files(config.data)
    for each in (config.coco_path, config.voc_path, config.yolo_path, config.data):
        if each:
            folders.append(Path(each).parent if Path(each).is_file() else Path(each))
    if out is not None and out.exists() and out.suffix.lower() in DATASET_SUFFIXES:
        inside = any(folder.resolve() in out.resolve().parents for folder in folders)
        files += [out] if inside else []
    return files


def annotation_files(data: str) -> list[Path]:
    """The annotation files of --data that have no ending of `DATASET_SUFFIXES`."""
    from trainer.data.data_folder import CocoPart
    from trainer.data.recognise import recognise

    parts = recognise(data).parts.values()
    return [Path(part.json_path) for part in parts if isinstance(part, CocoPart)]


def _split(table: Any) -> dict[str, Any]:
    labels = table.labels.bincount(minlength=len(table.class_names)).tolist()
    return {
        "source": table.source,
        "images": len(table),
        "boxes": len(table.labels),
        "boxes_by_class": dict(zip(table.class_names, labels, strict=True)),
    }


def report(facts: dict[str, Any], findings: list[Finding]) -> str:
    lines = [facts["recognised"]] if facts["recognised"] else []
    lines += [
        f"{each['source']}: {counted(each['images'], 'image')}, "
        f"{counted(each['boxes'], 'box', 'boxes')}"
        for each in facts["splits"]
    ]
    width = max((len(name) for name in facts["classes"]), default=0)
    for name in facts["classes"]:
        numbers = "  ".join(f"{each['boxes_by_class'][name]:>8}" for each in facts["splits"])
        lines.append(f"  {name:<{width}}  {numbers}")
    lines.append(format_findings(findings) if findings else "nothing wrong was found")
    return "\n".join(lines)


def plan_flags() -> OneLineParser:
    parser = command_parser("plan", PLAN_SUMMARY, PLAN_EXAMPLES)
    parser.add_argument(
        "data", metavar="DATA", help="folder of the dataset, or its annotation file; comes first"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def run_plan(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    first, *rest = argv or ("",)
    if plain(first) == "--data" and rest:  # as other commands take it
        first, *rest = rest
    given = plan_flags().parse_args([first, *(word for word in rest if word in OWN_FLAGS_OF_PLAN)])
    words = ["--data", given.data, "--preset", "auto"]
    words += [word for word in rest if word not in OWN_FLAGS_OF_PLAN]
    config, fields = parse(words)

    from trainer.data.dataset_statistics import plan_of
    from trainer.data.load import read_parts
    from trainer.loop.start import settled

    config, fields, fixed = settled(config, fields, fixed_settings(words))
    with findings_of_refused_data(), Stages() as tell:
        data = read_parts(config, num_queries=None, num_classes=None, tell=tell)
    config, fields, plan = plan_of(config, fields, fixed, data.train)
    if given.json:
        say(json.dumps({"settings": resolved(config, fields), "plan": plan.splitlines()}, indent=1))
    else:
        say(plan)
    return 0
