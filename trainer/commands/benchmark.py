"""`vidt benchmark`: the latency of one image, and the throughput of batches."""

import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.commands.command_flags import (
    add_detector_flags,
    check_result,
    command_parser,
    count,
    load_detector,
    say,
    side,
    write_json,
)
from vidt.arguments import OneLineParser
from vidt.errors import UserError
from vidt.weights.published import is_remote

SUMMARY = """
Times a detector on this machine, from images in memory to boxes: one image at a time (latency), and
in batches (throughput). Resizing is included, reading files is not. Takes a weights file, an
exported .onnx model, or the name of a backbone, which gets random weights: they are as fast. With
--compile it is timed as it is and compiled.
"""
EXAMPLES = """
examples:
  vidt benchmark output/best.safetensors
  vidt benchmark swin_tiny --size 640 640 --batch_size 16 --mixed_precision bf16
  vidt benchmark model.onnx --repeat 50 --out speed.json

output: the median, fastest and slowest run in milliseconds, and images per second. Times on a
machine that does other work mean little.

exit code: 0 done, 2 a mistake that the line "error: ..." names.
"""
WARM_UP = 3  # runs before those that count


def flags() -> OneLineParser:
    parser = command_parser("benchmark", SUMMARY, EXAMPLES)
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="weights, .onnx model, or a backbone such as swin_nano",
    )
    parser.add_argument(
        "--size", nargs=2, type=side, default=(640, 640), metavar=("H", "W"), help="of the images"
    )
    parser.add_argument(
        "--repeat", type=count, default=20, metavar="N", help="runs that count (default 20)"
    )
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    add_detector_flags(parser, batch_size=8)
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    given = flags().parse_args(argv)
    check_result("--out", given.out, [Path(given.weights)])
    detector = _detector(Namespace(**{**vars(given), "compile": False}))
    compiled = _detector(given) if given.compile else None
    pixels = np.random.default_rng(0).integers(0, 256, (*given.size, 3), np.uint8)
    picture = Image.fromarray(pixels)

    def both(of: Any) -> dict[str, dict[str, float]]:
        return {
            "latency": timed(of, [picture], 1, given.repeat),
            "throughput": timed(of, [picture] * given.batch_size, given.batch_size, given.repeat),
        }

    facts = {
        "detector": given.weights,
        "height": given.size[0],
        "width": given.size[1],
        "device": str(getattr(detector, "device", given.device or "cpu")),
        "precision": getattr(detector, "precision", "its own"),
        "compile": given.compile,
        "machine": platform.processor() or platform.machine(),
        **both(detector),
    }
    if compiled is not None:
        try:
            facts["compiled"] = both(compiled)
        except RuntimeError as error:  # the compiler's own errors are among them
            facts["compiled"] = {"failed": str(error).strip().partition("\n")[0]}
    say(table(facts))
    write_json(given.out, facts)
    return 0


def _detector(given: Any) -> Any:
    from vidt.model.config import ViDTConfig, backbone_names

    if given.weights not in backbone_names():
        if not is_remote(given.weights) and not Path(given.weights).exists():
            backbones = ", ".join(backbone_names())
            raise UserError(f"WEIGHTS {given.weights}: neither a file nor a backbone ({backbones})")
        return load_detector(given, threads=given.threads)
    if given.threads is not None:
        import torch

        torch.set_num_threads(given.threads)
    from vidt.images.preprocessing import Preprocessing
    from vidt.model.vidt import build_detector
    from vidt.predict.predictor import Predictor, usable_device
    from vidt.weights.weights_file import WeightsInfo

    config = ViDTConfig(backbone_name=given.weights)
    names = tuple(f"class {number}" for number in range(config.num_classes))
    info = WeightsInfo(config, names, Preprocessing(min(given.size)))
    return Predictor(
        build_detector(config),
        info,
        device=usable_device(given.device),
        precision=given.mixed_precision or "auto",
        compile=given.compile,
    )


def timed(
    detector: Any, pictures: list[Image.Image], batch_size: int, repeat: int
) -> dict[str, float]:
    """Seconds of a run over the pictures, and images per second of the median run."""
    seconds = []
    for _ in range(WARM_UP + repeat):
        start = time.perf_counter()
        detections = list(detector.stream(pictures, batch_size=batch_size))
        seconds.append(time.perf_counter() - start)
        assert len(detections) == len(pictures)
    counted = seconds[WARM_UP:]
    median = statistics.median(counted)
    return {
        "images": len(pictures),
        "median": median,
        "fastest": min(counted),
        "slowest": max(counted),
        "images_per_second": len(pictures) / median,
    }


def table(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['detector']}, pictures of {facts['height']} x {facts['width']} (height x width), "
        f"{facts['device']}, precision {facts['precision']}",
        f"{'':<22}{'batch':>6}{'median ms':>12}{'fastest':>10}{'slowest':>10}{'images/s':>10}",
    ]
    for way, rows in (("", facts), (", compiled", facts.get("compiled", {}))):
        if "failed" in rows:
            lines.append(f"compiled: failed, {rows['failed']}")
        lines += [row(name + way, rows[name]) for name in ("latency", "throughput") if name in rows]
    return "\n".join(lines)


def row(name: str, times: dict[str, float]) -> str:
    median, fastest, slowest = (1000 * times[key] for key in ("median", "fastest", "slowest"))
    return (
        f"{name:<22}{times['images']:>6}{median:>12.1f}{fastest:>10.1f}{slowest:>10.1f}"
        f"{times['images_per_second']:>10.1f}"
    )
