"""Time and memory of the detector: forward, and a training step (forward, loss, backward, clipping,
optimiser).

    python benchmarks/speed.py
    python benchmarks/speed.py --backbone_name swin_tiny --size 2x640x640 --precision bf16 --compile

Every case runs in a process of its own. Its time is the median of the repetitions after a warm-up.
Its memory is the most that the process ever held: on a CPU all of it, Python and PyTorch included;
on a GPU what PyTorch allocated there. Weights, images and boxes are random: neither time nor memory
depends on them.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.optim import make_optimizer
from vidt import SetCriterion, ViDT, ViDTConfig

BODIES = ("swin_nano", "swin_tiny")
SIZES = ("1x512x512", "2x640x640")
WORK = ("forward", "training step")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 2  # runs that are not counted; compilation is among them
OBJECTS = 8  # boxes of each image


@dataclass(frozen=True)
class Case:
    """What one process measures; `size` is (images, height, width)."""

    backbone_name: str
    size: tuple[int, int, int]
    work: str
    threads: int
    precision: str
    compile: bool
    device: str
    repeat: int


@dataclass(frozen=True)
class Result:
    """Seconds of one run and GiB of the process; `failure` says why there are none."""

    median: float = 0.0
    fastest: float = 0.0
    slowest: float = 0.0
    memory_gib: float = 0.0
    failure: str = ""


def measure(case: Case) -> Result:
    """Builds the model and runs the case, in this process."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    device = torch.device(case.device)
    model: nn.Module = ViDT(ViDTConfig(backbone_name=case.backbone_name)).to(device)
    if case.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    num_images, height, width = case.size
    images = torch.randn(num_images, 3, height, width, device=device)
    padding = torch.zeros(num_images, height, width, dtype=torch.bool, device=device)
    dtype = PRECISIONS[case.precision]
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    prepare = forward if case.work == "forward" else training_step
    try:
        seconds = timed(prepare(model, images, padding, autocast), case.repeat, device)
    except torch.OutOfMemoryError:
        return Result(failure="out of memory")
    memory = peak_memory_gib(device)
    return Result(statistics.median(seconds), min(seconds), max(seconds), memory)


def forward(
    model: nn.Module,
    images: Tensor,
    padding: Tensor,
    autocast: Callable[[], AbstractContextManager],
) -> Callable[[], None]:
    """A run of the detector as it predicts."""
    model.eval()

    @torch.inference_mode()
    def run() -> None:
        with autocast():
            model(images, padding)

    return run


def training_step(
    model: nn.Module,
    images: Tensor,
    padding: Tensor,
    autocast: Callable[[], AbstractContextManager],
) -> Callable[[], None]:
    """An optimiser step of the released recipe on one batch."""
    model.train()
    criterion, config = SetCriterion(), TrainConfig()
    optimizer = make_optimizer(model, config)
    targets = [random_objects(images.device) for _ in images]

    def run() -> None:
        with autocast():
            outputs = model(images, padding)
        terms = criterion(outputs, targets, len(images) * OBJECTS)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_max_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


def random_objects(device: torch.device) -> dict[str, Tensor]:
    """Labels [N] and boxes [N, 4], cxcywh in 0..1."""
    centres, sides = torch.rand(2, OBJECTS, 2) * 0.4 + 0.1
    boxes = torch.cat([centres + 0.2, sides], dim=1)
    return {"labels": torch.arange(OBJECTS, device=device), "boxes": boxes.to(device)}


def timed(run: Callable[[], None], repeat: int, device: torch.device) -> list[float]:
    """Seconds of each counted run, with nothing left to do on the device."""
    seconds = []
    for _ in range(WARM_UP + repeat):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process held so far: resident memory, or memory of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure_alone(case: Case) -> Result:
    """`measure` in a new process, so that no case inherits another's memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, case).result()
        except BrokenProcessPool:
            return Result(failure="the process was killed, perhaps for its memory")


def environment(case: Case) -> dict[str, Any]:
    on_cpu = torch.device(case.device).type == "cpu"
    return {
        "device": platform.machine() if on_cpu else torch.cuda.get_device_name(case.device),
        "threads": case.threads,
        "precision": case.precision,
        "compile": case.compile,
        "repeat": case.repeat,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def row_of(case: Case, result: Result) -> str:
    images, height, width = case.size
    start = f"{case.backbone_name:<22} {f'{images}x3x{height}x{width}':<15} {case.work:<14}"
    if result.failure:
        return f"{start} {result.failure}"
    times = f"{result.median:>9.3f} {result.fastest:>9.3f} {result.slowest:>9.3f}"
    return f"{start} {times} {result.memory_gib:>9.2f}"


def read_size(text: str) -> tuple[int, int, int]:
    """`2x640x480` to (2, 640, 480): images, height, width."""
    try:
        images, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        images = height = width = 0
    if min(images, height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be like 2x640x480, BxHxW")
    return images, height, width


def cases(argv: list[str] | None = None) -> tuple[list[Case], Path | None]:
    """The command line as cases, and the file to write to."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Time and memory of the detector.")
    parser.add_argument("--backbone_name", nargs="+", default=BODIES)
    parser.add_argument("--size", nargs="+", type=read_size, default=[*map(read_size, SIZES)])
    parser.add_argument("--threads", type=int, default=2, help="of the CPU, for each case")
    parser.add_argument("--precision", choices=PRECISIONS, default="no")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--device", default=here)
    parser.add_argument("--repeat", type=int, default=5, help="runs that are counted")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args(argv)
    if given.precision == "fp16" and torch.device(given.device).type == "cpu":
        parser.error("--precision fp16 is for a GPU: the trainer computes fp32 on a CPU; try bf16")
    if min(given.threads, given.repeat) < 1:
        parser.error("--threads and --repeat must be 1 or more")
    how = {name: getattr(given, name) for name in ("threads", "precision", "compile", "repeat")}
    return [
        Case(body, size, work, device=given.device, **how)
        for body in given.backbone_name
        for size in given.size
        for work in WORK
    ], given.json


def main() -> None:
    wanted, json_file = cases()
    where = environment(wanted[0])
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"{'body':<22} {'images':<15} {'work':<14} {'median s':>9} {'fastest':>9} ", end="")
    print(f"{'slowest':>9} {'peak GiB':>9}")
    results = []
    for case in wanted:
        result = measure_alone(case)
        print(row_of(case, result), flush=True)
        results.append(asdict(case) | asdict(result))
    if json_file is not None:
        json_file.write_text(json.dumps({"environment": where, "results": results}, indent=1))


if __name__ == "__main__":
    main()
