"""From a weights file to boxes: paths and pictures, any order, any batch size."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Compare
from PIL import Image
from pycocotools import mask as coco_mask

from vidt import Detections, Predictor, ViDT, decode_top_k
from vidt.errors import UserError
from vidt.images.files import UnreadableImage
from vidt.images.preprocessing import Preprocessing
from vidt.ops.packing import PackedLinear, onednn_runs, unpack
from vidt.predict.detections import MaskVectors
from vidt.predict.exchange import run_lengths
from vidt.weights.weights_file import WeightsInfo, save_weights

SIZES = [(60, 80), (80, 60), (60, 80), (200, 40), (60, 80), (33, 47)]


@pytest.fixture
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
        for height, width in SIZES
    ]


@pytest.fixture
def weights(tiny_model: ViDT, tmp_path: Path) -> Path:
    info = WeightsInfo(tiny_model.config, ("disc", "square", "star"), Preprocessing(64))
    save_weights(tmp_path / "tiny.safetensors", tiny_model.state_dict(), info)
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def predictor(weights: Path) -> Predictor:
    return Predictor.from_checkpoint(weights)


def test_files_and_pictures_give_the_same(
    predictor: Predictor, pictures: list[Image.Image], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    mixed = [paths[0], str(paths[1]), *pictures[2:]]
    for found, expected in zip(predictor(mixed), predictor(pictures), strict=True):
        assert torch.equal(found.boxes, expected.boxes) and torch.equal(
            found.scores, expected.scores
        )


def test_batch_size_and_company_do_not_matter(
    predictor: Predictor, pictures: list[Image.Image], compare: Compare
) -> None:
    """Order is that of the pictures; boxes are relative to the picture to be held to 1e-5."""
    alone = [predictor([picture])[0] for picture in pictures]
    for batch_size in (1, 2, 3, 8):
        together = predictor(pictures, batch_size=batch_size)
        for (height, width), found, expected in zip(SIZES, together, alone, strict=True):
            side = max(height, width)
            compare("boxes", found.boxes / side, expected.boxes / side, 1e-5)
            compare("scores", found.scores, expected.scores, 1e-5)
            assert torch.equal(found.labels, expected.labels)


def test_same_as_the_model_by_hand(predictor: Predictor, pictures: list[Image.Image]) -> None:
    image = predictor.preprocessing(pictures[3])[None]
    padding = torch.zeros(1, *image.shape[2:], dtype=torch.bool)
    with torch.no_grad():
        outputs = predictor.model(image, padding)
    expected = decode_top_k(outputs, torch.tensor(SIZES[3:4]))[0]
    assert torch.allclose(predictor(pictures)[3].boxes, expected.boxes, atol=1e-3)


def test_layers_are_packed_for_what_is_not_going_to_change(
    weights: Path, predictor: Predictor, pictures: list[Image.Image], compare: Compare
) -> None:
    def num_packed(of: Predictor) -> int:
        packed = sum(isinstance(layer, PackedLinear) for layer in of.model.modules())
        assert packed == 0 or packed > 50
        return packed

    assert bool(num_packed(predictor)) == onednn_runs()
    assert not num_packed(Predictor.from_checkpoint(weights, precision="bf16"))
    assert not num_packed(Predictor.from_checkpoint(weights, compile=True))
    found = predictor(pictures)
    unpack(predictor.model)
    for fast, plain in zip(found, predictor(pictures), strict=True):
        compare("scores", fast.scores, plain.scores, 1e-5)


def test_threshold(predictor: Predictor, pictures: list[Image.Image]) -> None:
    everything = predictor(pictures[:1])[0]
    assert len(everything.scores) == 7 * 3
    assert (everything.scores.diff() <= 0).all()
    middle = everything.scores[10].item()
    found = predictor(pictures[:1], threshold=middle)[0]
    assert torch.equal(found.scores, everything.scores[:11])
    assert torch.equal(found.boxes, everything.boxes[:11])
    assert len(predictor(pictures[:1], threshold=1.1)[0].boxes) == 0


def test_detections_are_themselves(predictor: Predictor, pictures: list[Image.Image]) -> None:
    """Comparing them compares no tensors: that has no single answer."""
    first, second = predictor(pictures[:2])
    assert first == first and first != second and first in [second, first]


def test_no_pictures(predictor: Predictor) -> None:
    assert predictor([]) == []


def test_grey_and_transparent_pictures(predictor: Predictor) -> None:
    for mode in ("L", "RGBA", "P"):
        assert len(predictor([Image.new(mode, (40, 30))])[0].scores) == 21


def test_a_damaged_file_is_named(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    with pytest.raises(UnreadableImage, match=r"torn\.jpg"):
        predictor([tmp_path / "torn.jpg"])


def test_class_names_travel_with_the_weights(predictor: Predictor) -> None:
    assert predictor.class_names == ("disc", "square", "star")
    assert predictor.preprocessing == Preprocessing(64)
    assert not predictor.model.training


def test_decoding_by_hand() -> None:
    """Two queries, two classes: pairs by score, boxes as corners in pixels, not clipped."""
    outputs = {
        "pred_logits": torch.tensor([[[0.0, 2.0], [1.0, -1.0]]]),
        "pred_boxes": torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.5, 0.4, 1.0]]]),
    }
    (found,) = decode_top_k(outputs, torch.tensor([[100, 200]]), top_k=3)
    assert isinstance(found, Detections)
    assert torch.allclose(found.scores, torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    assert found.labels.tolist() == [1, 0, 0]
    first, second = [50.0, 25.0, 150.0, 75.0], [-20.0, 0.0, 60.0, 100.0]
    assert torch.allclose(found.boxes, torch.tensor([first, second, first]), atol=1e-4)


def test_boxes_end_where_the_picture_does(
    predictor: Predictor, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what people are given; masks stay those of the whole boxes."""
    monkeypatch.setattr(predictor, "decode", lambda outputs, sizes: sticking_out(sizes))
    height, width = SIZES[0]
    full = [0, 0, width, height]
    streamed = [found for _, found in predictor.stream(pictures[:1])]
    both = [predictor.predict(pictures[0]), *predictor.predict(pictures[:1]), *streamed]
    (raw,) = predictor(pictures[:1])
    assert raw.boxes[0, 0] < 0 and raw.masks is not None
    for found in both:
        assert found.boxes[0].tolist() == full and found.masks is not None
        assert torch.equal(found.masks, raw.masks) and len(found[1:].masks) == 1


def sticking_out(sizes: torch.Tensor) -> list[Detections]:
    """A box around each picture, and one that lies in it."""
    height, width = sizes[0].tolist()
    boxes = torch.tensor([[-3.0, -50.0, width + 3, height + 9.0], [1.0, 2.0, 9.0, 9.0]])
    vectors = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    masks = MaskVectors(vectors, 16, (height, width))
    return [Detections(torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), boxes, masks)]


def test_one_by_one(predictor: Predictor, pictures: list[Image.Image]) -> None:
    found = predictor(pictures[:1])[0]
    assert [one.names for one in found] == [[name] for name in found.names]
    assert len(found[0]) == 1 and torch.equal(found[torch.tensor(2)].scores, found.scores[2:3])
    assert torch.equal(found[-1].boxes, found.boxes[-1:])
    assert len(found[torch.tensor([0, 2])]) == len(found[found.scores >= found.scores[1]]) == 2
    with pytest.raises(IndexError):
        found[len(found)]


def test_detections_as_coco_results() -> None:
    """A mask's run lengths give the mask back."""
    (found,) = sticking_out(torch.tensor([[40, 60]]))
    found = replace(found.clipped((40, 60)), class_names=("disc", "square"))
    results = found.to_coco(7)
    assert json.loads(json.dumps(results)) == results
    assert [each["category_id"] for each in results] == [1, 2]
    assert [each["category_id"] for each in found.to_coco(7, category_ids=(5, 9))] == [5, 9]
    assert found.masks is not None
    for result, box, score, mask in zip(
        results, found.boxes.tolist(), found.scores.tolist(), found.masks.numpy(), strict=True
    ):
        assert (result["image_id"], result["score"]) == (7, score)
        left, top, width, height = result["bbox"]
        assert [left, top, left + width, top + height] == pytest.approx(box)
        lengths = coco_mask.frPyObjects(result["segmentation"], *mask.shape)
        assert np.array_equal(coco_mask.decode(lengths), mask)
    without = Detections(found.scores, found.labels, found.boxes, class_names=found.class_names)
    assert all("segmentation" not in each for each in without.to_coco(7))
    assert found[:0].to_coco(7) == []


def test_run_lengths_go_down_the_columns() -> None:
    mask = np.array([[1, 0, 0], [1, 0, 1]], bool)
    assert run_lengths(mask) == [0, 2, 3, 1]
    assert run_lengths(np.zeros((2, 3), bool)) == [6] and run_lengths(np.ones((2, 3), bool)) == [
        0,
        6,
    ]


@pytest.fixture
def two_detections() -> Detections:
    (found,) = sticking_out(torch.tensor([[40, 60]]))
    return replace(found.clipped((40, 60)), class_names=("disc", "square"))


def test_detections_as_a_table_of_pandas(two_detections: Detections) -> None:
    pandas = pytest.importorskip("pandas")
    table = two_detections.to_pandas()
    assert isinstance(table, pandas.DataFrame) and list(table["name"]) == ["disc", "square"]
    assert np.array_equal(table[["x1", "y1", "x2", "y2"]].to_numpy(), two_detections.boxes.numpy())
    assert len(two_detections[:0].to_pandas()) == 0


def test_detections_for_supervision(two_detections: Detections) -> None:
    supervision = pytest.importorskip("supervision")
    theirs = two_detections.to_supervision()
    assert isinstance(theirs, supervision.Detections) and len(theirs) == 2
    assert np.array_equal(theirs.mask, two_detections.masks.numpy())
    assert list(theirs.data["class_name"]) == ["disc", "square"]
    assert len(two_detections[:0].to_supervision()) == 0


@pytest.mark.parametrize("name", ["pandas", "supervision"])
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    nothing = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    with pytest.raises(UserError, match=f"pip install {name}$"):
        getattr(nothing, f"to_{name}")()
