"""Inference: what training scored is what the platform gets, however it is computed."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_runs import NAMES, Learnt, cpu, draw, random_pictures, swapped, write_split
from ymir_candidates import Results, candidate_task, run_here

from trainer.loop.agreement import Agreement
from trainer.readers.coco import read_coco
from trainer.scoring.evaluation import evaluate
from vidt.images.batching import AHEAD
from vidt.images.preprocessing import Preprocessing
from vidt.model.config import ViDTConfig
from vidt.model.vidt import ViDT, build_detector
from vidt.predict.predictor import Predictor
from vidt.weights.checkpoint import load_model
from vidt.weights.weights_file import WeightsInfo, save_weights
from ymir_adapter.protocol.errors import Code, TaskError
from ymir_adapter.protocol.task import CandidateSettings
from ymir_adapter.tasks.candidates import PARTS, make_detector
from ymir_adapter.tasks.inference import (
    PENDING_BATCHES,
    Candidate,
    Detector,
    detections_of,
    equal_canvases,
    names_in_task,
    read_picture,
    read_pictures,
)

AP_THRESHOLD = 0.005  # what the platform scores with


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Thirteen pictures of four sizes; the first four are those that the detector knows."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for index, picture in enumerate([*random_pictures(4, 0), *random_pictures(9, 3)]):
        paths.append(folder / f"{index:02d}.png")
        draw(picture, 101 + index).save(paths[-1])
    return paths


@pytest.fixture
def predictor(learnt: Learnt) -> Predictor:
    return Predictor.from_checkpoint(learnt.weights)


def map50_of(document: dict, results: Results) -> float:
    """pycocotools on the boxes of the JSON, as integers."""
    truth = COCO()
    truth.dataset = document
    ids = {category["name"]: category["id"] for category in document["categories"]}
    by_name = {image["file_name"]: image["id"] for image in document["images"]}
    rows = [
        {
            "image_id": by_name[name],
            "category_id": ids[found["class_name"]],
            "bbox": [found["box"][side] for side in "xywh"],
            "score": found["score"],
        }
        for name, boxes in (results.boxes or {}).items()
        for found in boxes
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return float(evaluator.stats[1])


@pytest.mark.slow
def test_the_boxes_give_the_score_of_training(learnt: Learnt, tmp_path: Path) -> None:
    """On the pictures that training evaluated and on ones that it never saw."""
    known, unknown = random_pictures(4, seed=0), random_pictures(9, seed=3)
    write_split(tmp_path, "val", [*known, *unknown])
    file, folder = tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017"
    model, info = load_model(learnt.weights)
    samples, _ = read_coco(file, folder, info.class_names)
    settings = {"batch_size": 4, "num_workers": 0}
    agreement = Agreement(cpu())
    found = evaluate(model, samples, info.preprocessing, cpu(), agreement, **settings)  # type: ignore[arg-type]
    paths = sorted(folder.iterdir())
    threshold = {"conf_threshold": AP_THRESHOLD}
    results = run_here(
        candidate_task(tmp_path / "task", paths, learnt.weights, infer=True, **threshold)
    )
    assert 0.1 < found.metrics["map50"] < 1
    document = json.loads(file.read_text())
    assert map50_of(document, results) == pytest.approx(found.metrics["map50"], abs=1e-3)


def test_the_weights_file_is_all_that_is_needed(
    learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    """Its size at evaluation, its classes and their order, which are not those of the task."""
    weights = tmp_path / "models/epoch_9.safetensors"
    weights.parent.mkdir()
    shutil.copyfile(learnt.weights, weights)
    tree = candidate_task(tmp_path / "task", images, weights, infer=True, eval_size=640)
    assert load_model(learnt.weights)[1].class_names != NAMES
    found = run_here(tree).boxes
    assert found is not None
    predictor = Predictor.from_checkpoint(learnt.weights)
    for path, detections in zip(images, predictor(images, threshold=0.1), strict=True):
        names = [predictor.class_names[label] for label in detections.labels]
        assert [box["class_name"] for box in found[path.name]] == names
        scores = [box["score"] for box in found[path.name]]
        assert scores == pytest.approx(detections.scores.tolist(), abs=6e-5)  # 4 decimals
        assert scores == sorted(scores, reverse=True) and min(scores, default=1) >= 0.1


def test_img_size_takes_the_place_of_the_weights_size(
    learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    tree = candidate_task(tmp_path / "task", images, learnt.weights, infer=True, img_size=96)
    found = run_here(tree).boxes or {}
    predictor = Predictor.from_checkpoint(learnt.weights)
    assert predictor.preprocessing.eval_size == 64
    predictor.preprocessing = replace(predictor.preprocessing, eval_size=96)
    for path, detections in zip(images, predictor(images, threshold=0.1), strict=True):
        scores = [box["score"] for box in found[path.name]]
        assert scores == pytest.approx(detections.scores.tolist(), abs=6e-5)


@pytest.mark.parametrize("protocol", [None, "1.0.0", "1.1.0"])
def test_the_list_is_named_as_the_protocol_has_it(
    protocol: str | None, learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    turned = images[::-1]
    tree = candidate_task(tmp_path, turned, learnt.weights, infer=True, protocol=protocol)
    assert list(run_here(tree).boxes or {}) == [path.name for path in turned]
    document = json.loads((tree.output / "infer-result.json").read_text())["detection"]
    keys = {key for image in document.values() for key in image}
    assert keys == {"annotations" if protocol is None else "boxes"}


def test_classes_that_the_task_does_not_have_are_left_out(
    learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    tree = candidate_task(tmp_path / "some", images, learnt.weights, infer=True, names=("Red ",))
    some = run_here(tree).boxes or {}
    every = run_here(candidate_task(tmp_path / "all", images, learnt.weights, infer=True)).boxes
    assert every is not None
    for name, boxes in every.items():
        reds = [{**box, "class_name": "Red "} for box in boxes if box["class_name"] == "red"]
        assert some[name] == reds
    assert any(some.values())


def test_names_are_compared_as_the_platform_does() -> None:
    known = ("Cat", "dog", "cat", "bird")
    assert names_in_task(known, (" Dog", "cat", "cow")) == ["cat", " Dog", "cat", ""]
    assert names_in_task(("a b", "A B"), ("A B", "a b")) == ["a b", "A B"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("dog", "cat"), ""),
        (("dog",), "objects of these classes of the weights are left out"),
        (("cow",), "nothing will be found: the weights have no class"),
    ],
)
def test_classes_that_the_task_does_not_have_are_told(
    asked: tuple[str, ...], words: str, caplog: pytest.LogCaptureFixture
):
    from ymir_adapter.tasks import candidates

    known = ("dog", "cat")
    candidates.warn_of_unknown_classes(known, names_in_task(known, asked))
    assert words in caplog.text and bool(words) == bool(caplog.text)


def test_pixels_are_taken_as_stored(learnt: Learnt, tmp_path: Path) -> None:
    """A camera's note that the picture is to be turned changes nothing."""
    picture = draw(random_pictures(2, 0)[1], 102)
    plain, noted = tmp_path / "plain.jpg", tmp_path / "noted.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(plain, quality=95)
    picture.save(noted, quality=95, exif=exif)
    found = run_here(
        candidate_task(tmp_path / "task", [plain, noted], learnt.weights, infer=True)
    ).boxes
    assert found["plain.jpg"]
    for ours, theirs in zip(found["noted.jpg"], found["plain.jpg"], strict=True):
        assert ours == {**theirs, "score": pytest.approx(theirs["score"], rel=1e-6)}
    inside = [box["box"] for box in found["noted.jpg"]]
    assert max(box["x"] + box["w"] for box in inside) > picture.height  # it is wider than high
    assert all(box["y"] + box["h"] <= picture.height for box in inside)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stays_in_without_boxes(
    workers: int, learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    broken, missing = tmp_path / "broken.jpg", tmp_path / "missing.jpg"
    broken.write_bytes(b"no picture")
    paths = [broken, images[0], missing, images[1]]
    more = {"num_workers_per_gpu": workers}
    tree = candidate_task(tmp_path / "task", paths, learnt.weights, mining=True, infer=True, **more)
    results = run_here(tree)
    assert list(results.boxes or {}) == ["broken.jpg", "00.png", "missing.jpg", "01.png"]
    assert (results.boxes or {})["broken.jpg"] == (results.boxes or {})["missing.jpg"] == []
    assert [name for name, _ in results.ranking or []][2:] == ["broken.jpg", "missing.jpg"]
    assert results.scores["broken.jpg"] < 0


@pytest.mark.parametrize("algorithm", [None, "random", "entropy"])
def test_nothing_but_unreadable_images_is_an_error(
    algorithm: str | None, learnt: Learnt, tmp_path: Path
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(b"no picture")
    asked = {"infer": True} if algorithm is None else {"mining": True}
    paths = [tmp_path / f"{number}.jpg" for number in range(2)]
    more = {"mining_algorithm": algorithm or "random"}
    tree = candidate_task(tmp_path / "task", paths, learnt.weights, **asked, **more)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"none of 2 candidates .*0\.jpg") as caught:
        run_here(tree)
    assert caught.value.code == Code.IMAGE_FORMAT
    left = {path.name for path in tree.output.iterdir()}
    assert left == {"monitor.txt"}, "neither results nor parts"


def test_weights_that_are_not_finite_are_named(
    learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    model, info = load_model(learnt.weights)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["class_embed.0.bias"][:] = float("nan")
    state["class_embed.1.bias"][:] = float("nan")
    save_weights(tmp_path / "bad.safetensors", state, info)
    tree = candidate_task(tmp_path / "task", images, tmp_path / "bad.safetensors", infer=True)
    with pytest.raises(TaskError, match="not finite") as caught:
        run_here(tree)
    assert caught.value.code == Code.NAN
    assert not (tree.output / PARTS).exists()


def test_a_picture_is_prepared_as_for_evaluation(predictor: Predictor, images: list[Path]) -> None:
    preprocessing = predictor.preprocessing
    pictures = [read_picture(0, str(images[0]), preprocessing)] * 2
    found = Detector(predictor, rows=2).normalised(pictures)
    expected = preprocessing(Image.open(images[0]).convert("RGB"))
    assert torch.equal(found, torch.stack([expected] * 2))


def test_a_detector_without_neck_finds_what_its_predictor_finds(images: list[Path]) -> None:
    """Its scores are a softmax with a column for the background."""
    config = ViDTConfig(method="vidt_wo_neck", num_classes=3, det_token_num=7)
    torch.manual_seed(0)
    info = WeightsInfo(config, ("a", "b", "c"), Preprocessing(eval_size=64))
    predictor = Predictor(build_detector(config), info)
    picture = read_picture(0, str(images[0]), info.preprocessing)
    detector = Detector(predictor, rows=2)
    predictions = detector(detector.normalised([picture]))
    assert predictions.probabilities.shape == (1, 1, 7, 3)
    (found,) = detections_of(detector, [picture], predictions, 0.0)
    (expected,) = predictor([images[0]])
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.boxes, expected.boxes)
    best = predictions.probabilities[0, 0].amax(1).sort(descending=True).values
    torch.testing.assert_close(found.scores.double(), best)


def pictures_of(canvases: list[int | None]) -> Iterator[Candidate]:
    for index, side in enumerate(canvases):
        pixels = None if side is None else torch.zeros(3, 16, side, dtype=torch.uint8)
        yield Candidate(index, (16, side or 0), pixels)


def test_batches_are_of_one_canvas_and_lose_nothing() -> None:
    canvases = [16, 32, None, 16, 16, 48, 32, None, 16, 32, 32]
    batches = list(equal_canvases(pictures_of(canvases), 3))
    assert sorted(picture.index for batch in batches for picture in batch) == list(range(11))
    for batch in batches:
        assert len({canvases[picture.index] for picture in batch}) == 1
        assert len(batch) <= 3
    assert [[p.index for p in batch] for batch in batches[:2]] == [[2], [0, 3, 4]]


def test_pictures_that_wait_for_others_are_few() -> None:
    """A thousand pictures of a thousand canvases: taken in, but never held back without bound."""
    taken = 0

    def counted() -> Iterator[Candidate]:
        nonlocal taken
        for picture in pictures_of(list(range(16, 1016))):
            taken += 1
            yield picture

    given = 0
    for batch in equal_canvases(counted(), 2):
        given += len(batch)
        assert taken - given <= 2 * PENDING_BATCHES
    assert given == 1000


def test_readers_do_not_run_ahead(images: list[Path]) -> None:
    asked: list[int] = []

    def path_of(index: int) -> str:
        asked.append(index)
        return str(images[index % len(images)])

    stream = read_pictures(range(100), path_of, Preprocessing(eval_size=32), 2)
    first = [next(stream).index for _ in range(5)]
    assert first == list(range(5))
    assert len(asked) <= 5 + 2 * AHEAD + 1
    stream.close()  # type: ignore[attr-defined]
    assert len(asked) <= 5 + 2 * AHEAD + 3


def test_too_little_memory_halves_the_batch(predictor: Predictor) -> None:
    forward, sizes = ViDT.forward, []

    def short_of_memory(self, images, *rest, **more):
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, *rest, **more)

    batch = torch.rand(7, 3, 64, 64)
    expected = Detector(predictor, rows=7)(batch)
    detector = Detector(predictor, rows=16)
    with swapped(ViDT, "forward", short_of_memory):
        found = detector(batch)
    assert sizes == [7, 3, 3, 1] and detector.rows == 3
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    assert torch.allclose(found.boxes, expected.boxes, atol=1e-5)


@pytest.mark.parametrize("algorithm", [None, "cald"])
def test_a_cpu_computes_images_one_by_one(algorithm: str | None, predictor: Predictor) -> None:
    settings = CandidateSettings(batch_size_per_gpu=8)
    assert make_detector(algorithm, settings, predictor).rows == 1
    predictor.device = torch.device("cuda")
    assert make_detector(algorithm, settings, predictor).rows == 8


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_precision_of_the_form_is_that_of_the_detector(precision: str, learnt: Learnt) -> None:
    predictor, seen = Predictor.from_checkpoint(learnt.weights, precision=precision), []
    forward = ViDT.forward

    def watched(self, *images, **more):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *images, **more)

    with swapped(ViDT, "forward", watched):
        found = Detector(predictor, rows=1)(torch.rand(1, 3, 64, 64))
    assert seen == [precision == "bf16"] and found.logits.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [4, 16])
def test_the_result_is_the_same_bytes_for_any_batch_size(
    batch_size: int, learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    """Two processes: see `test_two_processes_give_what_one_gives`."""
    written = []
    for size in (1, batch_size):
        form = {"batch_size_per_gpu": size, "conf_threshold": 0.001}
        tree = candidate_task(tmp_path / f"{size}", images, learnt.weights, infer=True, **form)  # type: ignore[arg-type]
        assert any((run_here(tree).boxes or {}).values())
        written.append((tree.output / "infer-result.json").read_bytes())
    assert written[0] == written[1]


def test_one_image_that_is_too_large_is_out_of_memory(predictor: Predictor) -> None:
    def out_of_memory(self, *images, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with swapped(ViDT, "forward", out_of_memory), pytest.raises(torch.OutOfMemoryError):
        Detector(predictor, rows=4)(torch.rand(2, 3, 64, 64))


def test_progress_never_falls_and_ends_at_one(
    learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    tree = candidate_task(tmp_path, images, learnt.weights, infer=True, batch_size_per_gpu=1)
    told: list[float] = []

    class Listener:
        update = staticmethod(told.append)

    from ymir_adapter.protocol.task import read_task
    from ymir_adapter.tasks import candidates

    candidates.process_candidates(read_task(tree.env_file), Listener(), cpu())  # type: ignore[arg-type]
    assert told == sorted(told) and told[-1] == 1.0
    assert len(set(told)) >= len(images)
