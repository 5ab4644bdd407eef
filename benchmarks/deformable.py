"""Time and memory of the forms of deformable attention, at the sizes of the decoder.

    python benchmarks/deformable.py
    python benchmarks/deformable.py --device cuda --size 16x640x640 --precision bf16

The forms take turns on the same tensors; a time is the median of the turns, on a GPU by its own
clock. Memory is what a GPU holds at most beside the inputs during the same work. Values are random
and samples lie around random boxes, as in a decoder that is trained: how far apart they lie decides
how much of value a cache keeps.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidt.ops.deformable_attention import DeformableAttention, Form, Levels, kernel_runs

STRIDES = (8, 16, 32, 64)
HEADS, DIM, POINTS = 8, 32, 4
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORK = ("forward", "forward + backward")
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """Images, their padded size, queries, and the precision of value."""

    images: int
    height: int
    width: int
    queries: int
    precision: str


@dataclass(frozen=True)
class Result:
    """Milliseconds of one call, and MiB beside the inputs (0 on a CPU)."""

    form: Form
    work: str
    median: float
    fastest: float
    memory_mib: float


def forms_on(device: torch.device) -> list[Form]:
    """Those that run there."""
    if device.type == "cpu":
        return ["plain", "cpu"]
    return ["plain", "triton"] if kernel_runs(device) else ["plain"]


def inputs_of(case: Case, device: torch.device) -> tuple[Levels, list[Tensor]]:
    """Levels; query, reference boxes and source, as `DeformableAttention` takes them."""
    shapes = [(-(-case.height // stride), -(-case.width // stride)) for stride in STRIDES]
    positions = sum(height * width for height, width in shapes)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(case.images, case.queries, HEADS * DIM, generator=generator)
    boxes = torch.rand(case.images, case.queries, 1, 4, generator=generator) * 0.4
    source = torch.randn(case.images, positions, HEADS * DIM, generator=generator)
    made = [query, boxes.expand(-1, -1, len(STRIDES), -1), source.to(PRECISIONS[case.precision])]
    return Levels.of(shapes, device), [tensor.to(device).requires_grad_() for tensor in made]


def runs(case: Case, form: Form, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured, by its name in `WORK`."""
    levels, (query, reference, source) = inputs_of(case, device)
    torch.manual_seed(0)
    sizes = {"num_heads": HEADS, "num_levels": len(STRIDES), "num_points": POINTS}
    attention = DeformableAttention(HEADS * DIM, **sizes).to(device)
    half = case.precision != "fp32"

    def attend() -> Tensor:
        with torch.autocast(device.type, PRECISIONS[case.precision], enabled=half):
            return attention(query, reference, source, levels, form=form)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend().sum(), (query, source, *attention.parameters()))

    yield from zip(WORK, (torch.inference_mode()(attend), both), strict=True)


def milliseconds(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Time of one call, and MiB that it took at most beside what was there."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3, 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - held
    return before.elapsed_time(after), peak / 2**20


def measure(case: Case, device: torch.device, turns: int) -> list[Result]:
    """All forms and both kinds of work, in turns."""
    calls = [(form, *run) for form in forms_on(device) for run in runs(case, form, device)]
    taken: list[list[tuple[float, float]]] = [[] for _ in calls]
    for _ in range(WARM_UP + turns):
        for (_, _, call), so_far in zip(calls, taken, strict=True):
            so_far.append(milliseconds(call, device))
    results = []
    for (form, work, _), all_turns in zip(calls, taken, strict=True):
        times, memory = zip(*all_turns[WARM_UP:], strict=True)
        results.append(Result(form, work, statistics.median(times), min(times), max(memory)))
    return results


def read_size(text: str) -> tuple[int, int, int]:
    """`2x640x480` to (2, 640, 480): images, height, width."""
    try:
        images, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        images = height = width = 0
    if min(images, height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be like 2x640x480, BxHxW")
    return images, height, width


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    sizes = ("1x640x640", "16x640x640") if on_gpu else ("1x512x512", "2x640x640")
    parser = argparse.ArgumentParser(description="Time of the forms of deformable attention.")
    parser.add_argument("--size", nargs="+", type=read_size, default=[*map(read_size, sizes)])
    parser.add_argument("--queries", nargs="+", type=int, default=[100, 300])
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"][: 1 + on_gpu]
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--turns", type=int, default=15, help="turns that are counted")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args(argv)
    if min(*given.queries, given.threads, given.turns) < 1:
        parser.error("--queries, --threads and --turns must be 1 or more")
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    on_cpu = given.device.type == "cpu"
    name = platform.machine() if on_cpu else torch.cuda.get_device_name(given.device)
    where = {"device": name, "threads": given.threads, "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{'images':<15} {'queries':>7} {'value':<5} {'form':<7} {'work':<18} ", end="")
    print(f"{'median ms':>9} {'fastest':>9} {'MiB':>7}")
    rows = []
    for images, height, width in given.size:
        for queries in given.queries:
            for precision in given.precision:
                case = Case(images, height, width, queries, precision)
                start = f"{f'{images}x3x{height}x{width}':<15} {queries:>7}"
                for result in measure(case, given.device, given.turns):
                    print(f"{start} {precision:<5} {result.form:<7} {result.work:<18} ", end="")
                    print(f"{result.median:>9.2f} {result.fastest:>9.2f} ", end="")
                    print("" if on_cpu else f"{result.memory_mib:>7.0f}", flush=True)
                    rows.append(asdict(case) | asdict(result))
    if given.json is not None:
        given.json.write_text(json.dumps({"environment": where, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
