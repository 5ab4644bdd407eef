"""`vidt export`, and an exported model through `vidt predict` and `vidt evaluate` in a process that
cannot import PyTorch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import Learnt, call

import vidt
from trainer.commands.command_line import main

pytest.importorskip("onnxruntime")
pytest.importorskip("vidt.onnx.export")

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
