"""Ranks that play a SCENE instead of running a task, under their real parent.

Usage: SCENE=... DEFAULT_ENV_FILE_PATH=... python ymir_ranks.py (the parent)
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vidt.errors import UserError
from ymir_adapter.__main__ import main
from ymir_adapter.launch import run_rank
from ymir_adapter.protocol.errors import Code, TaskError
from ymir_adapter.protocol.monitor import Monitor
from ymir_adapter.protocol.task import Task

FOREVER = 300.0


def forever(first: bool) -> None:
    time.sleep(FOREVER)


def leave_a_child() -> None:
    """Start a child in a session of its own, detached from its parents."""
    subprocess.Popen(["sleep", str(int(FOREVER))], start_new_session=True)


def well(first: bool) -> None:
    if first:
        Path(os.environ["SEEN"]).write_text(json.dumps(dict(os.environ)))
    leave_a_child()


def second_fails(first: bool) -> None:
    if first:
        forever(first)
    raise TaskError(Code.MODEL, "the second process has no weights")


def both_fail(first: bool) -> None:
    """The first rank raises; the second raises an error with the same words."""
    if first:
        time.sleep(0.5)
        raise TaskError(Code.DATASET, "no images")
    raise UserError("no images")


def dies_of(signum: int) -> Callable[[bool], None]:
    def die(first: bool) -> None:
        if first:
            forever(first)
        os.kill(os.getpid(), signum)
        forever(first)

    return die


def lost_connection(first: bool) -> None:
    """The second is killed; the first learns of it as a lost connection."""
    if first:
        second = Path(os.environ["SEEN"]).with_suffix(".1")
        while not second.exists():
            time.sleep(0.01)
        time.sleep(0.05)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    os.kill(os.getpid(), signal.SIGKILL)


def deaf(first: bool) -> None:
    """Ignores SIGTERM, and leaves a child."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    leave_a_child()
    forever(first)


SCENES: dict[str, Callable[[bool], None]] = {
    "forever": forever,
    "well": well,
    "second fails": second_fails,
    "both fail": both_fail,
    "lost connection": lost_connection,
    "killed": dies_of(signal.SIGKILL),
    "bus error": dies_of(signal.SIGBUS),
    "deaf": deaf,
}


def work(task: Task, monitor: Monitor | None) -> None:
    first = monitor is not None
    Path(os.environ["SEEN"]).with_suffix(f".{os.environ['RANK']}").touch()
    SCENES[os.environ["SCENE"]](first)
    if monitor is not None:
        monitor.update(1.0)


if __name__ == "__main__":
    if "VIDT_FAILURES" in os.environ:
        run_rank(work)
    else:
        sys.exit(main("ymir_ranks"))
