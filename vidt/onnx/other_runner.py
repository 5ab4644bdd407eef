"""An exported detector in another runner, such as TensorRT: its inputs as a file, and its outputs.

Both files are NumPy archives (.npz) with an array for each name and image, `images/0`, `padding/0`,
`images/1` and so on, in the order of the images. Arrays have the shapes of the graph with a batch
of one. The outputs are called like those of the graph: `pred_logits/0`, `pred_boxes/0`.
"""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vidt.atomic import atomic_file
from vidt.errors import UserError
from vidt.onnx.detector import OnnxDetections, OnnxDetector


def write_inputs(path: Path, detector: OnnxDetector, pictures: Iterable[Image.Image]) -> None:
    """Writes what the graph takes for each picture, one at a time. Raises OSError naming the file,
    and `vidt.images.files.UnreadableImage` for a damaged picture.
    """
    with (
        atomic_file(path, durable=False) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for number, picture in enumerate(pictures):
            feeds = detector.feeds([picture])
            for name in detector.input_names:
                with archive.open(f"{name}/{number}.npy", "w") as entry:
                    np.lib.format.write_array(entry, feeds[name], allow_pickle=False)


class OtherRunner:
    """Stands in for an `OnnxDetector` in a comparison, with the outputs that another runner of the
    same graph gave for the inputs of `write_inputs`.
    """

    def __init__(self, detector: OnnxDetector, path: Path) -> None:
        """Raises UserError if the file is no archive of arrays."""
        self.frame, self.shape_of = detector.frame, detector.shape_of
        self._detector, self._path = detector, path
        try:
            arrays = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no .npz file: {error}") from error
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds a single array; write it by numpy.savez")
        self._arrays = arrays

    def require_images(self, count: int) -> None:
        """Raises UserError unless there are outputs of exactly this number of images."""
        first = next(iter(self._detector.output_shapes))
        found = sum(key.startswith(f"{first}/") for key in self._arrays.files)
        if found != count:
            raise UserError(
                f"{self._path} has {first} of {found} images, and the inputs had {count}; write "
                f"{first}/0 to {first}/{count - 1}, and name the images that the inputs are of"
            )

    def stream(
        self, images: Iterable[Image.Image], *, batch_size: int = 1, clip: bool = True
    ) -> Iterator[tuple[int, OnnxDetections]]:
        """Yields (index, detections) as `OnnxDetector.stream` does. batch_size has no effect."""
        for index, image in enumerate(images):
            outputs = {name: self._output(name, index) for name in self._detector.output_shapes}
            sizes = np.array([[image.height, image.width]], np.int64)
            (found,) = self._detector.detections(outputs, sizes, [image])
            yield index, found.clipped() if clip else found

    def _output(self, name: str, index: int) -> np.ndarray:
        key, shape = f"{name}/{index}", (1, *self._detector.output_shapes[name][1:])
        try:
            array = self._arrays[key]
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{self._path}: {key} is missing or damaged: {error}") from error
        if array.shape != shape or array.dtype.kind not in "fiu":
            raise UserError(
                f"{self._path}: {key} is {array.dtype} {list(array.shape)}; the model gives "
                f"numbers {list(shape)}"
            )
        return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
