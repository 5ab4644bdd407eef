"""SIGTERM and SIGINT: a saved run and a documented exit code; a second signal ends it at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import ROOT, command, environment, newest_checkpoint, program, published

from trainer.loop.stopping import SAME_REQUEST, Stopped, StopRequest

TIMEOUT = 120.0


def started(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        words,
        env=environment(PYTHONUNBUFFERED="1"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process: subprocess.Popen, text: str) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"it ended without saying {text!r}: {said}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "signum", "moment", "code", "name"),
    [
        (os.kill, signal.SIGTERM, "step 2/30", 143, "SIGTERM"),
        (os.kill, signal.SIGINT, "evaluating", 130, "SIGINT"),
        # As `timeout` and a terminal send it: to the loader's workers too.
        (os.killpg, signal.SIGTERM, "step 2/30", 143, "SIGTERM"),
        (os.killpg, signal.SIGTERM, "evaluating", 143, "SIGTERM"),
        (os.killpg, signal.SIGINT, "step 2/30", 130, "SIGINT"),
    ],
)
def test_stopped_by_a_signal(
    tiny_data: Path,
    room: Path,
    send: Callable[[int, int], None],
    signum: signal.Signals,
    moment: str,
    code: int,
    name: str,
) -> None:
    process = started(command(tiny_data, room, "--epochs 10 --num_workers 1"))
    read_until(process, moment)
    send(process.pid, signum)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, said
    last = said.splitlines()[-1]
    evaluated = (room / "best.safetensors").exists()
    none = "" if evaluated else "; no weights to predict with yet, since none were evaluated"
    assert last == f"stopped by {name}; everything is saved, continue with --resume{none}"
    assert "Traceback" not in said
    path, passed_over = newest_checkpoint(room)
    assert path is not None and passed_over == []
    assert 2 <= int(path.name.removeprefix("step-")) < 30


@pytest.mark.slow
def test_the_launcher_passes_it_on(tiny_data: Path, room: Path) -> None:
    """As a scheduler sends it: to `accelerate launch`, which is the parent of the run."""
    launch = [program("accelerate"), "launch", "--config_file", "accelerate_config.yaml"]
    words = [*launch, "trainer/train.py", *published(tiny_data, room, "--epochs 10")]
    process = started(words)
    read_until(process, "step 2/30")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert "stopped by SIGTERM; everything is saved" in said
    assert newest_checkpoint(room)[0] is not None


STUBBORN = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import trainer.loop.stopping
trainer.loop.stopping.SAME_REQUEST = 0.2
with trainer.loop.stopping.StopRequest():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_is_stuck(signum: signal.Signals) -> None:
    process = started([sys.executable, "-c", STUBBORN])
    read_until(process, "ready")
    process.send_signal(signum)
    process.send_signal(signum)  # what a launcher forwards: still the same request
    time.sleep(0.5)
    assert process.poll() is None
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signum)  # one that comes late is still an echo of the first
        time.sleep(0.3)
    assert process.wait(timeout=TIMEOUT) == -signum


def test_the_first_signal_is_noted_and_its_echo_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert stop.signum == 0
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        later = time.monotonic() + SAME_REQUEST + 0.1
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_in_a_thread_goes_without() -> None:
    seen: list[int] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(stop.signum)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]


def test_exit_codes_are_those_of_the_shell() -> None:
    assert (Stopped(signal.SIGTERM).exit_code, Stopped(signal.SIGINT).exit_code) == (143, 130)
