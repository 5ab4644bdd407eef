"""`vidt.load` and what it loads, as a person uses it from Python."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import Learnt, call

import vidt
from vidt.images.batching import PENDING_BATCHES, Picture, equal_canvases, in_order, read_ahead
from vidt.images.inputs import as_picture
from vidt.predict.detections import Detections
from vidt.predict.predictor import Predictor

SIZES = [(64, 64), (48, 80), (64, 64), (80, 48), (64, 64)]


@pytest.fixture(scope="module")
def detector(learnt: Learnt) -> Predictor:
    return vidt.load(learnt.weights, device="cpu")


@pytest.fixture(scope="module")
def files(learnt: Learnt) -> list[Path]:
    return sorted((learnt.data / "val2017").iterdir())


def equal(first: Detections, second: Detections) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("boxes", "labels", "scores")
    )


def test_to_import_the_package_does_not_import_pytorch() -> None:
    code = "import sys, vidt, vidt.loading; assert not {'torch', 'numpy'} & set(sys.modules)"
    done = call([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_package_is_there() -> None:
    assert all(getattr(vidt, name) is not None for name in vidt.__all__)
    assert set(vidt.__all__) <= set(dir(vidt)) and vidt.__version__
    promised = "ViDT ViDTConfig build_detector criterion_for SetCriterion HungarianMatcher load"
    assert set(promised.split()) <= set(vidt.__all__)
    assert callable(importlib.import_module("vidt.convert").released_vidt)
    with pytest.raises(AttributeError, match="lode"):
        vidt.lode  # noqa: B018


def test_one_in_one_out_and_many_in_many_out(detector: Predictor, files: list[Path]) -> None:
    one = detector.predict(files[0], threshold=0.1)
    assert isinstance(one, Detections) and len(one) > 0
    many = detector.predict(files, threshold=0.1)
    assert isinstance(many, list) and len(many) == len(files)
    assert equal(one, many[0])
    assert isinstance(detector.predict(str(files[0])), Detections)
    assert isinstance(detector.predict(iter(files)), list)
    assert detector.predict([]) == []


def test_all_kinds_of_image_give_the_same(detector: Predictor, files: list[Path]) -> None:
    picture = Image.open(files[1]).convert("RGB")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    alpha = np.dstack([array, np.zeros(array.shape[:2], np.uint8)])
    kinds: list[Any] = [picture, array, array / np.float64(255), tensor, tensor / 255, alpha]
    expected = detector.predict(files[1], threshold=0.0)
    for found in detector.predict(kinds, threshold=0.0, batch_size=1):
        assert equal(found, expected)
    assert [len(detector.predict(several)) for several in (array[None], tensor[None])] == [1, 1]


def test_grey_arrays(detector: Predictor) -> None:
    grey = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
    expected = detector.predict(Image.fromarray(grey), threshold=0.0)
    deep = grey.astype(np.uint16) * 257
    tensor = torch.from_numpy(grey)[None]
    for same in (grey, grey[..., None], deep, tensor):
        assert equal(detector.predict(same, threshold=0.0), expected)


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (np.zeros((3, 40, 40), np.uint8), ValueError, r"\(3, 40, 40\); it must be height x width"),
        (np.zeros((40, 40, 3), np.int64), ValueError, "array of int64; it must be uint8"),
        (np.full((4, 4, 3), 255.0), ValueError, "floats from 255 to 255; they must be from 0 to 1"),
        (np.full((4, 4, 3), np.nan), ValueError, "floats from nan to nan"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "no pixels"),
        (torch.zeros(40, 40, 3), ValueError, r"tensor of shape \(40, 40, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), ValueError, "tensor of int32"),
        (7, TypeError, "this is int"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        as_picture(image)


def test_names_and_units(detector: Predictor, files: list[Path]) -> None:
    found = detector.predict(files[1], threshold=0.1)
    assert found.names == [detector.class_names[label] for label in found.labels]
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    size = torch.tensor(Image.open(files[1]).size)
    assert found.boxes[0].max() > 1.5 and (found.boxes[0, 2:] <= size * 1.2).all()
    found.boxes.clamp_(min=0)  # they are the caller's own
    assert not found.boxes.is_inference()


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_no_score_has(detector: Predictor, threshold: float) -> None:
    with pytest.raises(ValueError, match="it must be from 0 to 1"):
        detector.predict(np.zeros((8, 8), np.uint8), threshold=threshold)


def test_under_inference_mode_and_in_threads(detector: Predictor, files: list[Path]) -> None:
    expected = detector.predict(files, threshold=0.0)
    with torch.inference_mode():
        assert all(map(equal, detector.predict(files, threshold=0.0), expected))
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(detector.predict, files, threshold=0.0) for _ in range(8)]
        for each in work:
            assert all(map(equal, each.result(), expected))


def test_plot_draws_on_a_copy_of_the_image(detector: Predictor, files: list[Path]) -> None:
    found = detector.predict(files[0], threshold=0.1)
    drawn = found.plot()
    assert drawn.mode == "RGB" and drawn.size == Image.open(files[0]).size
    assert np.asarray(drawn).tobytes() != np.asarray(Image.open(files[0])).tobytes()
    picture = Image.open(files[0]).convert("RGB")
    before = picture.tobytes()
    assert detector.predict(picture, threshold=0.1).plot().tobytes() == drawn.tobytes()
    assert picture.tobytes() == before
    bare = Detections(found.scores, found.labels, found.boxes)
    with pytest.raises(ValueError, match="pass it to plot"):
        bare.plot()
    assert bare.plot(picture).size == drawn.size


def test_half_precision_and_small_batches(learnt: Learnt, files: list[Path]) -> None:
    full = vidt.load(learnt.weights, device="cpu").predict(files, threshold=0.3)
    half = vidt.load(learnt.weights, device="cpu", precision="bf16").predict(files, threshold=0.0)
    for expected, found in zip(full, half, strict=True):
        assert found.scores[: len(expected)].allclose(expected.scores, atol=0.1)


def test_too_little_memory_halves_the_batch(
    learnt: Learnt, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = vidt.load(learnt.weights, device="cpu")
    expected = detector.predict([files[0]] * 5)
    forward = detector.model.forward

    def short_of_memory(images: torch.Tensor, padding: torch.Tensor, **more: bool) -> dict:
        if len(images) > 2:
            raise torch.OutOfMemoryError("too much")
        return forward(images, padding, **more)

    monkeypatch.setattr(detector.model, "forward", short_of_memory)
    for found, same in zip(detector.predict([files[0]] * 5), expected, strict=True):
        assert torch.allclose(found.boxes, same.boxes, atol=1e-3)


def test_a_stream_takes_no_more_than_it_needs(detector: Predictor, files: list[Path]) -> None:
    """Of endless images some, and what it has of a rare canvas does not wait for ever."""
    taken = 0

    def endless() -> Any:
        nonlocal taken
        yield Image.new("RGB", (30, 90))
        while True:
            taken += 1
            yield files[0]

    for index, _ in detector.stream(endless(), batch_size=2):
        if index == 0:
            break
    assert taken < 200


def test_batches_of_equal_canvas_fall_behind_by_a_bounded_number() -> None:
    rng = np.random.default_rng(0)
    shapes = [SIZES[1] if index % 50 == 0 else SIZES[0] for index in range(500)]
    rows = [Picture(i, (1, 1), np.zeros((*shape, 3), np.uint8)) for i, shape in enumerate(shapes)]
    newest = -1
    seen = []

    def noted() -> Any:
        nonlocal newest
        for row in rows:
            newest = row.index
            yield row

    for batch in equal_canvases(noted(), 4):
        assert len({row.canvas for row in batch}) == 1 and len(batch) <= 4
        assert newest - batch[0].index <= PENDING_BATCHES * 4
        seen += [row.index for row in batch]
    assert sorted(seen) == list(range(500))
    shuffled = [(int(index), int(index)) for index in rng.permutation(20)]
    assert list(in_order(shuffled)) == list(range(20))


def test_reading_ahead_keeps_order_and_raises_in_place() -> None:
    def read(item: int) -> int:
        if item == 30:
            raise ValueError("thirty")
        return item * item

    found = read_ahead(range(100), read, threads=3)
    assert [next(found) for _ in range(30)] == [item * item for item in range(30)]
    with pytest.raises(ValueError, match="thirty"):
        next(found)
