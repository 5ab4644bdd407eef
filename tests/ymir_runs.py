"""Tiny training tasks of the YMIR platform, and ways to run one."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tiny_runs import NAMES, ROOT, Picture, draw, environment, random_pictures
from ymir_task import make_tree, write_index

CHECKER = ROOT.parent / "shared/tools/check_ymir_out.py"
TIMEOUT = 240.0  # seconds that a task may take on a busy machine
OPTIONS = (
    "--det_token_num 8 --dec_layers 1 --dim_feedforward 64 --reduced_dim 64 --pos_dim 32 "
    "--train_sizes 48,64 --log_interval 1"
)
CONFIG = {
    "gpu_id": "",
    "epochs": 2,
    "batch_size_per_gpu": 2,
    "num_workers_per_gpu": 0,
    "eval_size": 64,
    "backbone_name": "swin_nano",
    "pre_trained": "none",
    "export_format": "ark:raw",
}


@dataclass(frozen=True)
class Tree:
    """The folders that a platform would mount as /in and /out."""

    root: Path

    @property
    def env_file(self) -> Path:
        return self.root / "in/env.yaml"

    @property
    def output(self) -> Path:
        return self.root / "out"

    @property
    def models(self) -> Path:
        return self.output / "models"

    @property
    def monitor(self) -> Path:
        return self.output / "monitor.txt"

    @property
    def result(self) -> dict[str, Any]:
        return yaml.safe_load((self.models / "result.yaml").read_text())

    @property
    def record(self) -> list[str]:
        """Columns of the monitor's first line."""
        return self.monitor.read_text().splitlines()[0].split("\t")


def training_task(
    root: Path,
    *,
    protocol: str | None = "1.1.0",
    names: Sequence[str] = NAMES,
    options: str = "",
    pictures: tuple[int, int] = (6, 3),
    **config: Any,
) -> Tree:
    """Write a task on pictures of `tiny_runs`; `names` may omit some of its classes or add others.

    A config value of None removes the key.
    """
    values = {**CONFIG, "class_names": list(names), "args_options": f"{OPTIONS} {options}"}
    kept = {key: value for key, value in {**values, **config}.items() if value is not None}
    folders = make_tree(root, protocol=protocol, config=kept, train=(), val=())
    for split, count, seed in (("train", pictures[0], 0), ("val", pictures[1], 1)):
        rows = [
            write_picture(root / "in/assets", f"{split}{number}", picture, names, seed + number)
            for number, picture in enumerate(random_pictures(count, seed))
        ]
        write_index(folders.input / f"{split}-index.tsv", rows)
    return Tree(root)


def write_picture(
    folder: Path, name: str, picture: Picture, names: Sequence[str], seed: int
) -> tuple[Path, Path]:
    """Write an image and its ark file, in which corners are inclusive."""
    image, annotation = folder / f"{name}.png", folder / f"{name}.txt"
    draw(picture, seed).save(image)
    lines = [
        f"{names.index(NAMES[label])}, {x}, {y}, {x + w - 1}, {y + h - 1}, -1.0, 0.0\n"
        for x, y, w, h, label, _ in picture.boxes
        if NAMES[label] in names
    ]
    annotation.write_text("".join(lines))
    return image, annotation


class Reader:
    """Polls the monitor file as the platform does and records every new first line."""

    def __init__(self, tree: Tree) -> None:
        self.path, self.history = tree.monitor, tree.root / "history.txt"
        self.lines: list[str] = []
        self.torn: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self.history.write_text("\n".join(self.lines) + "\n")

    def _read(self) -> None:
        while not self._over.wait(0.005):
            try:
                text = self.path.read_text()
            except FileNotFoundError:
                continue
            line = text.partition("\n")[0]
            if not text.endswith("\n") or len(line.split("\t")) < 4:
                self.torn.append(text)
            if not self.lines or line != self.lines[-1]:
                self.lines.append(line)


@dataclass(frozen=True)
class Ended:
    """Exit code of a task's parent, and the output of the parent and its ranks."""

    code: int
    said: str
    reader: Reader


def start(tree: Tree, *, ranks: int = 1, module: str = "", **more: str) -> subprocess.Popen:
    """Start `python -m ymir_adapter` in the task's folder; its output goes to `log.txt`.

    `module` names a module of the tests to run as ranks instead. The environment of every process
    holds MARK, the folder.
    """
    words = ["-m", "ymir_adapter"]
    if module:
        words = ["-c", f"import sys, ymir_adapter.__main__ as m; sys.exit(m.main({module!r}))"]
    own = {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "DEFAULT_ENV_FILE_PATH": str(tree.env_file),
        "VIDT_CPU_PROCESSES": str(ranks),
        "MARK": str(tree.root),
    }
    with (tree.root / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *words],
            env=environment(**own, **more),
            cwd=tree.root,
            stdout=log,
            stderr=log,
        )


def run_parent(tree: Tree, *, ranks: int = 1, module: str = "", **more: str) -> Ended:
    with Reader(tree) as reader:
        code = start(tree, ranks=ranks, module=module, **more).wait(TIMEOUT)
    return Ended(code, (tree.root / "log.txt").read_text(), reader)


def complaints(tree: Tree, ended: Ended, *flags: str) -> str:
    """Output of the platform's checker if it rejects a run, else ""."""
    words = ["--in", tree.root / "in", "--out", tree.output, "--task", "training"]
    words += ["--exit-code", str(ended.code), "--history", ended.reader.history, *flags]
    command = [sys.executable, str(CHECKER), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def processes_with(variable: str) -> list[int]:
    """Identifiers of processes whose environment holds `NAME=value`, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until_gone(variable: str, seconds: float) -> list[int]:
    """Wait for those processes to end; return the ones that are left after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := processes_with(variable)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
