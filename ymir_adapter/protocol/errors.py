"""Converts any failure to one of the platform's error codes and one readable line.

Every rank writes its failure to a folder; the parent process reports the one with the cause.
"""

import json
import time as clock
import traceback as traces
import urllib.error
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from vidt.atomic import atomic_write
from vidt.errors import UserError

LONGEST_LINE = 500  # characters of a message


class Code(IntEnum):
    """The platform's error codes."""

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
    """A failure with a known code; the message names the file or key."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Failure:
    """Why a process ended. `time` is in seconds since 1970; `mendable` if the error was a
    UserError, perhaps another rank's, whose class, and so its code, is unknown here.
    """

    code: Code
    message: str
    traceback: str
    time: float
    mendable: bool = False


def diagnose(error: BaseException) -> tuple[Code, str]:
    """The code of an exception and a line for people; CONTAINER for unknown exceptions."""
    for each in _with_causes(error):
        code = _code(each)
        if code is not None:
            return code, one_line(each)
    return Code.CONTAINER, _named(error)


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; its class if there is no message."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        # torch puts the traceback of a loader's worker in front of the message.
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return _shortened(text) or type(error).__name__


def write_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Writes the failure of a rank to `folder`; its first one counts."""
    path = folder / f"rank-{rank}.json"
    if path.exists():
        return
    code, message = diagnose(error)
    trace = "".join(traces.format_exception(error))
    failure = Failure(code, message, trace, clock.time(), isinstance(error, UserError))
    atomic_write(path, json.dumps(asdict(failure)).encode(), durable=False)


def first_failure(folder: Path) -> Failure | None:
    """The earliest failure with a known cause, else the earliest; None if there is none.

    After one rank fails, the others lose their connection to it; those failures mean nothing.
    """
    failures = []
    for path in folder.glob("rank-*.json"):
        fields = json.loads(path.read_text(encoding="utf-8"))
        failures.append(Failure(**{**fields, "code": Code(fields["code"])}))

    def rank(one: Failure) -> tuple[bool, bool, float]:
        unknown = one.code == Code.CONTAINER
        return unknown, unknown and one.mendable, one.time  # a copy of another rank's comes last

    return min(failures, key=rank, default=None)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from, at most ten deep."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        yield current
        current = current.__cause__


def _code(error: BaseException) -> Code | None:
    """By the class of the exception, or by its text if torch has no class for it."""
    if isinstance(error, TaskError):
        return error.code
    if isinstance(error, ImportError):
        return None  # perhaps of torch itself, which `_codes` imports
    for kind, code in _codes().items():
        if isinstance(error, kind):
            return code
    return _code_of_text(str(error)) if isinstance(error, RuntimeError) else None


def _codes() -> dict[type[BaseException], Code]:
    """Classes of exceptions, the specific before the general.

    The imports stand here because the parent process must not spend seconds on torch.
    """
    import torch

    from trainer.backward.memory import OutOfMemory
    from trainer.data.dataset_check import BadDataset
    from trainer.loop.loss_log import NonFiniteLoss
    from trainer.settings.flags import ConfigError
    from vidt.images.files import UnreadableImage
    from vidt.weights.published import Unreachable
    from vidt.weights.weights_file import UnusableWeights

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
    return line if isinstance(error, ValueError) or line == kind else _shortened(f"{kind}: {line}")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_LINE else text[: LONGEST_LINE - 3] + "..."
