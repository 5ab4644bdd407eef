"""`vidt.train`: a training run from Python, in a script or a notebook."""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState

from trainer.loop.loss_log import NonFiniteLoss
from trainer.loop.stopping import INTERRUPTED, SIGNALS, Stopped, StoppedBySignal
from trainer.loop.time_limit import count_from_now
from trainer.report.console import PrintableFormatter
from trainer.report.page import PAGE_NAME
from trainer.settings.config import TrainConfig
from trainer.settings.flags import settings_of
from trainer.settings.limits import COCO_FILES, PATH_OF
from trainer.settings.other_names import ELSEWHERE
from trainer.settings.parsing import fixed_settings, parse
from trainer.train import run_from_settings
from vidt.arguments import nearest
from vidt.errors import UserError
from vidt.loading import load
from vidt.model.config import ViDTConfig
from vidt.weights.weights_file import read_info

SETTINGS = {**settings_of(TrainConfig), **settings_of(ViDTConfig)}
# Errors that a process hands to the one that forked it.
TOLD: dict[str, type[Exception]] = {"user": UserError, "non-finite": NonFiniteLoss}
ELASTIC = "torch.distributed.elastic"  # the logger that reports processes that ended


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended, by its folder. `metrics` are those of its best evaluation: map50, map,
    ap/CLASS and so on, from 0 to 1, -1 for nothing to score.
    """

    output_dir: Path
    metrics: Mapping[str, float]

    @property
    def weights(self) -> Path:
        """The weights of the best evaluation."""
        return self.output_dir / "best.safetensors"

    @property
    def report(self) -> Path:
        """The page with curves, confusions and the worst images."""
        return self.output_dir / PAGE_NAME

    def detector(self, **options: Any) -> Any:
        """The best weights as a `vidt.Predictor`; `options` are those of `vidt.load`."""
        return load(self.weights, **options)


def train(
    data: str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    num_processes: int = 1,
    **settings: Any,
) -> FinishedRun:
    """Trains a detector as `vidt train` does, and returns the run once it has ended.

    data: a folder of COCO, YOLO or Pascal VOC data; other ways to name data are settings, such as
    `train_json`. settings: the flags of `vidt train` by name, such as `epochs=20`; `resume=True`
    continues the run in output_dir. What is not given is chosen from the data, as `vidt plan`
    shows; `preset="released"` is the paper's recipe. output_dir: None is that of a `config`, else
    "output". num_processes: more than 1 trains on so many
    GPUs of this machine, or, without a GPU, in so many processes; nothing may have used a GPU
    before.

    PyTorch's random state changes. Raises UserError for what you can mend, such as an unknown
    setting or a damaged dataset, NonFiniteLoss if the loss is not finite, and KeyboardInterrupt
    when it is interrupted, after it has saved everything.
    """
    named = {"output_dir": output_dir, "data": data, **settings}
    given = {name: each for name, each in named.items() if each is not None}
    if "config" not in given and given.keys() & {*PATH_OF.values(), *COCO_FILES}:
        given.setdefault("preset", "auto")
    words = _as_flags(given)
    config, _ = parse(words)
    for name in ("eval", "check"):
        if getattr(config, name):
            raise UserError(f"vidt.train has no {name}; use vidt {name} --help on the command line")
    if num_processes < 1:
        raise UserError(f"num_processes is {num_processes}; it must be 1 or more")
    with _signals_restored():
        if num_processes == 1:
            _run(words)
        else:
            _run_several(words, num_processes)
    folder = Path(config.output_dir)
    return FinishedRun(folder, read_info(folder / "best.safetensors").metrics)


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of the command line. Raises UserError for an unknown name."""
    words = []
    for name, value in settings.items():
        if name not in SETTINGS:
            similar = nearest(name, SETTINGS)
            hint = f"the nearest is {similar}" if similar else "vidt train --help lists all"
            hint = ELSEWHERE.get(name, hint).replace("--", "")
            raise UserError(f"vidt.train has no setting {name}; {hint}")
        if name == "resume" and isinstance(value, bool):
            words += ["--resume"] if value else []
            continue
        several = isinstance(value, list | tuple)
        text = (",".join(map(str, value)) or "none") if several else str(value)
        words.append(f"--{name}={text}")
    return words


def _run(words: list[str]) -> None:
    """One process of a run: this one. Accelerate's state, which a process has once, is cleared
    afterwards, so that another run may have another precision.
    """
    ours = not AcceleratorState._shared_state
    count_from_now()
    try:
        with _log_lines():
            run_from_settings(*parse(words), fixed_settings(words))
    except Stopped as stopped:
        kind = KeyboardInterrupt if stopped.exit_code == INTERRUPTED else StoppedBySignal
        raise kind(f"{stopped}; everything is saved, continue with resume=True") from stopped
    finally:
        if ours:
            AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()  # what refers to itself would keep its memory on the GPU


def _run_several(words: list[str], num_processes: int) -> None:
    """Forks the processes of a run. An error of TOLD comes back as itself."""
    _require_forks(num_processes)
    elastic = logging.getLogger(ELASTIC)
    level = elastic.level
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "error.txt"  # the kind of an error, then its message
        elastic.setLevel(logging.CRITICAL)
        try:
            notebook_launcher(
                _forked, (words, said), num_processes=num_processes, use_port=str(_free_port())
            )
        except Exception as error:  # of torch.distributed.elastic, with the children's tracebacks
            if said.exists():
                kind, _, text = said.read_text(encoding="utf-8").partition("\n")
                raise TOLD[kind](text) from None
            if type(error).__name__ == "SignalException":
                raise KeyboardInterrupt(str(error)) from error
            raise
        finally:
            elastic.setLevel(level)


def _forked(words: list[str], said: Path) -> None:
    """One of several processes. Threads of the parent do not exist here, so OpenMP would wait for
    them.
    """
    torch.set_num_threads(1)
    try:
        _run(words)
    except tuple(TOLD.values()) as error:
        kind = next(name for name, each in TOLD.items() if isinstance(error, each))
        said.write_text(f"{kind}\n{error}", encoding="utf-8")
        sys.exit(2)


def _require_forks(num_processes: int) -> None:
    """Raises UserError if this process cannot fork so many that share the work."""
    gpus = torch.cuda.device_count()  # by NVML, which does not initialise CUDA
    reason = ""
    if not hasattr(os, "fork"):
        reason = "this system has no fork"
    elif torch.cuda.is_initialized():
        reason = "this process has used a GPU; restart it and call vidt.train first"
    elif AcceleratorState._shared_state:
        reason = "this process has an Accelerator; restart it and call vidt.train first"
    elif 0 < gpus < num_processes:
        reason = f"this machine has {gpus} GPUs"
    if reason:
        raise UserError(
            f"num_processes is {num_processes}, but {reason}; or run trainer/train.py by "
            "accelerate launch"
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """The handlers of before: the launcher of several processes leaves its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _log_lines() -> Iterator[None]:
    """Shows the trainer's log lines, unless the program has set up logging itself."""
    if logging.getLogger().handlers:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in ("trainer", "vidt")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
