"""What would overwrite, exhaust or command this machine is refused in one line, or does no harm."""

import csv
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import (
    ROOT,
    Learnt,
    argv,
    call,
    cpu,
    environment,
    last_checkpoint,
    main_here,
    newest_checkpoint,
    run,
)

import trainer.loop.run_lock
from trainer.commands.command_line import main
from trainer.commands.predictions import WINDOW_PIXELS, pixels_of
from trainer.loop import resume
from trainer.loop.agreement import Agreement
from trainer.loop.run_lock import NAME, held, only_run_in
from trainer.readers.findings import Finding, read_findings, write_findings
from trainer.report.console import score_table
from trainer.scoring.prediction_formats import csv_format
from trainer.settings.parsing import parse
from trainer.settings.yaml_text import MOST_BYTES, BadYAML, load_yaml
from vidt.atomic import atomic_write, remove_leftovers, unfinished
from vidt.errors import UserError, escaped, printable, shown
from vidt.images.batching import read_ahead
from vidt.images.files import UnreadableImage, read_image
from vidt.images.image_files import fitting
from vidt.weights.checkpoint import load_model
from vidt.weights.weights_file import UnusableWeights

Text = pytest.CaptureFixture[str]


def one_error(capsys: Text, *words: str) -> str:
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < 1000, line
    for word in words:
        assert word in line, line
    return line


# Two runs in one folder

HOLD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from trainer.loop.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds `tmp_path`."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_a_folder_is_refused(
    tiny_data: Path, tmp_path: Path, holder: subprocess.Popen, capsys: Text
) -> None:
    (tmp_path / "metrics.csv").write_text("the first one's")
    assert main_here(argv(tiny_data, tmp_path, "--max_steps 1")) == 2
    one_error(capsys, f"--output_dir {tmp_path} is in use by process {holder.pid} on ")
    assert sorted(os.listdir(tmp_path)) == [NAME, "metrics.csv"]


def test_a_killed_run_s_folder_is_taken_over(tmp_path: Path, holder: subprocess.Popen) -> None:
    for name in (".last.safetensors.00000000-1-0.tmp", ".config.yaml.tmp"):
        (tmp_path / name).write_text("cut o")
    holder.kill()
    holder.wait()
    assert (tmp_path / NAME).exists()
    with held(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    # Only what looks like our own temporary files goes.
    assert os.listdir(tmp_path) == [".config.yaml.tmp"]


def test_the_lock_is_held_once_by_a_process_and_released(tmp_path: Path) -> None:
    agreement = Agreement(cpu())
    with only_run_in(tmp_path, agreement), only_run_in(tmp_path, agreement):
        assert (tmp_path / NAME).exists()
    assert not (tmp_path / NAME).exists()
    with pytest.raises(RuntimeError), held(tmp_path / "deep/er"):
        raise RuntimeError
    assert os.listdir(tmp_path / "deep/er") == []


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, as some network ones."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(trainer.loop.run_lock.fcntl, "lockf", refuse)


@pytest.mark.parametrize(
    ("owner", "is_free"),
    [
        (None, True),
        ({"host": "this", "process": 2**22 + 1}, True),  # beyond Linux's largest process id
        ({"host": "this", "process": 1}, False),
        ({"host": "elsewhere", "process": 2**22 + 1}, False),
        ({"host": "this", "process": "x"}, False),
        ("cut of", False),
        ("", False),  # created by a process that has not signed yet
    ],
)
def test_without_locks_the_file_decides(
    tmp_path: Path, no_locks: None, owner: Any, is_free: bool
) -> None:
    if isinstance(owner, dict):
        host = os.uname().nodename if owner["host"] == "this" else owner["host"]
        (tmp_path / NAME).write_text(json.dumps({**owner, "host": host}))
    elif owner is not None:
        (tmp_path / NAME).write_text(owner)
    if is_free:
        with held(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
        assert os.listdir(tmp_path) == []
    else:
        with pytest.raises(UserError, match=r"in use by .*delete .*\.run\.lock"), held(tmp_path):
            pass
        assert os.listdir(tmp_path) == [NAME]


def test_a_write_goes_through_links_and_into_pipes(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    atomic_write(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "target"]


WRITE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from vidt.atomic import atomic_write
letter, path = sys.argv[1:]
for _ in range(300):
    atomic_write(path, letter.encode() * 100_000, durable=False)
"""


def test_two_writers_of_one_path_write_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    words = [sys.executable, "-c", WRITE]
    writers = [subprocess.Popen([*words, letter, str(path)], env=environment()) for letter in "ab"]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 100_000 and len(set(data)) == 1
            reads += 1
    assert [writer.returncode for writer in writers] == [0, 0] and reads > 10
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_kill_left_goes_with_the_next_write(tmp_path: Path) -> None:
    with unfinished(tmp_path / "file") as mine:
        other = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))
        for path in (mine, other):
            path.write_text("cut o")
        remove_leftovers(tmp_path)
        assert mine.exists() and not other.exists()
        other.write_text("cut o")
        atomic_write(tmp_path / "file", b"whole")
        assert sorted(os.listdir(tmp_path)) == sorted([mine.name, "file"])


def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    for name in ("x" * 255, "\u00e9" * 127):
        atomic_write(tmp_path / name, b"1")
    assert len(os.listdir(tmp_path)) == 2


def test_a_run_set_aside_keeps_its_own_files(tiny_data: Path, room: Path) -> None:
    run(tiny_data, room, "--max_steps 1 --seed 1")
    before = (room / "config.yaml").read_text()
    run(tiny_data, room, "--max_steps 1 --seed 2")
    assert "seed: 1\n" in before and (room / "earlier/config.yaml").read_text() == before
    assert "seed: 2\n" in (room / "config.yaml").read_text()


# vidt predict --out


def predicted(learnt: Learnt, *words: str) -> int:
    return main(["predict", str(learnt.weights), *words, "--device", "cpu"])


def test_results_of_a_pattern_that_climbs_stay_inside(learnt: Learnt, tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(tmp_path / "in/a.png")
    pattern = f"{tmp_path}/in/*/../../in/*.png"
    assert predicted(learnt, pattern, "--out", str(tmp_path / "out/here"), "--yolo") == 0
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in written if path.parts[:2] == ("out", "here")]) == 3
    assert {path.parts[0] for path in written} == {"in", "out"}


@pytest.mark.parametrize("length", [254, 255])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg"])
def test_the_longest_names(learnt: Learnt, tmp_path: Path, length: int, suffix: str) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for letter in "ab":  # names that shortening must not make equal
        name = "x" * (length - len(suffix) - 1) + letter + suffix
        Image.new("RGB", (64, 48)).save(folder / name)
    assert predicted(learnt, str(folder), "--out", str(out), "--yolo") == 0
    pictures = [path for path in out.iterdir() if path.suffix in (".jpg", ".png")]
    assert len(pictures) == 2 and len(list((out / "labels").iterdir())) == 2


def test_fitting_keeps_what_fits() -> None:
    assert fitting("a/b", ".jpg") == "a/b.jpg"
    assert len(fitting("x" * 251, ".jpg")) == len(fitting("x" * 300, ".jpg")) == 255
    assert fitting("x" * 300, ".jpg") != fitting("x" * 301, ".jpg")


def png(path: Path, width: int, height: int) -> Path:
    """A black picture of one bit a pixel, written without holding its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


@pytest.mark.parametrize(("width", "height"), [(170_000_000, 1), (1, 300_000)])
def test_a_picture_that_is_a_thread_is_skipped_and_named(
    learnt: Learnt, tmp_path: Path, width: int, height: int, capsys: Text
) -> None:
    (tmp_path / "in").mkdir()
    thread = png(tmp_path / "in/a.png", width, height)
    Image.new("RGB", (64, 48)).save(tmp_path / "in/b.png")
    assert predicted(learnt, str(tmp_path / "in"), "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().err
    assert "skipped 1" in said and str(thread) in said and "a side may have at most" in said
    with pytest.raises(UnreadableImage, match="a side may have"):
        read_image(thread)


def test_pixels_in_flight_are_limited(tmp_path: Path) -> None:
    """Of large pictures no more than the limit are read ahead, of small ones as many as ever."""
    for weight, most in ((WINDOW_PIXELS, 1), (WINDOW_PIXELS // 3, 3), (0, 9)):
        taken, ahead = 0, []

        def items(count: int = 20) -> Iterator[int]:
            nonlocal taken
            for number in range(count):
                yield number
                taken += 1

        reads = read_ahead(
            items(),
            lambda number: number,
            4,
            weigh=lambda number, weight=weight: weight,
            heaviest=WINDOW_PIXELS,
        )
        for number in reads:
            ahead.append(taken - number)
        assert 0 < max(ahead) <= most
    assert pixels_of(str(png(tmp_path / "a.png", 700, 300))) == 210_000
    assert pixels_of(str(tmp_path / "none.png")) == 0


@pytest.mark.slow
def test_memory_for_huge_pictures(learnt: Learnt, tmp_path: Path) -> None:
    """Six of 100 million pixels: decoded together they would take 2.4 GB."""
    (tmp_path / "in").mkdir()
    for number in range(6):
        png(tmp_path / f"in/{number}.png", 10_000, 10_000)
    code = (
        "import resource, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import tiny_runs  # it adds the backbone of the weights\n"
        "from trainer.commands.command_line import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    words = ["predict", str(learnt.weights), str(tmp_path / "in"), "--json"]
    words += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    done = call([sys.executable, "-c", code, *words], timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) / 2**20 < 2.5


# YAML


def doubling(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"lr: *a{levels - 1}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: 2020-99-99", "is not YAML"),
        ("epochs: 2020-01-01", "epochs is datetime.date(2020, 1, 1); it must be a whole number"),
        ("epochs: !!timestamp x", "is not YAML"),
        ("epochs: !!int x", "is not YAML"),
        ("epochs: !!float x", "is not YAML"),
        ("epochs: !!bool x", "is not YAML"),
        ("epochs: !!python/object/apply:os.system [true]", "is not YAML"),
        ("epochs: " + "[" * 3000, "levels deep"),
        ("epochs: " + "{a: " * 3000, "levels deep"),
        ("&a epochs: *a", "epochs is 'epochs'"),
        ("epochs: &a [*a]", "epochs is ["),
        (doubling(9), "write fewer aliases"),
        (doubling(4), "unknown setting a0"),
        ("epochs: " + "9" * 5000, "is not YAML"),
        ("epochs: 0x" + "f" * 5000, "a number of 20,000 bits; it must be a whole number"),
        ("lr: 1" + "0" * 400, "it must be a number"),
        ("lr: '" + "z" * 100_000 + "'", "...z"),
        ("? [1, 2]\n: 3", "is not YAML"),
        ("? !!set {a}\n: 3", "is not YAML"),
        ("x" * 900 + ": 1", "unknown setting xxx"),
        ('"a\\e[2Jb": 1', "unknown setting a\\x1b[2Jb"),
        ("\x00", "is not YAML"),
    ],
)
def test_yaml_of_any_make_is_one_line_with_the_file(
    tmp_path: Path, text: str, words: str, capsys: Text
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        parse(["--config", str(path)])
    assert time.process_time() - began < 20
    message = str(caught.value)
    assert str(path) in message and words in message
    assert len(message) < 600 and message.isprintable()
    (tmp_path / "data.yaml").write_text(text)
    assert main(["check", "--yolo_path", str(tmp_path / "data.yaml")]) == 2
    one_error(capsys, "data.yaml")


def test_yaml_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"#" * (MOST_BYTES + 1))
    for each in (path, "/dev/zero"):
        with pytest.raises(UserError, match=f"{each} is larger than 4,194,304 bytes"):
            parse(["--config", str(each)])


def test_yaml_that_people_write_is_read() -> None:
    text = "\ufefflr: &rate 1e-3\nmin_lr: *rate\nnames: [no, 2020-01-01]\n"
    loaded = load_yaml(text.encode(), "x")
    assert loaded["lr"] == loaded["min_lr"] == "1e-3" and loaded["names"][0] is False
    with pytest.raises(BadYAML, match=r"^name\.yaml is not YAML"):
        load_yaml("a: [", "name.yaml")


# Headers of weights files


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_classes", value) for value in (10**9, 4, 2, "3", 3.0, True, -1, None)),
        *(("reduced_dim", value) for value in (32_000_000, 128, 8192, 0)),
        *(("det_token_num", value) for value in (10**9, 10_000)),
        *(("pos_dim", 8192), ("dim_feedforward", 65_536), ("dec_layers", 100), ("nheads", 64)),
        *(("dec_layers", 0), ("dec_n_points", 1024), ("with_vector", True), ("epff", "yes")),
        *(("method", "vidt_wo_neck"), ("backbone_name", "swin_base_win7_22k"), ("dropout", "x")),
    ],
)
def test_a_header_that_does_not_fit_is_refused_before_anything_is_built(
    learnt: Learnt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    path = changed_header(learnt.weights, tmp_path / "bad.safetensors", "config", field, value)
    if field not in ("backbone_name",):  # whose sizes are those of a published one
        monkeypatch.setattr("vidt.weights.checkpoint.build_detector", None)
    with pytest.raises(UnusableWeights, match=r"bad\.safetensors") as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eval_size", 10**9),
        ("eval_size", 64.5),
        ("mean", [0.5, 0.5, "x"]),
        ("std", [0.5, 0.5, 0]),
        ("std", 1),
        ("mean", [float("nan")] * 3),
    ],
)
def test_preprocessing_that_cannot_be(
    learnt: Learnt, tmp_path: Path, field: str, value: Any
) -> None:
    bad = tmp_path / "bad.safetensors"
    changed_header(learnt.weights, bad, "preprocessing", field, value)
    with pytest.raises(UnusableWeights, match=r"bad\.safetensors has a header that cannot be read"):
        load_model(bad)


def changed_header(source: Path, target: Path, part: str, field: str, value: Any) -> Path:
    """A copy of a weights file with another value in its header."""
    with open(source, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))["__metadata__"]
    header[part] = json.dumps({**json.loads(header[part]), field: value})
    save_file(load_file(source), target, metadata=header)
    return target


# Flags

LIMITED = (
    *("--num_workers", "--batch_size", "--eval_batch_size", "--epochs", "--max_steps"),
    *("--eval_size", "--train_sizes", "--train_max_size", "--denoising", "--keep"),
    *("--det_token_num", "--dec_layers", "--reduced_dim", "--dim_feedforward", "--nheads"),
)


@pytest.mark.parametrize("flag", LIMITED)
@pytest.mark.parametrize("value", ["1000000000000", "9" * 30, "9" * 5000])
def test_flags_have_upper_limits(flag: str, value: str) -> None:
    with pytest.raises(UserError, match=flag.removeprefix("--")) as caught:
        parse([flag, value])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("command", ["predict w a.png", "evaluate w --json a --images b"])
def test_commands_limit_the_batch(command: str, capsys: Text) -> None:
    assert main([*command.split(), "--batch_size", "1000000000"]) == 2
    one_error(capsys, "--batch_size: 1000000000 is too large; it must be at most 65,536")


# A full disk, a signal

FULL_DISK = f"""
import sys, tempfile
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
import tensorboard.summary.writer.record_writer as records
from tiny_runs import main_here
write, count, most, words = records.RecordWriter.write, 0, int(sys.argv[1]), sys.argv[2:]

def full(self, data):
    global count
    count += 1
    if count > most:
        raise OSError(28, "No space left on device")
    write(self, data)

records.RecordWriter.write = full
sys.exit(main_here(words))
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 1, 9])
def test_events_on_a_full_disk_are_told_in_one_line(
    tiny_data: Path, room: Path, before: int
) -> None:
    words = [str(before), *argv(tiny_data, room, "--max_steps 3")]
    done = call([sys.executable, "-c", FULL_DISK, *words])
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "TensorBoard" in line]
    assert told == [
        f"{room}/tensorboard cannot be written (No space left on device); the run goes on without "
        "TensorBoard"
    ]
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert (room / "best.safetensors").exists()


INTERRUPTED = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
import trainer.train
from tiny_runs import main_here
before, signum, words = trainer.train.checked_datasets, int(sys.argv[1]), sys.argv[2:]

def interrupted(*given):
    signal.raise_signal(signum)
    return before(*given)

trainer.train.checked_datasets = interrupted
sys.exit(main_here(words))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_loop(
    tiny_data: Path, room: Path, signum: signal.Signals, code: int
) -> None:
    words = [str(int(signum)), *argv(tiny_data, room, "--max_steps 3")]
    done = call([sys.executable, "-c", INTERRUPTED, *words])
    assert done.returncode == code
    assert done.stderr.splitlines() == [
        "stopped at once; --resume continues from the last checkpoint, if there is one"
    ]
    assert NAME not in os.listdir(room)


# What names can do

RED = "\x1b[31mred\x07"


def test_names_do_not_command_the_terminal(tmp_path: Path, capsys: Text) -> None:
    table = score_table({f"ap50/{RED}": 0.5, f"ap/{RED}": 0.5, "map50": 0.5, "map": 0.5})
    assert "\\x1b[31mred\\x07" in table and "\x1b" not in table
    finding = Finding("kind", "info", "kept", "two\nlines", file=f"{RED}.png")
    assert finding.line() == "\\x1b[31mred\\x07.png: two\\nlines"
    assert main(["check", "--coco_path", f"{tmp_path}/{RED}\nerror: all is well"]) == 2
    assert "\\x1b[31mred\\x07" in one_error(capsys)
    folder = ["--output_dir", str(tmp_path / "out")]
    assert main_here(["--coco_path", f"{tmp_path}/{RED}\nerror: all is well", *folder]) == 2
    assert "\\x1b[31mred\\x07\\nerror: all is well" in one_error(capsys)
    assert main_here(["--epochs", RED]) == 2
    assert "\\x1b[31mred" in one_error(capsys)


def test_text_that_people_read_stays_as_it_is() -> None:
    for text in ("caf\u00e9 \u732b", "\u3000\u00a0", "a\tb\n"):
        assert printable(text) == text
    assert escaped("a\tb\n\u202e\udc80") == "a\\tb\\n\\u202e\\udc80"
    assert shown("x" * 81) == "x" * 53 + "..." + "x" * 20
    assert shown({"a": 1}) == "{'a': 1}"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "'=1", "'", "a=1"])
def test_no_cell_is_a_formula(tmp_path: Path, name: str) -> None:
    findings = [Finding("kind", "info", "kept", name, name, name, image_id=-1)]
    write_findings(tmp_path / "findings.csv", findings)
    assert read_findings(tmp_path / "findings.csv") == findings
    with open(tmp_path / "findings.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["image_id"] == "-1" and not row["file"].startswith(("=", "+", "-", "@", "\t"))


def test_predictions_have_no_formula() -> None:
    class Found:
        file, names, labels, scores, boxes = "=a.png", ["@b"], [0], [0.5], torch.zeros(1, 4)

    (row,) = csv.reader(io.StringIO(csv_format().record(0, Found())))  # type: ignore[arg-type]
    assert row[:3] == ["'=a.png", "0", "'@b"]


# A damaged checkpoint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "3"),
        ("step", 2.5),
        ("step", None),
        ("best_map50", "high"),
        ("best_metrics", []),
        ("best_metrics", {"map50": "high"}),
        ("stopped_early", 0),
        ("settings", "none"),
        ("dataset", 7),
    ],
)
def test_a_state_of_other_types_is_damaged(tiny_data: Path, room: Path, field: str, value: Any):
    run(tiny_data, room, "--max_steps 2 --save_steps 1")
    newest = last_checkpoint(room)
    content = json.loads((newest / resume.STATE).read_text())
    content["state"][field] = value
    (newest / resume.STATE).write_text(json.dumps(content))
    path, skipped = newest_checkpoint(room)
    assert path is not None and path.name == "step-00000001"
    (line,) = skipped
    assert line.startswith(f"checkpoint {newest} is damaged: TypeError: {field}")
