"""Training tasks killed by SIGKILL at random instants, as the platform ends a task: whatever is
listed then is there, whole, and tells the truth.

Two kills among the tests; `python tests/test_ymir_kill.py --kills 20` for more, a line each.
"""

import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from kill_program import run_kills
from ymir_runs import TIMEOUT, Tree, processes_with, start, training_task, wait_until_gone

from vidt.weights.weights_file import load_weights
from ymir_adapter.protocol.task import read_task

EPOCHS = 14  # more than the stages that are kept
# A detector that learns its four pictures fast and badly: the best stage is seldom the last.
EASY = "--dropout 0 --no-flip --no-crop --train_sizes 64 --ema_decay 0.5 --clip_max_norm 1"
PLACES = ("a write of results", "an epoch", "a clean-up", "the whole run")
STAGES_BEFORE_CLEAN_UP = 10
LASTS = {"a write of results": 0.03, "an epoch": 0.5, "a clean-up": 0.03}  # seconds, about


@dataclass(frozen=True)
class Outcome:
    """Of one task: where it was to be killed, what that left, and what is wrong with it."""

    place: str
    seconds: float  # from the start of the parent to its death
    percent: str
    stages: int
    best: float  # mAP
    unfinished: int  # files under temporary names
    faults: list[str]

    def __str__(self) -> str:
        end = f"WRONG: {'; '.join(self.faults)}" if self.faults else "all is whole"
        return (
            f"killed in {self.place} after {self.seconds:.2f} s at {self.percent}: {self.stages} "
            f"stages listed, the best scored {self.best:.3f}, {self.unfinished} unfinished files; "
            f"{end}"
        )


def task(root: Path, protocol: str | None) -> Tree:
    """Validated on what it is trained on."""
    tree = training_task(
        root,
        protocol=protocol,
        options=EASY,
        pictures=(4, 0),
        backbone_name="swin_test",
        batch_size_per_gpu=1,
        epochs=EPOCHS,
        learning_rate=1e-3,
    )
    shutil.copy(root / "in/train-index.tsv", root / "in/val-index.tsv")
    return tree


def kill(tree: Tree, place: str, random: np.random.Generator, length: float) -> float:
    """Starts the task and kills it at the place; returns the seconds that it lived, 0 if it was
    done before.
    """
    # A result without stages drops its file for every better one.
    clean_up_after = STAGES_BEFORE_CLEAN_UP if read_task(tree.env_file).has_stages else 1
    process, begin = start(tree, module="ymir_tiny"), time.monotonic()
    if place == "the whole run":
        time.sleep(random.uniform(0, length))
    else:
        first = clean_up_after if place == "a clean-up" else 0
        wait_for_changes(process, tree, first + int(random.integers(1, 4)))
        time.sleep(random.uniform(0, LASTS[place]))
    for pid in processes_with(f"MARK={tree.root}"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    died = process.wait(TIMEOUT) == -signal.SIGKILL
    assert wait_until_gone(f"MARK={tree.root}", TIMEOUT) == []
    return time.monotonic() - begin if died else 0.0


def wait_for_changes(process: subprocess.Popen, tree: Tree, times: int) -> None:
    """Until so many stages' files have been seen, under whatever name."""
    seen: set[str] = set()
    while process.poll() is None and len(seen) < times:
        found = [path.name for path in tree.models.rglob("*epoch_*.safetensors*")]
        seen |= {name.removeprefix(".").removesuffix(".tmp") for name in found}
        time.sleep(0.002)


def wrong_with(tree: Tree) -> list[str]:
    """What the platform could not read, or would read wrongly."""
    wrong = []
    with suppress(FileNotFoundError):
        text = tree.monitor.read_text()
        columns = text.partition("\n")[0].split("\t")
        if not text.endswith("\n") or columns[0] != "t0000001" or int(columns[3]) != 2:
            wrong.append(f"monitor: {text!r}")
        if not (0 <= float(columns[2]) <= 1 and math.isfinite(float(columns[1]))):
            wrong.append(f"monitor: {text!r}")
    with suppress(FileNotFoundError):
        wrong += wrong_with_result(tree, tree.result)
    return wrong


def wrong_with_result(tree: Tree, result: dict) -> list[str]:
    """Files that do not load, weights of another score than the listed one, a best that is not."""
    if "model" in result:
        stages = {"flat": {"files": result["model"], "mAP": result["map"]}}
        best = "flat"
    else:
        stages, best = result["model_stages"], result["best_stage_name"]
    wrong = []
    for name, stage in stages.items():
        for file in stage["files"]:
            folder = tree.models / name if (tree.models / name).is_dir() else tree.models
            try:
                _, info = load_weights(folder / file)
            except ValueError as error:
                wrong.append(str(error))
                continue
            if abs(max(info.metrics["map50"], 0) - stage["mAP"]) > 1e-9:
                wrong.append(f"{file} scored {info.metrics['map50']}, listed is {stage['mAP']}")
    if stages[best]["mAP"] < max(stage["mAP"] for stage in stages.values()):
        wrong.append(f"best stage {best} is not the best")
    if len(stages) > 11:
        wrong.append(f"{len(stages)} stages are listed")
    return wrong


def kills(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    random, length = np.random.default_rng(seed), 20.0
    for number in range(count):
        root, place, lived = folder / f"killed-{number}", PLACES[number % len(PLACES)], 0.0
        while not lived:
            shutil.rmtree(root, ignore_errors=True)
            # Of every four tasks, whatever the place, one is for a platform without stages.
            tree = task(root, None if number // len(PLACES) % 4 == 3 else "1.1.0")
            lived = kill(tree, place, random, length)
            length = max(length, lived)
        yield outcome(tree, place, lived)
        shutil.rmtree(root)


def outcome(tree: Tree, place: str, lived: float) -> Outcome:
    stages, best, percent = 0, 0.0, "no percent"
    with suppress(FileNotFoundError):
        percent = tree.record[2]
    with suppress(FileNotFoundError, yaml.YAMLError):
        result = tree.result
        stages, best = len(result.get("model_stages", "1")), result.get("mAP", result.get("map"))
    unfinished = len(list(tree.output.rglob(".*.tmp")))
    return Outcome(place, lived, percent, stages, best, unfinished, wrong_with(tree))


@pytest.mark.slow
def test_two_kills(tmp_path: Path) -> None:
    outcomes = list(kills(tmp_path, 2))
    assert all(one.faults == [] for one in outcomes), outcomes
    assert any(one.stages for one in outcomes), outcomes


if __name__ == "__main__":
    run_kills(str(__doc__), kills, "kills left everything whole")
