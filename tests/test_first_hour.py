"""What new users stumbled over: commands in their first hour, and what they are told."""

import json
import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from tiny_runs import Learnt, run, settings, tables

import vidt
from trainer.commands.command_line import main
from trainer.data.dataset_check import check
from trainer.from_python import _as_flags
from trainer.report.console import PrintableFormatter
from trainer.report.progress import Progress
from trainer.scoring.held_out import label_map
from trainer.settings.parsing import parse, write_yaml
from vidt.convert import to_ours, to_theirs
from vidt.errors import UserError
from vidt.weights.checkpoint import start_from
from vidt.weights.weights_file import UnusableWeights, load_weights, save_weights

Output = pytest.CaptureFixture[str]


def told(words: list[object], capsys: Output) -> str:
    """The one line of a command that fails."""
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Racoon", "raccoon", True),
        ("traffic light", "Traffic Light", True),
        ("platelets", "platelet", True),
        ("person 1", "person 2", False),
        ("lane1", "lane12", False),
        ("cat", "car", False),
        ("truck", "train", False),
    ],
)
def test_a_misspelt_class_is_found(one: str, other: str, alike: bool, tiny_data: Path) -> None:
    config, fields = settings(tiny_data, tiny_data)
    train, val = (
        replace(table, class_names=(one, other, "zebra")) for table in tables(config, fields)
    )
    _, _, findings = check(train, val, num_queries=None)
    kinds = [each.detail for each in findings if each.kind == "class names that look alike"]
    assert kinds == ([f"{one}, {other}"] if alike else [])


def test_the_pictures_of_a_run_are_of_its_best_weights(tmp_path: Path, tiny_data: Path) -> None:
    """The first evaluation is the best: nothing is learned at this rate."""
    seen: list[tuple[bool, float]] = []
    path = tmp_path / "predictions.jpg"

    def report(progress: Progress) -> None:
        if progress.event == "evaluation":
            seen.append((progress.best, path.stat().st_mtime_ns))

    run(tiny_data, tmp_path, "--max_steps 3 --epochs 3 --lr 1e-30 --min_lr 0", report=report)
    for (_, before), (best, written) in pairwise(seen):
        assert (written != before) == best


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("predict {w} {photo} --conf 0.5", "unknown flag --conf; its name here is --threshold"),
        ("predict {w} {photo} --imgsz 640", "the size is saved with the weights"),
        ("predict {photo} {w}", "is no weights file; weights come first, then images"),
        ("train {photo}", "settings are --name value; is it --data"),
        ("train --data a b", "takes one value; it has a b; quote a path with blanks"),
        ("push {w} nonsense --dry_run", "is no model of the Hub; write hf://USER/NAME"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(
    words: str, hint: str, learnt: Learnt, tmp_path: Path, capsys: Output
) -> None:
    photo = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(photo)
    assert hint in told(words.format(w=learnt.weights, photo=photo).split(), capsys)


def test_check_and_plan_take_their_data_either_way(tiny_data: Path, capsys: Output) -> None:
    texts = []
    for words in (["check"], ["check", "--data"], ["plan"], ["plan", "--data"]):
        flags = ["--pre_trained", "none"] if words[0] == "plan" else []
        assert main([*words, str(tiny_data), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[2] == texts[3]


def test_the_settings_of_a_plan_can_be_given_back(tiny_data: Path, capsys: Output) -> None:
    words = ["plan", str(tiny_data), "--pre_trained", "none", "--batch_size", "auto"]
    assert main([*words, "--epochs", "3", "--report_to", "none", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["batch_size"] == "auto"
    given = {name: each for name, each in document["settings"].items() if each is not None}
    config, _ = parse(_as_flags(given))
    assert config.batch_size == -1 and config.report_to == () and config.epochs == 3


def test_the_folder_of_a_configuration_is_kept(tmp_path: Path, tiny_data: Path) -> None:
    path = tmp_path / "run.yaml"
    config, fields = settings(tiny_data, tmp_path / "mine", "--max_steps 1")
    write_yaml(path, config, fields)
    found = vidt.train(config=path)
    assert found.output_dir == tmp_path / "mine" and found.weights.exists()


def test_the_log_of_one_process_names_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord("trainer", logging.INFO, "", 0, "[RANK 0] hello", None, None)
    assert PrintableFormatter("%(message)s").format(record) == "hello"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert PrintableFormatter("%(message)s").format(record) == "[RANK 0] hello"


def test_classes_that_differ_in_case_are_two(learnt: Learnt) -> None:
    assert label_map("w", ("Car", "car"), ("car", "Car")).tolist() == [1, 0]
    assert label_map("w", ("Car", "bus"), ("car", "Bus ")).tolist() == [0, 1]
    with pytest.raises(UserError, match="has no class of the dataset"):
        label_map("w", ("a",), ("b",))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", []),
        ("metrics", {"map50": "x"}),
        ("training", {"category_ids": 5}),
        ("training", {"category_ids": ["a"]}),
        ("training", {"data": None}),
        ("training", {"data": {"training": 5}}),
        ("training", {"settings": [1]}),
        ("preprocessing", {"eval_size": 10**9, "mean": [0, 0, 0], "std": [1, 1, 1]}),
        ("preprocessing", {"eval_size": 64, "mean": [0, 0, 10**400], "std": [1, 1, 1]}),
    ],
)
def test_a_header_of_another_kind_is_one_line(
    name: str, value: object, learnt: Learnt, tmp_path: Path, capsys: Output
) -> None:
    with safe_open(learnt.weights, "pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    path = tmp_path / "w.safetensors"
    path.write_bytes(save(tensors, {**header, name: json.dumps(value)}))
    for command in (["info"], ["push", "--dry_run", "hf://a/b"]):
        error = told([*command[:1], path, *command[1:][::-1]], capsys)
        assert "has a header that cannot be read" in error and error.count("\n") == 1


def test_weights_that_do_not_fit_are_one_line(learnt: Learnt, tmp_path: Path) -> None:
    tensors, info = load_weights(learnt.weights)
    path = tmp_path / "w.safetensors"
    model = vidt.load(learnt.weights).model
    for name, tensor in (
        ("class_embed.9.bias", torch.zeros(3)),
        ("class_embed.0.bias", torch.zeros(1)),
        ("class_embed.1.weight", torch.zeros(3, 2)),
        ("class_embed.1.bias", torch.zeros(())),
    ):
        save_weights(path, {**tensors, name: tensor}, info)
        with pytest.raises(UnusableWeights, match=r"w\.safetensors (has|does not)"):
            start_from(model, path, tuple(info.class_names))


def test_the_whole_header_goes_through_a_released_file(learnt: Learnt, tmp_path: Path) -> None:
    there, back = tmp_path / "there.pth", tmp_path / "back.safetensors"
    to_theirs(learnt.weights, there)
    to_ours(there, back)
    _, before = load_weights(learnt.weights)
    _, after = load_weights(back)
    assert before.thresholds and after.thresholds == before.thresholds
    assert after.training == before.training and after.category_ids == before.category_ids
