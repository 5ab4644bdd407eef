"""Failures of any kind to the platform's error codes and one readable line.

Every rank leaves its failure in a folder; the parent process reports the one that tells the cause.
"""

import json
import os
import time as clock
import traceback as traces
import urllib.error
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from vidt.errors import UserError

LONGEST_LINE = 500  # characters of a message


class Code(IntEnum):
    """The platform's error codes, as it spells their meaning."""

    CONFIG = 300001
    DATASET = 300002
    IMAGE_FORMAT = 300003
    MODEL = 300004
    OBJECT_TYPE = 300005
    GPU = 300101
    NO_GPU = 300102
    OOM = 300103
    NAN = 300201
    NETWORK = 300301
    CONTAINER = 160004


class TaskError(UserError):
    """A failure whose code is known: one line for people, naming the file or key."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Failure:
    """What a process died of. `time` is seconds since 1970."""

    code: Code
    message: str
    traceback: str
    time: float


def diagnose(error: BaseException) -> tuple[Code, str]:
    """The code of any exception and one line for people; CONTAINER for a kind nobody foresaw."""
    for each in _with_causes(error):
        code = _code(each)
        if code is not None:
            return code, one_line(each)
    return Code.CONTAINER, _named(error)


def one_line(error: BaseException) -> str:
    """An exception's own words without line breaks; its kind where it has none."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        # Raised in a loader's worker: torch puts the worker's traceback in front of the message.
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return _shortened(text) or type(error).__name__


def write_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Leaves what a rank died of in `folder`; the first failure of a rank counts."""
    path = folder / f"rank-{rank}.json"
    if path.exists():
        return
    code, message = diagnose(error)
    trace = "".join(traces.format_exception(error))
    failure = Failure(code, message, trace, clock.time())
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".rank-{rank}.{os.getpid()}.tmp"
    unfinished.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    unfinished.replace(path)


def first_failure(folder: Path) -> Failure | None:
    """The earliest failure that names a cause, else the earliest; None if no rank left any.

    When one rank fails the others soon lose their connection to it: that tells nobody anything.
    """
    failures = []
    for path in folder.glob("rank-*.json"):
        fields = json.loads(path.read_text(encoding="utf-8"))
        failures.append(Failure(**{**fields, "code": Code(fields["code"])}))
    return min(failures, key=lambda one: (one.code == Code.CONTAINER, one.time), default=None)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from, at most ten deep."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        yield current
        current = current.__cause__


def _code(error: BaseException) -> Code | None:
    """By the type of the exception; by its text where torch has no type of its own."""
    if isinstance(error, TaskError):
        return error.code
    if isinstance(error, ImportError):
        return None  # perhaps torch itself, by which the other kinds are told
    for kind, code in _codes().items():
        if isinstance(error, kind):
            return code
    return _code_of_text(str(error)) if isinstance(error, RuntimeError) else None


def _codes() -> dict[type[BaseException], Code]:
    """Kinds of exceptions, the particular before the general.

    Imported here, for a process without a detector has no use for torch: it takes seconds.
    """
    import torch

    from trainer.data.dataset_check import BadDataset
    from trainer.loop.loss_log import NonFiniteLoss
    from trainer.loop.out_of_memory import OutOfMemory
    from trainer.settings.flags import ConfigError
    from vidt.images.files import UnreadableImage
    from vidt.weights.checkpoint import Unreachable, UnusableWeights

    return {
        ConfigError: Code.CONFIG,
        UnreadableImage: Code.IMAGE_FORMAT,
        BadDataset: Code.DATASET,
        UnusableWeights: Code.MODEL,
        OutOfMemory: Code.OOM,
        torch.OutOfMemoryError: Code.OOM,
        MemoryError: Code.OOM,
        NonFiniteLoss: Code.NAN,
        Unreachable: Code.NETWORK,
        urllib.error.URLError: Code.NETWORK,
        ConnectionError: Code.NETWORK,
        # Since torch 2.8: device asserts, no kernel for this card, a lost device.
        getattr(torch, "AcceleratorError", torch.cuda.CudaError): Code.GPU,
        torch.cuda.CudaError: Code.GPU,
    }


def _code_of_text(text: str) -> Code | None:
    words = {
        "DefaultCPUAllocator: can't allocate memory": Code.OOM,
        "out of memory": Code.OOM,
        "CUBLAS_STATUS_ALLOC_FAILED": Code.OOM,
        "killed by signal: Bus error": Code.OOM,  # the shared memory of loader workers is full
        "killed by signal: Killed": Code.OOM,
        "insufficient shared memory": Code.OOM,
        "Found no NVIDIA driver": Code.NO_GPU,
        "No CUDA GPUs are available": Code.NO_GPU,
        "no CUDA-capable device": Code.NO_GPU,
        "Torch not compiled with CUDA enabled": Code.NO_GPU,
        "CUDA error": Code.GPU,
        "CUDA driver": Code.GPU,
        "cuDNN error": Code.GPU,
        "CUDNN_STATUS": Code.GPU,
        "CUBLAS_STATUS": Code.GPU,
        "NVIDIA driver on your system is too old": Code.GPU,
    }
    return next((code for word, code in words.items() if word.lower() in text.lower()), None)


def _named(error: BaseException) -> str:
    line, kind = one_line(error), type(error).__name__
    return line if isinstance(error, UserError) or line == kind else _shortened(f"{kind}: {line}")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_LINE else text[: LONGEST_LINE - 3] + "..."
