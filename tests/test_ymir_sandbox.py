"""The sandbox: the folders that it makes, read back, and tasks that it runs."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import ROOT, environment, random_pictures, write_coco

from trainer.readers.coco import read_coco
from trainer.readers.samples import SampleTable
from ymir_adapter.dataset.tables import candidates, read_tables
from ymir_adapter.protocol.task import read_task
from ymir_adapter.sandbox import __main__ as sandbox
from ymir_adapter.sandbox.tree import Request, Tree, make_tree, task_settings

CHECKER = ROOT.parent / "shared/tools/check_ymir_out.py"
TINY = (
    "--det_token_num 8 --dec_layers 1 --dim_feedforward 64 --reduced_dim 64 --pos_dim 32 "
    "--train_sizes 64 --save_interval 9"
)
FORM = {
    **{"pre_trained": "none", "epochs": "1", "eval_size": "64", "batch_size_per_gpu": "4"},
    **{"num_workers_per_gpu": "0", "args_options": TINY},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose boxes have fractions of pixels, and one box without area."""
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, random_pictures(8, seed=0), random_pictures(4, seed=1), ids=(7, 900, 3))
    for path in (root / "annotations").iterdir():
        document = json.loads(path.read_text())
        for number, row in enumerate(document["annotations"]):
            x, y, width, height = row["bbox"]
            row["bbox"] = [x + 0.3, y + 0.6, width + 0.15 * (number % 4), height - 0.7]
        document["annotations"][0]["bbox"][2] = 0
        path.write_text(json.dumps(document))
    return root


def files_of(data: Path, split: str) -> tuple[Path, Path]:
    return data / f"annotations/instances_{split}2017.json", data / f"{split}2017"


def expected(data: Path, split: str) -> dict[str, list[list[int]]]:
    """Rows of (class index, x1, y1, x2, y2) in whole pixels, by the name of the asset; none for a
    box that has no pixel left.
    """
    json_path, folder = files_of(data, split)
    document = json.loads(json_path.read_text())
    order = sorted(category["id"] for category in document["categories"])
    found: dict[str, list[list[int]]] = {}
    for image in document["images"]:
        content = (folder / image["file_name"]).read_bytes()
        rows = found.setdefault(hashlib.sha1(content).hexdigest() + ".png", [])
        for row in document["annotations"]:
            x, y, width, height = row["bbox"]
            corners = [round(x), round(y), round(x + width), round(y + height)]
            if row["image_id"] == image["id"] and corners[2] > corners[0]:
                rows.append([order.index(row["category_id"]), *corners])
    return {name: sorted(rows) for name, rows in found.items()}


def tables_of(data: Path) -> dict[str, SampleTable]:
    train_set, _ = read_coco(*files_of(data, "train"))
    val_set, _ = read_coco(*files_of(data, "val"), train_set.class_names)
    return {"train": train_set, "val": val_set}


def training_tree(data: Path, root: Path, **more: Any) -> Tree:
    tables = tables_of(data)
    return make_tree(root, Request(class_names=tables["train"].class_names, **more), tables)


@pytest.mark.parametrize(
    ("protocol", "export_format"),
    [
        ("none", "ark"),
        ("1.0.0", "ark"),
        *[("1.1.0", export_format) for export_format in ("ark", "voc", "coco")],
    ],
)
def test_the_boxes_are_those_of_the_coco_file(
    data: Path, tmp_path: Path, protocol: str, export_format: str
):
    tree = training_tree(data, tmp_path, protocol=protocol, export_format=export_format)
    train_set, val_set, _ = read_tables(read_task(tree.env_file), num_queries=100)
    for split, table in (("train", train_set), ("val", val_set)):
        found = {
            Path(sample.path).name: sorted(
                [label, *map(int, box)]
                for label, box in zip(sample.labels.tolist(), sample.boxes.tolist(), strict=True)
            )
            for sample in table
        }
        assert found == expected(data, split)
        assert sum(map(len, found.values())) > 3


def test_ark_has_two_more_fields_since_2_0(data: Path, tmp_path: Path):
    for protocol, fields in (("none", 5), ("1.1.0", 7)):
        tree = training_tree(data, tmp_path / protocol, protocol=protocol)
        lines = [
            line
            for path in (tree.input / "annotations").rglob("*.txt")
            for line in path.read_text().splitlines()
        ]
        assert lines and {len(line.split(", ")) for line in lines} == {fields}


def test_assets_are_named_by_their_content(tmp_path: Path):
    root = write_coco(tmp_path / "data", random_pictures(3, seed=2), random_pictures(2, seed=3))
    json_path, folder = files_of(root, "train")
    (folder / "102.png").write_bytes((folder / "101.png").read_bytes())  # there twice
    (folder / "103.png").write_bytes(b"damaged")
    table, _ = read_coco(json_path, folder)
    request = Request(task="mining", class_names=table.class_names)
    tree = make_tree(tmp_path / "tree", request, {"candidate": table})
    listed = candidates(read_task(tree.env_file))
    assert [Path(path).suffix for path in listed] == [".png", ".unknown"]
    for path in map(Path, listed):
        digest = hashlib.sha1(path.read_bytes()).hexdigest()
        assert (path.stem, path.parent.name) == (digest, digest[-2:])


@pytest.mark.parametrize("task", ["training", "mining", "infer", "mining+infer"])
@pytest.mark.parametrize("protocol", ["none", "1.0.0", "1.1.0"])
def test_the_task_is_read_as_it_was_meant(data: Path, tmp_path: Path, task: str, protocol: str):
    weights = tmp_path / "model file.pth"
    weights.write_bytes(b"tensors")
    tables = tables_of(data)
    splits = tables if task == "training" else {"candidate": tables["val"]}
    request = Request(task, protocol, class_names=("a", "1", "yes"), weights=(weights,), gpus=2)
    tree = make_tree(tmp_path / "tree", request, splits)
    read = read_task(tree.env_file)
    asked = {name for name in ("training", "mining", "infer") if getattr(read, f"run_{name}")}
    assert asked == set(task.split("+"))
    assert read.class_names == ("a", "1", "yes") and read.gpu_ids == (0, 1)
    assert read.has_stages == (protocol != "none")
    assert [path.read_bytes() for path in read.weights] == [b"tensors"]
    assert read.weights[0].parent.name == (
        "models" if protocol != "1.1.0" else "default_best_stage"
    )
    assert read.input.root_dir == tree.input and read.output.root_dir == tree.output


@pytest.mark.parametrize(
    ("task", "typed", "sent"),
    [
        ("training", {"epochs": "3"}, {"epochs": 3}),
        ("training", {"learning_rate": "1e-4"}, {"learning_rate": 0.0001}),
        ("training", {"epochs": ""}, {"epochs": None}),
        ("training", {"num_workers_per_gpu": "0"}, {"num_workers_per_gpu": 0}),
        ("training", {"method": "8"}, {"method": "8"}),
        ("training", {"unknown": "0.5"}, {"unknown": 0.5}),
        ("training", {"unknown": "[1, 2]"}, {"unknown": "[1, 2]"}),
        ("infer", {"conf_threshold": "0.25"}, {"conf_threshold": 0.25}),
    ],
)
def test_a_form_sends_numbers_and_text(task: str, typed: dict[str, str], sent: dict[str, Any]):
    settings = task_settings(Request(task, settings=typed))
    key = next(iter(typed))
    assert (settings[key], type(settings[key])) == (sent[key], type(sent[key]))


def test_a_form_leaves_out_what_is_empty():
    assert "args_options" not in task_settings(Request("training"))
    dropped = {"conf_threshold": "0", "class_balance": ""}
    settings = task_settings(Request("mining+infer", settings=dropped))
    assert not set(dropped) & set(settings)
    assert settings["mining_algorithm"] and all(settings.values())


def test_a_draw_is_whole_and_the_same_again(data: Path):
    table = tables_of(data)["train"]
    for share, count in ((0.01, 1), (0.25, 2), (0.99, 7)):
        splits = sandbox.draw(table, share, seed=5)
        ids = [splits[name].image_ids.tolist() for name in ("train", "val")]
        assert len(ids[1]) == count and sorted(ids[0] + ids[1]) == table.image_ids.tolist()
        again = sandbox.draw(table, share, seed=5)
        assert again["val"].image_ids.tolist() == ids[1]
    assert (
        sandbox.draw(table, 0.5, 1)["val"].image_ids.tolist()
        != sandbox.draw(table, 0.5, 2)["val"].image_ids.tolist()
    )


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--task", "infr"], "--task"),
        (["--task", "infer"], "--weights"),
        (["--task", "infer", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["--task", "training", "--from-coco", "nowhere.json"], "nowhere.json"),
        (["--task", "training", "--images", "nowhere"], "nowhere"),
        (["--task", "training", "--limit", "1"], "two"),
        (["--task", "training", "--limit", "0"], "--limit"),
        (["--task", "training", "--limit", "many"], "--limit"),
        (["--task", "training", "--set", "epochs=many"], "epochs=many"),
        (["--task", "training", "--set", "epochs"], "KEY=VALUE"),
        (["--task", "training", "--val-images", "."], "--val-json"),
        (["--task", "training", "--val-share", "1"], "--val-share"),
        (["--task", "training", "--processes", "2", "--gpus", "2"], "--gpus"),
        (["--task", "training", "--protocol", "none", "--export-format", "voc"], "ark"),
        (["--task", "training", "--epochs", "2"], "--epochs"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    data: Path, tmp_path: Path, flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
):
    json_path, folder = files_of(data, "train")
    words = ["--from-coco", str(json_path), "--images", str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        sandbox.main([*words, *flags])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1 and word in said
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(data: Path, tmp_path: Path):
    tree = training_tree(data, tmp_path)
    before = tree.env_file.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        training_tree(data, tmp_path, protocol="1.0.0")
    assert tree.env_file.read_bytes() == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_handed_on(stop: signal.Signals):
    before = signal.getsignal(stop)
    process = subprocess.Popen(["sleep", "60"])
    with sandbox.handed_on(process):
        os.kill(os.getpid(), stop)
        assert process.wait(30) == -signal.SIGTERM
    assert signal.getsignal(stop) == before


Sandbox = Callable[..., tuple[int, str]]


@pytest.fixture
def run_sandbox(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Sandbox:
    """run_sandbox(folder, *flags): exit code and output, in a working directory of its own. The
    task's processes are as real as any; only the sandbox itself is this one.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name, value in environment(PYTHONPATH=path).items():
        monkeypatch.setenv(name, value)

    def run(folder: Path, *words: object) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        capfd.readouterr()
        code = sandbox.main([str(word) for word in words])
        return code, capfd.readouterr().out

    return run


def check_outputs(root: Path, task: str, history: Path) -> None:
    """By the checker that lies beside the project, where it does."""
    if not CHECKER.is_file():
        return
    words = ["--in", root / "in", "--out", root / "out", "--task", task, "--history", history]
    judged = subprocess.run(
        [sys.executable, CHECKER, *words, "--exit-code", "0", "--max-gap", "30"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert judged.returncode == 0, judged.stdout


@pytest.mark.slow
def test_training_then_mining_and_inference_with_what_it_listed(
    data: Path, tmp_path: Path, run_sandbox: Sandbox
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    json_path, folder = files_of(data, "train")
    val_json, val_folder = files_of(data, "val")
    form = [word for key, value in FORM.items() for word in ("--set", f"{key}={value}")]
    code, output = run_sandbox(
        *(elsewhere, "--task", "training", "--out", "run", "--history", "run.txt"),
        *("--from-coco", json_path, "--images", folder, *form),
        *("--val-json", val_json, "--val-images", val_folder),
    )
    assert code == 0, output[-2000:]
    root = elsewhere / "run"
    check_outputs(root, "training", elsewhere / "run.txt")
    result = yaml.safe_load((root / "out/models/result.yaml").read_text())
    for name, stage in result["model_stages"].items():
        assert f"stage    {name}  map50 {stage['mAP']:.4f}" in output
    named = next(line for line in output.splitlines() if line.startswith("weights"))
    weights = tmp_path / "kept.safetensors"
    shutil.copy(named.split(maxsplit=1)[1], weights)
    assert (root / "out/ymir-executor-out.log").read_text() in output
    other = tmp_path / "other"
    other.mkdir()
    os.chdir(other)
    shutil.rmtree(elsewhere)

    code, output = run_sandbox(
        *(other, "--task", "mining+infer", "--out", "run", "--history", "run.txt"),
        *("--from-coco", val_json, "--images", val_folder, "--weights", weights),
        *("--set", "conf_threshold=0.001", "--set", "num_workers_per_gpu=0"),
    )
    assert code == 0, output[-2000:]
    check_outputs(other / "run", "mining+infer", other / "run.txt")
    found = json.loads((other / "run/out/infer-result.json").read_text())["detection"]
    count = sum(len(entry["boxes"]) for entry in found.values())
    assert f"boxes    {count} in {len(expected(data, 'val'))} images" in output
    first = (other / "run/out/result.tsv").read_text().splitlines()[0].split("\t")
    assert f"  {first[1]}  {first[0]}" in output
