"""Starts one process for each GPU of a task, and ends them all.

The platform starts the parent. The parent starts `accelerate launch`, which starts the ranks. A
rank that fails writes its failure to a folder and waits, so that no other rank fails first with a
lost connection. The parent sees the file, kills everything and reports. If a rank dies without
writing, its death is the cause, whatever the others say of lost connections. Nothing outlives the
parent: orphans become its children, and a rank whose parent was killed sees its standard input hang
up.
"""

import ctypes
import faulthandler
import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from vidt.errors import printable
from ymir_adapter.protocol.errors import Code, Failure, TaskError, first_failure, write_failure
from ymir_adapter.protocol.monitor import Monitor
from ymir_adapter.protocol.task import Task, in_form_words, read_task

FAILURES = "VIDT_FAILURES"  # variable: the folder of the ranks' failures and signs of life
CPU_PROCESSES = "VIDT_CPU_PROCESSES"  # variable: ranks of a task without GPUs, default 1
SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL = 0.1  # seconds between two checks of the ranks
REFRESH = 1.0  # seconds between two records while the ranks start
SETTLE = 1.0  # seconds to wait for a failure with a known cause after one without
# Codes that a rank also reports when it loses the connection to one that died.
FROM_LOST_CONNECTION = (Code.CONTAINER, Code.NETWORK)
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
RESERVE = 2**16  # bytes of the failures' folder that each rank frees to write its own
CRASH = "crash-{rank}-{pid}.txt"  # file: a rank at work, and the trace if a signal ends it
RUNNING = "running"  # file: rank 0 has started, and writes the monitor file from now on
SET_CHILD_SUBREAPER = 36  # of prctl(2): orphaned descendants become our children
# Cache folders of libraries, below HOME unless these variables are set.
CACHES = {
    "XDG_CACHE_HOME": ".cache",
    "TORCH_HOME": ".cache/torch",
    "TORCHINDUCTOR_CACHE_DIR": ".cache/inductor",
    "HF_HOME": ".cache/huggingface",
    "TRITON_CACHE_DIR": ".triton",
    "MPLCONFIGDIR": ".config/matplotlib",
}

Work = Callable[[Task, Monitor | None], None]  # the work of one rank; only rank 0 has a monitor


class Terminated(Exception):
    """The parent was asked to stop. The exit code is 128 + the signal's number, as in a shell."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"the task was stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class RankFailed(Exception):
    """A rank failed, or died without writing its failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@contextmanager
def stop_signals() -> Iterator[None]:
    """The first SIGTERM or SIGINT raises Terminated; later ones are ignored during clean-up."""

    def stop(signum: int, frame: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise Terminated(signum)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_ranks(task: Task, module: str, monitor: Monitor) -> None:
    """Runs `python -m MODULE` once for each GPU of the task, or once on the CPU, and waits. Updates
    the monitor until rank 0 does.

    Raises RankFailed, or Terminated within `stop_signals`. When it returns, the ranks and all their
    children have ended.
    """
    with tempfile.TemporaryDirectory(prefix="vidt-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _adopt_orphans()
        try:
            words = launch_command(task, module, folder)
            environment = rank_environment(task, folder, os.environ)
            # A session of its own: only the parent receives Ctrl-C. The pipe hangs up when it dies.
            launcher = subprocess.Popen(
                words, env=environment, stdin=subprocess.PIPE, start_new_session=True
            )
            try:
                _watch(launcher, folder, monitor, num_ranks(task))
            except Terminated:
                _ask_to_stop(launcher, folder, num_ranks(task))
                raise
        finally:
            _end_children()


def num_ranks(task: Task) -> int:
    """One for each GPU; on the CPU VIDT_CPU_PROCESSES, by default 1."""
    return len(task.gpu_ids) or int(os.environ.get(CPU_PROCESSES, "1"))


def launch_command(task: Task, module: str, folder: Path) -> list[str]:
    """`accelerate launch -m MODULE` with a settings file of its own, not the user's."""
    ranks = num_ranks(task)
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        # For one rank and for CPUs too: other types ignore the number of processes.
        "distributed_type": "MULTI_GPU",
        "num_machines": 1,
        "num_processes": ranks,
        "machine_rank": 0,
        "main_process_port": 0,  # any free one
        "mixed_precision": "no",  # says nothing: the form's field decides
    }
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    words += ["--config_file", str(path)]
    if not task.gpu_ids and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        words += ["--num_cpu_threads_per_process", str(threads)]
    return [*words, "-m", module]


def rank_environment(task: Task, folder: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Only the task's devices are visible, and HOME and all caches are writable."""
    return {
        **inherited,
        **_homes(folder, inherited),
        "CUDA_VISIBLE_DEVICES": _devices(task.gpu_ids, inherited.get("CUDA_VISIBLE_DEVICES")),
        **_allocator(inherited),
        "PYTHONUNBUFFERED": "1",
        FAILURES: str(folder),
    }


def _allocator(inherited: Mapping[str, str]) -> dict[str, str]:
    """PyTorch's memory on a GPU grows in blocks, which fragments less; what the user set stays."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # of torch 2.9, and before
    given = any(name in inherited for name in names)
    return {} if given else {names[0]: "expandable_segments:True"}


def _homes(folder: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """The user of a task may have no passwd entry, and a HOME that is / or missing."""
    home = inherited.get("HOME")
    if home and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return {}
    places = {"HOME": folder, **{name: folder / place for name, place in CACHES.items()}}
    given = {name: str(path) for name, path in places.items()}
    kept = {name: inherited[name] for name in CACHES if name in inherited}
    return {"USER": "vidt", **given, **kept}


def _devices(gpu_ids: Sequence[int], visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for these ids, which index the devices that are visible now."""
    if visible is None:
        return ",".join(map(str, gpu_ids))
    there = [name for name in visible.split(",") if name.strip()]
    return ",".join(there[index] for index in gpu_ids if index < len(there))


def _watch(launcher: subprocess.Popen, folder: Path, monitor: Monitor, ranks: int) -> None:
    """Waits until the launcher ends or a rank fails; raises RankFailed for a failure."""
    refreshed = 0.0
    while launcher.poll() is None and first_failure(folder) is None and not _dead(folder):
        if time.monotonic() - refreshed > REFRESH:
            _refresh(monitor, folder)
            refreshed = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(POLL)
    failure = _settled(folder, ranks)
    if _dead(folder) and (failure is None or failure.code in FROM_LOST_CONNECTION):
        raise RankFailed(_silent_death(_dead(folder)))
    if failure is not None:
        raise RankFailed(failure)
    if launcher.poll():
        raise RankFailed(_failed_start(launcher.returncode))


def _refresh(monitor: Monitor, folder: Path) -> None:
    """Updates the monitor unless rank 0, which takes the same lock, does so already."""
    with _locked(folder):
        if not (folder / RUNNING).exists():
            monitor.update(0.0)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _settled(folder: Path, ranks: int) -> Failure | None:
    """The first failure, after the rank with the cause had time to write it: other ranks receive
    the message of an error without its class.
    """
    deadline = time.monotonic() + SETTLE
    while True:
        failure = first_failure(folder)
        is_known = failure is None or failure.code != Code.CONTAINER
        if is_known or _num_failures(folder) == ranks or time.monotonic() > deadline:
            return failure
        time.sleep(POLL)


def _num_failures(folder: Path) -> int:
    return len(list(folder.glob("rank-*.json")))


def _dead(folder: Path) -> list[Path]:
    """The crash files of ranks that died without writing their failure."""
    found = []
    for path in sorted(folder.glob(CRASH.format(rank="*", pid="*"))):
        _, rank, pid = path.stem.split("-")
        # In this order: a rank removes its crash file, or writes its failure, before it ends.
        if not _is_running(int(pid)) and path.exists():
            found += [path] * (not (folder / f"rank-{rank}.json").exists())
    return found


def _is_running(pid: int) -> bool:
    """False for a process that has ended, waited for or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _silent_death(crash_files: Sequence[Path]) -> Failure:
    """The failure of ranks that a signal ended, which wrote none."""
    for path in crash_files:
        trace = path.read_text(encoding="utf-8", errors="replace")
        if trace:
            what = trace.splitlines()[0].rpartition(": ")[2]
            bus = what == "Bus error"
            cause = "; shared memory is full: raise shm_size" if bus else ""
            message = f"a process of the task crashed: {what}{cause}"
            return Failure(Code.OOM if bus else Code.CONTAINER, message, trace, time.time())
    message = (
        "a process of the task was killed, probably because memory was full; lower "
        "batch_size_per_gpu or num_workers_per_gpu"
    )
    return Failure(Code.OOM, message, "", time.time())


def _failed_start(code: int) -> Failure:
    message = f"accelerate launch ended with code {code} while no rank was at work"
    return Failure(Code.CONTAINER, f"{message}; see the output above", "", time.time())


def _ask_to_stop(launcher: subprocess.Popen, folder: Path, ranks: int) -> None:
    """Sends SIGTERM to the ranks and waits. The launcher gets none: it would print the last line
    of the output.
    """
    for pid in _children_of(launcher.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while launcher.poll() is None and _num_failures(folder) < ranks:
        if time.monotonic() > deadline or not _children_of(launcher.pid):
            return
        time.sleep(POLL)


def _adopt_orphans() -> None:
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_children() -> None:
    """Kills all descendants. An orphan becomes our child before we learn of its parent's death, so
    nothing is left when there are no children.
    """
    while True:
        for pid in _children_of(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(path.parent.name))
    return found


def run_rank(work: Work) -> None:
    """Runs the work of a rank. Writes any failure for the parent, which then ends this process."""
    _log_lines()
    folder, rank = os.environ.get(FAILURES), int(os.environ.get("RANK", "0"))
    if folder is None:  # started by hand
        _work(work, rank)
        return
    _end_with_parent()
    crash_file = Path(folder) / CRASH.format(rank=rank, pid=os.getpid())
    reserve = Path(folder) / f"reserve-{rank}"
    reserve.write_bytes(bytes(RESERVE))
    with crash_file.open("w") as crash:
        faulthandler.enable(crash)
        try:
            if rank == 0:
                with _locked(Path(folder)):
                    (Path(folder) / RUNNING).touch()
            _work(work, rank)
            crash_file.unlink()
        except BaseException as error:
            reserve.unlink(missing_ok=True)
            write_failure(Path(folder), rank, error)
            threading.Event().wait(2 * GRACE)
            raise
        finally:
            faulthandler.disable()


def _work(work: Work, rank: int) -> None:
    task = read_task()
    if rank:
        require_devices(task.gpu_ids)
        work(task, None)
        return
    with Monitor(task.output.monitor_file, task.task_id) as monitor:
        monitor.update(0.0)
        require_devices(task.gpu_ids)
        work(task, monitor)


class FormWords(logging.Formatter):
    """Log lines in the words of the platform's forms, see `in_form_words`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(in_form_words(super().format(record)))


def _log_lines() -> None:
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(FormWords())
    for package in ("ymir_adapter", "trainer", "vidt", "__main__"):
        logging.getLogger(package).setLevel(logging.INFO)


def _end_with_parent() -> None:
    """Ends this process and its loaders when the parent dies in any way."""

    def watch() -> None:
        poll = select.poll()
        poll.register(0, 0)  # a hang-up is always reported
        if any(event & select.POLLHUP for _, event in poll.poll()):
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def require_devices(gpu_ids: Sequence[int]) -> None:
    """Raises TaskError unless there is a GPU for each id: a task for GPUs must not run for weeks on
    a CPU.
    """
    if not gpu_ids:
        return
    import torch  # takes seconds, which the parent must not spend

    wanted = ",".join(map(str, gpu_ids))
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        raise TaskError(
            Code.NO_GPU,
            f"gpu_id {wanted} was given, but PyTorch sees no GPU; check the driver or use the CPU",
        )
    if found < len(gpu_ids):
        raise TaskError(
            Code.GPU, f"gpu_id {wanted} was given, but only {found} of these GPUs are visible"
        )
