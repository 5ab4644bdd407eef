"""Crash-safe checkpoints: a resumed run computes what the uninterrupted run would have computed.

A checkpoint is a folder `step-00000123` that appears by one rename, after its files are written
and flushed. Its `state.json` holds the size and SHA-256 of its tensors, so that a torn or foreign
folder is noticed, named and skipped. Nothing in it is pickled. It holds no random state: random
numbers follow from (seed, step), (seed, epoch) and (seed, epoch, image).
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.augmentation.preview import PREVIEW_NAME
from trainer.settings.parsing import default_settings
from vidt.atomic import atomic_file, flush
from vidt.errors import UserError, shown
from vidt.weights.weights_file import UnusableWeights, read_info

PREFIX = "step-"
# The step, and a number for a step that was saved more than once.
NAME = re.compile(rf"{PREFIX}(\d+)(?:\.(\d+))?")
TENSORS, STATE = "tensors.safetensors", "state.json"
# The results in a run's folder; each save replaces RESULTS.
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
BEST, NON_FINITE, TEST = "best.safetensors", "non_finite.json", "test.json"
RESULTS = (
    *(BEST, "last.safetensors", "config.yaml"),
    *("report.html", "predictions.jpg", NON_FINITE),
)
NOT_OF_EVERY_RUN = (TEST, PREVIEW_NAME)
METRICS = "metrics.csv"  # a resumed run goes on with it
# How a run was trained whose checkpoint is older than these settings; what is not listed was not
# there, as by default.
BEFORE = {"scale_per": "image", "group_by_aspect": False, "mixed_precision": "no", "tf32": False}


@dataclass
class RunState:
    """The state of a run apart from its tensors."""

    step: int = 0  # optimiser steps done
    saved_step: int = -1  # the step of the last checkpoint that was due; -1: none yet
    evaluated_step: int = -1  # the step of the last evaluation; -1: none yet
    best_map50: float = -1.0
    best_step: int = -1  # -1: no evaluation yet
    best_metrics: dict[str, float] = field(default_factory=dict)
    stale_evaluations: int = 0  # evaluations since the best one
    n_iter_to_acc: int = 1  # may have grown after running out of memory
    skipped_updates: int = 0  # steps that the fp16 scaler refused
    stopped_early: bool = False
    step_images: int = 0  # images of one optimiser step over all processes
    dataset: str = ""  # fingerprint of the training table
    settings: dict[str, Any] = field(default_factory=dict)  # resolved, of the run that saved it
    scaler: dict[str, Any] = field(default_factory=dict)  # of fp16

    def require_types(self) -> None:
        """Raises TypeError for a value of another type than its default, as in a damaged file."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            default = getattr(RunState(), each.name)
            kinds = (int, float) if isinstance(default, float) else (type(default),)
            if type(value) not in kinds:
                raise TypeError(f"{each.name} is {shown(value)}; it must be like {default!r}")
        for name, value in self.best_metrics.items():
            if type(value) not in (int, float):
                raise TypeError(f"best_metrics has {name} {shown(value)}; it must be a number")

    def note_evaluation(self, metrics: dict[str, float]) -> bool:
        """Records an evaluation; True if it is the best so far by the setting best_by. Nothing else
        decides that.
        """
        self.evaluated_step = self.step
        by = self.settings.get("best_by", "map50")
        score, before = metrics[by], self.best_metrics.get(by, self.best_map50)
        # With nothing to score (-1) the latest weights are the best guess.
        best = self.best_step < 0 or score > before or score == before == -1
        if best:
            self.best_map50, self.best_step = metrics["map50"], self.step
            self.best_metrics, self.stale_evaluations = dict(metrics), 0
        else:
            self.stale_evaluations += 1
        return best

    def forget_best(self) -> None:
        """The next evaluation is the best so far."""
        fresh = RunState()
        self.best_map50, self.best_step = fresh.best_map50, fresh.best_step
        self.best_metrics, self.stale_evaluations = {}, 0

    def stops_early(self, patience: int) -> bool:
        """Whether `patience` evaluations (0: any number) have brought no better one."""
        return 0 < patience <= self.stale_evaluations


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint, in memory."""

    path: Path
    state: RunState
    tensors: dict[str, Tensor]


def tensors_of(model: nn.Module, ema: nn.Module | None, optimizer: Optimizer) -> dict[str, Tensor]:
    """All tensors of a run under flat names: `model/...`, `ema/...` and
    `optimizer/<field>/<parameter>`.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema/{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore_tensors(
    tensors: dict[str, Tensor], model: nn.Module, ema: nn.Module | None, optimizer: Optimizer
) -> None:
    """Restores what `tensors_of` returned, on the devices of the model.

    Raises UserError if the tensors are those of another architecture, or if only one of the
    checkpoint and this run has a moving average.
    """
    saved_average = any(name.startswith("ema/") for name in tensors)
    if saved_average != (ema is not None):
        flag = "--ema" if saved_average else "--no-ema"
        raise UserError(
            f"--resume: the checkpoint was saved with {flag}; give {flag}, or start anew with "
            "--load_from"
        )
    try:
        model.load_state_dict(_under("model/", tensors), strict=True)
        if ema is not None:
            ema.load_state_dict(_under("ema/", tensors), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--resume: the checkpoint is of another architecture: {reason}") from error
    parameters = dict(model.named_parameters())
    fused = optimizer.defaults["fused"]
    for full_name, tensor in _under("optimizer/", tensors).items():
        key, name = full_name.split("/", 1)
        # AdamW reads its step count on the host, unless it is fused.
        device = parameters[name].device if fused or key != "step" else torch.device("cpu")
        optimizer.state[parameters[name]][key] = tensor.to(device)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def save(root: Path, state: RunState, tensors: dict[str, Tensor], *, keep: int) -> Path:
    """Writes a checkpoint under a temporary name, flushes it, renames it, then removes all but the
    newest `keep`. Raises OSError, and removes none, if it cannot be written.
    """
    # A step that is saved again, with its evaluation, gets a folder of its own, so that one of the
    # two exists at every instant.
    again = [_order(path)[1] + 1 for path in checkpoints(root) if _order(path)[0] == state.step]
    final = root / (f"{PREFIX}{state.step:08d}" + (f".{max(again)}" if again else ""))
    unfinished = root / f".{final.name}.{os.getpid()}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_file(tensors, unfinished / TENSORS)
        content = {
            "state": dataclasses.asdict(state),
            "files": {TENSORS: _fingerprint(unfinished / TENSORS)},
        }
        (unfinished / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in (unfinished / TENSORS, unfinished / STATE, unfinished):
            flush(path)
        unfinished.rename(final)
        flush(root)
    except (OSError, SafetensorError) as error:
        raise OSError(f"checkpoint {final} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    prune(final, keep)
    return final


def prune(newest: Path, keep: int) -> None:
    """Keeps `newest`, which is intact, and the keep - 1 before it. Checkpoints of later steps go
    too: this run started afresh or from an earlier checkpoint, and they would pass for its newest.

    Each folder is renamed before it is deleted, so that no half-deleted one has a valid name.
    """
    root = newest.parent
    before = [path for path in checkpoints(root) if _order(path) < _order(newest)]
    kept = {newest, *before[: keep - 1]}
    sweep(root)
    for path in checkpoints(root):
        if path not in kept and path.is_dir():
            doomed = path.rename(path.with_name(f".{path.name}.removed"))
            shutil.rmtree(doomed, ignore_errors=True)


def set_aside(output: Path) -> Path | None:
    """Moves the run in `output` into its folder `earlier`, replacing that, and returns the folder;
    None if there is no run. The moved run can be resumed.

    RESULTS also stay in `output` until they are replaced: --load_from may name them. The
    checkpoints move last, so that after a kill the next call completes the move.
    """
    earlier, half = output / "earlier", output / ".earlier.half"
    if checkpoints(output / CHECKPOINTS):
        half.mkdir(exist_ok=True)
        for name in RESULTS:
            if (output / name).exists() and not (half / name).exists():
                _link(output / name, half / name)
        for name in (METRICS, *NOT_OF_EVERY_RUN, TENSORBOARD, CHECKPOINTS):
            if (output / name).exists():
                if (half / name).is_dir():  # a move was killed, and the run went on since
                    shutil.rmtree(half / name)
                (output / name).rename(half / name)
    elif not (half / CHECKPOINTS).exists():
        return None
    shutil.rmtree(earlier, ignore_errors=True)
    half.rename(earlier)
    return earlier


def bring_best(checkpoint: Checkpoint, output: Path) -> bool:
    """Copies the best weights of the run that is resumed into a new output folder, and returns
    whether they are there now. Those of an evaluation after the checkpoint are not copied.
    """
    source, target = checkpoint.path.parent.parent / BEST, output / BEST
    try:
        if read_info(source).training.get("steps_done") != checkpoint.state.best_step:
            return False
        content = source.read_bytes()
    except (UnusableWeights, OSError):
        return False
    with atomic_file(target) as file:
        file.write(content)
    return True


def _link(file: Path, target: Path) -> None:
    """Gives the file a second name, which keeps this content when the first is replaced."""
    try:
        target.hardlink_to(file)
    except OSError:  # the file system has no hard links
        shutil.copyfile(file, target)


def sweep(root: Path) -> None:
    """Removes the remains of saves and removals that were killed."""
    for leftover in root.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def checkpoints(root: Path) -> list[Path]:
    """All folders with the name of a checkpoint, newest first; they may be damaged."""
    found = [path for path in root.glob(f"{PREFIX}*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    """The step of a checkpoint and the number of the save of that step, from 0."""
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), int(match[2] or 0)


def load(path: Path) -> Checkpoint:
    """Reads an intact checkpoint. Raises UserError naming the folder and what is wrong with it."""
    try:
        content = json.loads((path / STATE).read_bytes())
        if _fingerprint(path / TENSORS) != content["files"][TENSORS]:
            raise UserError(f"{TENSORS} is not the file that was written")
        state = RunState(**content["state"])
        state.require_types()
        return Checkpoint(path, state, load_file(path / TENSORS))
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        reason = shown(f"{type(error).__name__}: {error}", 300)
        raise UserError(f"checkpoint {path} is damaged: {reason}") from error


def find(wanted: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, and a line about each newer one that was skipped.

    wanted is a run's output folder, a folder of checkpoints, or a checkpoint.
    """
    skipped: list[str] = []
    for path in _candidates(wanted):
        try:
            return load(path), skipped
        except UserError as error:
            skipped.append(str(error))
    return None, skipped


def _candidates(wanted: Path) -> list[Path]:
    if (wanted / STATE).exists():
        return [wanted]
    inner = wanted / CHECKPOINTS
    return checkpoints(inner if inner.is_dir() else wanted)


def saved_settings(wanted: Path) -> dict[str, Any] | None:
    """The settings of the newest checkpoint that `find` may return, without its tensors; None if
    there is none. All checkpoints of a run were saved with the same settings.
    """
    for path in _candidates(wanted):
        with suppress(OSError, KeyError, TypeError, ValueError, RecursionError):
            settings = json.loads((path / STATE).read_bytes())["state"]["settings"]
            return {**BEFORE, **settings}
    return None


def changed_settings(old: RunState, new: RunState) -> list[str]:
    """A line for each setting that differs. Raises UserError for a difference that prevents
    resuming.
    """
    for name, meaning in (
        ("step_images", "images per optimiser step"),
        ("dataset", "training set"),
    ):
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            raise UserError(
                f"--resume: the checkpoint's {meaning} is {before}, this run's {now}; give the "
                "same data, --batch_size and number of processes, or start anew with --load_from"
            )
    settings = {**default_settings(), **BEFORE, **old.settings}
    return [
        f"resuming with {key} {value}, it was {settings.get(key)}"
        for key, value in new.settings.items()
        if settings.get(key) != value
    ]


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
