"""`vidt.load`: opens a weights file, a published model or an ONNX model as a detector."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidt.errors import UserError
from vidt.weights.published import local_weights, nearest_model

if TYPE_CHECKING:
    from vidt.predict.predictor import Predictor

ONNX = ".onnx"


def load(
    weights: str | Path,
    *,
    device: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    threads: int | None = None,
    allow_http: bool = False,
) -> "Predictor | Any":
    """Loads a detector from a weights file (our .safetensors or a released .pth), its URL, a model
    on the Hugging Face Hub ("hf://USER/NAME", "hf://USER/NAME@REVISION"), the name of a published
    model such as "vidt_plus_tiny" (see `vidt models`), or an exported model (.onnx, which
    onnxruntime runs without PyTorch). Downloads are cached.

    device: "cpu", "cuda", "cuda:1", ...; None: a GPU if there is one, but the CPU for .onnx.
    precision: "auto" (bf16 where the GPU computes it natively, else fp32), "no" (fp32), "bf16" or
    "fp16"; None is auto. compile: compile the model's blocks with torch.compile, once for all
    canvases. threads: of the CPU; None: one per core. PyTorch has one number for the process.
    allow_http: fetch from http addresses too, unencrypted.

    Returns a `vidt.Predictor`, or an `OnnxDetector` with the same methods, which returns NumPy
    arrays. Raises UserError that names the file if it holds no detector or cannot be downloaded,
    and for a device or precision that is not available.
    """
    path = local_weights(str(weights), flag=None, allow_http=allow_http)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; weights come first, then images: name the weights file in it"
        )
    if not path.exists():
        hint = nearest_model(str(weights)) or "; name a weights file or an .onnx model"
        raise UserError(f"{path} does not exist{hint}")
    formats, video = map(import_module, ("vidt.images.formats", "vidt.images.video"))
    if formats.is_picture(path.name) or video.is_video(path.name):
        raise UserError(f"{path} is no weights file; weights come first, then images")
    if path.suffix == ONNX:
        return _onnx(path, device, precision, compile, threads)
    try:
        from vidt.predict.predictor import Predictor, usable_device
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs {error.name}, which is not installed; install it, or export the "
            "weights to .onnx where it is"
        ) from error

    if threads is not None:
        import_module("torch").set_num_threads(threads)
    return Predictor.from_checkpoint(
        path, device=usable_device(device), precision=precision or "auto", compile=compile
    )


def _onnx(
    path: Path, device: str | None, precision: str | None, compile: bool, threads: int | None
) -> Any:
    if precision not in (None, "auto", "no", "fp32"):
        raise UserError(
            f"mixed_precision is {precision}; an .onnx model has a fixed one: export it with --fp16"
        )
    if compile:
        raise UserError(f"compile is for PyTorch; onnxruntime runs {path}")
    try:
        detector = import_module("vidt.onnx.detector").OnnxDetector
        return detector(path, device=device or "cpu", threads=threads)
    except ImportError as error:
        raise UserError(
            f"{path} needs onnxruntime, which is not installed ({error}); pip install onnxruntime"
        ) from error
