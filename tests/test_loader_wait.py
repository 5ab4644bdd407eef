"""How long training waits for its loader: a clock that the tests turn stands for the time."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run

import trainer.data.loader
import trainer.data.loader_wait
import trainer.loop.set_up
import trainer.loop.step
from trainer.data.loader_wait import STEADY, LoaderWait
from trainer.report.progress import Progress
from trainer.settings.config import TrainConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def own(share: float) -> float:
    return share


def slow_batches(clock: Clock, waits: list[float]) -> Iterator[int]:
    for number, seconds in enumerate(waits):
        clock.passes(seconds)
        yield number


def reports(
    wait: LoaderWait, clock: Clock, waits: list[float], step: float, interval: int = 10
) -> tuple[list[float], list[str]]:
    """Shares and advice of a run with these waits, whose steps take `step` seconds besides."""
    shares, lines = [], []
    for number in wait.timed(slow_batches(clock, waits)):
        clock.passes(step)
        if (number + 1) % interval == 0:
            share, advice = wait.report(own)
            shares.append(share)
            lines += [advice] if advice else []
            clock.passes(1000)  # an evaluation
    return shares, lines


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def there_are(number: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(number)))

    there_are(16)
    return there_are


def test_the_share_is_that_of_the_steps_alone(cores: Callable[[int], None]) -> None:
    clock = Clock()
    wait = LoaderWait(TrainConfig(), CPU, clock=clock)
    shares, _ = reports(wait, clock, [3.0] * 10 + [0.0] * 10 + [1.0] * 10, step=1.0)
    assert shares == pytest.approx([0.75, 0.0, 0.5])


def test_the_advice_is_given_once_and_not_for_the_start(cores: Callable[[int], None]) -> None:
    clock = Clock()
    wait = LoaderWait(TrainConfig(num_workers=3), CPU, clock=clock)
    assert reports(wait, clock, [9.0] * 20, step=1.0)[1] == []
    (line,) = reports(
        LoaderWait(TrainConfig(num_workers=3), CPU, clock=clock), clock, [9.0] * 80, 1.0
    )[1]
    assert "spends 90% of its time waiting" in line
    assert "--num_workers (3 now, 16 cores here)" in line and "--cache_images DIR" in line


@pytest.mark.parametrize("interval", [1, 3, 10, 50])
def test_random_waits_below_a_third_are_fine(interval: int, cores: Callable[[int], None]) -> None:
    """One slow image in a while is no slow loader, however often the log is written."""
    clock, random = Clock(), torch.Generator().manual_seed(interval)
    waits = (8 * (torch.rand(600, generator=random) < 0.01)).tolist()  # 8 s, rarely: 0.08 s a step
    assert max(waits) == 8
    wait = LoaderWait(TrainConfig(), CPU, clock=clock)
    shares, lines = reports(wait, clock, waits, step=1.0, interval=interval)
    assert lines == [] and max(shares) > 0.1


@pytest.mark.parametrize("interval", [1, 10, 50])
def test_steady_waits_are_found_at_any_interval(
    interval: int, cores: Callable[[int], None]
) -> None:
    clock = Clock()
    wait = LoaderWait(TrainConfig(), CPU, clock=clock)
    assert len(reports(wait, clock, [1.0] * (STEADY + 2 * interval), 1.0, interval)[1]) == 1


def test_a_new_loader_starts_anew(cores: Callable[[int], None]) -> None:
    """As after an out-of-memory: its workers start, and the first batches take long."""
    clock = Clock()
    wait = LoaderWait(TrainConfig(), CPU, clock=clock)
    for _ in range(5):
        assert reports(wait, clock, [9.0] * 10 + [0.0] * 20, step=1.0)[1] == []


@pytest.mark.parametrize(
    ("device", "workers", "cache", "processes", "number", "expected"),
    [
        (GPU, 2, None, 1, 16, ["--num_workers (2 now, 16 cores here)", "--cache_images"]),
        (GPU, 2, None, 8, 64, ["(2 now, 64 cores here for 8 processes)", "--cache_images"]),
        (GPU, 8, None, 8, 64, ["--cache_images"]),
        (GPU, 2, "cache", 1, 16, ["--num_workers"]),
        (GPU, 16, "cache", 1, 16, []),
        (CPU, 2, None, 1, 2, ["--cache_images"]),  # all cores compute; workers would only compete
        (CPU, 0, "cache", 1, 1, []),
    ],
)
def test_the_advice_names_only_what_can_help(
    device: torch.device,
    workers: int,
    cache: str | None,
    processes: int,
    number: int,
    expected: list[str],
    cores: Callable[[int], None],
) -> None:
    cores(number)
    torch.set_num_threads(1)
    config = TrainConfig(num_workers=workers, cache_images=cache)
    ways = LoaderWait(config, device, num_processes=processes)._ways()
    assert len(ways) == len(expected)
    assert all(part in way for way, part in zip(ways, expected, strict=True))


def test_a_gpu_s_wait_begins_when_its_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A played GPU: each step queues 5 s of work, during which the program waits for a batch."""
    clock, idle_from = Clock(), [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(clock(), idle_from[0])

        def elapsed_time(self, later: "Event") -> float:
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for seconds, expected in ((4.0, 0.0), (5.0, 0.0), (10.0, 0.5)):
        wait = LoaderWait(TrainConfig(), GPU, clock=clock)
        batches = wait.timed(slow_batches(clock, [0.0] + [seconds] * 50))
        for _ in range(51):
            next(batches)
            idle_from[0] = max(clock(), idle_from[0]) + 5.0
        clock.now = idle_from[0]  # the report waits for the device
        assert wait.report(own)[0] == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("computing", "said"), [(1.0, True), (40.0, False)])
def test_a_run_says_when_its_dataset_is_slow(
    computing: float,
    said: bool,
    tiny_data: Path,
    room: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each image takes a second, the four of a step four; a step computes for `computing`."""
    clock, metrics = Clock(), dict[int, Progress]()

    def after(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def slower(*args: Any, **more: Any) -> Any:
            clock.passes(seconds)
            return function(*args, **more)

        return slower

    def report(progress: Progress) -> None:
        if progress.event == "step":
            metrics[progress.step] = progress

    loader, loop = trainer.data.loader, trainer.loop
    monkeypatch.setattr(trainer.data.loader_wait, "STEADY", 20)
    monkeypatch.setattr(loader, "read_image", after(1.0, loader.read_image))
    monkeypatch.setattr(loop.step, "gradients", after(computing, loop.step.gradients))
    monkeypatch.setattr(loop.set_up, "LoaderWait", partial(LoaderWait, clock=clock))
    flags = "--epochs 10 --eval_interval 10 --save_interval 10 --log_interval 2 --max_steps 26"
    run(tiny_data, room, flags, report=report)
    lines = [each for each in caplog.messages if "waiting for the loader" in each]
    assert len(lines) == said
    share = 4 / (4 + computing)
    # Accelerate loads a batch ahead, so the first wait is for two and the last for none.
    assert metrics[10].metrics["loader_wait"] == pytest.approx(share)
    assert f"spends {share:.0%} of its time" in "".join(lines) or not said
