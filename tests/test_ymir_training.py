"""Training tasks: through the real parent from the platform's files to what it reads back, and what
each failure is told as.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import NAMES, cpu, swapped
from ymir_runs import (
    CHECKER,
    TIMEOUT,
    Ended,
    Tree,
    complaints,
    processes_with,
    run_parent,
    start,
    training_task,
    wait_until_gone,
)

import vidt
from trainer.report.progress import Progress
from trainer.scoring.scores import Hits, curve
from vidt.model.vidt import ViDT
from vidt.weights.weights_file import load_weights
from ymir_adapter.protocol.errors import Code, diagnose, first_failure, write_failure
from ymir_adapter.protocol.monitor import Monitor
from ymir_adapter.protocol.outputs import TrainingResult
from ymir_adapter.protocol.task import in_form_words, read_task
from ymir_adapter.tasks import training

OTHER_NAMES = ("blue", "violet", "red")
needs_checker = pytest.mark.skipif(
    not CHECKER.exists(), reason="the platform's checker is not beside the checkout"
)


def check_end(tree: Tree, ended: Ended) -> None:
    assert ended.code == 0, ended.said
    assert tree.record[2:] == ["1.00", "2"]
    assert ended.reader.torn == []
    percents = [float(line.split("\t")[2]) for line in ended.reader.lines]
    assert percents == sorted(percents) and percents[-1] == 1.0, percents
    assert not CHECKER.exists() or complaints(tree, ended) == ""


def listed_weights(tree: Tree) -> list[Path]:
    stages = tree.result["model_stages"]
    return [tree.models / name / file for name, one in stages.items() for file in one["files"]]


@pytest.mark.slow
@needs_checker
def test_a_platform_without_stages_gets_the_best_weights(tmp_path: Path) -> None:
    tree = training_task(tmp_path, protocol=None)
    check_end(tree, run_parent(tree))
    (name,) = tree.result["model"]
    _, info = load_weights(tree.models / name)
    assert info.class_names == NAMES and info.preprocessing.eval_size == 64
    assert tree.result["map"] == max(info.metrics["map50"], 0)
    assert [path.name for path in tree.models.iterdir() if path.name != "result.yaml"] == [name]


@pytest.mark.slow
@needs_checker
def test_two_processes_then_other_classes_from_their_weights(tmp_path: Path) -> None:
    """The second task knows nothing of the first but its weights, and stands still: what it lists
    is what it started with.
    """
    tiny = {"backbone_name": "swin_test"}
    first = training_task(tmp_path / "first", protocol="1.0.0", num_workers_per_gpu=1, **tiny)
    ended = run_parent(first, ranks=2, module="ymir_tiny")
    check_end(first, ended)
    assert "4 images a step on 2 x cpu" in ended.said
    assert len(listed_weights(first)) == 2
    given = tmp_path / "second/in/models/epoch_2/epoch_2.safetensors"
    second = training_task(
        tmp_path / "second",
        names=OTHER_NAMES,
        options="--min_lr 0 --no-ema",
        learning_rate="1e-12",
        epochs=1,
        pretrained_model_params=[str(given)],
        **tiny,
    )
    given.parent.mkdir(parents=True)
    listed_weights(first)[1].rename(given)
    ended = run_parent(second, module="ymir_tiny")
    check_end(second, ended)
    assert "kept 2: blue, red; dropped 1: green; new 1: violet" in ended.said
    check_head_rows(given, listed_weights(second)[0])


def check_head_rows(before: Path, after: Path) -> None:
    old, new = load_file(before), load_file(after)
    heads = [name for name in old if name.startswith("class_embed.")]
    assert heads
    for name in heads:
        for ours, theirs in ((0, NAMES.index("blue")), (2, NAMES.index("red"))):
            torch.testing.assert_close(new[name][ours], old[name][theirs], rtol=0, atol=1e-6)
    body = "backbone.layers.0.blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(new[body], old[body], rtol=0, atol=1e-6)


def check_failure(tree: Tree, code: Code, said: str) -> None:
    """State 4 and the code; the cause in one line, alike in the record and as the last output."""
    record = tree.record
    assert record[2:5] == ["1.00", "4", str(int(code))], said
    assert said.splitlines()[-1] == f"error {int(code)}: {record[5]}"
    assert len(tree.monitor.read_text().splitlines()) > 1, "no traceback from line 2 on"


@pytest.mark.slow
def test_memory_that_runs_out_on_the_second_process(tmp_path: Path) -> None:
    tree = training_task(tmp_path, backbone_name="swin_test")
    ended = run_parent(tree, ranks=2, module="ymir_tiny", FAULT="memory")
    assert ended.code == 1
    check_failure(tree, Code.OOM, ended.said)
    assert "is now split into 2 micro-batches" in ended.said and "lower" in tree.record[5]
    assert not CHECKER.exists() or complaints(tree, ended, "--allow-error") == ""


@pytest.mark.slow
def test_a_killed_process_is_the_cause_and_not_the_connection_that_it_drops(tmp_path: Path) -> None:
    tree = training_task(tmp_path, backbone_name="swin_test", epochs=200)
    parent = start(tree, ranks=2, module="ymir_tiny")
    deadline = time.monotonic() + TIMEOUT
    while not (tree.models / "result.yaml").exists():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    (second,) = set(processes_with("RANK=1")) & set(processes_with(f"MARK={tree.root}"))
    os.kill(second, signal.SIGKILL)
    assert parent.wait(TIMEOUT) == 1
    said = (tree.root / "log.txt").read_text()
    assert tree.record[2:5] == ["1.00", "4", str(int(Code.OOM))], said
    assert "was killed" in tree.record[5] and "lower batch_size_per_gpu" in tree.record[5]
    rule, *_, last = said.splitlines()[-5:]
    assert rule == "-" * 80 and last == f"error {int(Code.OOM)}: {tree.record[5]}"


@pytest.mark.parametrize("content", ["task_id: [", "run_training: perhaps", "run_infer: false"])
def test_a_task_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    tree = training_task(tmp_path)
    tree.env_file.write_text(f"output:\n  monitor_file: {tree.monitor}\n{content}\n")
    ended = run_parent(tree)
    assert ended.code == 1
    check_failure(tree, Code.CONFIG, ended.said)
    assert str(tree.env_file) in tree.record[5]


# What goes wrong is told in the test's own process, as each of these costs a second there.


def missing_weights(tree: Tree) -> dict[str, object]:
    return {"pretrained_model_params": [str(tree.root / "in/models/gone.safetensors")]}


def foreign_weights(tree: Tree) -> dict[str, object]:
    path = tree.root / "in/foreign.pth"
    torch.save({"model": {"conv.weight": torch.ones(2)}}, path)
    return {"pretrained_model_paths": [str(path)]}


def torn_weights(tree: Tree) -> dict[str, object]:
    path = tree.root / "in/torn.safetensors"
    save_file({"weight": torch.ones(1000)}, path)
    os.truncate(path, 500)
    return {"pretrained_model_params": str(path)}


def empty_index(tree: Tree) -> dict[str, object]:
    (tree.root / "in/train-index.tsv").write_text("\n \n")
    return {}


def no_validation(tree: Tree) -> dict[str, object]:
    (tree.root / "in/val-index.tsv").unlink()
    return {}


def unreadable_images(tree: Tree) -> dict[str, object]:
    for path in (tree.root / "in/assets").glob("*.png"):
        path.write_text("no image")
    return {}


def folder_in_the_way(tree: Tree) -> dict[str, object]:
    (tree.output / "training").write_text("a file")
    return {}


def options(words: str) -> Callable[[Tree], dict[str, object]]:
    return lambda tree: {"args_options": f"{{}} {words}"}


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (options("--lrr 1"), Code.CONFIG, "lrr"),
        (options("'--lr"), Code.CONFIG, "args_options"),
        (options("--num_classes 7"), Code.CONFIG, "--num_classes 7"),
        (lambda tree: {"epochs": "many"}, Code.CONFIG, "epochs"),
        (lambda tree: {"object_type": 4}, Code.OBJECT_TYPE, "object_type is 4"),
        (empty_index, Code.DATASET, "train-index.tsv"),
        (no_validation, Code.DATASET, "val-index.tsv"),
        (unreadable_images, Code.IMAGE_FORMAT, "train0.png"),
        (missing_weights, Code.MODEL, "gone.safetensors"),
        (foreign_weights, Code.MODEL, "foreign.pth"),
        (torn_weights, Code.MODEL, "torn.safetensors"),
        (options("--load_from http://127.0.0.1:9/a.safetensors"), Code.NETWORK, "127.0.0.1:9"),
        (options("--lr 1e30 --clip_max_norm 0"), Code.NAN, "not finite"),
        (folder_in_the_way, Code.CONTAINER, "training"),
    ],
)
def test_each_failure_has_its_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Tree], dict[str, object]],
    code: Code,
    words: str,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    tree = tiny_task(tmp_path / "task", wrong)
    error = failure_here(tree)
    write_failure(tmp_path / "failures", 0, error)
    failure = first_failure(tmp_path / "failures")
    assert failure is not None and failure.code == code, failure
    assert words in failure.message and "\n" not in failure.message
    assert not (tree.models / "result.yaml").exists()


def tiny_task(root: Path, wrong: Callable[[Tree], dict[str, object]]) -> Tree:
    """With a body that only this process knows."""
    tree = training_task(root, backbone_name="swin_test")
    path = root / "in/config.yaml"
    config = yaml.safe_load(path.read_text())
    changes = wrong(tree)
    if "args_options" in changes:
        changes["args_options"] = str(changes["args_options"]).format(config["args_options"])
    path.write_text(yaml.safe_dump({**config, **changes}))
    return tree


def failure_here(tree: Tree) -> BaseException:
    with (
        pytest.raises(Exception) as raised,
        swapped(training, "make_accelerator", lambda precision: cpu()),
    ):
        task = read_task(tree.env_file)
        training.train_task(task, Monitor(tree.monitor, task.task_id))
    return raised.value


def test_a_body_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, which is read when the library is loaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    body = {"backbone_name": "swin_tiny", "pre_trained": "imagenet"}
    tree = tiny_task(tmp_path / "task", lambda tree: body)
    code, line = diagnose(failure_here(tree))
    assert code == Code.NETWORK and "swin_tiny" in line
    assert "pre_trained none" in in_form_words(line) and "--" not in in_form_words(line)


@pytest.mark.slow
def test_memory_that_runs_out_whatever_the_portions(tmp_path: Path) -> None:
    def full(self: ViDT, *images: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    tree = tiny_task(tmp_path, lambda tree: {})
    with swapped(ViDT, "forward", full):
        code, line = diagnose(failure_here(tree))
    assert code == Code.OOM and "eval_size" in line


def test_progress_becomes_percent_and_stages(tmp_path: Path) -> None:
    """1.00 is not reached before all is over; nothing falls; a stage has the trainer's numbers."""
    tree = training_task(tmp_path)
    weights = tree.output / "last.safetensors"
    save_file({"weight": torch.ones(1)}, weights)
    monitor = Monitor(tree.monitor, "t1")
    outcome = training.Outcome(monitor, TrainingResult(read_task(tree.env_file)))
    shown = []
    for fraction, event in ((0.0, "start"), (0.5, "step"), (1.0, "evaluation"), (1.0, "end")):
        metrics = {"map50": 0.25, "mar_100": -1.0}
        outcome(Progress(event, fraction, 3, 8, 8, metrics, weights=weights))  # type: ignore[arg-type]
        shown.append(monitor._fraction)
    assert shown == sorted(shown) and shown[0] > 0 and shown[-1] == training.ALMOST
    (stage,) = tree.result["model_stages"].values()
    assert (stage["stage_name"], stage["mAP"], stage["mAR"]) == ("epoch_4", 0.25, 0.0)
    with safe_open(listed_weights(tree)[0], framework="pt") as file:
        assert list(file.keys()) == ["weight"]


def test_a_class_has_its_best_threshold_in_the_log() -> None:
    """Of right, right, wrong, right at falling scores, three true boxes: F1 6/7 at the last."""
    hits = Hits(np.array([0.9, 0.7, 0.6, 0.4]), np.array([True, True, False, True]), 3)
    nothing = Hits(np.zeros(0), np.zeros(0, bool), 2)
    said = training.best_thresholds([curve("cat", hits), curve("dog", nothing)])
    assert said.endswith("cat 0.400 (F1 0.857), dog - (nothing right)")


@pytest.mark.slow
def test_stages_with_onnx_models_and_thresholds(tmp_path: Path) -> None:
    """The model is listed beside the weights, and finds what they find."""
    pytest.importorskip("onnxruntime")
    tree = training_task(tmp_path, backbone_name="swin_test", epochs=1, export_onnx="yes")
    ended = run_parent(tree, module="ymir_tiny")
    check_end(tree, ended)
    weights, model = listed_weights(tree)
    assert model.name == "epoch_1.onnx" and "thresholds with the highest F1" in ended.said
    image = next((tree.root / "in/assets").glob("val*.png"))
    ours, theirs = (vidt.load(path).predict(image, threshold=0) for path in (weights, model))
    assert np.allclose(sorted(ours.scores), sorted(theirs.scores), atol=0.05)
    assert not list(tree.output.glob("training/*.onnx*"))


def test_a_stage_whose_export_fails_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = training_task(tmp_path)
    weights = tree.output / "last.safetensors"
    save_file({"weight": torch.ones(1)}, weights)
    monitor, result = Monitor(tree.monitor, "t1"), TrainingResult(read_task(tree.env_file))
    outcome = training.Outcome(monitor, result, with_onnx=True)
    outcome(Progress("evaluation", 1.0, 3, 8, 8, {"map50": 0.25}, weights=weights))
    assert [path.name for path in listed_weights(tree)] == ["epoch_4.safetensors"]
    assert "stage epoch_4 has no ONNX model" in caplog.text


@pytest.mark.slow
def test_a_stopped_training_leaves_its_results_alone(tmp_path: Path) -> None:
    """SIGTERM in the middle of a run: over within seconds, and what was listed is there."""
    tree = training_task(tmp_path, epochs=200, backbone_name="swin_test")
    process = start(tree, module="ymir_tiny")
    wait_for(process, tree.models / "result.yaml")
    process.terminate()
    assert process.wait(30) == 143
    said = (tree.root / "log.txt").read_text()
    assert tree.record[2:5] == ["1.00", "4", str(int(Code.CONTAINER))], said
    assert said.splitlines()[-1].endswith("stopped by SIGTERM")
    assert wait_until_gone(f"MARK={tmp_path}", 0) == []
    for path in listed_weights(tree):
        load_weights(path)


def wait_for(process: subprocess.Popen, path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
