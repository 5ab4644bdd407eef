"""Time and memory of the detector, beside what they could be at best.

    python benchmarks/speed.py
    python benchmarks/speed.py --backbone_name swin_nano --size 1x512x512 --plus
    python benchmarks/speed.py --size 16x640x640 --precision bf16 --compile --json speed.json
    python benchmarks/speed.py --new_sizes --repeat 10 --seconds 1000

Three kinds of work: forward, as in prediction; learning, which is forward, criterion and backward;
the whole training step, which also clips, optimises and averages. The floor is timm's plain
backbone of the same sizes, without [DET] tokens, forward and learning (backward from the features'
sum).

All of a size take turns in one process, so that a ratio holds on a machine that is not idle:
figures are medians, "to timm" is the median of each round's ratio to the eager floor. The first
turn counts FLOPs instead, and warms up. "limit" is the time that these would take at the machine's
own speed, measured first on a large matrix product, relative to the time that they took; for parts
that only touch the parameters it is the time that as many bytes need to come and go. Weights,
images and boxes are random: neither time nor memory depends on them. Memory is measured in
processes of their own.

With --new_sizes every round has another of ten sizes around the given one, as the multi-scale
recipe has; only "to timm" can then be compared, since a round's ratio is between equal sizes. What
timm prepares for a size is not timed.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ceiling import Ceiling, measure_ceiling
from contestants import FORWARD, PRECISIONS, TRAINING, Case, Detector, Floor
from laps import Contestant, Gains, race
from loader import loader_seconds
from memory import EMPTY, Peaks, peak_memory
from parts import count_flops, watched
from results import HEADING, WORKS, Part, Row, make_parts, make_rows, parts_table
from vidt.model.config import SWIN_VARIANTS, backbone_names

BACKBONES = ("swin_nano", "swin_tiny")
SIZES = ("1x512x512", "2x640x640")
LEAST = 3  # rounds
WARM_UP = {"cpu": 0, "cuda": 3}  # rounds that are not counted, after the one that counts FLOPs
# Of the environment, what moves figures: threads that wait, and memory that is given back.
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_PRELOAD", "PYTORCH_")
ALWAYS_SHOWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MALLOC_TRIM_THRESHOLD_")


@dataclass(frozen=True)
class Result:
    """All that is told of a case. `failures` say why a contestant is missing."""

    case: Case
    parameters: int
    rows: list[Row]
    forward_parts: list[Part]
    step_parts: list[Part]
    peaks: Peaks
    loader_seconds: float
    failures: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rows": [row.as_dict() for row in self.rows]}

    def lines(self) -> list[str]:
        images, height, width = self.case.size
        step = sum(part.seconds for part in self.step_parts)
        name = f"{self.case.backbone_name}, {'ViDT+' if self.case.plus else 'ViDT'}"
        share = f"{100 * self.loader_seconds / step:.1f} % of a training step"
        return [
            f"{name}, {images}x3x{height}x{width}, {self.parameters / 1e6:.1f} M parameters",
            HEADING,
            *map(str, self.rows),
            *self.failures,
            f"of the memory, a process without a model: {self.peaks.get(EMPTY, 0):.2f} GiB",
            *parts_table(self.forward_parts, self.step_parts),
            f"one loader process needs {self.loader_seconds:.4f} s for the batch, {share}",
        ]


def measure(case: Case, ceiling: Ceiling, given: argparse.Namespace) -> Result:
    torch.manual_seed(0)
    torch.compiler.reset()  # else what it learnt of other sizes would count
    device = torch.device(case.device)
    detector, floor = Detector(case), Floor(case)
    known = [watched(each, detector) for each in detector.eager()]
    flops = {each.work: count_flops(each) for each in (*floor.eager(), *known)}
    # Hooks cost nothing on a CPU. A GPU waits for whoever feeds it: there they run apart.
    apart = device.type != "cpu"
    contestants = [*floor.eager(), *(detector.eager() if apart else known)]
    failures: list[str] = []
    if given.compile:
        graphed = [detector.graphed()] if device.type == "cuda" else []
        contestants += able((*floor.compiled(), *detector.compiled(), *graphed), device, failures)
    contestants.sort(key=lambda each: WORKS.index(each.work))
    rounds = run_race(contestants, device, given)
    by_part = run_race(known, device, given) if apart else rounds
    peaks = peak_memory(case)
    parameters = sum(parameter.numel() for parameter in detector.model.parameters())
    forward_parts, step_parts = (
        make_parts(by_part[work, "eager"], flops[work], ceiling, parameters)
        for work in (FORWARD, TRAINING)
    )
    return Result(
        case,
        parameters,
        make_rows(rounds, flops, peaks, ceiling, case.size[0]),
        forward_parts,
        step_parts,
        peaks,
        loader_seconds(case.size, count=case.size[0] if given.quick else 32),
        failures,
    )


def able(
    contestants: Iterable[Contestant], device: torch.device, failures: list[str]
) -> list[Contestant]:
    """Those that run at all, compiled and warm; of the others one line each goes to `failures`."""
    working = []
    for each in contestants:
        try:
            each.seconds(device)
        except RuntimeError as error:  # the compiler's own errors are among them
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            failures.append(f"{each.work}, {each.how}: failed, {reason}")
        else:
            working.append(each)
    return working


def run_race(
    contestants: Sequence[Contestant], device: torch.device, given: argparse.Namespace
) -> dict[tuple[str, str], list[Gains]]:
    warm_up = WARM_UP[device.type]
    race(contestants, device, least=warm_up, most=warm_up, seconds=0)
    least = min(LEAST, given.repeat)
    return race(contestants, device, least=least, most=given.repeat, seconds=given.seconds)


def environment(given: argparse.Namespace) -> dict[str, str]:
    on_cpu = given.device.type == "cpu"
    shown = {name: os.environ.get(name, "not set") for name in ALWAYS_SHOWN}
    found = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    return {
        "device": processor() if on_cpu else torch.cuda.get_device_name(given.device),
        "threads": str(given.threads),
        "precision": given.precision,
        "float32 products": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}",  # of the last minute: what else the machine does
    } | dict(sorted((shown | found).items()))


def processor() -> str:
    """Its name, where Linux tells it, and the instructions that PyTorch uses."""
    name, told = platform.machine(), Path("/proc/cpuinfo")
    for line in told.read_text().splitlines() if told.exists() else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def read_size(text: str) -> tuple[int, int, int]:
    """`2x640x480` to (2, 640, 480): images, height, width."""
    try:
        images, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        images = height = width = 0
    if min(images, height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be like 2x640x480, BxHxW")
    return images, height, width


def read_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in WARM_UP:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be cpu or cuda")
    return device


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Time and memory of the detector.")
    parser.add_argument("--backbone_name", nargs="+", choices=backbone_names(), default=BACKBONES)
    parser.add_argument("--size", nargs="+", type=read_size, default=[*map(read_size, SIZES)])
    parser.add_argument("--plus", action="store_true", help="ViDT+ of 300 tokens, without masks")
    parser.add_argument("--new_sizes", action="store_true", help="a new size in every round")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--precision", choices=PRECISIONS, default="no")
    parser.add_argument("--compile", action="store_true", help="compiled ones take part, too")
    parser.add_argument("--device", type=read_device, default=here)
    parser.add_argument("--repeat", type=int, default=7, help="rounds at most")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help=f"no round begins later, after {LEAST}"
    )
    parser.add_argument("--quick", action="store_true", help="one tiny case: does all work?")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args(argv)
    if given.quick:
        given.backbone_name, given.size, given.repeat = ["swin_nano"], [(1, 64, 96)], 1
    if given.precision == "fp16" and given.device.type == "cpu":
        parser.error("--precision fp16 is for a GPU: the trainer computes fp32 on a CPU; try bf16")
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if given.new_sizes and not set(given.backbone_name) <= SWIN_VARIANTS.keys():
        parser.error("--new_sizes is for Swin: timm's CoaT keeps the size that it was built for")
    if min(given.threads, given.repeat) < 1:
        parser.error("--threads and --repeat must be 1 or more")
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    where = environment(given)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    ceiling = measure_ceiling(
        given.device, PRECISIONS[given.precision], scale=16 if given.quick else 1
    )
    print(f"at most {ceiling.flops / 1e9:.0f} GFLOP/s, {ceiling.bytes / 1e9:.1f} GB/s", flush=True)
    results = []
    for name in given.backbone_name:
        for size in given.size:
            case = Case(
                name,
                size,
                given.plus,
                str(given.device),
                given.precision,
                given.threads,
                given.new_sizes,
            )
            result = measure(case, ceiling, given)
            print("", *result.lines(), sep="\n", flush=True)
            results.append(result.as_dict())
    if given.json is not None:
        content = {"environment": where, "ceiling": asdict(ceiling), "results": results}
        given.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
