"""Every failure becomes a code of the platform and one line."""

import re
import traceback
import urllib.error
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trainer.backward.memory import OutOfMemory, more_micro_batches
from trainer.data.dataset_check import BadDataset
from trainer.loop.loss_log import NonFiniteLoss
from trainer.settings.parsing import parse
from vidt.errors import UserError
from vidt.images.files import UnreadableImage, read_image
from vidt.weights.checkpoint import load_model
from vidt.weights.published import Unreachable, local_weights
from vidt.weights.weights_file import UnusableWeights
from ymir_adapter.protocol.errors import (
    LONGEST_LINE,
    Code,
    TaskError,
    diagnose,
    first_failure,
    write_failure,
)


def raised(work):
    with pytest.raises(BaseException) as caught:
        work()
    return caught.value


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TaskError(Code.OBJECT_TYPE, "object_type is 3"), Code.OBJECT_TYPE),
        (BadDataset("no image", []), Code.DATASET),
        (UnreadableImage("x.jpg"), Code.IMAGE_FORMAT),
        (UnusableWeights("x.pth"), Code.MODEL),
        (Unreachable("https://x"), Code.NETWORK),
        (urllib.error.URLError("no route"), Code.NETWORK),
        (ConnectionRefusedError("refused"), Code.NETWORK),
        (OutOfMemory("one image"), Code.OOM),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), Code.OOM),
        (MemoryError(), Code.OOM),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error."), Code.OOM),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), Code.OOM),
        (NonFiniteLoss("nan at step 3"), Code.NAN),
        (RuntimeError("CUDA error: device-side assert triggered"), Code.GPU),
        (torch.AcceleratorError("no kernel image is available"), Code.GPU),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), Code.GPU),
        (RuntimeError("Found no NVIDIA driver on your system."), Code.NO_GPU),
        (RuntimeError("No CUDA GPUs are available"), Code.NO_GPU),
        (RuntimeError("Connection closed by peer"), Code.CONTAINER),
        (KeyError("x"), Code.CONTAINER),
        (OSError(28, "No space left on device"), Code.CONTAINER),
        (ImportError("libcudart.so"), Code.CONTAINER),
        (KeyboardInterrupt(), Code.CONTAINER),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_kind_has_its_code(error: BaseException, code: Code):
    found, line = diagnose(error)
    assert found == code
    assert line and "\n" not in line and "\t" not in line


def test_what_trainer_and_detector_raise_is_told_by_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cases = {
        Code.CONFIG: lambda: parse(["--epochs", "many"]),
        Code.MODEL: lambda: load_model(tmp_path / "none.safetensors"),
        Code.IMAGE_FORMAT: lambda: read_image(tmp_path / "none.jpg"),
        Code.NETWORK: lambda: local_weights("http://127.0.0.1:9/w.safetensors"),
        Code.OOM: lambda: more_micro_batches(parse([], own_data=True)[0], 2, (64, 64)),
    }
    assert {code: diagnose(raised(work))[0] for code, work in cases.items()} == {
        code: code for code in cases
    }


def test_a_cause_counts_where_the_exception_itself_tells_nothing():
    def fail():
        try:
            raise UnusableWeights("w.pth is damaged")
        except ValueError as error:
            raise RuntimeError("could not start") from error

    assert diagnose(raised(fail)) == (Code.MODEL, "w.pth is damaged")


class Damaged(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise UnreadableImage("p.jpg: cannot be read")


def test_a_failure_in_a_loaders_worker_is_one_line():
    error = raised(lambda: list(DataLoader(Damaged(), num_workers=1)))
    assert diagnose(error) == (Code.IMAGE_FORMAT, "p.jpg: cannot be read")


def test_a_long_message_of_any_characters_is_one_readable_line():
    _, line = diagnose(UserError("a\n\tb \udcff" + "x" * 9999))
    assert line.startswith("a b \\udcff") and len(line) <= LONGEST_LINE
    assert diagnose(RuntimeError()) == (Code.CONTAINER, "RuntimeError")


def test_the_failure_that_names_a_cause_is_reported(tmp_path: Path):
    assert first_failure(tmp_path / "none") is None
    write_failure(tmp_path, 1, RuntimeError("Connection closed by peer"))
    write_failure(tmp_path, 0, raised(lambda: parse(["--lr", "x"])))
    write_failure(tmp_path, 2, NonFiniteLoss("later"))
    failure = first_failure(tmp_path)
    assert failure is not None and failure.code == Code.CONFIG and "--lr" in failure.message
    assert "Traceback" in failure.traceback and re.search(r"parsing\.py", failure.traceback)


def test_the_first_failure_of_a_rank_counts(tmp_path: Path):
    write_failure(tmp_path, 0, MemoryError())
    write_failure(tmp_path, 0, KeyError("afterwards"))
    failure = first_failure(tmp_path)
    assert failure is not None and failure.code == Code.OOM
    assert "".join(traceback.format_exception(MemoryError())) == failure.traceback
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank-0.json"]
