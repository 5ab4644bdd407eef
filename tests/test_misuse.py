"""What people do wrong with `vidt`: each mistake is told in one line that names it, its value and
what to do, the exit code is not zero, and nothing half-written is left.
"""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import Learnt, environment, random_pictures, write_coco

from trainer.commands.command_line import main
from vidt.weights.weights_file import load_weights, save_weights

Make = Callable[[Path], object]
# A mistake: the words after `vidt`, in which {name} is a path of the playground, and what the line
# must say.
Mistake = tuple[str, str]


@pytest.fixture(scope="module")
def playground(learnt: Learnt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Good weights, images and annotations, and one of everything that is not."""
    root = tmp_path_factory.mktemp("play")
    write_coco(root / "data", random_pictures(4, 0), random_pictures(3, 0))
    shutil.copy(learnt.weights, root / "good.safetensors")
    for make in (spoilt_weights, spoilt_images, spoilt_annotations):
        make(root)
    yield root
    shutil.rmtree(root)


def spoilt_weights(root: Path) -> None:
    good = root / "good.safetensors"
    whole = good.read_bytes()
    (root / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (root / "empty.safetensors").write_bytes(b"")
    (root / "text.safetensors").write_text("these are no weights")
    tensors, info = load_weights(good)
    save_file(load_file(good), root / "strange.safetensors")
    del tensors["tgt_proj.0.weight"]
    save_weights(root / "gap.safetensors", tensors, info)
    (root / "header.safetensors").write_bytes(whole.replace(b'swin_test\\"', b'swin_tost\\"', 1))
    torch.save({"model": {"weight": torch.zeros(2)}}, root / "other.pth")
    torch.save({"model": Exception("surprise")}, root / "pickle.pth")
    (root / "bad.onnx").write_bytes(b"no model")


def spoilt_images(root: Path) -> None:
    (root / "heic").mkdir()
    (root / "heic/photo.heic").touch()
    (root / "none").mkdir()
    (root / "closed").mkdir(mode=0o555)
    (root / "torn").mkdir()
    (root / "torn/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (root / "torn/empty.png").write_bytes(b"")
    whole = (root / "data/val2017/101.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "note.txt").write_text("no image")
    shutil.copy(root / "data/val2017/101.png", root / "one.png")


def spoilt_annotations(root: Path) -> None:
    good = root / "data/annotations/instances_val2017.json"
    document = json.loads(good.read_text())

    def write(name: str, **more: object) -> None:
        (root / name).write_text(json.dumps({**document, **more}))

    (root / "half.json").write_text(good.read_text()[:200])
    (root / "list.json").write_text("[1, 2]")
    write("no_categories.json", categories=None)
    write("no_images.json", images=[])
    write("strangers.json", categories=[{"id": 1, "name": "cat"}])
    write("unnamed.json", categories=[{"id": 1}])
    write("twice.json", categories=[{"id": 1, "name": "red"}, {"id": 2, "name": "red"}])
    images = document["images"]
    gone = [
        {**each, "file_name": f"gone{each['id']}.png", "id": 900 + each["id"]} for each in images
    ]
    write("same_image.json", images=[*images, {**images[0], "file_name": "x.png"}])
    annotation = document["annotations"][0]
    annotation = {key: value for key, value in annotation.items() if key != "bbox"}
    write("no_box.json", annotations=[annotation])
    write("half_gone.json", images=[*images, *gone])


PREDICT = "predict {root}/good.safetensors {root}/one.png"
EVALUATE = "evaluate {root}/good.safetensors --images {root}/data/val2017 --json "
BAD_WEIGHTS = {
    "nowhere.safetensors": "does not exist",
    "none": "is a folder",
    "cut.safetensors": "cut.safetensors cannot be read",
    "empty.safetensors": "empty.safetensors cannot be read",
    "text.safetensors": "text.safetensors cannot be read",
    "strange.safetensors": "strange.safetensors is a safetensors file but not a ViDT weights file",
    "gap.safetensors": "gap.safetensors does not hold the tensors it should",
    "header.safetensors": "header.safetensors has a header that cannot be read",
    "other.pth": "other.pth is not a ViDT checkpoint",
    "pickle.pth": "pickle.pth cannot be read safely",
    "one.png": "one.png is no weights file; weights come first",
    "bad.onnx": "bad.onnx",
}
DATA = "data/annotations/instances_val2017.json"
NAMED = (
    f"--train_json {{root}}/{DATA} --train_images {{root}}/data/val2017 "
    f"--val_json {{root}}/half_gone.json --val_images {{root}}/data/val2017"
)
EXPORT = "export {root}/good.safetensors {root}/model.onnx"
OVERWRITING = [  # words before the name of the result, and that name
    ("benchmark {root}/good.safetensors --out", "good.safetensors"),
    (f"check {NAMED} --out", DATA),
    (f"check {NAMED} --out", "half_gone.json"),
    ("check --coco_path {root}/data --out", DATA),
    ("check --coco_path {root}/data --out", "data/val2017/101.png"),
    ("check --yolo_path {root} --out", "note.txt"),
    (f"{EXPORT} --report", "good.safetensors"),
    (f"{EXPORT} --report", "model.onnx"),
    (f"{EXPORT} --json {{root}}/half.json --coco_images {{root}} --report", "half.json"),
    (f"{EXPORT} --images {{root}}/one.png --report", "one.png"),
    ("export {root}/bad.onnx", "bad.onnx"),
    (f"{EVALUATE} {{root}}/{DATA} --out", "good.safetensors"),
    (f"{EVALUATE} {{root}}/{DATA} --out", DATA),
    (f"{EVALUATE} {{root}}/{DATA} --out", "data/val2017/101.png"),
]
MISTAKES: list[Mistake] = [
    ("predikt", "there is no command predikt; the nearest is predict"),
    ("foo", "there is no command foo; vidt --help shows all"),
    ("help foo", "there is no command foo; vidt --help shows all"),
    ("--threshold 0.5", "unknown option --threshold; vidt --help shows the commands"),
    ("--verison", "unknown option --verison; did you mean --version?"),
    (f"check {NAMED} --eval_size 70000", "70000 is too large; it must be at most 16,384"),
    ("predict", "missing arguments: WEIGHTS, IMAGES; see vidt predict --help"),
    ("predict {root}/good.safetensors", "missing arguments: IMAGES"),
    *((f"predict {{root}}/{name} {{root}}/one.png", words) for name, words in BAD_WEIGHTS.items()),
    (f"{PREDICT} --treshold 0.5", "unknown flag --treshold; the nearest is --threshold"),
    (f"{PREDICT} --format coco", "unknown flag --format; see vidt predict --help"),
    (f"{EVALUATE} {{root}}/half.json --threshold 0.5", "unknown flag --threshold; "),
    (f"{PREDICT} --threshold 1.5", "--threshold: 1.5 is no number from 0 to 1"),
    (f"{PREDICT} --threshold -0.1", "--threshold: -0.1 is no number from 0 to 1"),
    (f"{PREDICT} --threshold nan", "--threshold: nan is no number from 0 to 1"),
    (f"{PREDICT} --threshold high", "--threshold: high is no number from 0 to 1"),
    (f"{PREDICT} --threshold", "--threshold: expected one argument"),
    (f"{PREDICT} --batch_size 0", "--batch_size: 0 is no whole number of 1 or more"),
    (f"{PREDICT} --batch_size 2.5", "--batch_size: 2.5 is no whole number"),
    (f"{PREDICT} --device gpu", "device is gpu; it must be cpu, cuda or cuda:1"),
    (f"{PREDICT} --device cuda:99", "device is cuda:99; this machine has"),
    (f"{PREDICT} --device meta", "device is meta"),
    (f"{PREDICT} --precision fp8", "--precision: invalid choice: 'fp8' (choose from"),
    (f"{PREDICT} --mixed_precision fp8", "--mixed_precision: invalid choice: 'fp8' (choose from"),
    (f"{PREDICT} --precision fp16 --device cpu", "precision is fp16; on a CPU it must be auto"),
    (f"{PREDICT} --json --csv", "--csv: not allowed with --json"),
    (f"{PREDICT} --yolo", "--yolo writes a file for each image; say where: --out DIR"),
    (f"{PREDICT} --out {{root}}/note.txt", "--out {root}/note.txt is a file; name a folder"),
    (f"{PREDICT} --out {{root}}/note.txt/deep", "note.txt/deep"),
    (f"{PREDICT} --out {{root}}", "would overwrite {root}/one.png; name another folder"),
    ("predict {root}/good.safetensors {root}/gone.png", "IMAGES {root}/gone.png: no such file"),
    ("predict {root}/good.safetensors {root}/heic", "there is no image in it; ignored 1 file"),
    ("predict {root}/good.safetensors {root}/*.webp", "no file matches this pattern"),
    ("predict {root}/good.safetensors {root}/none", "IMAGES {root}/none: there is no image in it"),
    ("predict {root}/good.safetensors - -", "IMAGES - stands for standard input; give it once"),
    ("predict {root}/good.safetensors -", "IMAGES -: there is no image in it"),
    ("predict {root}/good.safetensors {root}/torn", "none of 2 images could be read; the first"),
    ("predict {root}/good.safetensors {root}/cut.png --out {root}/out", "cut.png"),
    ("predict {root}/good.safetensors {root}/note.txt --csv", "note.txt: cannot be read as an im"),
    ("evaluate {root}/good.safetensors --images {root}", "--json and --images: give both"),
    (f"{EVALUATE} nowhere.json", "--json nowhere.json: cannot be read (No such file"),
    (f"{EVALUATE} {{root}}", "--json {root} is a folder; name COCO's JSON file"),
    (f"{EVALUATE} {{root}}/half.json", "half.json: not JSON"),
    (f"{EVALUATE} {{root}}/one.png", "one.png: not JSON"),
    (f"{EVALUATE} {{root}}/list.json", "list.json: not COCO JSON"),
    (f"{EVALUATE} {{root}}/no_categories.json", 'it needs a list of objects "categories"'),
    (f"{EVALUATE} {{root}}/no_images.json", "no_images.json: empty dataset"),
    (f"{EVALUATE} {{root}}/strangers.json", "strangers.json has no class of the weights"),
    (f"{EVALUATE} {{root}}/unnamed.json", "needs a name and an integer id of its own"),
    (f"{EVALUATE} {{root}}/twice.json", "class name 'red' is used twice"),
    (f"{EVALUATE} {{root}}/same_image.json", "same_image.json: image id 101 is used twice"),
    (f"{EVALUATE} {{root}}/half_gone.json", "3 of 6 images cannot be read"),
    (f"{EVALUATE} {{root}}/strangers.json --images {{root}}/gone", "has no class of the weights"),
    (
        "evaluate {root}/good.safetensors --json {root}/data/annotations/instances_val2017.json "
        "--images {root}/none",
        "--images {root}/none holds none of the 3 images, such as 101.png",
    ),
    (
        "evaluate {root}/good.safetensors --json {root}/data/annotations/instances_val2017.json "
        "--images {root}/gone",
        "--images {root}/gone: no such folder",
    ),
    (
        "evaluate {root}/good.safetensors --json {root}/data/annotations/instances_val2017.json "
        "--images {root}/data/val2017 --out {root}/none",
        "--out {root}/none is a folder; name a file",
    ),
    ("check", "no dataset is named; give --data"),
    ("check --coco_path nowhere", "nowhere/annotations/instances_train2017.json"),
    ("check --coco_path {root}/data --yolo_path {root}", "check one dataset at a time"),
    ("check --train_json {root}/half.json", "train_json is given without"),
    ("check --coco_path {root}/data --det_token_num none", "--det_token_num: none is no whole"),
    ("check --coco_path {root}/data --max_bad_fraction 5", "5 is no number from 0 to 1"),
    ("check --voc_path {root}/none", "{root}/none"),
    ("check --yolo_path {root}/none", "{root}/none"),
    ("info", "missing arguments: WEIGHTS"),
    ("info {root}/gone.safetensors", "WEIGHTS {root}/gone.safetensors: no such file"),
    ("info {root}/none", "WEIGHTS {root}/none is a folder; name the weights file in it"),
    ("info {root}/cut.safetensors", "cut.safetensors cannot be read"),
    ("info {root}/bad.onnx", "bad.onnx"),
    ("info {root}/good.safetensors more", "unrecognized arguments: more"),
    ("export {root}/good.safetensors {root}/model.pt", "name it something.onnx"),
    ("export {root}/gone.safetensors {root}/model.onnx", "gone.safetensors: no such file"),
    ("export {root}/good.safetensors {root}/none/deep/model.onnx", "there is no folder for it"),
    ("export {root}/good.safetensors {root}/model.onnx --dynamic width", "width is neither batch"),
    ("export {root}/good.safetensors {root}/model.onnx --size 640", "--size: expected 2 arguments"),
    ("export {root}/good.safetensors {root}/model.onnx --size 8 8", "8 is too small"),
    ("export {root}/good.safetensors {root}/model.onnx --json x.json", "give both, or neither"),
    (
        "export {root}/good.safetensors {root}/model.onnx --json {root}/no_box.json "
        "--coco_images {root}/data/val2017",
        "no_box.json: no annotation has a usable box",
    ),
    ("benchmark swin_nanno", "WEIGHTS swin_nanno: neither a file nor a backbone (swin_nano"),
    ("benchmark swin_nano --repeat 0", "--repeat: 0 is no whole number of 1 or more"),
    ("benchmark swin_nano --size 640 no", "--size: no is no whole number"),
    ("benchmark {root}/good.safetensors --out {root}/none", "is a folder; name a file"),
    ("benchmark {root}/good.safetensors --json {root}/list.json", "unknown flag --json"),
    *(
        (f"{words} {{root}}/none/../{file}", f"/../{file} would overwrite a file that is read")
        for words, file in OVERWRITING
    ),
    ("train --lrr 1e-4", "unknown flag --lrr; the nearest is --lr"),
    ("train --foo", "unknown flag --foo; see vidt train --help"),
    ("train --device cpu", "unknown flag --device; CUDA_VISIBLE_DEVICES=1 vidt train"),
    ("train --precision bf16", "unknown flag --precision; --mixed_precision bf16"),
    ("train --mixed_precision fp32", "mixed_precision is fp32; it must be one of auto, no"),
    ("train --coco_path nowhere", "nowhere/annotations"),
    ("train --coco_path {root}/data --batch_size two", "--batch_size is 'two'; it must be a whole"),
    ("train --coco_path {root}/data --load_from {root}/cut.safetensors", "{root}/cut.safetensors"),
    *(
        # Before the data is read, which there is none of here.
        (f"train --coco_path nowhere {flag} {{root}}/gone", f"{flag} {{root}}/gone: no such file")
        for flag in ("--load_from", "--pre_trained", "--distil_model_path")
    ),
    (
        "train --coco_path nowhere --load_from {root}/data",
        "--load_from {root}/data: a folder; give the path of a weights file",
    ),
    (
        "train --coco_path nowhere --pre_trained imagnet",
        "imagnet: no such file; give imagenet, coco, none or the path of a weights file",
    ),
    ("train --coco_path nowhere --check --load_from gone", "nowhere/annotations"),
    ("train --coco_path nowhere --load_from {root}/cut.safetensors --pre_trained gone", "nowhere"),
    ("train --coco_path nowhere --resume --pre_trained gone", "nowhere/annotations"),
]


def test_there_are_more_than_fifty() -> None:
    assert len({words for words, _ in MISTAKES}) == len(MISTAKES) > 50


def contents(root: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in sorted(root.rglob("*")) if each.is_file()}


def one_line(text: str) -> str:
    # A slow machine is told what a command does meanwhile.
    text = "".join(line for line in text.splitlines(True) if not line.endswith(" ...\n"))
    assert len(text.splitlines()) == 1, text
    assert text.startswith("error: ") and len(text) < 500
    return text


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(
    playground: Path,
    words: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.chdir(playground)
    before = contents(playground)
    given = words.format(root=playground).split()
    if given[0] == "train":
        given += ["--output_dir", str(tmp_path)]
    code = main(given)
    shown = capfd.readouterr()
    line = one_line(shown.err)
    assert expected.format(root=playground) in line
    assert code == (1 if "could be read" in line else 2)
    assert contents(playground) == before
    if given[0] == "predict":
        assert shown.out in ("", "file,label,name,score,x1,y1,x2,y2\n")


def test_no_permission(playground: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where root may write everything, a path beneath a file stands for a folder that is closed."""
    closed = playground / "closed"
    if os.access(closed, os.W_OK):
        closed = playground / "note.txt"
    code = main([*PREDICT.format(root=playground).split(), "--out", str(closed / "out")])
    assert code == 2 and str(closed / "out") in one_line(capfd.readouterr().err)


@pytest.mark.parametrize(
    ("form", "most_bytes"),
    [("--json", 60), ("--json", 3000), ("--coco", 3000), ("--csv", 3000), ("--yolo", 60)],
)
def test_a_full_disk(
    playground: Path,
    tmp_path: Path,
    form: str,
    most_bytes: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A limit on the size of files stands for it: what is beyond is refused, what is cut off is
    taken back, and a picture that is there is whole.
    """
    out = tmp_path / "out"
    words = f"predict {playground}/good.safetensors {playground}/data/train2017 --out {out} {form}"
    with no_file_beyond(most_bytes):
        code = main([*words.split(), "--threshold", "0", "--device", "cpu"])
    line = one_line(capsys.readouterr().err)
    assert code == 2 and str(out) in line and "cannot be written (File too large)" in line
    left = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith((".", "predictions"))]
    for path in left:
        if path.suffix == ".png":
            Image.open(path).load()


@contextmanager
def no_file_beyond(num_bytes: int) -> Iterator[None]:
    """Files of this process may not grow beyond a size; to write more is an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_standard_output_that_is_full() -> None:
    with open("/dev/full", "w") as full:
        done = script("--version", stdout=full)
    assert done.returncode == 2 and "standard output: No space left" in one_line(done.stderr)


def script(*words: str, **more: object) -> subprocess.CompletedProcess:
    """The command in a process of its own, as the console script starts it."""
    code = "import sys; from trainer.commands.command_line import main; sys.exit(main())"
    how: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
    return subprocess.run([sys.executable, "-c", code, *words], env=environment(), **how)


@pytest.mark.parametrize("words", ["predikt", "predict gone.safetensors gone.png"])
def test_in_a_process_of_its_own(words: str) -> None:
    done = script(*words.split())
    assert done.returncode == 2 and one_line(done.stderr)


@pytest.mark.slow
def test_who_stops_listening_is_no_error(playground: Path) -> None:
    words = f"vidt check --coco_path {playground}/data | true; exit ${{PIPESTATUS[0]}}"
    code = f"'{sys.executable}' -m trainer.commands.command_line"
    done = subprocess.run(
        ["bash", "-c", words.replace("vidt", code, 1)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr and done.returncode in (0, 141)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_what_was_begun(
    signum: signal.Signals,
    code: int,
    playground: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The results so far are whole, and say how many images they are of."""

    class Interrupted(io.StringIO):
        def readline(self, size: int | None = -1) -> str:
            if line := super().readline(size):
                return line
            signal.raise_signal(signum)
            return ""

    paths = [str(path) for path in sorted((playground / "data/train2017").iterdir())]
    monkeypatch.setattr(sys, "stdin", Interrupted("".join(f"{path}\n" for path in paths * 20)))
    out = tmp_path / "out"
    words = ["predict", f"{playground}/good.safetensors", "-", "--out", str(out), "--no_pictures"]
    assert main([*words, "--batch_size", "1"]) == code
    assert "stopped" in capfd.readouterr().err
    assert [path.name for path in out.iterdir()] == ["predictions.json"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    images = json.loads((out / "predictions.json").read_text())["images"]
    assert 0 < len(images) < 80


def test_names_that_null_bytes_part(
    playground: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As find -print0 writes them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{playground}/one.png\0{playground}/a.png\0"))
    assert main(["predict", f"{playground}/good.safetensors", "-"]) == 2
    expected = "error: IMAGES -: null bytes in it; names are expected one a line\n"
    assert capfd.readouterr().err == expected
