"""`vidt export`, and an exported model through `vidt predict` and `vidt evaluate` in a process that
cannot import PyTorch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import Learnt, call

import vidt
from trainer.commands.command_line import main

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("vidt.onnx.export")
OnnxDetector = pytest.importorskip("vidt.onnx.detector").OnnxDetector

pytestmark = pytest.mark.slow
WITHOUT_PYTORCH = """
import sys
for name in ("torch", "torchvision", "timm", "accelerate"):
    sys.modules[name] = None
from trainer.commands.command_line import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def model(learnt: Learnt, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pictures are of 64 x 64, and so is the first of the validation pictures."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    report = path.with_name("report.json")
    words = ["export", learnt.weights, path, "--dynamic", "batch", "--size", 64, 64]
    words += ["--images", learnt.data / "val2017/101.png", "--report", report]
    words += ["--write_inputs", path.with_name("inputs.npz")]
    assert main([str(word) for word in words]) == 0
    assert json.loads(report.read_text())
    return path


def without_pytorch(*words: object) -> str:
    done = call([sys.executable, "-c", WITHOUT_PYTORCH, *map(str, words)])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_predict_without_pytorch_finds_the_same(
    learnt: Learnt, model: Path, tmp_path: Path
) -> None:
    picture = learnt.data / "val2017/101.png"
    without_pytorch("predict", model, picture, "--out", tmp_path, "--threshold", 0.1)
    (entry,) = json.loads((tmp_path / "predictions.json").read_text())["images"]
    expected = vidt.load(learnt.weights, device="cpu").predict(picture, threshold=0.1)
    assert [each["name"] for each in entry["detections"]] == expected.names
    boxes = np.array([each["box"] for each in entry["detections"]])
    inside = expected.boxes.numpy().clip(0, 64)
    assert np.abs(boxes - inside).max() < 0.1 and (tmp_path / "101.png").is_file()


def test_evaluate_without_pytorch(learnt: Learnt, model: Path, tmp_path: Path) -> None:
    where = ("--json", learnt.data / "annotations/instances_val2017.json")
    where += ("--images", learnt.data / "val2017", "--out", tmp_path / "scores.json")
    assert "AP at IoU 0.50" in without_pytorch("evaluate", model, *where)
    assert json.loads((tmp_path / "scores.json").read_text())["map50"] > 0.5


def test_load_and_info(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector = vidt.load(model)
    assert len(detector.predict(np.zeros((64, 64, 3), np.uint8), threshold=0.0).scores) > 0
    assert main(["info", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class_names"] == list(detector.class_names)


def test_prove(
    learnt: Learnt, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outputs of onnxruntime agree; spoilt ones, and those of other images, do not."""
    picture = learnt.data / "val2017/101.png"
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    inputs = np.load(model.with_name("inputs.npz"))
    feeds = {name: inputs[f"{name}/0"] for name in ("images", "padding")}
    names = [f"{each.name}/0" for each in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, feeds), strict=True))
    before = model.read_bytes()

    def code_of(outputs: dict[str, np.ndarray], *more: object) -> int:
        np.savez(tmp_path / "outputs.npz", **outputs)  # type: ignore[arg-type]
        words = ["export", learnt.weights, model, "--prove", tmp_path / "outputs.npz", *more]
        return main([str(word) for word in words])

    assert code_of(outputs, "--images", picture, "--report", tmp_path / "report.json") == 0
    assert "both agree" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["differences"]["num_shown"] > 0
    assert code_of(outputs | {"pred_logits/0": outputs["pred_logits/0"] - 0.1}, "--images", picture)
    assert "REJECTED: scores differ" in capsys.readouterr().out
    assert code_of(outputs, "--images", picture, "--dynamic", "batch") == 2
    assert "drop --dynamic" in capsys.readouterr().err
    assert code_of(outputs, "--images", learnt.data / "val2017") == 2
    assert "of 1 images, and the inputs had 4" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_prove_on_a_dataset(learnt: Learnt, model: Path, tmp_path: Path) -> None:
    """The report has map50 of both, which shifted boxes lower."""
    where = ["--json", learnt.data / "annotations/instances_val2017.json"]
    where += ["--coco_images", learnt.data / "val2017", "--report", tmp_path / "report.json"]
    detector = OnnxDetector(model)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    outputs = {}
    for number, path in enumerate(sorted((learnt.data / "val2017").iterdir())):
        feeds = detector.feeds([Image.open(path).convert("RGB")])
        given = session.run(None, {name: feeds[name] for name in detector.input_names})
        for name, array in zip(detector.output_shapes, given, strict=True):
            outputs[f"{name}/{number}"] = array
    reports = []
    for shift in (0.0, 0.2):
        moved = {key: array + shift if "boxes" in key else array for key, array in outputs.items()}
        np.savez(tmp_path / "outputs.npz", **moved)  # type: ignore[arg-type]
        words = ["export", learnt.weights, model, "--prove", tmp_path / "outputs.npz", *where]
        assert main([str(word) for word in words]) == (1 if shift else 0)
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    assert reports[0]["onnx_map50"] == pytest.approx(reports[0]["map50"], abs=1e-3)
    assert reports[1]["onnx_map50"] < reports[1]["map50"] - 0.1
    assert any("map50" in failure for failure in reports[1]["failures"])
