"""The detector that needs no torch: from a file, in a process where torch cannot be imported, and
its own arithmetic against torch's.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from tiny_runs import environment
from torch import Tensor, nn

import vidt
from trainer.commands.command_line import main
from vidt.errors import UserError
from vidt.images.canvas import canvas_of, fitted_shape, framed
from vidt.images.inputs import as_picture
from vidt.images.preprocessing import Preprocessing
from vidt.model.vidt import ViDTConfig
from vidt.onnx.detector import FORMAT, OnnxDetector, OnnxInfo, _decoded, _session
from vidt.onnx.export import ScoredImages, export
from vidt.onnx.graph import ExportedDetector, make_graph
from vidt.onnx.other_runner import OtherRunner, write_inputs
from vidt.onnx.proof import FULL, compare
from vidt.predict.predictor import Predictor
from vidt.weights.weights_file import WeightsInfo

NO_TORCH = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "onnx", "accelerate"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refusing())
import numpy
from vidt.onnx.detector import OnnxDetector

detector = OnnxDetector(sys.argv[1])
found = detector.predict(sys.argv[2:4], threshold=0.0)
for number, one in enumerate(found):
    arrays = {"scores": one.scores, "labels": one.labels, "boxes": one.boxes}
    numpy.savez(f"{sys.argv[4]}/{number}.npz", **arrays)
print(found[0].names[0])
assert "torch" not in sys.modules
"""


class Linear(nn.Module):
    """A detector of one layer: what it says depends on every pixel, and exports in a second."""

    def __init__(self, config: ViDTConfig) -> None:
        super().__init__()
        self.config = config
        self.logits = nn.Linear(3, 7 * 3)
        self.boxes = nn.Linear(3, 7 * 4)

    def forward(
        self, images: Tensor, padding: Tensor, *, detections_only: bool
    ) -> dict[str, Tensor]:
        share = (~padding).float().mean((1, 2))[:, None]
        colours = images.mean((2, 3)) / share
        return {
            "pred_logits": self.logits(3 * colours).unflatten(1, (7, 3)),
            "pred_boxes": self.boxes(colours).unflatten(1, (7, 4)).sigmoid(),
        }


@pytest.fixture(scope="module")
def model() -> Predictor:
    torch.manual_seed(0)
    config = ViDTConfig(num_classes=3, det_token_num=7)
    training = {"category_ids": [2, 7, 90]}
    info = WeightsInfo(config, ("disc", "square", "star"), Preprocessing(32), training=training)
    return Predictor(Linear(config), info)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def file(model: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With raw outputs, which the detector decodes itself."""
    module = ExportedDetector(model.model, model.preprocessing, decode=False).eval()
    graph = make_graph(module, model.info, (32, 48), dynamic_batch=True, half=False)
    path = tmp_path_factory.mktemp("linear") / "model.onnx"
    onnx.save(graph, path)
    return path


def test_category_ids_are_those_of_the_weights(
    file: Path, model: Predictor, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """From Python, and in the results of `vidt predict`. Older models have none."""
    assert OnnxDetector(file).category_ids == model.category_ids == (2, 7, 90)
    assert main(["predict", str(file), str(pictures[0]), "--coco", "--threshold", "0"]) == 0
    written = [each["category_id"] for each in json.loads(capsys.readouterr().out)]
    labels = model.predict(pictures[0], threshold=0.0).labels.tolist()
    assert written == [model.category_ids[label] for label in labels] and len(written) == 21
    stored = onnx.load(file)
    older = {each.key: each.value for each in stored.metadata_props if each.key != "category_ids"}
    del stored.metadata_props[:]
    helper.set_model_props(stored, older)
    onnx.save(stored, pictures[0].with_name("older.onnx"))
    assert OnnxDetector(pictures[0].with_name("older.onnx")).category_ids == (1, 2, 3)


def test_threads_reach_onnxruntime(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `vidt.load`, and from `vidt benchmark`."""
    asked = []

    def session(path: Path, device: str, threads: int | None) -> Any:
        asked.append(threads)
        return _session(path, device, threads)

    monkeypatch.setattr("vidt.onnx.detector._session", session)
    words = ["benchmark", str(file), "--repeat", "1", "--batch_size", "1", "--size", "32", "48"]
    assert main([*words, "--threads", "1"]) == 0 and main(words) == 0
    detector = vidt.load(file, threads=2)
    assert asked == [1, None, 2]
    assert detector._session.get_session_options().intra_op_num_threads == 2


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """One of the frame's own canvas, one that is padded."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, size in zip(paths, ((60, 90), (40, 40)), strict=True):
        noise = generator.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(noise).resize(size[::-1]).save(path)
    return paths


@pytest.mark.slow
def test_without_torch(file: Path, model: Predictor, pictures: list[Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(NO_TORCH)
    words = [sys.executable, str(script), str(file), *map(str, pictures), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    for number, expected in enumerate(model.predict(pictures, threshold=0.0)):
        found = np.load(tmp_path / f"{number}.npz")
        assert found["labels"].tolist() == expected.labels.tolist()
        assert np.abs(found["scores"] - expected.scores.numpy()).max() < 1e-5
        assert np.abs(found["boxes"] - expected.boxes.numpy()).max() < 1e-3
    assert done.stdout.strip() == model.class_names[int(model(pictures)[0].labels[0])]


def test_files_pictures_and_arrays_give_the_same(file: Path, pictures: list[Path]) -> None:
    detector = OnnxDetector(file)
    opened = [Image.open(path) for path in pictures]
    expected = detector.predict(pictures, threshold=0.2)
    assert isinstance(expected, list) and 0 < len(expected[0]) < 21
    for images in (opened, [np.asarray(each) for each in opened], map(str, pictures)):
        for found, wanted in zip(detector.predict(images, threshold=0.2), expected, strict=True):
            assert np.array_equal(found.boxes, wanted.boxes)
            assert found.names == wanted.names
    alone = detector.predict(opened[1], threshold=0.2)
    assert np.allclose(alone.boxes, expected[1].boxes, atol=1e-4) and alone.size == (40, 40)
    assert expected[0].masks is None


def test_threshold(file: Path, pictures: list[Path]) -> None:
    (found,) = OnnxDetector(file).predict(pictures[:1], threshold=0.0)
    assert len(found) == 21 and (np.diff(found.scores) <= 0).all()
    kept = found.above(found.scores[9])
    assert len(kept) == 10 and np.array_equal(kept.boxes, found.boxes[:10])
    assert OnnxDetector(file).predict([]) == []


def test_tiles_as_in_pytorch(file: Path, model: Predictor, pictures: list[Path]) -> None:
    """The second image is no larger than a tile."""
    found = OnnxDetector(file).predict(pictures, threshold=0.0, tile=50, classes=["disc", "star"])
    expected = model.predict(pictures, threshold=0.0, tile=50, classes=["disc", "star"])
    assert len(found[0]) > 14 == len(found[1])
    for one, other in zip(found, expected, strict=True):
        assert one.labels.tolist() == other.labels.tolist()
        assert np.allclose(one.scores, other.scores, atol=1e-5)
        assert np.allclose(one.boxes, other.boxes, atol=1e-3)


def test_plot(file: Path, pictures: list[Path]) -> None:
    found = OnnxDetector(file).predict(pictures[0], threshold=0.2)
    picture = Image.open(pictures[0])
    assert found.plot().size == picture.size
    assert found.plot(picture).tobytes() == found.plot().tobytes() != picture.tobytes()
    bare = replace(found, source=None)
    with pytest.raises(ValueError, match="do not know their image; pass it to plot"):
        bare.plot()
    assert bare.plot(picture).size == picture.size


@pytest.mark.parametrize(
    ("image", "error"), [(3, TypeError), (np.zeros((4, 4, 9), np.uint8), ValueError)]
)
def test_what_is_no_image(file: Path, image: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"an image is a path|of shape"):
        OnnxDetector(file).predict([image])


def test_pixels_are_those_of_the_preprocessing() -> None:
    """Bit for bit; their normalisation is the graph's, see `test_export.py`."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
    image, preprocessing = Image.fromarray(noise), Preprocessing(64)
    canvas = canvas_of(100, 150, 64)
    assert canvas == preprocessing.canvas(100, 150) == (64, 96)
    found = framed(image, canvas, (80, 112))
    assert np.array_equal(found[:, :64, :96], preprocessing.pixels(image).numpy())
    assert not found[:, 64:].any() and not found[:, :, 96:].any()


@pytest.mark.parametrize(
    ("canvas", "frame", "shape"),
    [
        ((64, 96), (64, 96), (64, 96)),
        ((64, 96), (128, 128), (64, 96)),
        ((64, 96), (64, 48), (32, 48)),
        ((320, 416), (320, 320), (240, 320)),
        ((16, 1600), (32, 160), (16, 160)),
    ],
)
def test_fitting_into_a_frame(
    canvas: tuple[int, int], frame: tuple[int, int], shape: tuple[int, int]
) -> None:
    assert fitted_shape(canvas, frame) == shape


@pytest.fixture
def outputs(file: Path, pictures: list[Path], tmp_path: Path) -> dict[str, np.ndarray]:
    """What a runner that knows nothing of us gives for the inputs."""
    import onnxruntime

    write_inputs(tmp_path / "inputs.npz", OnnxDetector(file), map(Image.open, pictures))
    inputs = np.load(tmp_path / "inputs.npz")
    assert set(inputs.files) == {"images/0", "padding/0", "images/1", "padding/1"}
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = {}
    for number in range(2):
        feeds = {name: inputs[f"{name}/{number}"] for name in ("images", "padding")}
        names = ("pred_logits", "pred_boxes")
        for name, array in zip(names, session.run(names, feeds), strict=True):
            given[f"{name}/{number}"] = array
    return given


def other_runner(file: Path, outputs: dict[str, np.ndarray], folder: Path) -> OtherRunner:
    np.savez(folder / "outputs.npz", **outputs)  # type: ignore[arg-type]
    return OtherRunner(OnnxDetector(file), folder / "outputs.npz")


def test_another_runner_is_the_exported_detector(
    file: Path, pictures: list[Path], outputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    runner = other_runner(file, outputs, tmp_path)
    runner.require_images(2)
    opened = [Image.open(path) for path in pictures]
    found = dict(runner.stream(opened))
    for index, expected in OnnxDetector(file).stream(opened):
        assert np.array_equal(found[index].labels, expected.labels)
        assert np.allclose(found[index].boxes, expected.boxes, atol=1e-4)


@pytest.mark.parametrize("spoilt", ["none", "shifted", "swapped", "nan", "class"])
def test_another_runner_is_held_to_pytorch(
    spoilt: str,
    file: Path,
    model: Predictor,
    pictures: list[Path],
    outputs: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    boxes, logits = outputs["pred_boxes/1"], outputs["pred_logits/1"]
    if spoilt == "shifted":
        boxes[0, :, 0] += 0.01
    elif spoilt == "swapped":  # two images
        for name in ("pred_logits", "pred_boxes"):
            one, other = outputs[f"{name}/0"], outputs[f"{name}/1"]
            outputs |= {f"{name}/0": other, f"{name}/1": one}
    elif spoilt == "nan":
        logits[0, 3] = np.nan
    elif spoilt == "class":
        logits[:] = logits[..., [1, 2, 0]]
    runner = other_runner(file, outputs, tmp_path)
    differences = compare(model, runner, [Image.open(path) for path in pictures], FULL)
    failures = list(differences.failures(FULL))
    assert bool(failures) == (spoilt != "none"), failures
    assert differences.num_shown > 0


def test_outputs_that_do_not_belong_to_the_model(
    file: Path, pictures: list[Path], outputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Each is refused in one line that names the file."""

    def refused(given: dict[str, np.ndarray], words: str) -> None:
        runner = other_runner(file, given, tmp_path)
        with pytest.raises(ValueError, match=words) as caught:
            runner.require_images(2)
            list(runner.stream([Image.open(path) for path in pictures]))
        assert "outputs.npz" in str(caught.value) and "\n" not in str(caught.value)

    refused({}, "pred_logits of 0 images")
    refused(outputs | {"pred_logits/2": outputs["pred_logits/0"]}, "of 3 images, and the .* 2")
    refused({key: outputs[key] for key in list(outputs)[:3]}, "pred_boxes/1 is missing")
    refused(outputs | {"pred_boxes/0": outputs["pred_boxes/0"][:, :5]}, r"\[1, 5, 4\].*\[1, 7, 4\]")
    refused(outputs | {"pred_boxes/0": np.full((1, 7, 4), "a")}, "gives numbers")
    for name, content in (("text.npz", b"no archive"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no .npz file"):
            OtherRunner(OnnxDetector(file), tmp_path / name)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="single array"):
        OtherRunner(OnnxDetector(file), tmp_path / "one.npy")


def foreign(path: Path, metadata: dict[str, str]) -> Path:
    """A whole model, of one node, that detects nothing."""
    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("same", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["images"], ["same"])
    graph = helper.make_graph([node], "foreign", [value], [other])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(made, metadata)
    onnx.save(made, path)
    return path


def test_files_of_another_kind_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    names = '["a"]'
    ours = {"format": FORMAT, "class_names": names, "eval_size": "32", "mask_side": "1"}
    cases = {
        tmp_path / "missing.onnx": "does not exist",
        tmp_path / "text.onnx": "cannot be read as an ONNX model",
        foreign(tmp_path / "foreign.onnx", {}): "not one of ours",
        foreign(tmp_path / "torn.onnx", ours): "metadata that cannot be read",
        foreign(
            tmp_path / "odd.onnx", ours | {"frame": "[32, 48]", "decoding": '"top_k"'}
        ): "takes images; expected images and padding",
        foreign(
            tmp_path / "newer.onnx", ours | {"frame": "[32, 48]", "decoding": '"beam"'}
        ): "decoding beam",
    }
    for path, words in cases.items():
        with pytest.raises(ValueError, match=words) as caught:
            OnnxDetector(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    import onnxruntime

    if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU build of onnxruntime")
    with pytest.raises(ValueError, match=f"device is {device}"):
        OnnxDetector(foreign(tmp_path / "any.onnx", {}), device=device)


def test_boxes_end_where_the_picture_does(
    file: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what people are given; masks stay those of the whole boxes."""

    def wider(*given: Any) -> dict[str, np.ndarray]:
        decoded = _decoded(*given)
        return decoded | {"boxes": 3 * decoded["boxes"] - np.float32(90)}

    monkeypatch.setattr("vidt.onnx.detector._decoded", wider)
    detector = OnnxDetector(file)
    size = np.array([90, 60, 90, 60])
    ((_, raw),) = detector.stream(pictures[:1], clip=False)
    assert ((raw.boxes < 0) | (raw.boxes > size)).any()
    ((_, streamed),) = detector.stream(pictures[:1])
    alone = detector.predict(pictures[0], threshold=0.0)
    for found in (streamed, alone, *detector.predict(pictures[:1], threshold=0.0)):
        assert np.array_equal(found.boxes, raw.boxes.clip(0, size))
        assert found.boxes.dtype == np.float32
    vectors = np.random.default_rng(0).normal(size=(len(raw), 10)).astype(np.float32)
    masked = replace(raw, mask_vectors=vectors, mask_side=16)
    assert np.array_equal(masked.clipped()[2:5].masks, masked.masks[2:5])


@pytest.mark.parametrize("threshold", [-0.1, 2, float("nan")])
def test_a_threshold_that_no_score_has(file: Path, threshold: float) -> None:
    for images in (np.zeros((8, 8), np.uint8), []):
        with pytest.raises(ValueError, match="it must be from 0 to 1"):
            OnnxDetector(file).predict(images, threshold=threshold)


def test_one_by_one(file: Path, pictures: list[Path]) -> None:
    found = OnnxDetector(file).predict(pictures[0], threshold=0.0)
    assert [one.names for one in found] == [[name] for name in found.names]
    assert len(found[0]) == 1 and found[np.int64(2)].scores == found.scores[2]
    assert np.array_equal(found[-1].boxes, found.boxes[-1:])
    assert len(found[[0, 2]]) == len(found[found.scores >= found.scores[1]]) == 2
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        ("[0.5, null]", "2 thresholds for 3 classes"),
        ("[0.5, null, 1.5]", "from 0 to 1"),
        ('"abc"', "from 0 to 1"),
    ],
)
def test_thresholds_of_the_metadata(file: Path, thresholds: str, said: str) -> None:
    stored = {each.key: each.value for each in onnx.load(file).metadata_props}
    fitting = OnnxInfo.of({**stored, "thresholds": "[0.5, null, 1.0]"}, file)
    assert fitting.thresholds == (0.5, None, 1.0)
    with pytest.raises(UserError, match=said):
        OnnxInfo.of({**stored, "thresholds": thresholds}, file)


@pytest.mark.parametrize(
    ("ids", "said"),
    [("[1, 2]", "2 category ids for 3 classes"), ('["a", "b", "c"]', "must be integers")],
)
def test_category_ids_of_the_metadata(file: Path, ids: str, said: str) -> None:
    stored = {each.key: each.value for each in onnx.load(file).metadata_props}
    with pytest.raises(UserError, match=said):
        OnnxInfo.of({**stored, "category_ids": ids}, file)


def phone_photos(folder: Path) -> list[Path]:
    """Upright ones, which phones store lying, and one that lies."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    paths = [folder / f"{number}.jpg" for number in range(3)]
    for path in paths:
        Image.fromarray(noise).save(path, exif=exif if path != paths[2] else Image.Exif())
    return paths


@pytest.mark.parametrize("given", ["images", "dataset"])
def test_the_frame_of_phone_photographs_is_upright(
    given: str, model: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a size, the frame is that of most images as prediction turns them, or of the sizes of
    the annotations; and the images are compared as prediction turns them.
    """
    photos = phone_photos(tmp_path)
    dataset = ScoredImages(photos, [(80, 40), (80, 40), (40, 80)], lambda found: 0.5)
    monkeypatch.setattr("vidt.onnx.export.load_model", lambda path: (model.model, model.info))
    report = export(
        tmp_path / "any.safetensors",
        tmp_path / "model.onnx",
        images=photos if given == "images" else (),
        dataset_for=None if given == "images" else lambda names: dataset,
        inputs=tmp_path / "inputs.npz",
    )
    assert report.ok, report.text()
    assert report.frame == model.preprocessing.canvas(80, 40)
    inputs, detector = np.load(tmp_path / "inputs.npz"), OnnxDetector(tmp_path / "model.onnx")
    for number, photo in enumerate(photos):
        feeds = detector.feeds([as_picture(photo)])
        assert np.array_equal(inputs[f"images/{number}"], feeds["images"])
