"""The parent of a task and its ranks: how they are started, how they fail, and that none is left.

The ranks play the scenes of ymir_ranks.py: they need no detector, so each costs little.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_runs import ROOT, environment
from ymir_runs import processes_with, wait_until_gone

from ymir_adapter.launch import launch_command, rank_environment, require_devices
from ymir_adapter.protocol.errors import Code, TaskError
from ymir_adapter.protocol.task import Task, read_task

TIMEOUT = 120.0  # seconds, for a busy machine
GONE_WITHIN = 60.0  # seconds, after which whatever is still there counts as left behind


class Play:
    """A task whose ranks play a scene. All its processes carry a mark, by which they are found."""

    def __init__(self, folder: Path, scene: str, *, ranks: int = 2, gpu_id: str = "") -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.monitor, self.seen = folder / "out/monitor.txt", folder / "seen.json"
        write_task(folder, gpu_id)
        own = {
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
            "DEFAULT_ENV_FILE_PATH": str(folder / "in/env.yaml"),
            "VIDT_CPU_PROCESSES": str(ranks),
            "SCENE": scene,
            "SEEN": str(self.seen),
            "MARK": self.mark,
            "HOME": str(folder / "nowhere"),
        }
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/ymir_ranks.py")],
                env=environment(**own),
                cwd=folder,
                stdout=log,
                stderr=log,
            )

    def wait(self) -> int:
        return self.process.wait(TIMEOUT)

    def wait_for_ranks(self, ranks: int = 2) -> None:
        """Until they play."""
        deadline = time.monotonic() + TIMEOUT
        while not all(self.seen.with_suffix(f".{rank}").exists() for rank in range(ranks)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.02)

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def record(self) -> list[str]:
        return self.monitor.read_text().splitlines()[0].split("\t")

    def left(self) -> list[int]:
        """Processes of this task that run."""
        return processes_with(f"MARK={self.mark}")

    def check_failure(self, code: Code, words: str) -> None:
        """State 4, the code, and one readable line as the last of all output; nothing is left."""
        assert self.left() == []
        assert self.record[2:5] == ["1.00", "4", str(int(code))], self.said
        last = self.said.splitlines()[-1]
        assert words in self.record[5] and last == f"error {int(code)}: {self.record[5]}"


def write_task(folder: Path, gpu_id: str = "") -> None:
    (folder / "in").mkdir(exist_ok=True)
    roots = {side: {"root_dir": str(folder / name)} for side, name in SIDES.items()}
    env = {"task_id": "t1", "protocol_version": "1.1.0", "run_training": True, **roots}
    (folder / "in/env.yaml").write_text(yaml.safe_dump(env))
    (folder / "in/config.yaml").write_text(
        yaml.safe_dump({"class_names": ["cat"], "gpu_id": gpu_id})
    )


SIDES = {"input": "in", "output": "out"}


@pytest.fixture
def play(tmp_path: Path) -> Iterator[type[Play]]:
    """Starts plays; whatever a failed test leaves of them is ended."""
    plays: list[Play] = []

    def start(scene: str, **more: object) -> Play:
        plays.append(Play(tmp_path, scene, **more))  # type: ignore[arg-type]
        return plays[-1]

    yield start  # type: ignore[misc]
    for one in plays:
        for pid in one.left():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_ranks_end_well_and_leave_nothing(play) -> None:
    """HOME does not exist, as that of a user whom no password file knows."""
    done = play("well")
    assert done.wait() == 0, done.said
    assert done.left() == []
    assert done.record[0] == "t1" and done.record[2:] == ["1.00", "2"]
    seen = json.loads(done.seen.read_text())
    homes = {seen[name] for name in ("HOME", "TORCH_HOME", "HF_HOME", "TRITON_CACHE_DIR")}
    assert all(path.startswith(seen["VIDT_FAILURES"]) for path in homes)
    assert not Path(seen["VIDT_FAILURES"]).exists(), "the folder of a task goes with it"
    assert seen["CUDA_VISIBLE_DEVICES"] == "" and seen["WORLD_SIZE"] == "2"
    assert int(seen["MASTER_PORT"]) not in (0, 29500)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scene", "code", "words"),
    [
        ("second fails", Code.MODEL, "the second process has no weights"),
        ("both fail", Code.DATASET, "no images"),
        ("killed", Code.OOM, "was killed"),
        ("bus error", Code.OOM, "raise shm_size"),
    ],
)
def test_a_failure_of_one_rank_ends_all(play, scene: str, code: Code, words: str) -> None:
    failed = play(scene)
    assert failed.wait() == 1
    failed.check_failure(code, words)


@pytest.mark.slow
def test_gpus_that_no_rank_can_see(play) -> None:
    failed = play("well", gpu_id="0,1")
    assert failed.wait() == 1
    failed.check_failure(Code.NO_GPU, "gpu_id 0,1 was given")


@pytest.mark.slow
def test_a_signal_ends_ranks_that_do_not_listen(play) -> None:
    stopped = play("deaf", ranks=1)
    stopped.wait_for_ranks(1)
    since = time.monotonic()
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 143
    assert time.monotonic() - since < GONE_WITHIN
    stopped.check_failure(Code.CONTAINER, "stopped by SIGTERM")


@pytest.mark.slow
def test_a_signal_while_ranks_are_starting(play) -> None:
    stopped = play("deaf")
    deadline = time.monotonic() + TIMEOUT
    while len(stopped.left()) < 2:
        assert time.monotonic() < deadline, stopped.said
        time.sleep(0.01)
    since = time.monotonic()
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.wait() == 130, stopped.said
    assert time.monotonic() - since < GONE_WITHIN
    stopped.check_failure(Code.CONTAINER, "stopped by SIGINT")


@pytest.mark.slow
def test_ranks_follow_a_parent_that_was_killed(play) -> None:
    killed = play("forever")
    killed.wait_for_ranks()
    killed.process.kill()
    assert killed.wait() == -signal.SIGKILL
    assert wait_until_gone(f"MARK={killed.mark}", GONE_WITHIN) == []


@pytest.fixture
def task(tmp_path: Path) -> Task:
    write_task(tmp_path, "0, 2")
    return read_task(tmp_path / "in/env.yaml")


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "0,2"), ("4,5,6", "4,6"), ("7", "7"), ("", "")]
)
def test_gpus_count_within_what_is_visible(
    task: Task, tmp_path: Path, visible: str | None, expected: str
) -> None:
    inherited = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    environ = rank_environment(task, tmp_path, inherited)
    assert environ["CUDA_VISIBLE_DEVICES"] == expected


def test_memory_of_a_gpu_grows_in_blocks_unless_the_user_chose(task: Task, tmp_path: Path) -> None:
    assert rank_environment(task, tmp_path, {})["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environ = rank_environment(task, tmp_path, {name: "backend:native"})
        assert [v for k, v in environ.items() if "ALLOC_CONF" in k] == ["backend:native"]


def test_a_home_that_can_be_written_to_is_kept(task: Task, tmp_path: Path) -> None:
    environ = rank_environment(task, tmp_path / "room", {"HOME": str(tmp_path)})
    assert environ["HOME"] == str(tmp_path) and "TORCH_HOME" not in environ


def test_caches_that_came_with_the_image_are_kept(task: Task, tmp_path: Path) -> None:
    environ = rank_environment(task, tmp_path, {"HOME": "/nowhere", "TORCH_HOME": "/baked"})
    assert environ["TORCH_HOME"] == "/baked" and environ["HOME"] == str(tmp_path)


def test_ranks_on_the_cpu_share_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher would give each one thread; whoever set a number knows better."""
    write_task(tmp_path)
    task = read_task(tmp_path / "in/env.yaml")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("VIDT_CPU_PROCESSES", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = launch_command(task, "some.module", tmp_path)
    assert words[words.index("--num_cpu_threads_per_process") + 1] == "4"
    assert words[-2:] == ["-m", "some.module"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "--num_cpu_threads_per_process" not in launch_command(task, "some.module", tmp_path)


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    require_devices(())
    for found, gpu_ids, code in ((0, (0,), Code.NO_GPU), (1, (0, 1), Code.GPU)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: found)
        with pytest.raises(TaskError) as refused:
            require_devices(gpu_ids)
        assert refused.value.code == code
    require_devices((0,))
