"""`trainer/train.py` as people start it: one run through the real launcher, and what goes wrong in
one line.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import (
    NAMES,
    ROOT,
    Learnt,
    argv,
    call,
    command,
    main_here,
    program,
    published,
    random_pictures,
    run,
    write_coco,
)

from trainer.loop import resume
from trainer.scoring.average_precision import COCO_NUMBERS
from vidt.convert import to_theirs

BCCD = ROOT.parent / "shared/data/bccd"
# Put in the way of every Python process of a run: notes any attempt to leave the machine, and
# refuses it.
GUARD = """
import os, socket, sys

HERE = {"", "localhost", "0.0.0.0", "::", "::1", socket.gethostname(), None}

def local(host):
    host = host.decode() if isinstance(host, bytes) else host
    return host in HERE or str(host).startswith("127.")

def guard(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.connect"):
        where = args[0] if event.startswith("socket.get") else args[1]
        host = where[0] if isinstance(where, tuple) else "localhost" if event[7:] in (
            "sendto", "connect") else where
        if not local(host):
            with open(os.environ["NETWORK_LOG"], "a") as log:
                log.write(f"{event} {host} {sys.argv}\\n")
            raise OSError(f"no network: {event} {host}")
        with open(os.environ["NETWORK_LOG"] + ".local", "a") as log:
            log.write(f"{event} {host}\\n")

sys.addaudithook(guard)
"""


@pytest.fixture
def guarded(tmp_path: Path) -> dict[str, str]:
    """An environment without a network, and with the settings that would switch reports on left
    as they are for everybody.
    """
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(GUARD)
    return {"PYTHONPATH": str(folder), "NETWORK_LOG": str(tmp_path / "network.log")}


def test_the_guard_notes_and_refuses(guarded: dict[str, str]) -> None:
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    done = call(["python", "-c", code], PATH=str(Path(program("python")).parent), **guarded)
    assert done.returncode != 0 and "no network" in done.stderr
    assert "192.0.2.1" in Path(guarded["NETWORK_LOG"]).read_text()


@pytest.mark.slow
def test_a_run_through_the_launcher(tiny_data: Path, room: Path, guarded: dict[str, str]) -> None:
    """Everything promised is there, and nothing tried to leave the machine."""
    launch = [program("accelerate"), "launch", "--config_file", "accelerate_config.yaml"]
    flags = "--max_steps 5 --num_workers 1 --keep 1"
    done = call([*launch, "trainer/train.py", *published(tiny_data, room, flags)], **guarded)
    assert done.returncode == 0, done.stderr
    assert not Path(guarded["NETWORK_LOG"]).exists(), Path(guarded["NETWORK_LOG"]).read_text()
    check_results(room)
    check_said(done.stdout)


def check_results(output: Path) -> None:
    for name in ("best", "last"):
        with safe_open(output / f"{name}.safetensors", framework="pt") as file:
            header = file.metadata()
        assert sorted(json.loads(header["class_names"])) == sorted(NAMES)
        assert json.loads(header["config"])["det_token_num"] == 8
        assert json.loads(header["preprocessing"])["eval_size"] == 64
        assert set(COCO_NUMBERS) < set(json.loads(header["metrics"]))
    assert os.listdir(output / "checkpoints") == ["step-00000005"]
    settings = yaml.safe_load((output / "config.yaml").read_text())
    assert settings["max_steps"] == 5 and settings["batch_size"] == 4
    with open(output / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "5"]
    assert all(float(row["loss"]) > 0 and float(row["map50"]) >= 0 for row in rows)
    with open(output / "findings.csv", newline="") as file:
        kinds = {row["kind"] for row in csv.DictReader(file)}
    assert kinds == {
        "image without boxes",
        "image in both training and validation",
        "class with fewer than 10 training boxes",
    }
    with Image.open(output / "predictions.jpg") as picture:
        assert picture.width > 100 and picture.height > 100
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    expected = {"train/loss", "train/loss_ce", "run/lr", "run/grad_norm", "run/images_per_second"}
    assert expected | {"run/memory_gib", "val/map50"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert tags["images"]


def check_said(said: str) -> None:
    for expected in ("from step 0 to 5 (3 per epoch), 4 images a step on 1 x cpu", "best.safetens"):
        assert expected in said
    assert "map50" in said and "class" in said and "AP50" in said


@pytest.mark.skipif(not BCCD.exists(), reason="the blood cell pictures are not beside the checkout")
def test_check_names_the_two_degenerate_boxes_and_trains_nothing(
    room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [f"--{split}_json {BCCD / split}.json" for split in ("train", "val")]
    folders = [f"--{split}_images {BCCD / 'images'}" for split in ("train", "val")]
    words = " ".join([*files, *folders, f"--output_dir {room} --check --backbone_name swin_nano"])
    caplog.set_level("INFO", logger="trainer")
    assert main_here(words.split()) == 0
    with open(room / "findings.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "degenerate box"]
    assert len(rows) == 2 and all(row["file"].endswith(".jpg") for row in rows)
    for row in rows:
        assert Path(row["file"]).name in caplog.text
    assert os.listdir(room) == ["findings.csv"]


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("mode", ["", "--eval"])
def test_a_pickle_with_code_in_it_is_refused(
    tiny_data: Path, room: Path, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = room / "evil.pth"
    torch.save({"model": {"weight": torch.ones(1)}, "extra": Trap(room / "trapped")}, evil)
    words = argv(tiny_data, room / "out", mode, f"--load_from {evil}")
    assert main_here(words) == 2
    assert one_line(capfd).startswith(f"error: {evil} cannot be read")
    assert not (room / "trapped").exists()


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = capfd.readouterr().err.splitlines()
    return line


def broken_json(room: Path) -> str:
    (room / "annotations").mkdir()
    for split in ("train", "val"):
        (room / f"{split}2017").mkdir()
        (room / f"annotations/instances_{split}2017.json").write_text('{"images": [')
    return f"--coco_path {room}"


def torn_weights(room: Path) -> str:
    save_file({"weight": torch.ones(1000)}, room / "torn.safetensors")
    os.truncate(room / "torn.safetensors", 500)
    return f"--load_from {room / 'torn.safetensors'}"


def torn_checkpoints(room: Path) -> str:
    state = resume.RunState(step=3)
    resume.save(room / "checkpoints", state, {"model/weight": torch.ones(1000)}, keep=1)
    os.truncate(room / "checkpoints/step-00000003/tensors.safetensors", 500)
    return f"--resume {room}"


def a_file_for_a_folder(room: Path) -> str:
    (room / "results").write_text("a note")
    return f"--output_dir {room / 'results'}"


def most_images_gone(room: Path) -> str:
    write_coco(room, random_pictures(4, 0), random_pictures(2, 1))
    shutil.rmtree(room / "train2017")
    (room / "train2017").mkdir()
    return f"--coco_path {room}"


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        (f"--output_dir {__file__}", "test_command_line.py is a file; name a folder"),
        ("--coco_path nowhere", "nowhere/annotations/instances_train2017.json"),
        ("--num_classes 5", "--num_classes 5, but instances_train2017.json has 3 classes"),
        ("--lrr 1e-4", "lrr"),
        ("--batch_size 0", "batch_size is 0"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--load_from nowhere.pth", "--load_from nowhere.pth: no such file"),
        ("--load_from a.pth --resume", "--load_from and --resume exclude each other"),
        ("--eval --check --load_from a.pth", "--eval and --check exclude each other"),
        ("--eval", "--eval needs --load_from"),
        ("--eval --load_from nowhere.pth", "nowhere.pth"),
        ("--resume nowhere", "--resume nowhere: there is no intact checkpoint"),
        ("--pre_trained nowhere.pth", "nowhere.pth"),
        ("--denoising 5 --no-with_box_refine", "--denoising needs --with_box_refine"),
        ("--denoising 5 --dec_layers 0", "vidt --dec_layers 0 has none"),
        (broken_json, "instances_train2017.json: not JSON"),
        (torn_weights, "torn.safetensors"),
        (torn_checkpoints, "there is no intact checkpoint"),
        (a_file_for_a_folder, "results"),
        (most_images_gone, "4 of 4 images cannot be used"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    tiny_data: Path,
    room: Path,
    mistake: str | Callable[[Path], str],
    expected: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = mistake if isinstance(mistake, str) else mistake(room)
    assert main_here(argv(tiny_data, room / "out", flags)) == 2
    line = one_line(capfd)
    assert line.startswith("error: ") and expected in line


def test_weights_of_another_architecture_name_the_flag(
    learnt: Learnt, tiny_data: Path, room: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = f"--load_from {learnt.weights} --det_token_num 9"
    assert main_here(argv(tiny_data, room, flags)) == 2
    assert one_line(capfd).endswith("has det_token_num 8, this run 9; pass --det_token_num 8")


def test_eval_gives_the_number_in_the_file(learnt: Learnt, room: Path) -> None:
    """With a batch size of its own, and flags of the architecture that it does not need."""
    flags = f"--eval --load_from {learnt.weights} --batch_size 3 --det_token_num 20"
    assert main_here(argv(learnt.data, room, flags)) == 0
    metrics = json.loads((room / "evaluation.json").read_text())
    with safe_open(learnt.weights, framework="pt") as file:
        expected = json.loads(file.metadata()["metrics"])
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_eval_needs_the_validation_files_alone_and_takes_the_size_from_the_weights(
    learnt: Learnt, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [learnt.data / "annotations/instances_val2017.json", learnt.data / "val2017"]
    words = ["--eval", "--load_from", learnt.weights, "--output_dir", room, "--num_workers", 0]
    words += ["--val_json", files[0], "--val_images", files[1]]
    assert main_here([str(word) for word in words]) == 0
    metrics = json.loads((room / "evaluation.json").read_text())
    with safe_open(learnt.weights, framework="pt") as file:
        expected = json.loads(file.metadata()["metrics"])
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert "was trained for" not in caplog.text


def test_a_written_configuration_repeats_the_run(tiny_data: Path, room: Path) -> None:
    first = run(tiny_data, room, "--max_steps 2")
    words = ["--config", str(room / "config.yaml"), "--output_dir", str(room / "again")]
    assert main_here(words) == 0
    state = resume.load(resume.checkpoints(room / "again/checkpoints")[0]).state
    assert state.best_metrics == first


BUG = """
import sys
from trainer.data import load

def buggy(*given, **more):
    return dict(zip((1, 2), (1,), strict=True))

load.read_datasets = load.read_parts = buggy
"""
# In place of the programs that `accelerate launch` and the console start.
TRAIN = BUG + "import trainer.train\ntrainer.train.main()\n"
CHECK = BUG + (
    "import trainer.commands.check, trainer.commands.command_line as vidt\n"
    "trainer.commands.check.run = buggy\n"
    "sys.exit(vidt.main(['check', *sys.argv[1:]]))\n"
)


@pytest.mark.parametrize(
    ("program_text", "launcher"),
    [
        pytest.param(TRAIN, ["accelerate", "launch", "--cpu"], marks=pytest.mark.slow),
        pytest.param(CHECK, ["python"], id="vidt"),
    ],
)
def test_a_bug_of_ours_keeps_its_traceback(
    tiny_data: Path, room: Path, program_text: str, launcher: list[str]
) -> None:
    script = room / "program.py"
    script.write_text(program_text)
    words = [program(launcher[0]), *launcher[1:], str(script), *published(tiny_data, room / "run")]
    done = call(words, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in buggy" in done.stderr
    assert "ValueError: zip() argument 2 is shorter than argument 1" in done.stderr
    assert "error: zip" not in done.stderr


@pytest.mark.slow
def test_in_a_process_of_its_own_a_mistake_leaves_no_trace_of_python(
    tiny_data: Path, room: Path
) -> None:
    done = call(command(tiny_data, room, "--num_classes 5"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_eval_of_a_released_file_and_of_fewer_decoder_layers(
    learnt: Learnt, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same weights under the released names score the same; without their only decoder layer,
    which the log names, they score less.
    """
    released = room / "released.pth"
    to_theirs(learnt.weights, released)
    scores = {}
    for layers in (1, 0):
        flags = f"--eval --load_from {released} --eval_size 64 --dec_layers {layers}"
        assert main_here(argv(learnt.data, room, flags)) == 0
        scores[layers] = json.loads((room / "evaluation.json").read_text())["map"]
        said = f"{released}: left out decoder layers 1 to 1 and the heads above them"
        assert (said in caplog.text) == (layers == 0)
    assert scores[1] == pytest.approx(learnt.scores[40]["map"], abs=1e-6)
    assert scores[0] < scores[1]
