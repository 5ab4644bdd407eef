"""Runs a task of the platform without the platform: `python -m ymir_adapter.sandbox --help`.

Makes the folders that the platform would mount, runs the program of the image's start script on
them, and prints the results.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trainer.commands.command_flags import count
from trainer.readers.coco import read_coco
from trainer.readers.samples import SampleTable
from vidt.arguments import OneLineParser
from vidt.errors import UserError
from vidt.weights.checkpoint import read_start
from vidt.weights.weights_file import UnusableWeights
from ymir_adapter.sandbox.tree import (
    EXPORT_FORMATS,
    PROTOCOLS,
    TASKS,
    Request,
    Tree,
    make_tree,
)

EPILOG = """\
example, with a data set of blood cells beside this project (minutes on a CPU):
  python -m ymir_adapter.sandbox --task training --out try/training --limit 20 \\
      --from-coco ../shared/data/bccd/train.json --images ../shared/data/bccd/images \\
      --set epochs=1 --set eval_size=320 --set pre_trained=none
  python -m ymir_adapter.sandbox --task mining+infer --out try/candidates --limit 20 \\
      --from-coco ../shared/data/bccd/val.json --images ../shared/data/bccd/images \\
      --weights WHAT_TRAINING_PRINTED

All files are copied below --out: in/ is the container's /in, out/ is its /out. The exit code is
that of the task: 0 done, 1 failed; 2: a flag is wrong, and nothing was started.
"""
SHOWN = 5  # lines of a ranking
POLL_SECONDS = 0.02


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
        check(args)
        splits = read_splits(args)
        request = make_request(args, next(iter(splits.values())).class_names)
        tree = make_tree(args.out.resolve(), request, splits)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    counts = ", ".join(f"{len(table)} {split} images" for split, table in splits.items())
    print(f"{args.task} with {counts}")
    print(f"  in   {tree.input}\n  out  {tree.output}\n  log  {tree.log}", flush=True)
    code = run_task(tree, processes=args.processes, history=args.history)
    print("\n".join(["", f"exit code {code}", *summary(tree, args.task)]), flush=True)
    return code


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        "python -m ymir_adapter.sandbox",
        description="Runs a task of the YMIR platform on COCO data, without the platform.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--from-coco", type=Path, required=True, metavar="JSON", help="images and their boxes")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of these images")
    add("--task", required=True, choices=TASKS)
    add("--out", type=Path, required=True, metavar="DIR", help="folder for in/ and out/")
    add("--val-json", type=Path, metavar="JSON", help="training: the validation set")
    add("--val-images", type=Path, metavar="DIR", help="its images; default: those of --images")
    text = "without --val-json: share of the images that is drawn for validation (%(default)s)"
    add("--val-share", type=float, default=0.2, metavar="X", help=text)
    add("--split-seed", type=int, default=0, metavar="N", help="seed of that draw (%(default)s)")
    add("--limit", type=count, metavar="N", help="only the first N images of each file")
    text = "the model: training starts from it, mining and infer use it"
    add("--weights", type=Path, nargs="+", default=[], metavar="FILE", help=text)
    text = "a field of the template, as typed into the platform's form; may be repeated"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    add("--protocol", choices=PROTOCOLS, default="1.1.0", help="age of the platform (1.1.0: 2.x)")
    add("--export-format", choices=list(EXPORT_FORMATS), default="ark", help="of annotations (ark)")
    add("--gpus", type=int, default=0, metavar="N", help="GPUs of the task (0: the CPU)")
    add("--processes", type=count, default=1, metavar="N", help="processes on the CPU (1)")
    text = "records every first line that monitor.txt has during the run"
    add("--history", type=Path, metavar="FILE", help=text)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that exclude each other and for missing files."""
    _require("training" in args.task or args.weights, f"--task {args.task} needs --weights FILE")
    _require(args.val_json is None or args.task == "training", "--val-json is for training")
    _require(args.val_images is None or args.val_json, "--val-images is for --val-json")
    _require(0 < args.val_share < 1, f"--val-share {args.val_share} must be between 0 and 1")
    _require(args.split_seed >= 0, f"--split-seed {args.split_seed} must be 0 or more")
    is_folder = args.history is not None and args.history.is_dir()
    _require(not is_folder, f"--history {args.history} is a folder; name a file")
    _require(args.gpus >= 0, f"--gpus {args.gpus} must be 0 or more")
    _require(args.processes == 1 or not args.gpus, "--processes is for the CPU; leave out --gpus")
    for path in args.weights:
        _require(path.is_file(), f"--weights {path}: no such file")
    for setting in args.set:
        _require("=" in setting[1:], f"--set {setting}: must be KEY=VALUE")


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def read_splits(args: argparse.Namespace) -> dict[str, SampleTable]:
    """The samples by the name of their index: "train" and "val", or "candidate"."""
    table = first(read_coco(args.from_coco, args.images)[0], args.limit)
    if args.task != "training":
        return {"candidate": table}
    if args.val_json is None:
        return draw(table, args.val_share, args.split_seed)
    val_images = args.val_images or args.images
    val_set, _ = read_coco(args.val_json, val_images, table.class_names)
    return {"train": table, "val": first(val_set, args.limit)}


def first(table: SampleTable, limit: int | None) -> SampleTable:
    return table.subset(range(min(limit or len(table), len(table))))


def draw(table: SampleTable, share: float, seed: int) -> dict[str, SampleTable]:
    """Draws the validation images; each split gets one at least. Raises UserError for one image."""
    if len(table) < 2:
        raise UserError(f"{table.source} has one image; training and validation need two")
    order = np.random.default_rng(seed).permutation(len(table)).tolist()
    count = min(max(1, round(share * len(table))), len(table) - 1)
    return {
        "train": table.subset(sorted(order[count:])),
        "val": table.subset(sorted(order[:count])),
    }


def make_request(args: argparse.Namespace, class_names: tuple[str, ...]) -> Request:
    """Candidates have no annotations, so their class names are those of the model."""
    if args.task != "training":
        class_names = next(filter(None, map(classes_of, args.weights)), class_names)
    return Request(
        task=args.task,
        protocol=args.protocol,
        export_format=args.export_format,
        class_names=class_names,
        weights=tuple(args.weights),
        gpus=args.gpus,
        settings=dict(setting.split("=", 1) for setting in args.set),
    )


def classes_of(path: Path) -> tuple[str, ...] | None:
    """The class names of a weights file; None if it has none, or if the task will reject it."""
    try:
        return read_start(path)[2]
    except UnusableWeights:
        return None


def run_task(tree: Tree, *, processes: int = 1, history: Path | None = None) -> int:
    """Runs the task as the start script does. Its output is printed and logged as on the platform.

    SIGINT and SIGTERM reach it as SIGTERM, the signal of `docker stop`.
    """
    more = {"DEFAULT_ENV_FILE_PATH": str(tree.env_file), "PYTHONUNBUFFERED": "1"}
    if processes > 1:
        more["VIDT_CPU_PROCESSES"] = str(processes)
    process = subprocess.Popen(
        [sys.executable, "-m", "ymir_adapter"],
        env={**os.environ, **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(tree.monitor, history, over))
    watcher.start()
    try:
        with handed_on(process):
            show_and_keep(process, tree.log)
            return process.wait()
    finally:
        if process.poll() is None:  # this program fails, or its output is closed
            process.terminate()
            process.wait()
        over.set()
        watcher.join()


@contextmanager
def handed_on(process: subprocess.Popen) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP terminate the process."""
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {stop: signal.signal(stop, lambda *_: process.terminate()) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


def show_and_keep(process: subprocess.Popen, log_file: Path) -> None:
    """Copies output as it appears, progress bars included."""
    assert process.stdout is not None
    with log_file.open("ab") as log, process.stdout as output:
        while chunk := os.read(output.fileno(), 65536):
            log.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()


def watch(monitor: Path, history: Path | None, over: threading.Event) -> None:
    """Records the first line of the file whenever it changes, until `over`."""
    if history is None:
        return
    history.parent.mkdir(parents=True, exist_ok=True)
    last = None
    with history.open("w", encoding="utf-8") as file:
        while True:
            ending = over.wait(POLL_SECONDS)  # the last record is read too
            line = monitor.read_text(encoding="utf-8").partition("\n")[0]
            if line != last:
                file.write(f"{line}\n")
                last = line
            if ending:
                return


def summary(tree: Tree, task: str) -> list[str]:
    """The results of the task, in lines to print."""
    first_line = tree.monitor.read_text(encoding="utf-8").partition("\n")[0]
    columns = first_line.split("\t")
    lines = [f"monitor  {float(columns[2]):.0%} done, state {columns[3]}"]
    if columns[3] == "4":
        lines.append(f"error    {' '.join(columns[4:])}")
    parts = {"training": of_training, "mining": of_mining, "infer": of_inference}
    for name in task.split("+"):
        lines += parts[name](tree.output)
    return lines


def of_training(output: Path) -> list[str]:
    result = output / "models" / "result.yaml"
    if not result.is_file():
        return ["no model was listed"]
    content = yaml.safe_load(result.read_text(encoding="utf-8"))
    if "model" in content:
        paths = [str(result.with_name(name)) for name in content["model"]]
        return [f"model    map50 {content['map']:.4f}", *(f"weights  {path}" for path in paths)]
    stages, best = content["model_stages"], content["best_stage_name"]
    lines = [
        f"stage    {name}  map50 {stage['mAP']:.4f}{'  best' if name == best else ''}"
        for name, stage in stages.items()
    ]
    files = stages[best]["files"]
    return [*lines, *(f"weights  {result.parent / best / name}" for name in files)]


def of_mining(output: Path) -> list[str]:
    result = output / "result.tsv"
    if not result.is_file():
        return ["no ranking was written"]
    ranking = result.read_text(encoding="utf-8").splitlines()
    top = [f"  {line.split(chr(9))[1]}  {line.split(chr(9))[0]}" for line in ranking[:SHOWN]]
    return [f"ranking  {len(ranking)} images, most informative first:", *top]


def of_inference(output: Path) -> list[str]:
    result = output / "infer-result.json"
    if not result.is_file():
        return ["no boxes were written"]
    found = json.loads(result.read_text(encoding="utf-8"))["detection"]
    boxes = [box for entry in found.values() for box in boxes_of(entry)]
    counts = Counter(box["class_name"] for box in boxes)
    classes = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    best = max((box["score"] for box in boxes), default=math.nan)
    line = f"boxes    {len(boxes)} in {len(found)} images"
    return [line + (f", best score {best:.2f}: {classes}" if boxes else "")]


def boxes_of(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Platforms before 1.2 call the list `annotations`."""
    return entry.get("boxes", entry.get("annotations", []))


if __name__ == "__main__":
    sys.exit(main())
