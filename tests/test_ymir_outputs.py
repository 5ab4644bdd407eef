"""What the platform reads back is whole at every instant, and means what the trainer meant."""

import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from ymir_task import PROTOCOLS, Tree, make_tree

from vidt.predict.detections import Detections
from ymir_adapter.protocol.monitor import HEARTBEAT, LONGEST_MESSAGE, MOST_LINES, Monitor
from ymir_adapter.protocol.outputs import (
    LATEST_STAGES,
    DetectionWriter,
    TrainingResult,
    write_ranking,
)

fork = multiprocessing.get_context("fork")


def record(path: Path) -> list[str]:
    return path.read_text().splitlines()[0].split("\t")


# ---------------------------------------------------------------- monitor.txt


def test_a_record_is_as_the_platform_wants_it(tmp_path: Path):
    before = time.time()
    Monitor(tmp_path / "monitor.txt", "t1").update(0.256)
    text = (tmp_path / "monitor.txt").read_text()
    task_id, stamp, percent, state = text.removesuffix("\n").split("\t")
    assert (task_id, percent, state) == ("t1", "0.25", "2")
    assert before <= float(stamp) + 1e-6 and float(stamp) <= time.time()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["monitor.txt"]


def test_percent_never_falls_and_is_never_nan(tmp_path: Path):
    path = tmp_path / "monitor.txt"
    shown = []
    for fraction in (0.0, 0.5, 0.2, float("nan"), -3.0, 0.999, float("inf"), 0.1):
        Monitor(path, "t1").update(fraction)  # each as a process of its own
        shown.append(record(path)[2])
    assert shown == ["0.00", "0.50", "0.50", "0.50", "0.50", "0.99", "1.00", "1.00"]


def test_writes_are_at_most_two_a_second_but_the_last_word_is_written(tmp_path: Path):
    path = tmp_path / "monitor.txt"
    monitor = Monitor(path, "t1")
    start, stamps = time.monotonic(), set()
    while time.monotonic() - start < 1.2:
        monitor.update((time.monotonic() - start) / 2)
        stamps.add(record(path)[1])
    monitor.update(1.0)
    assert len(stamps) == 3 and record(path)[2] == "1.00"


def test_time_never_goes_back(tmp_path: Path):
    path = tmp_path / "monitor.txt"
    ahead = time.time() + 500
    path.write_text(f"t1\t{ahead:.6f}\t0.00\t1\n")
    monitor = Monitor(path, "t1")
    monitor.update(0.5)
    assert float(record(path)[1]) >= ahead - 1e-5
    monitor.error(300001, "broken")
    assert float(record(path)[1]) >= ahead - 1e-5


def test_a_silent_phase_stays_fresh(tmp_path: Path):
    path = tmp_path / "monitor.txt"
    with Monitor(path, "t1") as monitor:
        monitor.update(0.3)
        monitor.update(0.4)  # held back, but not for long
        first = record(path)
        wait_until(lambda: record(path)[1] != first[1], 3 * HEARTBEAT)
        assert (first[2], record(path)[2]) == ("0.30", "0.40")
    last = record(path)
    assert monitor._thread is None and record(path) == last


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"


def test_an_error_stays(tmp_path: Path):
    path = tmp_path / "monitor.txt"
    mine, other = Monitor(path, "t1"), Monitor(path, "t1")
    other.update(0.2)
    trace = "\n".join(f"line {number}" for number in range(500))
    mine.error(300103, "out of\tmemory\nat 3" + "x" * 999, trace)
    for monitor in (mine, other):
        monitor.update(0.9)
        monitor.update(1.0)
    lines = path.read_text().splitlines()
    task_id, _, percent, state, code, message = lines[0].split("\t")
    assert (task_id, percent, state, code) == ("t1", "1.00", "4", "300103")
    assert message.startswith("out of memory at 3x") and len(message) == LONGEST_MESSAGE
    assert len(lines) == MOST_LINES and lines[-1] == "line 499"


@pytest.mark.parametrize(
    "old",
    [
        "",
        "nonsense",
        "t1\tnan\t0.5\t2\n",
        "t1\t1700000000\t7\t2\n",
        "other\t1700000000.5\t0.9\t2\n",
        "t1\t1700000000.5\t1.00\t4\t300001\tof an earlier attempt\n",
        "t1\t1700000000.5\t0.00\t1\n",
        "\xff\xfe",
    ],
)
def test_whatever_lies_there_the_task_starts_at_nothing(tmp_path: Path, old: str):
    path = tmp_path / "monitor.txt"
    path.write_bytes(old.encode("latin-1"))
    Monitor(path, "t1").update(0.0)
    assert record(path)[0] == "t1" and record(path)[2:] == ["0.00", "2"]


def write_often(path: Path, start: float) -> None:
    monitor = Monitor(path, "t1")
    for step in range(1500):
        monitor.update(start + step / 5000)
        monitor._written = None  # as if half a second had passed
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["rename", "overwriting"])
def test_a_reader_in_a_tight_loop_never_sees_half_a_record(tmp_path: Path, by: str):
    path = tmp_path / "monitor.txt"
    Monitor(path, "t1").update(0.0)
    writers = [fork.Process(target=write_often, args=(path, start)) for start in (0.0, 0.2)]
    if by == "overwriting":  # as where the file alone is mounted: one writer, and no rename
        writers = writers[:1]
    for writer in writers:
        writer.start()
        if by == "overwriting":
            (tmp_path / f".monitor.txt.{writer.pid}.tmp").mkdir()
    seen, last, reads = set(), (0.0, 0.0), 0
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        reads += 1
        assert text.endswith("\n") and text.count("\n") == 1, repr(text)
        task_id, stamp, percent, state = text.rstrip("\n").split("\t")
        assert (task_id, state) == ("t1", "2")
        assert float(stamp) >= last[0] and float(percent) >= last[1]
        last = (float(stamp), float(percent))
        seen.add(text)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    print(f"{reads} reads by {by}, {len(seen)} different records, none of them torn")
    assert len(seen) > 20 and record(path)[2] == ("0.49" if len(writers) == 2 else "0.29")


def test_a_folder_that_takes_no_file_ends_no_task(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "monitor.txt"
    path.mkdir()
    monitor = Monitor(path, "t1")
    monitor.update(0.5)
    monitor.error(300001, "broken")
    assert str(path) in caplog.text


# ---------------------------------------------------------------- result.yaml


@pytest.fixture(params=PROTOCOLS, ids=str)
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Tree:
    return make_tree(tmp_path, protocol=request.param)


def weights_of(tree: Tree, content: str) -> Path:
    """As the trainer writes them: one name, replaced by a rename."""
    path = tree.output / "training" / "last.safetensors"
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(content)
    unfinished.replace(path)
    return path


def add(result: TrainingResult, tree: Tree, epoch: int, map50: float) -> None:
    content = f"weights of epoch {epoch}, {map50}"
    result.add(f"epoch_{epoch}", weights_of(tree, content), {"map50": map50, "mar_100": map50})


def read_result(tree: Tree) -> dict[str, tuple[float, list[Path]]]:
    """Stages by name, with mAP and files as the platform finds them; the best one first."""
    content = yaml.safe_load((tree.output / "models" / "result.yaml").read_text())
    models = tree.output / "models"
    if "model" in content:
        assert set(content) == {"model", "map"}
        return {"best": (content["map"], [models / name for name in content["model"]])}
    stages = content["model_stages"]
    best = content["best_stage_name"]
    assert content["mAP"] == stages[best]["mAP"] == max(one["mAP"] for one in stages.values())
    assert all(type(value) is float for value in content["evaluate_config"].values())
    for name, stage in stages.items():
        assert stage["stage_name"] == name and type(stage["timestamp"]) is int
    order = [best, *(name for name in stages if name != best)]
    return {n: (stages[n]["mAP"], [models / n / f for f in stages[n]["files"]]) for n in order}


def weight_files(tree: Tree) -> set[Path]:
    found = (tree.output / "models").rglob("*")
    return {path for path in found if path.is_file() and path.name != "result.yaml"}


def test_the_best_and_the_ten_latest_are_kept(tree: Tree):
    result = TrainingResult(tree.read())
    scores = [0.1, 0.9, 0.9, *(0.2 + epoch / 100 for epoch in range(3, 20))]
    for epoch, score in enumerate(scores):
        add(result, tree, epoch, score)
        found = read_result(tree)
        named = {file for _, files in found.values() for file in files}
        assert weight_files(tree) == named
        assert not any(path.is_symlink() for path in named)
        best_score, (best_file,) = next(iter(found.values()))
        assert best_score == max(scores[: epoch + 1])
        assert best_file.read_text().endswith(str(best_score))
    assert result.best == "epoch_2"  # of equal ones the latest
    if tree.read().has_stages:
        latest = [f"epoch_{epoch}" for epoch in range(20 - LATEST_STAGES, 20)]
        assert list(read_result(tree)) == ["epoch_2", *latest]
    else:
        assert [p.name for p in weight_files(tree)] == ["epoch_2.safetensors"]


def test_more_files_of_a_stage_come_and_go_with_its_weights(tree: Tree):
    result, model = TrainingResult(tree.read()), tree.output / "last.onnx"
    for epoch in range(LATEST_STAGES + 3):
        model.unlink(missing_ok=True)  # another file under the same name
        model.write_text(f"model of epoch {epoch}")
        weights = weights_of(tree, f"weights of epoch {epoch}")
        result.add(f"epoch_{epoch}", weights, {"map50": epoch / 100}, [model])
        found = read_result(tree)
        assert weight_files(tree) == {file for _, files in found.values() for file in files}
    names = [file.name for file in next(iter(found.values()))[1]]
    last = LATEST_STAGES + 2
    assert names == [f"epoch_{last}.safetensors", f"epoch_{last}.onnx"]
    resumed = TrainingResult(tree.read(), resumed=True)
    assert resumed.best == f"epoch_{last}"


@pytest.mark.parametrize("score", [-1.0, float("nan"), 0.0])
def test_what_could_not_be_scored_is_zero(tree: Tree, score: float):
    add(TrainingResult(tree.read()), tree, 1, score)
    assert [found[0] for found in read_result(tree).values()] == [0.0]
    assert yaml.safe_load((tree.output / "models" / "result.yaml").read_text())


def test_scores_of_any_number_type_are_plain(tree: Tree):
    path = weights_of(tree, "x")
    TrainingResult(tree.read()).add("epoch_1", path, {"map50": torch.tensor(0.5).numpy()[()]})
    assert next(iter(read_result(tree).values()))[0] == 0.5


def test_the_weights_may_change_afterwards(tree: Tree):
    result = TrainingResult(tree.read())
    add(result, tree, 1, 0.5)
    weights_of(tree, "of the next epoch")
    ((_, (file,)),) = read_result(tree).values()
    assert file.read_text() == "weights of epoch 1, 0.5"
    assert file.stat().st_mode & 0o444 == 0o444


def test_a_new_run_replaces_the_result_and_a_resumed_one_goes_on(tree: Tree):
    first = TrainingResult(tree.read())
    add(first, tree, 1, 0.8)
    add(first, tree, 2, 0.5)
    resumed = TrainingResult(tree.read(), resumed=True)
    add(resumed, tree, 3, 0.6)
    assert next(iter(read_result(tree).values()))[0] == 0.8
    anew = TrainingResult(tree.read())
    assert weight_files(tree) and anew.best is None  # until there is something better
    add(anew, tree, 1, 0.3)
    ((score, (file,)),) = read_result(tree).values()
    assert (score, weight_files(tree)) == (0.3, {file})


@pytest.mark.parametrize("text", ["", "[1]", "model_stages: 3", "a: [", "model: [], map: x"])
def test_a_result_that_is_not_ours_is_replaced(tree: Tree, text: str):
    (tree.output / "models" / "result.yaml").write_text(text)
    add(TrainingResult(tree.read(), resumed=True), tree, 1, 0.3)
    assert [found[0] for found in read_result(tree).values()] == [0.3]


def add_for_ever(tree: Tree, seed: int) -> None:
    scores = random.Random(seed)
    result = TrainingResult(tree.read(), resumed=True)
    for epoch in range(seed * 10**6 + 1, (seed + 1) * 10**6):  # no name comes twice
        add(result, tree, epoch, round(scores.random(), 3))


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_a_result_whose_files_are_whole(tree: Tree):
    """Twenty kills; every file says in itself to which mAP it belongs."""
    add(TrainingResult(tree.read()), tree, 0, 0.5)
    random.seed(0)
    files = 0
    for kill in range(20):
        process = fork.Process(target=add_for_ever, args=(tree, kill))
        process.start()
        process.join(0.05 + random.random() / 10)
        assert process.is_alive()
        process.kill()
        process.join()
        for score, named in read_result(tree).values():
            for file in named:
                files += 1
                assert file.read_text().startswith("weights of epoch ")
                assert float(file.read_text().split(", ")[1]) == score
    print(f"20 kills, {files} listed files, all whole")


# ---------------------------------------------------------------- result.tsv


def test_a_ranking_keeps_paths_verbatim(tmp_path: Path):
    ranked = [
        ("/in/assets/a b.jpg", 2.5),
        ("/in/\u00fc\udcff.jpg", 1e-17),
        ("c", 1e-17),
        ("d", -1.0),
    ]
    write_ranking(tmp_path / "result.tsv", iter(ranked))
    text = (tmp_path / "result.tsv").read_bytes().decode("utf-8", "surrogateescape")
    rows = [line.split("\t") for line in text.splitlines()]
    assert [(asset, float(score)) for asset, score in rows] == ranked


@pytest.mark.parametrize("scores", [(0.1, 0.2), (float("nan"),), (float("inf"),), (1, -math.inf)])
def test_a_ranking_that_goes_up_is_refused(tmp_path: Path, scores: tuple[float, ...]):
    with pytest.raises(ValueError, match="score"):
        write_ranking(tmp_path / "result.tsv", [("a.jpg", score) for score in scores])
    assert not (tmp_path / "result.tsv").exists()


# ---------------------------------------------------------------- infer-result.json


@pytest.fixture(params=PROTOCOLS, ids=str)
def infer_tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tree]:
    yield make_tree(tmp_path, "infer", protocol=request.param)


def detections(*rows: tuple[float, int, float, float, float, float]) -> Detections:
    numbers = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(numbers[:, 0], numbers[:, 1].long(), numbers[:, 2:])


def read_json(tree: Tree) -> dict[str, list[dict]]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    text = (tree.output / "infer-result.json").read_text(encoding="utf-8")
    key = "boxes" if "protocol_version" in tree.env else "annotations"
    content = json.loads(text, parse_constant=refuse)
    assert all(set(entry) == {key} for entry in content["detection"].values())
    return {name: entry[key] for name, entry in content["detection"].items()}


def test_boxes_are_whole_pixels_inside_the_image(infer_tree: Tree):
    names = ("bird", "cat", "dog")  # of the weights; the task has cat and dog
    nan = float("nan")
    with DetectionWriter(infer_tree.read()) as writer:
        writer.add(
            "/in/assets/xx/a.jpg",
            (20, 30),
            names,
            detections(
                (0.3, 1, 2.4, 3.6, 9.5001, 12.2),
                (0.9, 2, -5.0, -1.0, 99.0, 99.0),
                (0.8, 0, 1.0, 1.0, 5.0, 5.0),  # a class that the task does not have
                (0.7, 1, 4.1, 4.1, 4.4, 9.0),  # less than half a pixel wide
                (0.6, 1, 40.0, 1.0, 50.0, 9.0),  # outside
                (nan, 1, 1.0, 1.0, 5.0, 5.0),
                (0.5, 1, nan, 1.0, 5.0, 5.0),
                (0.4, 1, 1.0, 1.0, float("inf"), 5.0),
            ),
        )
        writer.add("b.png", None, names, None)
        writer.add("c.png", (5, 5), names, detections())
    found = read_json(infer_tree)
    assert list(found) == ["a.jpg", "b.png", "c.png"] and found["b.png"] == found["c.png"] == []
    assert [(box["class_name"], box["box"]) for box in found["a.jpg"]] == [
        ("dog", {"x": 0, "y": 0, "w": 30, "h": 20}),
        ("cat", {"x": 2, "y": 4, "w": 8, "h": 8}),
    ]
    assert [round(box["score"], 6) for box in found["a.jpg"]] == [0.9, 0.3]
    assert all(type(number) is int for box in found["a.jpg"] for number in box["box"].values())


def test_names_of_any_kind_survive(infer_tree: Tree):
    names = ['a "quoted" one', "K\u00e4fer/\u732b", "back\\slash"]
    infer_tree.config["class_names"] = names
    files = ["bl ank.jpg", "\u732b.jpg", 'q"uote.jpg', "\udcff.jpg"]
    with DetectionWriter(infer_tree.write().read()) as writer:
        for file in files:
            writer.add(f"x/{file}", (9, 9), names, detections((0.5, 1, 1, 1, 5, 5)))
    found = read_json(infer_tree)
    assert list(found) == files
    assert found["\u732b.jpg"][0]["class_name"] == names[1]


def test_no_candidates_and_two_of_one_name(infer_tree: Tree, caplog: pytest.LogCaptureFixture):
    task = infer_tree.read()
    DetectionWriter(task).close()
    assert read_json(infer_tree) == {}
    with DetectionWriter(task) as writer:
        writer.add("x/a.jpg", (9, 9), ["cat"], detections((0.5, 0, 1, 1, 5, 5)))
        writer.add("y/a.jpg", None, ["cat"], None)
    assert len(read_json(infer_tree)["a.jpg"]) == 1 and "y/a.jpg" in caplog.text


def test_a_failure_leaves_the_old_result(infer_tree: Tree):
    task = infer_tree.read()
    with DetectionWriter(task) as writer:
        writer.add("a.jpg", None, [], None)
    with pytest.raises(KeyError), DetectionWriter(task) as writer:
        writer.add("b.jpg", None, [], None)
        assert list(read_json(infer_tree)) == ["a.jpg"]
        raise KeyError
    assert [path.name for path in infer_tree.output.glob("*infer*")] == ["infer-result.json"]
    assert list(read_json(infer_tree)) == ["a.jpg"]
