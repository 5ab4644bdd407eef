"""A file system that fails at its n-th operation costs a run nothing that it had saved: it ends in
one line, or goes on, and the resumed run ends bit for bit as one that was left alone.
"""

import builtins
import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import argv, differences, end_of, main_here, run

from trainer.loop import resume
from trainer.loop.run_lock import NAME
from trainer.report.progress import Progress

FLAGS = "--max_steps 2 --save_steps 1"
FAULTS = (errno.EIO, errno.ENOSPC, errno.EROFS)
# TensorBoard's files have a thread of their own, and tests of their own.
APART = "tensorboard"


class FaultyFile:
    """A file whose writes count as operations."""

    def __init__(self, file: Any, operate: Callable[[str], None]) -> None:
        self._file, self._operate = file, operate

    def write(self, data: Any) -> int:
        self._operate("write")
        return self._file.write(data)

    def __enter__(self) -> "FaultyFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def faults(
    monkeypatch: pytest.MonkeyPatch, root: Path, at: int, code: int, times: int = 1
) -> Iterator[list[str]]:
    """Operations number `at` and the next, `times` in all, fail: opening for writing, write, fsync,
    mkdir and rename below `root`. Yields the names of all.
    """
    done: list[str] = []

    def operate(name: str) -> None:
        done.append(name)
        if at < len(done) <= at + times:
            raise OSError(code, os.strerror(code))

    def is_ours(path: object) -> bool:
        on_main = threading.current_thread() is threading.main_thread()
        text = os.fspath(path) if isinstance(path, str | Path) else ""
        return on_main and text.startswith(str(root)) and APART not in text

    def counted(name: str, real: Callable) -> Callable:
        def work(path: Any, *more: Any, **named: Any) -> Any:
            if is_ours(path) or isinstance(path, int):
                operate(name)
            return real(path, *more, **named)

        return work

    def opened(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if not (set(mode) & set("wxa+") and is_ours(path)):
            return real_open(path, mode, *more, **named)
        operate("open")
        return FaultyFile(real_open(path, mode, *more, **named), operate)

    def save_file(tensors: Any, path: Path, *more: Any) -> None:
        operate("write tensors")
        real_save(tensors, path, *more)

    real_open, real_save = io.open, resume.save_file
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        patch.setattr(resume, "save_file", save_file)
        for name in ("fsync", "rename", "replace", "mkdir"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield done


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a run that is left alone ends with."""
    output = tmp_path_factory.mktemp("whole")
    assert main_here(argv(tiny_data, output, FLAGS)) == 0
    yield end_of(output)
    shutil.rmtree(output)


def check_fault(
    data: Path,
    output: Path,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    capsys: pytest.CaptureFixture[str],
    times: int = 1,
) -> str:
    """The operation that failed; "" if there were fewer."""
    code = FAULTS[at % len(FAULTS)]
    with faults(monkeypatch, output, at, code, times) as done:
        ended = main_here(argv(data, output, FLAGS))
    said = capsys.readouterr().err
    assert "Traceback" not in said and ended in (0, 2), said
    if ended:
        last = said.splitlines()[-1]
        assert last.startswith("error: ") and os.strerror(code) in last, said
    assert NAME not in os.listdir(output) and not list(output.rglob("*.tmp"))
    assert main_here(argv(data, output, FLAGS, "--resume")) == 0
    assert differences(end_of(output), whole) == []
    return done[at] if at < len(done) else ""


@pytest.mark.slow
def test_a_fault_of_every_operation(
    tiny_data: Path,
    room: Path,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failed: list[str] = []
    for at in range(1000):
        output = room / str(at)
        output.mkdir()
        name = check_fault(tiny_data, output, whole, monkeypatch, at, capsys)
        shutil.rmtree(output)
        if not name:
            break
        failed.append(name)
    with capsys.disabled():
        kinds = {name: failed.count(name) for name in sorted(set(failed))}
        print(f"\n{len(failed)} operations failed in turn: {kinds}")
    assert {"open", "write", "fsync", "replace", "rename", "mkdir"} <= set(failed)


@pytest.mark.parametrize("at", [3, *(pytest.param(at, marks=pytest.mark.slow) for at in (17, 30))])
def test_a_disk_that_stays_full(
    tiny_data: Path,
    room: Path,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
) -> None:
    assert check_fault(tiny_data, room, whole, monkeypatch, at, capsys, times=10**6)


def test_an_output_folder_that_is_removed(tiny_data: Path, room: Path) -> None:
    """The run makes it again; what was in it is gone."""
    output = room / "output"

    def remove(progress: Progress) -> None:
        if progress.event == "step" and progress.step == 1:
            shutil.rmtree(output)

    best = run(tiny_data, output, FLAGS, report=remove)
    assert run(tiny_data, output, FLAGS, "--resume") == best
    assert {"best.safetensors", "checkpoints"} <= set(os.listdir(output))


def test_a_clock_that_is_set_back(
    tiny_data: Path, room: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: now() - 3600 * next(calls))
    assert main_here(argv(tiny_data, room, FLAGS)) == 0
    assert differences(end_of(room), whole) == []
