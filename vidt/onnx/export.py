"""Export to ONNX with a check: the exported detector, run by `OnnxDetector`, is compared with the
trained one on pictures, and on a dataset if one is given.

A model beyond the `Limits` is written as NAME.rejected instead of its name.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from vidt.atomic import naming, unfinished
from vidt.errors import UserError, counted
from vidt.images.canvas import GRANULE, whole_granules
from vidt.images.files import probe_image, read_image
from vidt.onnx.detector import OnnxDetector
from vidt.onnx.graph import ExportedDetector, make_graph
from vidt.onnx.other_runner import OtherRunner, write_inputs
from vidt.onnx.proof import (
    FULL,
    HALF,
    PROOF_BATCH,
    SAME_BOX,
    SHOWN,
    Differences,
    Limits,
    compare,
    detections_in_frame,
)
from vidt.predict.predictor import Predictor
from vidt.weights.checkpoint import load_model

DYNAMIC = ("batch",)
NUM_DRAWN = 6  # pictures that are drawn if none are given
MOST_COMPARED = 20  # pictures of a dataset on which scores and boxes are compared one by one


@dataclass(frozen=True)
class ScoredImages:
    """A dataset to score both detectors on. `sizes` are (height, width) of the stored or turned
    pixels, as annotated. `map50` takes the detections of each image, in order, and returns the mean
    AP at IoU 0.5, 0..1.
    """

    files: Sequence[Path]
    sizes: Sequence[tuple[int, int]]
    map50: Callable[[Iterable[Any]], float]

    def pictures(self) -> Iterator[Image.Image]:
        """Raises `vidt.images.files.UnreadableImage` for a damaged file."""
        return map(read_image, self.files, self.sizes)


@dataclass(frozen=True, kw_only=True)
class ProofReport:
    """The differences of an exported detector from the original one."""

    _verdict: ClassVar[str] = "both agree"
    file: str  # the model, NAME.rejected if it is not `ok`; or another runner's outputs
    num_pictures: int
    drawn: bool  # whether the pictures were drawn, since none were given
    differences: Differences
    limits: Limits
    map50: float | None = None  # of the trained detector; None: no dataset was given
    onnx_map50: float | None = None
    evaluated_map50: float | None = None  # of the trained one without the frame
    failures: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}

    def text(self) -> str:
        """A few lines for a person."""
        lines = [*self._what(), *self._how_far()]
        if self.differences.num_reshaped:
            lines.append(
                f"note: evaluation brings {self.differences.num_reshaped} of these "
                f"{self.num_pictures} pictures to another size; here they are padded, or shrunk to "
                "fit, on both sides alike"
            )
        verdict = self._verdict if self.ok else f"REJECTED: {'; '.join(self.failures)}"
        return "\n".join([*lines, verdict])

    def _what(self) -> list[str]:
        return [f"{self.file}: outputs of another runner"]

    def _how_far(self) -> list[str]:
        limits, seen = self.limits, self.differences
        pictures = "drawn pictures (none were given)" if self.drawn else "pictures"
        lines = [
            f"held to the detector in PyTorch on {self.num_pictures} {pictures}:",
            f"  scores differ by at most {seen.scores:.1e}; allowed {limits.scores:g}",
            f"  boxes differ by at most {seen.boxes:.1e} of the picture; allowed {limits.boxes:g}",
            *(
                [f"  masks differ in at most {seen.masks:.2%}; allowed {limits.masks:.0%}"]
                if seen.masks is not None
                else []
            ),
            f"  {seen.matched:.2%} of {seen.num_shown} detections that score {SHOWN} or more are "
            f"found again at IoU {SAME_BOX}; required {limits.matched:.0%}",
        ]
        if self.map50 is not None and self.onnx_map50 is not None:
            lines.append(
                f"  map50 {self.onnx_map50:.4f}, in PyTorch {self.map50:.4f}; may differ by "
                f"{limits.map50:g}"
            )
        if self.evaluated_map50 is not None:
            score = self.evaluated_map50
            lines.append(f"  map50 in PyTorch where every picture has its own size {score:.4f}")
        return lines


@dataclass(frozen=True, kw_only=True)
class ExportReport(ProofReport):
    """The exported file, and its differences from the original detector."""

    _verdict: ClassVar[str] = "exported"
    bytes: int
    frame: tuple[int, int]  # (height, width) that the model takes
    half: bool
    dynamic: tuple[str, ...]
    decoded: bool

    def _what(self) -> list[str]:
        kind = "half precision" if self.half else "single precision"
        batch = "any batch" if "batch" in self.dynamic else "one picture at a time"
        output = "scores, labels and boxes" if self.decoded else "raw outputs"
        height, width = self.frame
        return [
            f"{self.file}: {self.bytes / 2**20:.1f} MiB, {kind}",
            f"takes pictures of height {height} and width {width}, {batch}; gives {output}",
            "passes onnx's checker",
        ]


def export(
    weights: Path,
    output: Path,
    *,
    size: tuple[int, int] | None = None,
    dynamic: tuple[str, ...] = (),
    half: bool = False,
    with_decode: bool = False,
    images: Sequence[Path] = (),
    dataset_for: Callable[[Sequence[str]], ScoredImages] | None = None,
    inputs: Path | None = None,
    tell: Callable[[str], None] = lambda stage: None,
) -> ExportReport:
    """Writes a detector as an ONNX model and checks it. Needs onnx, onnxscript and onnxruntime.

    size: (height, width) of the model's input, multiples of 16; None: the most common canvas of
    `images` or of the dataset, without either a square of the evaluation size. dynamic: ("batch",)
    for a model with any batch size. half: half precision where it costs little accuracy.
    with_decode: the model returns boxes, scores and labels instead of the detector's outputs.
    images: pictures to compare on, turned as their EXIF says; none: some are drawn. dataset_for:
    called with the class names before the export; returns the dataset on which map50 of both
    detectors is compared. inputs: a file for what `prove` needs: the model's inputs of the dataset,
    or else of the pictures. tell: called as each stage begins, with a text for people.

    `output` is written atomically. Raises UserError in one line for weights that cannot be read, an
    invalid size or axis, and a dataset without the detector's classes; OSError in one line for a
    file that cannot be written.
    """
    _check(output, size, dynamic)
    tell(f"reading {weights}")
    model, info = load_model(weights)
    predictor = Predictor(model, info)
    dataset = dataset_for(info.class_names) if dataset_for else None
    pictures = _Pictures(images)
    if dataset and not images:
        pictures = _Pictures(dataset.files[:MOST_COMPARED], dataset.sizes[:MOST_COMPARED])
    frame = size or _common_canvas(_sizes(dataset, images), predictor)
    tell(f"exporting the graph for images of {frame[0]} x {frame[1]}")
    graph = make_graph(
        ExportedDetector(predictor.model, info.preprocessing, decode=with_decode),
        info,
        frame,
        dynamic_batch="batch" in dynamic,
        half=half,
    )
    written, limits = graph.SerializeToString(), HALF if half else FULL
    with unfinished(output) as temporary:
        with naming(output), temporary.open("wb") as file:
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        tell(f"comparing both detectors on {counted(len(pictures), 'image')}")
        detector = OnnxDetector(temporary)
        differences = compare(predictor, detector, pictures, limits)
        if dataset:
            tell(f"scoring both detectors on {counted(len(dataset.files), 'image')}")
        scores = _scores(predictor, detector, dataset) if dataset else None
        failures = tuple(_failures(differences, scores, limits))
        if inputs is not None:
            tell(f"writing {inputs}")
            write_inputs(inputs, detector, _Pictures.of(dataset, images))
        named = output.with_name(f"{output.name}.rejected") if failures else output
        with naming(named):
            temporary.replace(named)
    return ExportReport(
        file=str(named),
        bytes=len(written),
        frame=frame,
        half=half,
        dynamic=tuple(dynamic),
        decoded=with_decode,
        num_pictures=len(pictures),
        drawn=not pictures.files,
        differences=differences,
        limits=limits,
        map50=scores and scores[0],
        onnx_map50=scores and scores[1],
        evaluated_map50=scores and scores[2],
        failures=failures,
    )


def prove(
    weights: Path,
    file: Path,
    outputs: Path,
    *,
    half: bool = False,
    images: Sequence[Path] = (),
    dataset_for: Callable[[Sequence[str]], ScoredImages] | None = None,
    tell: Callable[[str], None] = lambda stage: None,
) -> ProofReport:
    """Compares another runner of an exported model with the trained detector, as `export` does.

    file: the model. outputs: what the runner gave, see `vidt.onnx.other_runner`, for the inputs
    that `export` wrote for the same images or the same dataset. half: whether to allow what half
    precision costs.

    Raises UserError in one line for files that cannot be read or do not belong together.
    """
    tell(f"reading {weights}")
    predictor = Predictor(*load_model(weights))
    detector = OnnxDetector(file)
    if detector.class_names != tuple(predictor.class_names):
        raise UserError(f"{file} has other classes than {weights}; name the weights it is made of")
    runner, limits = OtherRunner(detector, outputs), HALF if half else FULL
    dataset = dataset_for(predictor.class_names) if dataset_for else None
    pictures = _Pictures.of(dataset, images)
    runner.require_images(len(pictures))
    tell(f"comparing on {counted(len(pictures), 'image')}")
    differences = compare(predictor, runner, pictures, limits)
    scores = _scores(predictor, runner, dataset) if dataset else None
    return ProofReport(
        file=str(outputs),
        num_pictures=len(pictures),
        drawn=not pictures.files,
        differences=differences,
        limits=limits,
        map50=scores and scores[0],
        onnx_map50=scores and scores[1],
        evaluated_map50=scores and scores[2],
        failures=tuple(_failures(differences, scores, limits)),
    )


def _check(output: Path, size: tuple[int, int] | None, dynamic: tuple[str, ...]) -> None:
    if "size" in dynamic:
        raise UserError(
            "dynamic size: a graph has one size here; export one for each (--size H W) or rely on "
            "padding"
        )
    for axis in dynamic:
        if axis not in DYNAMIC:
            raise UserError(f"dynamic is {axis}; it must be one of {', '.join(DYNAMIC)}")
    for side in size or ():
        if side < GRANULE or side % GRANULE:
            raise UserError(
                f"size {side} is not a multiple of {GRANULE}; {whole_granules(side)} is one"
            )
    if not output.parent.is_dir():
        raise UserError(f"{output} cannot be written: there is no folder {output.parent}")


class _Pictures:
    """The pictures to compare on, opened on demand: given files, or drawn ones. sizes: those of a
    dataset's files, see `ScoredImages`.
    """

    def __init__(self, files: Sequence[Path], sizes: Sequence[tuple[int, int]] = ()) -> None:
        self.files, self.sizes = files, sizes

    @classmethod
    def of(cls, dataset: ScoredImages | None, files: Sequence[Path]) -> "_Pictures":
        """Those of the dataset if there is one."""
        return cls(dataset.files, dataset.sizes) if dataset else cls(files)

    def __len__(self) -> int:
        return len(self.files) or NUM_DRAWN

    def __iter__(self) -> Iterator[Image.Image]:
        if self.sizes:
            return map(read_image, self.files, self.sizes)
        if self.files:
            return (read_image(file, exif=True) for file in self.files)  # as in prediction
        return map(_drawn, range(NUM_DRAWN))


def _drawn(seed: int) -> Image.Image:
    """A picture of coarse, colourful noise in a common shape."""
    generator = np.random.default_rng(seed)
    width, height = ((640, 480), (480, 640), (500, 500))[seed % 3]
    coarse = generator.integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _sizes(dataset: ScoredImages | None, files: Sequence[Path]) -> Iterable[tuple[int, int]]:
    """The sizes of the given files as prediction reads them, or else those of the dataset."""
    if dataset and not files:
        return dataset.sizes
    return (probe_image(file).shown_size for file in files)


def _common_canvas(sizes: Iterable[tuple[int, int]], predictor: Predictor) -> tuple[int, int]:
    preprocessing = predictor.preprocessing
    canvases = Counter(preprocessing.canvas(*size) for size in sizes)
    square = whole_granules(preprocessing.eval_size)
    return max(canvases, key=lambda canvas: canvases[canvas], default=(square, square))


def _scores(
    predictor: Predictor, detector: OnnxDetector | OtherRunner, dataset: ScoredImages
) -> tuple[float, float, float | None]:
    """map50 of the trained and of the exported detector in the frame; and of the trained one as in
    evaluation, None if all pictures have the frame's size.
    """
    mine = dataset.map50(detections_in_frame(predictor, detector, dataset.pictures()))
    exported = detector.stream(dataset.pictures(), batch_size=PROOF_BATCH, clip=False)
    theirs = dataset.map50(each for _, each in exported)
    canvases = {predictor.preprocessing.canvas(*size) for size in dataset.sizes}
    if canvases <= {detector.frame}:
        return mine, theirs, None
    return mine, theirs, dataset.map50(predictor([each])[0] for each in dataset.pictures())


def _failures(
    differences: Differences,
    scores: tuple[float, float, float | None] | None,
    limits: Limits,
) -> Iterator[str]:
    yield from differences.failures(limits)
    if scores and not abs(scores[0] - scores[1]) <= limits.map50:
        yield f"map50 is {scores[1]:.4f} instead of {scores[0]:.4f}"
