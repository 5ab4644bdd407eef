"""Exported detectors held to those of PyTorch: every method, both precisions, and what is refused.

Each export takes seconds, so there are three, of different kinds, and most tests look at these.
"""

import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from tiny_runs import SWIN_VARIANTS, Learnt, blurred

import vidt.onnx.export
from trainer.commands.export import scored_images
from vidt import Predictor, ViDTConfig
from vidt.images.canvas import resize
from vidt.images.preprocessing import Preprocessing, pad_batch, to_pixels
from vidt.model.config import COAT_VARIANTS, CoatVariant
from vidt.model.swin import SwinVariant
from vidt.model.vidt import build_detector
from vidt.onnx.detector import OnnxDetections, OnnxDetector
from vidt.onnx.export import ExportReport, export
from vidt.onnx.graph import ExportedDetector
from vidt.onnx.half import halved
from vidt.onnx.proof import FULL, HALF, compare
from vidt.predict.detections import Detections
from vidt.weights.weights_file import WeightsInfo, load_weights, save_weights

# Of the operators that TensorRT 10.0 lists for opset 20 (docs/operators.md of onnx/onnx-tensorrt),
# those that detection may need. Resize must be nearest or linear, TopK sorted with K below 3840.
TENSORRT = """
Add And Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum Div Equal Erf Exp Expand
Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual GridSample Identity
InstanceNormalization LayerNormalization Less Log MatMul Max Min Mod Mul Neg Not Or Pad Pow Range
Reciprocal ReduceMax ReduceMean ReduceSum Relu Reshape Resize Shape Sigmoid Sin Slice Softmax Split
Sqrt Squeeze Sub Tile TopK Transpose Unsqueeze Where
"""

pytestmark = pytest.mark.slow  # each makes and runs an ONNX model

# With shifted windows, which need two blocks.
SWIN_VARIANTS["swin_test_shift"] = SwinVariant(24, (1, 2, 1, 1), (1, 2, 4, 8), 0.0)
NAMES = ("red", "green", "blue")
FRAME = (64, 80)
# The frame itself, lower, narrower, and too high for it.
SIZES = [(64, 80), (64, 120), (90, 64), (60, 75), (200, 40)]


@dataclass(frozen=True)
class Exported:
    """A report, the detector that it is about, and the weights that this was made from."""

    report: ExportReport
    predictor: Predictor
    weights: Path

    @property
    def file(self) -> Path:
        return Path(self.report.file)

    @property
    def detector(self) -> OnnxDetector:
        return OnnxDetector(self.file)


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8))


def weights_of(config: ViDTConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = blurred(build_detector(config))
    save_weights(
        folder / "weights.safetensors",
        model.state_dict(),
        WeightsInfo(config, NAMES, Preprocessing(64)),
    )
    return folder / "weights.safetensors"


def exported(weights: Path, images: list[Path], **wanted: object) -> Exported:
    output = weights.with_name("model.onnx")
    report = export(weights, output, images=images, **wanted)  # type: ignore[arg-type]
    assert report.ok, report.text()
    assert report.file == str(output) and output.stat().st_size == report.bytes
    return Exported(report, Predictor.from_checkpoint(weights), weights)


def small(**more: object) -> ViDTConfig:
    sizes = {"det_token_num": 7, "reduced_dim": 64, "pos_dim": 16, "dec_layers": 1}
    return ViDTConfig(num_classes=3, dim_feedforward=64, **sizes, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{index}.png" for index in range(len(SIZES))]
    for index, path in enumerate(paths):
        picture(SIZES[index], index).save(path)
    return paths


@pytest.fixture(scope="module")
def plus(tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> Exported:
    """ViDT+ with all parts, decoded, for any batch."""
    parts = dict.fromkeys(("epff", "iou_aware", "token_label", "with_vector"), True)
    config = small(backbone_name="swin_test_shift", n_keep=20, gt_mask_len=32, **parts)
    weights = weights_of(config, tmp_path_factory.mktemp("plus"))
    return exported(weights, files, size=FRAME, dynamic=("batch",), with_decode=True)


@pytest.fixture(scope="module")
def without_neck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """Another body, no neck, raw outputs, one picture at a time; proven on drawn pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COAT_VARIANTS, "coat_test", CoatVariant((16, 32, 64, 64), (1, 1, 1, 1)))
        config = small(backbone_name="coat_test", method="vidt_wo_neck")
        yield exported(weights_of(config, tmp_path_factory.mktemp("neckless")), [])


@pytest.fixture(scope="module")
def trained(learnt: Learnt, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A trained ViDT in half precision, with map50; its size is that of most pictures."""
    folder = tmp_path_factory.mktemp("trained")
    weights = folder / "weights.safetensors"
    weights.write_bytes((learnt.output / "best.safetensors").read_bytes())
    images = sorted((learnt.data / "val2017").iterdir())
    json_path = learnt.data / "annotations" / "instances_val2017.json"
    dataset_for = partial(scored_images, json_path, learnt.data / "val2017")
    return exported(weights, images, half=True, dataset_for=dataset_for)


def in_frame(predictor: Predictor, image: Image.Image, shape: tuple[int, int]) -> Detections:
    """What PyTorch finds in a picture of this shape, padded to the frame."""
    pixels, padding = pad_batch([to_pixels(resize(image, shape))], FRAME)
    with torch.inference_mode():
        outputs = predictor.model(predictor.preprocessing.normalise(pixels, padding), padding)
    return predictor.decode(outputs, torch.tensor([(image.height, image.width)]))[0]


def assert_same(found: OnnxDetections, expected: Detections, allowed: float = 1e-5) -> None:
    assert found.labels.tolist() == expected.labels.tolist()
    assert np.abs(found.scores - expected.scores.numpy()).max() <= allowed
    side = max(found.size)
    assert np.abs(found.boxes - expected.boxes.numpy()).max() <= allowed * side
    assert (found.masks is None) == (expected.masks is None)
    if found.masks is not None and expected.masks is not None:
        assert found.masks.shape == tuple(expected.masks.shape) and found.masks.any()
        assert (found.masks != expected.masks.numpy()).mean() < 1e-3


def test_a_canvas_of_the_frame_is_as_in_pytorch(plus: Exported) -> None:
    for size in ((64, 80), (60, 75), (128, 160)):
        found = plus.detector.predict(picture(size), threshold=0.0)
        assert isinstance(found, OnnxDetections)
        assert_same(found, plus.predictor.predict(picture(size), threshold=0.0))


def test_other_canvases_are_padded_or_shrunk(plus: Exported) -> None:
    for size, shape in {(64, 120): (32, 80), (90, 64): (64, 48), (200, 40): (64, 16)}.items():
        image = picture(size)
        assert plus.detector.shape_of(size) == shape
        found = plus.detector.predict(image, threshold=0.0)
        assert_same(found, in_frame(plus.predictor, image, shape).clipped(size))


def test_batch_size_does_not_matter(plus: Exported, files: list[Path]) -> None:
    alone = list(plus.detector.stream(files))
    assert [index for index, _ in alone] == list(range(len(files)))
    for batch_size in (2, 3, 8):
        together = plus.detector.stream(iter(files), batch_size=batch_size)
        for (_, found), (_, expected) in zip(together, alone, strict=True):
            assert np.abs(found.scores - expected.scores).max() < 1e-5
            assert np.abs(found.boxes - expected.boxes).max() < 1e-2


def test_raw_outputs_without_neck(without_neck: Exported) -> None:
    assert without_neck.detector.frame == (64, 64) and without_neck.detector.batch == 1
    images = [picture((64, 64), seed) for seed in range(3)]
    found = without_neck.detector.predict(images, threshold=0.0, batch_size=8)
    wanted = without_neck.predictor.predict(images, threshold=0.0)
    for one, expected in zip(found, wanted, strict=True):
        assert_same(one, expected)


def test_operators_are_those_of_tensorrt(
    plus: Exported, without_neck: Exported, trained: Exported
) -> None:
    for each in (plus, without_neck, trained):
        model = onnx.load(each.file)
        assert [entry.domain for entry in model.opset_import] == [""]
        for node in model.graph.node:
            assert node.op_type in TENSORRT.split(), node.op_type
            given = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            if node.op_type == "Resize":
                assert given["mode"] in (b"nearest", b"linear") and not given.get("antialias")
            if "images" in node.input:  # uint8 is a type of inputs only
                dynamic = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param != ""
                assert node.op_type == "Cast" or (dynamic and node.op_type == "Shape")


def test_half_precision(trained: Exported) -> None:
    for tensor in onnx.load(trained.file).graph.initializer:
        if "bbox_embed" in tensor.name or "sampling_offsets" in tensor.name:
            assert tensor.data_type == onnx.TensorProto.FLOAT, tensor.name
    assert trained.report.differences.scores > 1e-6, "nothing was halved"


def test_half_precision_of_every_part(plus: Exported, files: list[Path], tmp_path: Path) -> None:
    """EPFF resizes maps, and masks and decoding follow the heads: neither can be halved blindly."""
    model = halved(onnx.load(plus.file))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "half.onnx")
    assert model.ByteSize() < 0.7 * plus.report.bytes
    pictures = [Image.open(file) for file in files]
    differences = compare(plus.predictor, OnnxDetector(tmp_path / "half.onnx"), pictures, HALF)
    assert list(differences.failures(HALF)) == []
    assert differences.scores > 1e-6


def test_map50_is_that_of_the_evaluation(trained: Exported, learnt: Learnt) -> None:
    """pycocotools by way of the trainer, and here: the same number."""
    data = learnt.data / "val2017"
    names = trained.predictor.class_names
    coco = scored_images(learnt.data / "annotations/instances_val2017.json", data, names)
    map50 = coco.map50(trained.predictor(coco.files))
    assert map50 == pytest.approx(max(each["map50"] for each in learnt.scores.values()), abs=1e-6)
    assert 0.1 < map50 < 1
    assert trained.report.map50 is not None and trained.report.onnx_map50 is not None
    assert abs(trained.report.map50 - trained.report.onnx_map50) <= HALF.map50


def test_the_default_size_is_that_of_most_pictures(trained: Exported) -> None:
    """Of the four there is one square one, one that is upright, and two that lie."""
    assert trained.report.frame == (64, 96)
    assert trained.report.differences.num_reshaped == 2


def test_report(plus: Exported, without_neck: Exported) -> None:
    differences = plus.report.differences
    assert 0 < differences.scores < 1e-4 and 0 < differences.boxes < 1e-4
    assert differences.num_compared == 5 * 21 and differences.num_reshaped == 3
    assert differences.masks is not None and differences.masks < 1e-3
    assert without_neck.report.differences.masks is None
    content = json.loads(json.dumps(plus.report.as_dict()))
    assert content["ok"] is True and content["frame"] == list(FRAME)
    text = plus.report.text()
    assert text.endswith("exported") and "any batch" in text and "3 of these 5 pictures" in text
    assert "drawn pictures (none were given)" in without_neck.report.text()


def test_outputs_have_the_names_of_what_the_module_gives(
    plus: Exported, without_neck: Exported
) -> None:
    inputs = {
        "images": torch.zeros(1, 3, *FRAME, dtype=torch.uint8),
        "padding": torch.zeros(1, *FRAME, dtype=torch.bool),
        "sizes": torch.ones(1, 2, dtype=torch.int64),
    }
    for each in (plus, without_neck):
        for decode in (False, True):
            module = ExportedDetector(each.predictor.model, Preprocessing(), decode=decode)
            with torch.inference_mode():
                assert list(module(**inputs)) == module.output_names


def test_a_tiny_evaluation_size_still_has_a_frame(
    plus: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, info = load_weights(plus.weights)
    tiny = tmp_path / "tiny.safetensors"
    save_weights(tiny, tensors, replace(info, preprocessing=Preprocessing(8)))

    def graph_of(detector: object, info: object, frame: tuple[int, int], **how: bool) -> None:
        raise ValueError(f"frame {frame}")

    monkeypatch.setattr(vidt.onnx.export, "make_graph", graph_of)
    with pytest.raises(ValueError, match=r"frame \(16, 16\)"):
        export(tiny, tmp_path / "model.onnx")


def test_what_rides_along(plus: Exported) -> None:
    entries = {each.key: each.value for each in onnx.load(plus.file).metadata_props}
    assert json.loads(entries["class_names"]) == list(NAMES)
    assert json.loads(entries["preprocessing"])["mean"] == list(Preprocessing().mean)
    assert ViDTConfig(**json.loads(entries["config"])) == plus.predictor.model.config
    assert json.loads(entries["mask_side"]) == 32 and json.loads(entries["opset"]) >= 18


def test_normalisation_in_the_graph_is_the_preprocessing(plus: Exported) -> None:
    """Bit for bit, for every value that a pixel can have."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    module = ExportedDetector(plus.predictor.model, Preprocessing(), decode=False)
    assert torch.equal(module.normalise(pixels), Preprocessing().normalise(pixels))


def test_a_wrong_graph_is_rejected(
    plus: Exported, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bias of the last class head is off by a little; the model of before stays in place."""
    broken = onnx.load(plus.file)
    (bias,) = (each for each in broken.graph.initializer if "class_embed.1.bias" in each.name)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.1), bias.name))
    monkeypatch.setattr(vidt.onnx.export, "make_graph", lambda *args, **kwargs: broken)
    output = tmp_path / "model.onnx"
    output.write_bytes(b"of before")
    report = export(plus.weights, output, size=FRAME, images=files)
    assert not report.ok and "scores differ" in report.failures[0]
    assert "REJECTED" in report.text() and not report.as_dict()["ok"]
    assert output.read_bytes() == b"of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.rejected"]


def test_a_full_disk_is_named_and_leaves_what_was_there(
    plus: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vidt.onnx.export, "make_graph", lambda *given, **how: onnx.load(plus.file))
    output = tmp_path / "model.onnx"
    output.write_bytes(b"of before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.onnx cannot be written \(File too large\)"):
            export(plus.weights, output, size=FRAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert output.read_bytes() == b"of before" and list(tmp_path.iterdir()) == [output]


def test_masks_that_differ_are_rejected(plus: Exported, tmp_path: Path) -> None:
    """Everything else is as it was."""
    broken = onnx.load(plus.file)
    name = "vector_embed.0.layers.2.bias"
    (bias,) = (each for each in broken.graph.initializer if name in each.name)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(3), bias.name))
    onnx.save(broken, tmp_path / "masks.onnx")
    detector = OnnxDetector(tmp_path / "masks.onnx")
    (failure,) = compare(plus.predictor, detector, [picture((64, 80))], FULL).failures(FULL)
    assert "masks differ" in failure


def test_what_is_not_a_number_is_rejected(plus: Exported, tmp_path: Path) -> None:
    broken = onnx.load(plus.file)
    (bias,) = (each for each in broken.graph.initializer if "class_embed.1.bias" in each.name)
    nothing = np.full(bias.dims, np.nan, np.float32)
    bias.CopyFrom(numpy_helper.from_array(nothing, bias.name))
    onnx.save(broken, tmp_path / "nan.onnx")
    differences = compare(
        plus.predictor, OnnxDetector(tmp_path / "nan.onnx"), [picture((64, 80))], FULL
    )
    assert any("scores differ by nan" in failure for failure in differences.failures(FULL))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"size": (500, 512)}, "size 500 is not a multiple of 16"),
        ({"dynamic": ("batch", "size")}, "dynamic size"),
        ({"dynamic": ("colour",)}, "dynamic is colour"),
    ],
)
def test_refused(plus: Exported, tmp_path: Path, wanted: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        export(plus.weights, tmp_path / "model.onnx", **wanted)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_named(plus: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        export(plus.weights, tmp_path / "nowhere" / "model.onnx")


def test_a_dataset_of_other_classes_is_named(plus: Exported, tmp_path: Path) -> None:
    content = {"categories": [{"id": 1, "name": "cat"}], "images": [IMAGE], "annotations": []}
    (tmp_path / "cats.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cats\.json.* cat"):
        scored_images(tmp_path / "cats.json", tmp_path, NAMES)
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ValueError, match=r"torn\.json"):
        scored_images(tmp_path / "torn.json", tmp_path, NAMES)


def coco_of_one(folder: Path, **more: object) -> Path:
    """One picture with one object; `more` in place of members of the document."""
    picture((64, 80)).save(folder / "1.png")
    document = {
        "categories": [{"id": 4, "name": "green"}],
        "images": [{"id": 1, "file_name": "1.png", "height": 64, "width": 80}],
        "annotations": [THING],
    }
    (folder / "one.json").write_text(json.dumps(document | more))
    return folder / "one.json"


THING = {"id": 1, "image_id": 1, "category_id": 4, "bbox": [2, 3, 40, 50]}
IMAGE = {"id": 1, "file_name": "1.png", "height": 64, "width": 80}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"annotations": [7]}, 'list of objects "annotations"'),
        ({"annotations": None}, 'list of objects "annotations"'),
        ({"categories": [{"id": [4], "name": "green"}]}, r"\[4\]"),
        ({"images": [IMAGE, IMAGE | {"file_name": "2.png"}]}, "image id 1 is used twice"),
        ({"images": [IMAGE, IMAGE | {"id": 2, "file_name": "2.png"}]}, r"2\.png: no such file"),
    ],
    ids=range(5),
)
def test_a_dataset_that_cannot_be_scored_is_named_before_anything_is_exported(
    tmp_path: Path, more: dict, words: str, plus: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vidt.onnx.export, "make_graph", None)  # not callable: it is not come to
    dataset_for = partial(scored_images, coco_of_one(tmp_path, **more), tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        export(plus.weights, tmp_path / "model.onnx", size=FRAME, dataset_for=dataset_for)
    assert "one.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "odd",
    [
        {"bbox": None},
        {"bbox": [1, 2, "wide", 4]},
        {"bbox": [1, 2, 0, 5]},
        {"bbox": [1, 2, float("nan"), 5]},
        {"bbox": [1, 2, 10**400, 5]},
        {"bbox": [1, float("inf"), 5, 5]},
        {"image_id": 99},
        {"image_id": [1]},
        {"category_id": 99},
    ],
    ids=range(9),
)
def test_boxes_without_area_and_strangers_do_not_count(tmp_path: Path, odd: dict) -> None:
    things = [THING | {"area": None}, THING | {"id": 2} | odd]
    coco = scored_images(coco_of_one(tmp_path, annotations=things), tmp_path, NAMES)
    boxes, names = np.array([[2.0, 3, 42, 53]]), NAMES
    found = OnnxDetections(np.ones(1), np.array([names.index("green")]), boxes, names, (64, 80))
    assert coco.map50([found]) == pytest.approx(1)
