"""`Predictor`: a trained detector with preprocessing and decoding, from images to detections."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vidt.arguments import MIXED_PRECISIONS
from vidt.errors import UserError, counted
from vidt.images.batching import (
    Picture,
    equal_canvases,
    in_order,
    overlapped,
    read_ahead,
    reading_threads,
)
from vidt.images.canvas import resize
from vidt.images.inputs import ImageLike, as_picture, is_one, source_of
from vidt.model.vidt import ViDT, compile_blocks
from vidt.model.without_neck import ViDTWithoutNeck
from vidt.ops.packing import pack
from vidt.ops.precision import best_precision, set_tf32
from vidt.predict.detections import Detections, copy_to_cpu, decode_for
from vidt.predict.selection import least_scores, select
from vidt.predict.tiles import OVERLAP, check_tile, tiled
from vidt.weights.checkpoint import load_model
from vidt.weights.weights_file import WeightsInfo

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # by the major version of PyTorch's CUDA
# Texts of RuntimeErrors that have no type of their own: CUDA, Triton, cuBLAS, cuDNN and the CPU.
OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, so that smaller batches may help."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


class Predictor:
    """A trained detector with its class names and with the resize, normalisation and decoding of
    its evaluation. Several threads may use it at once.
    """

    def __init__(
        self,
        model: ViDT | ViDTWithoutNeck,
        info: WeightsInfo,
        *,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        compile: bool = False,
    ) -> None:
        """precision: bf16 or fp16, by autocast, fp32 (or "no"), or auto: bf16 where the GPU
        computes it natively, else fp32. compile: compile the model's blocks (see
        `vidt.model.vidt.compile_blocks`), for all canvases and batch sizes together. The model is
        moved to the device; on a CPU, in fp32 and not compiled, it is packed (see
        `vidt.ops.packing.pack`). On CUDA, TF32 is switched off in this process: what is computed in
        float32 must not depend on the batch.

        Raises UserError for a precision that does not exist or that the device does not support.
        """
        self.device = torch.device(device)
        self.precision, self.why_precision = _precision(precision, self.device)
        if self.device.type == "cuda":
            set_tf32(False)
        self.model = model.to(self.device).eval()
        if self.precision == "fp32" and not compile:
            pack(self.model)
        self.info = info
        self.decode = decode_for(info.config)
        self.class_names, self.preprocessing = info.class_names, info.preprocessing
        dtype = PRECISIONS[self.precision]
        self.autocast = partial(torch.autocast, self.device.type, dtype, enabled=dtype is not None)
        if compile:
            compile_blocks(self.model)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The category ids of the training data, [K]; label + 1 if they are unknown."""
        return self.info.category_ids

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        compile: bool = False,
    ) -> "Predictor":
        """Reads one of our weights files or a released one. Raises UserError, naming the file, for
        any other.
        """
        return cls(*load_model(path), device=device, precision=precision, compile=compile)

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        threshold: float | str = 0.3,
        batch_size: int = 8,
        tile: int | None = None,
        overlap: float = OVERLAP,
        classes: Iterable[str] | None = None,
    ) -> Detections | list[Detections]:
        """Detections of one image, or a list of them for several, in order.

        images: a path, a Pillow image, an array uint8 [H, W, 3] (RGB) or [H, W] (grey), a tensor
        [3, H, W] (uint8, or float from 0 to 1), or several of these, of any mix; an array [B, H, W,
        3] or tensor [B, 3, H, W] is several. Sizes may differ: each is resized as in evaluation.
        threshold: the lowest score to return, 0 to 1, or "best": for each class the threshold that
        evaluation found to have the highest F1, as stored in the weights. batch_size: the most
        images computed together; it does not change the detections. tile: predict in tiles of this
        many pixels a side that share `overlap` of it, and in the whole image, and merge (see
        `vidt.predict.tiles`). classes: the names to return; None: all.

        Returns `Detections`, on the CPU: boxes float32 [N, 4] as xyxy in pixels of the original
        image and clipped to it, labels int64 [N], names [N], scores float32 [N] from 0 to 1 and
        falling, and masks bool [N, H, W] or None; `plot()` draws them.

        Raises `vidt.images.files.UnreadableImage` for a damaged file, UserError or TypeError for
        anything but an image, UserError for a setting outside its range, an unknown class, and
        "best" if the weights hold no thresholds.
        """
        least = least_scores(threshold, classes, self.class_names, self.info.thresholds)
        one = is_one(images)
        results = self.stream(
            [images] if one else images, batch_size=batch_size, tile=tile, overlap=overlap
        )
        found = [select(detections, least) for detections in in_order(results)]
        return found[0] if one else found

    def __call__(
        self,
        images: Iterable[ImageLike],
        *,
        threshold: float = 0.0,
        batch_size: int = 8,
    ) -> list[Detections]:
        """The detections as evaluation scores them. Unlike `predict`: images are always several,
        all scores are returned by default, and boxes are not clipped to the image.
        """
        results = in_order(self.stream(images, batch_size=batch_size, clip=False))
        return [detections.above(threshold) for detections in results]

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        batch_size: int = 8,
        clip: bool = True,
        tile: int | None = None,
        overlap: float = OVERLAP,
    ) -> Iterator[tuple[int, Detections]]:
        """Yields (index, detections) as they are ready, which is not quite in order: pictures of
        equal canvas are batched together. Threads decode and resize images a few batches ahead of
        the detector, so memory use does not grow with their number. A GPU computes a batch while
        the results of the batch before it are unpacked and used here. Boxes are clipped to the
        picture unless `clip` is False. tile and overlap are those of `predict`.
        """
        check_tile(tile, overlap)
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be 1 or more")
        if isinstance(images, str | bytes):  # whose letters would be taken for paths
            raise TypeError(
                "images is one path; it must be several images, such as a list of paths"
            )
        if tile is not None:
            yield from tiled(
                self.stream, images, tile=tile, overlap=overlap, batch_size=batch_size, clip=clip
            )
            return
        sources: dict[int, ImageLike] = {}

        def numbered() -> Iterator[tuple[int, ImageLike]]:
            for index, image in enumerate(images):
                sources[index] = source_of(image)
                yield index, image

        pictures = read_ahead(numbered(), self._prepared, reading_threads())
        batches = equal_canvases(pictures, batch_size)
        for batch, found in overlapped(batches, self._detect, int(self.device.type != "cpu")):
            for picture, detections in zip(batch, found, strict=True):
                if clip:
                    detections = detections.clipped(picture.size)
                yield picture.index, replace(detections, source=sources.pop(picture.index))

    def _prepared(self, numbered: tuple[int, ImageLike]) -> Picture:
        index, image = numbered
        picture = as_picture(image)
        size = (picture.height, picture.width)
        return Picture(index, size, np.asarray(resize(picture, self.preprocessing.canvas(*size))))

    def _detect(self, batch: Sequence[Picture]) -> Callable[[], list[Detections]]:
        """Starts to detect in pictures of equal canvas; if memory runs out, in each half
        separately. Returns the function that waits for the detections.
        """
        try:
            found = self._forward(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        else:
            # Copied outside of inference mode, each by itself: the caller may change them, or keep
            # one of many.
            return lambda: [self._own(each) for each in found()]
        # Not inside `except`, where the traceback still holds the memory.
        middle = len(batch) // 2
        halves = [self._detect(batch[:middle]), self._detect(batch[middle:])]
        return lambda: [detections for half in halves for detections in half()]

    def _own(self, detections: Detections) -> Detections:
        return replace(detections._map(Tensor.clone), class_names=self.class_names)

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Picture]) -> Callable[[], list[Detections]]:
        shape = (len(batch), *batch[0].pixels.shape)
        # PyTorch keeps pinned memory until the copy from it is done.
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.stack([picture.pixels for picture in batch], out=pixels.numpy())
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = self.preprocessing.normalise(images).contiguous()
        padding = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=self.device)
        sizes = torch.tensor([picture.size for picture in batch])  # also needed on the CPU
        with self.autocast():
            detections = self.decode(self.model(images, padding, detections_only=True), sizes)
        return copy_to_cpu(detections)


def _precision(asked: str, device: torch.device) -> tuple[str, str]:
    """The key of PRECISIONS that a precision stands for on a device, and why. Raises UserError."""
    if asked not in (*PRECISIONS, *MIXED_PRECISIONS):
        expected = ", ".join(MIXED_PRECISIONS)
        raise UserError(f"mixed_precision is {asked}; it must be one of {expected}")
    if asked == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision is fp16; on a CPU it must be auto, no or bf16")
    chosen, reason = best_precision(device) if asked == "auto" else (asked, "as asked")
    return ("fp32" if chosen == "no" else chosen), reason


def require_working_gpu() -> None:
    """Raises UserError if there is an NVIDIA driver but no GPU that PyTorch can use, unless
    CUDA_VISIBLE_DEVICES hides all GPUs: a CPU must not take over unnoticed.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.split(",")[0].strip() in ("", "-1")
    if hidden or torch.accelerator.is_available() or not NVIDIA_DRIVER.is_file():
        return
    found = re.search(r"\d+\.[\d.]+", NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace"))
    driver, cuda = found[0] if found else "unknown", torch.version.cuda
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0) if cuda else 0
    if cuda is None:
        cause = "it is built without CUDA; install a PyTorch with CUDA"
    elif found and int(driver.partition(".")[0]) < oldest:
        cause = f"its CUDA {cuda} needs driver {oldest}; update the driver or take an older CUDA"
    elif visible is not None:
        cause = f"CUDA_VISIBLE_DEVICES is {visible}; name GPUs that nvidia-smi lists"
    else:
        cause = "no GPU is visible; if this is a container, start it with its GPUs"
    raise UserError(
        f"NVIDIA driver {driver} is installed, but PyTorch {torch.__version__} finds no GPU: "
        f"{cause}; to compute on the CPU, set CUDA_VISIBLE_DEVICES= (empty)"
    )


def usable_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one, else the CPU.

    Raises UserError for a device that PyTorch does not know or that this machine does not have, and
    without a name for a GPU that PyTorch cannot use.
    """
    if name is None:
        require_working_gpu()
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name}; it must be cpu, cuda or cuda:1, for example") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        gpus = torch.cuda.device_count()
        here = counted(gpus, "CUDA device") if gpus else "no GPU that PyTorch can use"
        raise UserError(f"device is {name}; this machine has {here}; try cpu") from None
    if device.type == "meta":
        raise UserError("device is meta; it must be one that computes, such as cpu")
    return device
