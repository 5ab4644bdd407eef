"""The benchmarks start, measure something, and write it down. Their figures are no matter here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trainer.shapes import write_shapes

ROOT = Path(__file__).parent.parent


def run(program: str, *flags: object) -> str:
    """What the program prints."""
    command = [sys.executable, f"benchmarks/{program}", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/speed.py as a module."""
    spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks" / "speed.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "speed", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_speed_measures_each_case(tmp_path: Path) -> None:
    size = ("--size", "1x64x96", "--backbone_name", "swin_nano", "--device", "cpu")
    flags = (*size, "--threads", 1, "--repeat", 1, "--json", tmp_path / "speed.json")
    printed = run("speed.py", *flags)
    forward, step = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert (forward["work"], step["work"]) == ("forward", "training step")
    assert forward["size"] == [1, 64, 96]
    for result in (forward, step):
        assert not result["failure"]
        assert 0 < result["fastest"] <= result["median"] <= result["slowest"]
        assert result["memory_gib"] > 0.06  # the weights alone, in single precision
        assert f"{result['median']:.3f}" in printed


def test_data_measures_each_number_of_workers(tmp_path: Path) -> None:
    written = tmp_path / "data.json"
    folder = write_shapes(tmp_path, num_train=6, num_val=2, size=64)
    flags = ("--dataset_file", "coco", "--coco_path", folder, "--eval_size", 64)
    run("data.py", *flags, "--workers", 0, 1, "--count", 8, "--json", written)
    (result,) = json.loads(written.read_text())["results"]
    assert [rate["workers"] for rate in result["workers"]] == [0, 1]
    assert all(rate["images_per_second"] > 0 for rate in result["workers"])


def test_data_compares_with_bare_decoding(tmp_path: Path) -> None:
    written = tmp_path / "data.json"
    folder = write_shapes(tmp_path, num_train=6, num_val=2, size=64) / "train2017"
    flags = ("--images", folder, "--eval_size", 64, "--workers", "--count", 8, "--json", written)
    printed = run("data.py", *flags)
    (result,) = json.loads(written.read_text())["results"]
    assert result["data"] == str(folder) and result["workers"] == []
    assert min(result["bare"], result["loader"], result["ratio"]) > 0
    assert f"ratio {result['ratio']:.2f}" in printed


def test_scoring_compares_with_pycocotools(tmp_path: Path) -> None:
    written = tmp_path / "scoring.json"
    flags = ("--images", 12, "--detections", 30, "--classes", 3, "--json", written)
    printed = run("scoring.py", *flags)
    result = json.loads(written.read_text())
    assert result["equal"] and result["detections"] == 360
    assert min(result["pycocotools"], result["ours"]) > 0
    assert f"ratio {result['ratio']:.1f}" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "640x640"], "'640x640'; it must be like 2x640x480"),
        (["--device", "cpu", "--precision", "fp16"], "is for a GPU"),
    ],
)
def test_wrong_flags_are_named(
    flags: list[str], message: str, speed: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        speed.cases(flags)
    assert message in capsys.readouterr().err
