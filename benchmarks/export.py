"""How far exported detectors are from PyTorch, and how fast: sizes, batches, both precisions.

    python benchmarks/export.py WEIGHTS... --json val.json --images DIR

For every weights file and every --eval_size: the model is exported for any batch, in both
precisions, at the canvas of most images, and held to PyTorch on --count images, alone and in
batches of four; map50 of both is on all images of the file. Latency is the median over --repeat
turns of one image, both taking turns, in as many threads as PyTorch has; a ratio below 1 says that
onnxruntime is faster. On a machine that does other work too, believe the ratio of one thread only
(OMP_NUM_THREADS=1).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from PIL import Image

from trainer.commands.export import scored_images
from vidt import Predictor
from vidt.images.files import read_image
from vidt.onnx import detector as onnx_detector
from vidt.onnx.export import export
from vidt.onnx.proof import FULL, HALF, compare
from vidt.weights.checkpoint import load_model
from vidt.weights.weights_file import save_weights

BATCHES = (1, 4)


@dataclass(frozen=True)
class Row:
    """One export; differences are the largest, of boxes in shares of the picture."""

    weights: str
    frame: tuple[int, int]
    half: bool
    mebibytes: float
    scores: dict[int, float]  # by batch size
    boxes: dict[int, float]
    matched: float
    map50: float
    onnx_map50: float
    seconds: float  # PyTorch, one image
    onnx_seconds: float

    @property
    def ratio(self) -> float:
        return self.onnx_seconds / self.seconds


def measure(weights: Path, eval_size: int, half: bool, given: argparse.Namespace) -> Row:
    """Raises ValueError with the report if the export is rejected."""
    model, info = load_model(weights)
    info = replace(info, preprocessing=replace(info.preprocessing, eval_size=eval_size))
    files = scored_images(given.json, given.images, info.class_names).files[: given.count]
    pictures = [read_image(file) for file in files]
    with tempfile.TemporaryDirectory() as name:
        resized, output = Path(name) / "weights.safetensors", Path(name) / "model.onnx"
        save_weights(resized, model.state_dict(), info)
        report = export(
            resized,
            output,
            dynamic=("batch",),
            half=half,
            images=files,
            dataset_for=None
            if given.no_map50
            else partial(scored_images, given.json, given.images),
        )
        if not report.ok:
            raise ValueError(report.text())
        predictor = Predictor.from_checkpoint(resized)
        detector = onnx_detector.OnnxDetector(output, threads=torch.get_num_threads())
        limits = HALF if half else FULL
        differences = {
            size: compare(predictor, detector, pictures, limits, batch_size=size)
            for size in BATCHES
        }
        seconds = latencies(
            [
                lambda picture: predictor([picture]),
                lambda picture: detector.predict(picture, threshold=0.0),
            ],
            pictures,
            given.repeat,
        )
    return Row(
        weights=weights.parent.name or weights.name,
        frame=report.frame,
        half=half,
        mebibytes=report.bytes / 2**20,
        scores={size: each.scores for size, each in differences.items()},
        boxes={size: each.boxes for size, each in differences.items()},
        matched=min(each.matched for each in differences.values()),
        map50=-1.0 if report.map50 is None else report.map50,
        onnx_map50=-1.0 if report.onnx_map50 is None else report.onnx_map50,
        seconds=seconds[0],
        onnx_seconds=seconds[1],
    )


def latencies(
    ways: Sequence[Callable[[Image.Image], object]], pictures: Sequence[Image.Image], repeat: int
) -> list[float]:
    """Median seconds of each way; they take turns, and the first turn is not counted."""
    turns: list[list[float]] = [[] for _ in ways]
    for turn in range(repeat + 1):
        picture = pictures[turn % len(pictures)]
        for seconds, way in zip(turns, ways, strict=True):
            start = time.perf_counter()
            way(picture)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in turns]


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        f"{'weights':<14}{'size':>10}{'bits':>5}{'MiB':>7}{'scores, batch 1, 4':>21}"
        f"{'boxes, batch 1, 4':>21}{'found':>8}{'map50':>8}{'ONNX':>8}{'torch ms':>10}{'ratio':>7}"
    )
    for row in rows:
        scores = ", ".join(f"{row.scores[size]:.1e}" for size in BATCHES)
        boxes = ", ".join(f"{row.boxes[size]:.1e}" for size in BATCHES)
        yield (
            f"{row.weights:<14}{row.frame[0]:>6}x{row.frame[1]:<3}{16 if row.half else 32:>5}"
            f"{row.mebibytes:>7.1f}{scores:>21}{boxes:>21}{row.matched:>8.2%}{row.map50:>8.4f}"
            f"{row.onnx_map50:>8.4f}{row.seconds * 1e3:>10.0f}{row.ratio:>7.2f}"
        )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Exported detectors against PyTorch.")
    parser.add_argument("weights", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, required=True, help="COCO file of the images")
    parser.add_argument("--images", type=Path, required=True, help="their folder")
    parser.add_argument("--eval_size", type=int, nargs="+", default=[320, 512])
    parser.add_argument("--count", type=int, default=20, help="images to compare on")
    parser.add_argument("--precisions", nargs="+", choices=("32", "16"), default=["32", "16"])
    parser.add_argument("--no_map50", action="store_true", help="differences and latency only")
    parser.add_argument("--repeat", type=int, default=15, help="turns of the latency")
    parser.add_argument("--out", type=Path, help="file for the figures")
    return parser.parse_args(argv)


def main() -> None:
    given = arguments()
    rows = [
        measure(weights, size, precision == "16", given)
        for weights in given.weights
        for size in given.eval_size
        for precision in given.precisions
    ]
    versions = f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}"
    print(f"{versions}; threads of each: {torch.get_num_threads()}")
    print("\n".join(table(rows)))
    if given.out is not None:
        given.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
