"""`vidt benchmark`: how long one image takes, and how many go through in a second."""

import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.commands.command_flags import (
    Flags,
    UsageError,
    add_detector_flags,
    check_result,
    count,
    say,
    side,
)
from trainer.commands.result_files import write_result
from vidt.loading import load

SUMMARY = """
Times a detector on this machine, from pictures in memory to boxes: one at a time (latency), and in
batches (throughput). Resizing is in it, reading files is not. Takes a weights file, an exported
.onnx model, or the name of a body with random weights, which is as fast.
"""
EXAMPLES = """
examples:
  vidt benchmark output/best.safetensors
  vidt benchmark swin_tiny --size 640 640 --batch_size 16 --precision bf16
  vidt benchmark model.onnx --repeat 50 --out speed.json

what it prints: the median of the runs, and the fastest and slowest, in milliseconds; images per
second. Times on a machine that does other work mean little.

exit code: 0 done, 2 a mistake that the line "error: ..." names.
"""
WARM_UP = 3  # runs that are not counted


def flags() -> Flags:
    parser = Flags("benchmark", SUMMARY, EXAMPLES)
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="weights, an .onnx model, or a body such as swin_nano"
    )
    parser.add_argument(
        "--size", nargs=2, type=side, default=(640, 640), metavar=("H", "W"), help="of the pictures"
    )
    parser.add_argument(
        "--repeat", type=count, default=20, metavar="N", help="runs that count (default 20)"
    )
    parser.add_argument("--threads", type=count, metavar="N", help="of the CPU; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers, as JSON")
    add_detector_flags(parser, batch_size=8)
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises ValueError and OSError with one line for the user."""
    given = flags().read(argv)
    check_result("--out", given.out, [Path(given.weights)])
    detector = _detector(given)
    pixels = np.random.default_rng(0).integers(0, 256, (*given.size, 3), np.uint8)
    picture = Image.fromarray(pixels)
    results = {
        "latency": timed(detector, [picture], 1, given.repeat),
        "throughput": timed(detector, [picture] * given.batch_size, given.batch_size, given.repeat),
    }
    facts = {
        "detector": given.weights,
        "height": given.size[0],
        "width": given.size[1],
        "device": str(getattr(detector, "device", given.device or "cpu")),
        "precision": given.precision or getattr(detector, "precision", "its own"),
        "compile": given.compile,
        "machine": platform.processor() or platform.machine(),
        **results,
    }
    say(in_words(facts))
    if given.out is not None:
        write_result(given.out, json.dumps(facts, indent=1).encode())
    return 0


def _detector(given: Any) -> Any:
    how = {"device": given.device, "precision": given.precision, "compile": given.compile}
    from vidt.model.config import ViDTConfig, backbone_names

    if given.threads is not None and not given.weights.endswith(".onnx"):
        import torch

        torch.set_num_threads(given.threads)
    if given.weights not in backbone_names():
        if not Path(given.weights).exists():
            bodies = ", ".join(backbone_names())
            raise UsageError(f"WEIGHTS {given.weights}: neither a file nor a body ({bodies})")
        return load(given.weights, **how)
    from vidt.images.preprocessing import Preprocessing
    from vidt.model.vidt import build_detector
    from vidt.predict.devices import usable_device
    from vidt.predict.predictor import Predictor
    from vidt.weights.checkpoint import WeightsInfo

    config = ViDTConfig(backbone_name=given.weights)
    names = tuple(f"class {number}" for number in range(config.num_classes))
    info = WeightsInfo(config, names, Preprocessing(min(given.size)))
    how |= {"device": usable_device(given.device), "precision": given.precision or "fp32"}
    return Predictor(build_detector(config), info, **how)


def timed(
    detector: Any, pictures: list[Image.Image], batch_size: int, repeat: int
) -> dict[str, float]:
    """Seconds of a run over the pictures, and images per second by the median of the runs."""
    seconds = []
    for _ in range(WARM_UP + repeat):
        start = time.perf_counter()
        found = list(detector.stream(pictures, batch_size=batch_size))
        seconds.append(time.perf_counter() - start)
        assert len(found) == len(pictures)
    counted = seconds[WARM_UP:]
    median = statistics.median(counted)
    return {
        "images": len(pictures),
        "median": median,
        "fastest": min(counted),
        "slowest": max(counted),
        "images_per_second": len(pictures) / median,
    }


def in_words(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['detector']}, pictures of {facts['height']} x {facts['width']} (height x width), "
        f"{facts['device']}, precision {facts['precision']}"
        + (", compiled" if facts["compile"] else ""),
        f"{'':<12}{'batch':>6}{'median ms':>12}{'fastest':>10}{'slowest':>10}{'images/s':>10}",
    ]
    for name in ("latency", "throughput"):
        row = facts[name]
        times = (1000 * row[which] for which in ("median", "fastest", "slowest"))
        median, fastest, slowest = times
        lines.append(
            f"{name:<12}{row['images']:>6}{median:>12.1f}{fastest:>10.1f}{slowest:>10.1f}"
            f"{row['images_per_second']:>10.1f}"
        )
    return "\n".join(lines)
