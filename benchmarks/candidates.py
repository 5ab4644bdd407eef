"""Images per second of inference and of each way of mining, against one image and one view at a
time.

    python benchmarks/candidates.py
    python benchmarks/candidates.py --weights best.safetensors --images DIR --batch 16 --workers 4

"alone" reads, predicts and scores one image after the other, each view in a forward pass of its
own, as the predecessor did. "ours" is what a task runs. Both take turns, on the same images; a
figure is the median of the turns, the ratio is of these. "work" is the same ratio of the time that
processors worked on it, all threads together: on a machine that is shared it says more. Without
weights they are random, of the size that the flags say: time does not depend on them.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.data.shapes import write_shapes
from vidt import Predictor, ViDT, ViDTConfig
from vidt.images.preprocessing import Preprocessing
from vidt.weights.weights_file import WeightsInfo
from ymir_adapter.protocol.environment import InputPaths, OutputPaths
from ymir_adapter.protocol.task import CandidateSettings, Task
from ymir_adapter.tasks.candidates import CandidatePass, algorithm_of, make_detector
from ymir_adapter.tasks.parts import Part

WORK = ("infer", "entropy", "aldd", "cald")


@dataclass(frozen=True)
class Speed:
    """Images per second of one kind of work, by the clock; images per second of processor time."""

    work: str
    alone: float
    ours: float
    alone_cpu: float
    ours_cpu: float

    @property
    def ratio(self) -> float:
        return self.ours / self.alone

    @property
    def cpu_ratio(self) -> float:
        return self.ours_cpu / self.alone_cpu


def task_of(work: str, folder: Path, names: Sequence[str]) -> Task:
    inputs = InputPaths(*[folder] * 8)
    return Task(
        task_id="benchmark",
        protocol=(1, 1, 0),
        run_training=False,
        run_mining=work != "infer",
        run_infer=work == "infer",
        input=inputs,
        output=OutputPaths(*[folder] * 7),
        config={},
        class_names=tuple(names),
        gpu_ids=(),
    )


def measure(
    work: str,
    predictor: Predictor,
    images: Sequence[str],
    settings: CandidateSettings,
    turns: int,
) -> Speed:
    """The first turn of each way is not counted."""
    with tempfile.TemporaryDirectory() as name:
        task = task_of(work, Path(name), predictor.class_names)
        mining = settings if work == "infer" else replace(settings, mining_algorithm=work)
        single = replace(mining, batch_size_per_gpu=1, num_workers_per_gpu=0)
        ways = {}
        for way, chosen in (("alone", single), ("ours", mining)):
            detector = make_detector(algorithm_of(task, chosen), chosen, predictor)
            if way == "alone":
                detector.rows = 1
            ways[way] = CandidatePass(task, chosen, images, detector)
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(1 + turns):
            for way, candidate_pass in ways.items():
                seconds[way].append(seconds_of(candidate_pass, len(images), Path(name)))
    speeds = [
        len(images) / statistics.median(turn[clock] for turn in seconds[way][1:])
        for clock in (0, 1)
        for way in ("alone", "ours")
    ]
    return Speed(work, *speeds)


def seconds_of(candidate_pass: CandidatePass, count: int, folder: Path) -> tuple[float, float]:
    """By the clock, and of all processors."""
    start, start_cpu = time.perf_counter(), time.process_time()
    with Part(folder, 0) as part:
        candidate_pass.run(range(count), part)
    if part.num_unreadable:
        raise ValueError(f"a picture cannot be read: {part.unreadable[0]}")
    return time.perf_counter() - start, time.process_time() - start_cpu


@contextmanager
def candidates(given: argparse.Namespace) -> Iterator[list[str]]:
    """Files of --images in turn, or drawn pictures, until there are --count."""
    with tempfile.TemporaryDirectory() as name:
        folder = given.images
        if folder is None:
            folder = write_shapes(Path(name), num_train=1, num_val=16, size=given.eval_size)
        suffixes = {".jpg", ".jpeg", ".png", ".bmp"}
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
        if not files:
            raise ValueError(f"--images {folder}: there is no picture")
        yield [str(files[index % len(files)].resolve()) for index in range(given.count)]


def predictor_of(given: argparse.Namespace) -> Predictor:
    if given.weights is not None:
        return Predictor.from_checkpoint(given.weights, device=given.device)
    config = ViDTConfig(backbone_name=given.backbone_name)
    names = tuple(f"class{label}" for label in range(config.num_classes))
    info = WeightsInfo(config, names, Preprocessing(eval_size=given.eval_size))
    torch.manual_seed(0)
    return Predictor(ViDT(config), info, device=given.device)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Images per second of mining and inference.")
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--weights", type=Path, help="a weights file; its own sizes count")
    parser.add_argument("--backbone_name", default="swin_nano")
    parser.add_argument("--eval_size", type=int, default=320)
    parser.add_argument("--images", type=Path, help="folder of pictures; else some are drawn")
    parser.add_argument("--count", type=int, default=32, help="images in each turn")
    parser.add_argument("--batch", type=int, default=8, help="batch_size_per_gpu")
    parser.add_argument("--workers", type=int, default=2, help="num_workers_per_gpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default=here)
    parser.add_argument("--turns", type=int, default=3, help="turns that are counted")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args(argv)
    if min(given.count, given.batch, given.threads, given.turns) < 1 or given.workers < 0:
        parser.error("--count, --batch, --threads and --turns must be 1 or more, --workers 0")
    return given


def environment(given: argparse.Namespace, predictor: Predictor) -> dict[str, Any]:
    on_cpu = torch.device(given.device).type == "cpu"
    return {
        "device": platform.machine() if on_cpu else torch.cuda.get_device_name(given.device),
        "threads": given.threads,
        "body": predictor.model.config.backbone_name,
        "eval_size": predictor.preprocessing.eval_size,
        "batch": given.batch,
        "workers": given.workers,
        "images": given.count,
        "torch": torch.__version__,
    }


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    settings = CandidateSettings(batch_size_per_gpu=given.batch, num_workers_per_gpu=given.workers)
    try:
        predictor = predictor_of(given)
        where = environment(given, predictor)
        print(", ".join(f"{name} {value}" for name, value in where.items()))
        print(f"{'':<10} {'alone /s':>10} {'ours /s':>10} {'ratio':>7} {'work':>7}")
        speeds = []
        with candidates(given) as images:
            for work in given.work:
                speed = measure(work, predictor, images, settings, given.turns)
                speeds.append(asdict(speed) | {"ratio": speed.ratio, "cpu_ratio": speed.cpu_ratio})
                rates = f"{speed.alone:>10.2f} {speed.ours:>10.2f}"
                print(f"{work:<10} {rates} {speed.ratio:>7.2f} {speed.cpu_ratio:>7.2f}", flush=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if given.json is not None:
        given.json.write_text(json.dumps({"environment": where, "results": speeds}, indent=1))


if __name__ == "__main__":
    main()
