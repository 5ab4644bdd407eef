"""Thresholds per class, classes by name, and images by their address."""

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from served import served
from tiny_runs import Learnt

import vidt
from trainer.commands import evaluate, predict
from vidt import Predictor, ViDT
from vidt.downloads import MOST_IMAGE_BYTES, Unreachable, fetch
from vidt.errors import UserError
from vidt.images.files import UnreadableImage
from vidt.images.preprocessing import Preprocessing
from vidt.predict.selection import NO_BEST, least_scores
from vidt.weights.weights_file import (
    WeightsInfo,
    load_weights,
    read_info,
    save_weights,
    store_thresholds,
)

NAMES = ("disc", "square", "star")
Output = pytest.CaptureFixture[str]


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))


@pytest.fixture
def png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def weights(tiny_model: ViDT, tmp_path: Path) -> Path:
    """Without thresholds, as older code wrote them."""
    info = WeightsInfo(tiny_model.config, NAMES, Preprocessing(64))
    save_weights(tmp_path / "tiny.safetensors", tiny_model.state_dict(), info)
    return tmp_path / "tiny.safetensors"


def test_thresholds_of_each_class_travel_with_the_weights(
    weights: Path, picture: Image.Image
) -> None:
    everything = vidt.load(weights, device="cpu").predict(picture, threshold=0.0)
    # The third best of one class, nothing of another, and no threshold for the last.
    third = everything.scores[everything.labels == 0][2].item()
    before = load_weights(weights)[0]
    store_thresholds(weights, [third, 1.0, None])
    tensors, info = load_weights(weights)
    assert info.thresholds == (third, 1.0, None)
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    found = vidt.load(weights, device="cpu").predict(picture, threshold="best")
    expected = [
        score
        for score, label in zip(everything.scores.tolist(), everything.labels, strict=True)
        if score >= (third, 1.0, NO_BEST)[label]
    ]
    assert found.scores.tolist() == expected
    assert found.names.count("disc") == 3 and "square" not in found.names


def test_older_weights_say_how_to_get_thresholds(weights: Path, picture: Image.Image) -> None:
    with pytest.raises(UserError, match="vidt evaluate WEIGHTS --save_thresholds, or give a num"):
        vidt.load(weights, device="cpu").predict(picture, threshold="best")
    with pytest.raises(UserError, match="threshold is worst; it must be from 0 to 1, or best"):
        vidt.load(weights, device="cpu").predict(picture, threshold="worst")


@pytest.mark.parametrize("thresholds", ["[0.5]", '["0.5", 0.1, 0.2]', "[0.5, 2.0, 0.1]"])
def test_thresholds_that_cannot_be_are_refused(weights: Path, thresholds: str) -> None:
    tensors, info = load_weights(weights)
    save_weights(weights, tensors, replace(info, thresholds=tuple(json.loads(thresholds))))
    with pytest.raises(UserError, match=r"header that cannot be read.*thresholds"):
        read_info(weights)


def test_classes_by_name(weights: Path, picture: Image.Image) -> None:
    detector = vidt.load(weights, device="cpu")
    everything = detector.predict(picture, threshold=0.0)
    found = detector.predict(picture, threshold=0.0, classes=["star", "disc"])
    assert torch.equal(found.scores, everything.scores[everything.labels != 1])
    with pytest.raises(UserError, match=r"classes has sqare, .* the nearest is square$"):
        detector.predict(picture, classes=["sqare"])
    with pytest.raises(UserError, match=r"classes has house, .* they are disc, square, star$"):
        detector.predict(picture, classes="house")


def test_a_threshold_counts_as_itself() -> None:
    """0.7 has no exact float32; a score that prints as 0.7 reaches it."""
    assert np.float32(0.7) >= least_scores(0.7, None, NAMES, ())[0]


def test_training_and_evaluation_store_the_same_thresholds(
    learnt: Learnt, tmp_path: Path, capsys: Output
) -> None:
    """Those of the report: the training's scorer and that of `vidt evaluate` agree."""
    trained = read_info(learnt.weights)
    assert len(trained.thresholds) == len(trained.class_names)
    assert any(each is not None and 0 < each < 1 for each in trained.thresholds)
    again = tmp_path / "again.safetensors"
    tensors, _ = load_weights(learnt.weights)
    save_weights(again, tensors, replace(trained, thresholds=()))
    data = ["--json", str(learnt.data / "annotations/instances_val2017.json")]
    data += ["--images", str(learnt.data / "val2017")]
    assert evaluate.run([str(again), *data, "--save_thresholds", "--device", "cpu"]) == 0
    for stored, expected in zip(read_info(again).thresholds, trained.thresholds, strict=True):
        assert stored == (expected if expected is None else pytest.approx(expected, abs=1e-5))
    # A tile as large as the images scores the same.
    capsys.readouterr()
    assert evaluate.run([str(again), *data, "--device", "cpu"]) == 0
    plain = capsys.readouterr().out
    assert evaluate.run([str(again), *data, "--tile", "500", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == plain
    with pytest.raises(UserError, match="--save_thresholds writes into"):
        evaluate.run(["model.onnx", *data, "--save_thresholds"])
    for remote in ("https://example.org/best.safetensors", "vidt_nano_50"):
        with pytest.raises(UserError, match="writes into a file of this machine"):
            evaluate.run([remote, *data, "--save_thresholds"])


def test_an_address_is_predicted_as_its_file(
    weights: Path, png: bytes, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "a.png").write_bytes(png)
    common = [str(weights), "--threshold", "0", "--csv"]
    assert predict.run([*common, str(tmp_path / "a.png")]) == 0
    expected = capsys.readouterr().out
    with served(png) as server:
        address = server.address.replace("weights.pth", "a.png")
        assert predict.run([*common, address, "--allow_http"]) == 0
        shown = capsys.readouterr().out
        assert shown.replace(address, str(tmp_path / "a.png")) == expected
        out = tmp_path / "out"
        assert predict.run([str(weights), address, address, "--allow_http", "--out", str(out)]) == 0
        names = sorted(path.name for path in out.iterdir())
        assert names == ["a-2.png", "a.png", "predictions.json"]


def test_only_https_and_whole_images(weights: Path, png: bytes, capsys: Output) -> None:
    with served(png) as server:
        with pytest.raises(Unreachable, match="pass --allow_http"):
            predict.run([str(weights), server.address])
        with pytest.raises(Unreachable, match="unencrypted"):
            vidt.load(weights, device="cpu").predict(server.address)
        assert server.requests == []
        with pytest.raises(Unreachable, match=f"more than {len(png) - 1:,} bytes"):
            fetch(server.address, allow_http=True, most=len(png) - 1)
        with pytest.raises(Unreachable, match="broke off"):
            fetch(f"{server.address}?cut", allow_http=True)
        assert fetch(server.address, allow_http=True) == png and len(png) < MOST_IMAGE_BYTES
    with pytest.raises(predict.NothingRead, match="cannot be fetched"):
        predict.run([str(weights), server.address, "--allow_http"])
    with (
        served(b"<html>no image</html>") as server,
        pytest.raises(predict.NothingRead, match="it holds text, '<html>no image"),
    ):
        predict.run([str(weights), server.address, "--allow_http"])


def test_an_address_is_the_source_of_its_detections(
    weights: Path, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetched(url: str) -> bytes:
        asked.append(url)
        return png if url.endswith("a.png") else b"no"

    monkeypatch.setattr("vidt.images.inputs.fetch", fetched)
    detector: Predictor = vidt.load(weights, device="cpu")
    found = detector.predict("https://example.org/a.png", threshold=0.0)
    assert found.source == "https://example.org/a.png" and found.plot().size == (80, 60)
    assert asked == ["https://example.org/a.png"] * 2
    with pytest.raises(UnreadableImage, match=r"https://example\.org/b\.png: cannot be read"):
        detector.predict("https://example.org/b.png")
