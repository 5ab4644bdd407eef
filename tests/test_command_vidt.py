"""The console command `vidt`, each subcommand on real files: weights that know their pictures."""

import csv
import io
import json
import math
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from safetensors.torch import load_file
from tiny_runs import ROOT, Learnt, argv, call, random_pictures, write_coco
from torch import nn

import vidt
from trainer.commands.command_flags import SILENT, Stages, atomic_text, progress_bar, write_result
from trainer.commands.command_line import COMMANDS, main
from trainer.commands.info import page as info_page
from trainer.commands.predictions import Read, predict_files, windows
from trainer.scoring.average_precision import COCO_NUMBERS
from vidt.errors import counted
from vidt.images.batching import AHEAD, PENDING_BATCHES, reading_threads
from vidt.images.image_files import DistinctFiles, ImageFile, ImageFiles, distinct
from vidt.images.preprocessing import Preprocessing
from vidt.model.config import METHODS, ViDTConfig
from vidt.model.vidt import build_detector
from vidt.onnx.detector import OnnxDetections
from vidt.weights.weights_file import WeightsInfo, load_weights, save_weights

BCCD = ROOT.parent / "shared/data/bccd"
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def photos(learnt: Learnt) -> Path:
    return learnt.data / "val2017"


def ok(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def test_help_and_a_wrong_flag_come_at_once_and_without_pytorch() -> None:
    """All commands in one process, in which PyTorch cannot be imported."""
    code = (
        "import sys, time; sys.modules['torch'] = None\n"
        "from trainer.commands.command_line import COMMANDS, main\n"
        "def shown(words):\n"
        "    try: return main(words)\n"
        "    except SystemExit as end: return end.code\n"
        "assert not any(map(shown, [[], ['--help'], *([name, '--help'] for name in COMMANDS)]))\n"
        "assert [shown([name, '--wrong', '1']) for name in COMMANDS] == [2] * len(COMMANDS)\n"
    )
    done = call([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert all(f"usage: vidt {name}" in done.stdout for name in COMMANDS)
    assert done.stdout.count("examples:") == len(COMMANDS)


def test_the_console_script_is_the_command_line() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'\[project\.scripts\]\nvidt = "trainer\.commands\.command_line:main"\n', text)


def test_help_of_a_command_in_either_order(capsys: Output) -> None:
    for command in ("predict", "train"):
        pages = []
        for words in ([command, "--help"], ["help", command], ["--help", command]):
            with suppress(SystemExit):
                main(words)
            pages.append(capsys.readouterr().out)
        assert pages == [pages[0]] * 3 and f"vidt {command}" in pages[0]


def test_help_of_train_has_whole_examples_and_every_choice(capsys: Output) -> None:
    ok("train", "--help")
    page = capsys.readouterr().out
    assert "best.safetensors \\\n      --output_dir output/tuned" in page
    assert all(name in page for name in METHODS)


def test_version(capsys: Output) -> None:
    ok("--version")
    assert capsys.readouterr().out == f"vidt {vidt.__version__}\n"


def test_predict_in_words(learnt: Learnt, photos: Path, capsys: Output) -> None:
    ok("predict", learnt.weights, photos / "101.png", "--threshold", 0.2)
    shown = capsys.readouterr()
    (found,) = [vidt.load(learnt.weights).predict(photos / "101.png", threshold=0.2)]
    lines = shown.out.splitlines()
    assert len(lines) == len(found) > 0
    assert lines[0].startswith(f"{photos / '101.png'}: {found.names[0]} {found.scores[0]:.2f} at ")
    assert shown.err == f"1 image, {counted(len(found), 'object')}\n"


def test_predict_a_folder_to_a_folder(learnt: Learnt, photos: Path, tmp_path: Path) -> None:
    """Pictures of the same size with something drawn on them, and JSON that says what."""
    ok("predict", learnt.weights, photos, "--out", tmp_path / "out", "--threshold", 0.2)
    document = json.loads((tmp_path / "out/predictions.json").read_text())
    names = sorted(path.name for path in photos.iterdir())
    assert [Path(entry["file"]).name for entry in document["images"]] == names
    assert document["class_names"] == list(vidt.load(learnt.weights).class_names)
    expected = vidt.load(learnt.weights).predict(sorted(photos.iterdir()), threshold=0.2)
    for name, entry, found in zip(names, document["images"], expected, strict=True):
        before, after = Image.open(photos / name), Image.open(tmp_path / "out" / name)
        assert before.size == after.size == (entry["width"], entry["height"])
        drawn = np.asarray(before.convert("RGB")) != np.asarray(after)
        assert drawn.any() == bool(entry["detections"])
        assert [each["name"] for each in entry["detections"]] == found.names
        scores = [each["score"] for each in entry["detections"]]
        assert scores == pytest.approx(found.scores.tolist(), abs=1e-4)
        for each in entry["detections"]:
            x1, y1, x2, y2 = each["box"]
            assert 0 <= x1 < x2 <= entry["width"] and 0 <= y1 < y2 <= entry["height"]
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == sorted([*names, "predictions.json"])


def test_coco_results_are_scored_by_pycocotools_as_in_training(
    learnt: Learnt, photos: Path, tmp_path: Path
) -> None:
    """Category ids are the data's own, 7, 900 and 3; image ids come of the files' names."""
    where = ("--out", tmp_path, "--no-pictures", "--threshold", 0, "--batch-size", 1)
    ok("predict", learnt.weights, photos, "--coco", *where)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.coco.json"]
    truth = COCO(str(learnt.data / "annotations/instances_val2017.json"))
    results = truth.loadRes(str(tmp_path / "predictions.coco.json"))
    assert {row["category_id"] for row in results.dataset["annotations"]} <= {7, 900, 3}
    assert sorted(results.imgToAnns) == sorted(truth.imgs)


def test_csv_and_json_on_standard_output(learnt: Learnt, photos: Path, capsys: Output) -> None:
    ok("predict", learnt.weights, photos, "--csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    ok("predict", learnt.weights, photos, "--json")
    document = json.loads(capsys.readouterr().out)
    flat = [(entry, each) for entry in document["images"] for each in entry["detections"]]
    assert len(rows) == len(flat) > 0
    for row, (entry, each) in zip(rows, flat, strict=True):
        assert (row["file"], row["name"]) == (entry["file"], each["name"])
        assert [float(row[name]) for name in ("x1", "y1", "x2", "y2")] == each["box"]


def test_yolo_files(learnt: Learnt, photos: Path, tmp_path: Path) -> None:
    ok("predict", learnt.weights, photos, "--yolo", "--out", tmp_path, "--no_pictures")
    names = (tmp_path / "classes.txt").read_text().split()
    assert names == list(vidt.load(learnt.weights).class_names)
    labels = sorted((tmp_path / "labels").iterdir())
    assert [path.stem for path in labels] == sorted(path.stem for path in photos.iterdir())
    rows = [line.split() for path in labels for line in path.read_text().splitlines()]
    assert rows and all(len(row) == 6 for row in rows)
    assert all(0 <= float(value) <= 1 for row in rows for value in row[1:])


def test_yolo_files_replace_no_annotations(
    learnt: Learnt, photos: Path, tmp_path: Path, capsys: Output
) -> None:
    words = ("predict", learnt.weights, photos, "--yolo", "--out", tmp_path, "--no_pictures")
    ok(*words)
    ok(*words)  # predictions of before are replaced
    label = min((tmp_path / "labels").iterdir())
    for annotation in ("0 0.5 0.5 0.1 0.1\n", "0 0.1 0.1 0.9 0.1 0.5 0.9\n"):
        label.write_text(annotation)
        assert main([str(word) for word in words]) == 2
        assert f"error: {label} is an annotation" in capsys.readouterr().err
        assert label.read_text() == annotation
    label.unlink()
    (tmp_path / "classes.txt").write_text("dog\n")
    assert main([str(word) for word in words]) == 2
    assert "classes.txt lists other classes" in capsys.readouterr().err
    assert (tmp_path / "classes.txt").read_text() == "dog\n" and not label.exists()


def test_standard_input_patterns_and_twins(
    learnt: Learnt, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    paths = sorted(photos.iterdir())
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{path}\n" for path in paths[::-1])))
    ok("predict", learnt.weights, "-", "--json")
    files = [entry["file"] for entry in json.loads(capsys.readouterr().out)["images"]]
    assert files == [str(path) for path in paths[::-1]]
    ok("predict", learnt.weights, f"{photos}/*2.png", f"{photos.parent}/**/103.png", "--json")
    files = [entry["file"] for entry in json.loads(capsys.readouterr().out)["images"]]
    assert [Path(file).name for file in files][:1] == ["102.png"] and len(files) == 3
    for name in ("a.png", "a.jpg", "b.png"):
        (tmp_path / "in/deep").mkdir(parents=True, exist_ok=True)
        Image.open(paths[0]).convert("RGB").save(tmp_path / "in/deep" / name)
    out = tmp_path / "in/out"
    for _ in range(2):  # the second time the results of the first lie among the images
        ok("predict", learnt.weights, tmp_path / "in", "--yolo", "--out", out)
        kept = sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
        labels = ["labels/deep/a.jpg.txt", "labels/deep/a.png.txt", "labels/deep/b.txt"]
        assert kept == ["classes.txt", "deep/a.jpg", "deep/a.png", "deep/b.png", *labels]


@pytest.mark.parametrize("source", ["pattern", "words", "standard input"])
def test_no_image_loses_its_results_to_another(
    learnt: Learnt,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    """Files that differ in their ending alone, or are drawn under one name, whatever names them."""
    names = ("a.bmp", "a.bmp.jpg", "a.jpg", "a.png")
    paths = [tmp_path / "in" / name for name in names]
    (tmp_path / "in").mkdir()
    for path in paths:
        Image.open(photos / "101.png").convert("RGB").save(path)
    paths += [tmp_path / "in" / name for name in ("a.json", "b.json", "b.png")]
    for path in paths[-3:-1]:  # what cannot be read has no results, and takes no name
        path.write_text("{}")
    Image.open(photos / "101.png").save(paths[-1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{path}\n" for path in paths)))
    words = {"pattern": [f"{tmp_path}/in/*"], "words": paths, "standard input": ["-"]}[source]
    out = tmp_path / "out"
    ok("predict", learnt.weights, *words, "--yolo", "--out", out)
    texts = [path.name for path in (out / "labels").rglob("*.txt")]
    pictures = [path.name for path in out.rglob("*") if path.suffix in (".jpg", ".png")]
    assert len(texts) == len(pictures) == 5 and "b.txt" in texts
    assert {"a.bmp.jpg", "a.jpg", "a.png", "b.png"} < set(pictures)


def test_paths_that_differ_in_their_root_alone_keep_their_pictures(
    learnt: Learnt, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps upwards and roots are no part of a name; the first has the name as it is."""
    below = tmp_path / "here/x"
    for number, folder in enumerate((tmp_path / "x", below), 101):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes((photos / f"{number}.png").read_bytes())
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "stdin", io.StringIO("../x/a.png\nx/a.png\nx/../x/a.png\n"))
    ok("predict", learnt.weights, "-", "--out", tmp_path / "out", "--threshold", 1)
    found = sorted((tmp_path / "out/x").iterdir())
    assert [path.name for path in found] == ["a-2.png", "a-3.png", "a.png"]
    sizes = [Image.open(path).size for path in found]
    first, second = (Image.open(photos / name).size for name in ("101.png", "102.png"))
    assert sizes == [second, second, first]


def test_what_was_named_before_takes_the_next_free_number() -> None:
    """Also where there are many of one name: each is looked for from the last one on."""
    looks = 0

    def written(file: ImageFile) -> list[str]:
        nonlocal looks
        looks += 1
        return [file.name]

    files = DistinctFiles(written)
    names = [files.place(ImageFile("a.jpg", "a.jpg")).name for _ in range(1000)]
    assert names[:3] == ["a.jpg", "a-2.jpg", "a-3.jpg"] and len(set(names)) == 1000
    assert looks < 4000
    assert files.place(ImageFile("x", "b/../a.jpg")).name == "b/../a-1001.jpg"


def test_what_cannot_be_read_is_skipped_and_named(
    learnt: Learnt, photos: Path, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (tmp_path / "note.txt").write_text("no image")
    words = [tmp_path / "torn.jpg", photos / "101.png", tmp_path / "note.txt"]
    ok("predict", learnt.weights, *words, "--json")
    shown = capsys.readouterr()
    images = json.loads(shown.out)["images"]
    assert ["error" in entry for entry in images] == [True, False, True]
    assert "skipped 2 that cannot be read" in shown.err and "note.txt" in shown.err


def test_a_million_images_take_no_more_memory_than_a_hundred(learnt: Learnt, photos: Path) -> None:
    """Of a list without end no more is taken than a window or two ahead of what comes out."""
    path = str(photos / "101.png")
    taken = 0

    def endless() -> Iterator[ImageFile]:
        nonlocal taken
        while True:
            taken += 1
            yield ImageFile(path, "101.png")

    detector = vidt.load(learnt.weights)
    for number, _ in enumerate(predict_files(detector, endless(), least=0.3, batch_size=2), 1):
        assert taken - number <= PENDING_BATCHES * 2 + AHEAD * reading_threads() + 1
        if number == 150:
            break


def test_photographs_are_turned_as_their_exif_says(
    learnt: Learnt, tmp_path: Path, capsys: Output
) -> None:
    """By `vidt predict`, unless the stored pixels are asked for, and from Python."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (80, 40)).save(path, exif=exif)
    for flags, size in (([], (80, 40)), (["--stored_pixels"], (40, 80))):
        ok("predict", learnt.weights, path, "--json", *flags)
        (entry,) = json.loads(capsys.readouterr().out)["images"]
        assert (entry["height"], entry["width"]) == size
    ok("predict", learnt.weights, path, "--out", tmp_path / "out")
    with Image.open(tmp_path / "out" / "turned.jpg") as drawn:
        assert drawn.size == (40, 80)
    detector = vidt.load(learnt.weights)
    for image in (path, Image.open(path)):
        assert detector.predict(image, threshold=0).plot().size == (40, 80)


def test_what_is_skipped_or_cut_is_told(learnt: Learnt, tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    for name in ("a.jpg", "cut.jpg"):
        Image.fromarray(noise).save(folder / name)
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:-100])
    (folder / "empty.jpg").touch()
    for name in ("photo.heic", "notes.txt", "more.TXT"):
        (folder / name).touch()
    ok("predict", learnt.weights, folder, "--out", tmp_path / "out", "--no_pictures")
    told = capsys.readouterr().err
    assert (
        "2 images" in told and "empty.jpg: cannot be read as an image (the file is empty)" in told
    )
    assert "1 truncated JPEG was used: " in told and "cut.jpg" in told
    assert "ignored 3 files that are not images: 2 .txt, 1 .heic" in told
    ok("predict", learnt.weights, folder, "--out", tmp_path / "drawn")
    told = capsys.readouterr().err
    assert "1 truncated JPEG was used: " in told and "cut.jpg" in told
    ok("predict", learnt.weights, folder, "--json", "--strict_images")
    printed = capsys.readouterr()
    assert "1 image," in printed.err and "cut.jpg: cannot be read as an image" in printed.err


def test_no_original_is_overwritten_by_the_drawing_of_another(
    learnt: Learnt, photos: Path, tmp_path: Path
) -> None:
    """Neither an image of the command nor, where images and results share a folder, any other."""
    (tmp_path / "sub").mkdir()
    files = [tmp_path / name for name in ("sub/a.png", "sub/b.png", "a.png", "b.png")]
    for file in files:
        Image.open(photos / "101.png").save(file)
    before = [file.read_bytes() for file in files]
    ok("predict", learnt.weights, files[0], files[2], "--out", tmp_path)
    assert [file.read_bytes() for file in files] == before
    assert len([*tmp_path.glob("a*.png")]) == 3
    ok("predict", learnt.weights, files[1], "--out", tmp_path)
    assert [file.read_bytes() for file in files] == before
    assert (tmp_path / "b-2.png").is_file()
    for _ in range(2):  # a folder of results alone is written anew
        ok("predict", learnt.weights, *files[:2], "--out", tmp_path / "out")
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["a.png", "b.png", "predictions.json"]


@pytest.mark.parametrize(("mode", "seen_through"), [("1", 0), ("L", 3), ("RGB", (1, 2, 3))])
def test_transparent_colours_are_drawn(
    learnt: Learnt, tmp_path: Path, mode: str, seen_through: Any
) -> None:
    Image.new(mode, (64, 64)).save(tmp_path / "a.png", transparency=seen_through)
    ok("predict", learnt.weights, tmp_path / "a.png", "--out", tmp_path / "out")
    with Image.open(tmp_path / "out/a.png") as drawn:
        assert "transparency" not in drawn.info and drawn.mode == "RGB"
    with Image.open(tmp_path / "a.png") as picture:
        in_memory = picture.convert("RGB")
    in_memory.info["transparency"] = (1, 2, 3)
    plot = vidt.load(learnt.weights).predict(in_memory).plot()
    assert "transparency" not in plot.info and "transparency" in in_memory.info


def test_a_picture_that_cannot_be_written_stops_no_other(
    learnt: Learnt, photos: Path, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "102.png").mkdir()  # in the place of a drawing
    ok("predict", learnt.weights, photos, "--out", tmp_path)
    assert len(json.loads((tmp_path / "predictions.json").read_text())["images"]) == 4
    assert len([path for path in tmp_path.glob("*.png") if path.is_file()]) == 3
    told = capsys.readouterr().err
    assert "4 images, " in told and "1 image could not be drawn:\n" in told
    assert f"  {photos / '102.png'}: " in told


def test_listed_names_of_any_bytes_and_without_results(
    learnt: Learnt,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write((photos / "101.png").read_bytes())
    for _ in range(2):  # the second time what was drawn is listed, too
        listed = b"\n".join([name, *map(os.fsencode, sorted((tmp_path / "out").rglob("*.png")))])
        listing = io.TextIOWrapper(io.BytesIO(listed), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", listing)
        ok("predict", learnt.weights, "-", "--out", tmp_path / "out")
        assert len([*(tmp_path / "out").rglob("*.png")]) == 1
    told = capsys.readouterr().err
    assert f"ignored 1 listed file in the folder of the results, {tmp_path}/out" in told


def test_links_are_followed_once_and_keep_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("in/a/1.png", "far/x/2.png", "in/.hidden/3.png", "store/0a1b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {"in/1st": "in/a", "in/far": "far", "far/back": "in", "in/shown": "in/.hidden"}
    for link, target in {**links, "photo.png": "store/0a1b", "all": "in"}.items():
        (tmp_path / link).symlink_to(tmp_path / target)

    def names(word: str, avoid: Path | None = None) -> list[str]:
        return [file.name for file in ImageFiles([f"{tmp_path}/{word}"], io.StringIO(), avoid)]

    assert names("in") == names("all") == ["a/1.png", "far/x/2.png", "shown/3.png"]
    assert names("in", tmp_path / "far") == ["a/1.png", "shown/3.png"]
    assert names("photo.png") == ["photo.png"]
    files = ImageFiles([f"{tmp_path}/in"], io.StringIO())
    scan = os.scandir

    def refuse(path: str) -> Any:
        if os.path.realpath(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len([*files]) == 2
    assert f"{tmp_path}/in/a: Permission denied" in files.passed_over()


class Fake:
    """A detector that finds nothing, in an instant."""

    class_names: tuple[str, ...] = ()

    def stream(self, pictures: list[Any], *, batch_size: int) -> Iterator[tuple[int, Any]]:
        nothing = OnnxDetections(np.zeros(0), np.zeros(0, int), np.zeros((0, 4)), (), (1, 1))
        return ((index, nothing) for index in range(len(pictures)))


@pytest.mark.parametrize(("wait", "most"), [(0.0, 8 + AHEAD * reading_threads() + 1), (0.05, 8)])
def test_results_do_not_wait_for_a_full_window(
    photos: Path, monkeypatch: pytest.MonkeyPatch, wait: float, most: int
) -> None:
    """The first batch comes when it is there; where files are named slowly, what is there comes."""
    monkeypatch.setattr("trainer.commands.predictions.PATIENCE", 0.06 if wait else 60)
    monkeypatch.setattr("vidt.images.batching.PATIENCE", 0.06 if wait else 60)
    taken = 0

    def named() -> Iterator[ImageFile]:
        nonlocal taken
        while True:
            time.sleep(wait)
            taken += 1
            yield ImageFile(str(photos / "101.png"), "101.png")

    next(predict_files(Fake(), named(), least=0.3, batch_size=8))
    assert taken <= most


def test_windows_grow_from_one_batch_to_a_few() -> None:
    reads = [Read(ImageFile("a", "a"), None)] * 40
    assert [len(window) for window in windows(reads, 2)] == [2, 4, 8, 16, 10]


def test_a_pattern_passes_over_the_folder_of_results(tmp_path: Path) -> None:
    """A second run does not detect in the drawings of the first, unless it is asked to."""
    for name in ("1.png", "found/1.png", "found/deep/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    out = tmp_path / "found"

    def names(pattern: str) -> list[str]:
        files = ImageFiles([f"{tmp_path}/{pattern}"], io.StringIO(), avoid=out)
        return [os.path.relpath(file.path, tmp_path) for file in files]

    assert names("**/*.png") == names("*") == ["1.png"]
    assert names("found/*.png") == ["found/1.png"]


def test_names_of_images_from_many_places(tmp_path: Path) -> None:
    """No two are the same, whatever they are given as."""
    for name in ("a/1.png", "b/1.png", "c/a/1.png", "c/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    words = [*(f"{tmp_path}/{name}" for name in ("a/1.png", "b/1.png", "a", "c")), "-"]
    files = ImageFiles(words, io.StringIO(f"{tmp_path}/a/1.png\n\n../x.png\n"))
    names = [file.name for file in files]
    assert names[:3] == ["1.png", "1-2.png", "a/1.png"]
    assert names[3:5] == ["c/2.jpg", "c/a/1.png"]
    assert names[5].startswith("stdin/") and names[6] == "stdin/x.png"
    assert len(set(names)) == len(names)
    assert ImageFiles(words[:-1], io.StringIO()).count() == 5 and files.count() is None
    assert [file.name for file in ImageFiles([f"{tmp_path}/c"], io.StringIO())] == [
        "2.jpg",
        "a/1.png",
    ]
    assert distinct(["a.b", "a.b", "a-2.b"]) == ["a.b", "a-2.b", "a-2-2.b"]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_evaluate_gives_the_numbers_in_the_file(
    learnt: Learnt, tmp_path: Path, capsys: Output, batch_size: int
) -> None:
    """Those of the training, from another reader and another scorer, without PyTorch's loaders."""
    json_path = learnt.data / "annotations/instances_val2017.json"
    where = ("--json", json_path, "--images", learnt.data / "val2017")
    out = tmp_path / "scores.json"
    ok("evaluate", learnt.weights, *where, "--out", out, "--batch_size", batch_size)
    metrics = json.loads(out.read_text())
    expected = load_weights(learnt.weights)[1].metrics
    assert set(metrics) == set(expected) >= set(COCO_NUMBERS)
    assert metrics == pytest.approx(expected, abs=1e-6)
    table = capsys.readouterr().out
    assert f"AP at IoU 0.50                       {metrics['map50']:.3f}" in table
    assert re.search(rf"red +{metrics['ap50/red']:.3f} +{metrics['ap/red']:.3f}\n", table)


def test_evaluate_judges_boxes_as_the_check_before_training_does(
    learnt: Learnt, tmp_path: Path
) -> None:
    """Boxes without area, outside, sticking out, of strangers, and images that are gone."""
    data = write_coco(tmp_path, random_pictures(2, 3), random_pictures(30, 4))
    path = data / "annotations/instances_val2017.json"
    document = json.loads(path.read_text())
    image = document["images"][1]
    boxes = ([5, 5, 0, 9], [-9, -9, 20, 20], [90, 90, 5, 5], [4, 4, 500, 20], [1, 1, math.nan, 3])
    for number, box in enumerate(boxes, 1000):
        entry = {"id": number, "image_id": image["id"], "category_id": 1, "bbox": box}
        document["annotations"].append(entry)
    document["annotations"].append({"id": 2000, "image_id": 1, "category_id": 1, "bbox": [1] * 4})
    document["annotations"].append({"id": 2001, "image_id": 101, "category_id": 9, "bbox": [1] * 4})
    document["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(document))
    (data / "val2017/107.png").unlink()
    out = tmp_path / "scores.json"
    where = ("--json", path, "--images", data / "val2017", "--out", out)
    ok("evaluate", learnt.weights, *where)
    flags = f"--eval --load_from {learnt.weights} --output_dir {tmp_path / 'eval'}"
    assert main(["train", *argv(data, tmp_path, flags)]) == 0
    expected = json.loads((tmp_path / "eval/evaluation.json").read_text())
    assert json.loads(out.read_text()) == pytest.approx(expected, abs=1e-6)


def test_findings_come_before_the_error_of_a_refused_dataset_and_before_the_metrics(
    learnt: Learnt, tmp_path: Path, capsys: Output
) -> None:
    data = write_coco(tmp_path / "data", random_pictures(2, 3), random_pictures(8, 4))
    audit = ("audit", learnt.weights, "--data", data, "--output_dir", tmp_path / "audit")
    commands = (("evaluate", learnt.weights, "--data", data), audit)
    for words in commands:
        ok(*words)
        assert "info: image without boxes, kept: 1" in capsys.readouterr().err.splitlines()
    for picture in (data / "val2017").iterdir():
        picture.write_bytes(b"no picture")
    for words in commands:
        assert main([str(word) for word in words]) == 2
        *lines, last = capsys.readouterr().err.splitlines()
        assert "error: unreadable image, removed: 8" in lines
        assert last.startswith("error: ")


def test_evaluate_and_predict_masks(tmp_path: Path, capsys: Output) -> None:
    config = ViDTConfig(
        "vidt", "swin_test", 3, 8, 64, 32, 1, dim_feedforward=64, with_vector=True, n_keep=32
    )
    info = WeightsInfo(config, ("red", "green", "blue"), Preprocessing(64))
    weights = tmp_path / "masks.safetensors"
    save_weights(weights, build_detector(config).state_dict(), info)
    data = write_coco(tmp_path / "data", random_pictures(1, 0), random_pictures(3, 0))
    path = data / "annotations/instances_val2017.json"
    document = json.loads(path.read_text())
    for each in document["annotations"]:
        x, y, w, h = each["bbox"]
        each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    path.write_text(json.dumps(document))
    where = ("--json", path, "--images", data / "val2017")
    ok("evaluate", weights, *where, "--out", tmp_path / "scores.json")
    flags = f"--eval --load_from {weights} --output_dir {tmp_path / 'eval'}"
    assert main(["train", *argv(data, tmp_path, flags)]) == 0
    expected = json.loads((tmp_path / "eval/evaluation.json").read_text())
    assert json.loads((tmp_path / "scores.json").read_text()) == pytest.approx(expected, abs=1e-6)
    assert "segm_map" in expected
    capsys.readouterr()
    ok("predict", weights, data / "val2017", "--json", "--threshold", 0)
    entry = json.loads(capsys.readouterr().out)["images"][0]
    assert entry["detections"][0]["mask"]["size"] == [entry["height"], entry["width"]]


def test_check_in_words_and_as_json(tiny_data: Path, tmp_path: Path, capsys: Output) -> None:
    ok("check", "--coco_path", tiny_data)
    assert "instances_train2017.json: 12 images" in capsys.readouterr().out
    ok("check", "--coco_path", tiny_data, "--json", "--out", tmp_path / "check.json")
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads((tmp_path / "check.json").read_text())
    assert facts["usable"] and facts["classes"] == ["red", "green", "blue"]
    assert sum(facts["splits"][0]["boxes_by_class"].values()) == facts["splits"][0]["boxes"]


def test_one_is_not_told_as_many(tmp_path: Path, capsys: Output) -> None:
    data = write_coco(tmp_path / "data", random_pictures(1, 0), random_pictures(1, 1))
    for path in (data / "annotations").iterdir():
        document = json.loads(path.read_text())
        del document["annotations"][1:]
        path.write_text(json.dumps(document))
    ok("check", "--coco_path", data)
    told = capsys.readouterr().out
    assert told.count(": 1 image, 1 box\n") == 2
    for path in data.rglob("*.png"):
        path.unlink()
    assert main(["check", "--coco_path", str(data)]) == 2
    assert "1 of 1 image cannot be used" in capsys.readouterr().err
    training = {"data": {"train": {"source": "a", "images": 1, "boxes": 1}}}
    facts = {"file": "a", "bytes": 1, "training": training}
    assert "a: 1 image, 1 box" in info_page(facts)


@pytest.mark.skipif(not BCCD.is_dir(), reason="no blood cells here")
def test_check_of_blood_cells(capsys: Output) -> None:
    images = BCCD / "images"
    files = ("--train_json", BCCD / "train.json", "--val_json", BCCD / "val.json")
    ok("check", *files, "--train_images", images, "--val_images", images, "--json")
    facts = json.loads(capsys.readouterr().out)
    kinds = [each["kind"] for each in facts["findings"]]
    assert facts["usable"] and kinds.count("degenerate box") == 2


def test_info_tells_how_it_was_trained(learnt: Learnt, capsys: Output) -> None:
    ok("info", learnt.weights, "--json")
    facts = json.loads(capsys.readouterr().out)
    tensors = load_file(learnt.weights)
    assert facts["parameters"] == sum(each.numel() for each in tensors.values())
    training = facts["training"]
    assert training["steps_done"] in (20, 40) and training["settings"]["lr"] == 1e-3
    assert training["data"]["training"]["images"] == 4 and training["version"] == vidt.__version__
    assert str(learnt.data.parent) not in json.dumps(facts["training"])  # files are handed on
    ok("info", learnt.weights)
    page = capsys.readouterr().out
    assert "classes (3): " in page and "map50 " in page and "backbone_name " in page


def test_info_of_weights_that_do_not_know(learnt: Learnt, tmp_path: Path, capsys: Output) -> None:
    tensors, info = load_weights(learnt.weights)
    save_weights(tmp_path / "old.safetensors", tensors, WeightsInfo(*list(vars(info).values())[:3]))
    ok("info", tmp_path / "old.safetensors")
    assert "training settings" not in capsys.readouterr().out


def test_benchmark(learnt: Learnt, tmp_path: Path, capsys: Output) -> None:
    how = ("--size", 64, 64, "--repeat", 2, "--batch_size", 2, "--device", "cpu")
    ok("benchmark", learnt.weights, *how, "--out", tmp_path / "speed.json")
    facts = json.loads((tmp_path / "speed.json").read_text())
    row = facts["throughput"]
    assert row["images"] == 2 and row["fastest"] <= row["median"] <= row["slowest"]
    assert row["images_per_second"] == pytest.approx(2 / row["median"])
    ok("benchmark", "swin_test", *how)
    assert "swin_test, pictures of 64 x 64" in capsys.readouterr().out


def test_benchmark_times_both_ways(
    learnt: Learnt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """The compiler is left out; then it fails."""
    how = ("--size", 64, 64, "--repeat", 1, "--batch_size", 1, "--device", "cpu", "--compile")
    asked: list[nn.Module] = []
    monkeypatch.setattr("vidt.predict.predictor.compile_blocks", asked.append)
    ok("benchmark", learnt.weights, *how, "--out", tmp_path / "speed.json")
    facts = json.loads((tmp_path / "speed.json").read_text())
    assert len(asked) == 1 and facts["compiled"].keys() == {"latency", "throughput"}
    text = capsys.readouterr().out
    assert "\nlatency, compiled" in text and "\nthroughput, compiled" in text

    def fail(model: nn.Module) -> None:
        def forward(*given: Any, **more: Any) -> None:
            raise RuntimeError("no C++ compiler\nand more")

        monkeypatch.setattr(model, "forward", forward)

    monkeypatch.setattr("vidt.predict.predictor.compile_blocks", fail)
    ok("benchmark", learnt.weights, *how)
    text = capsys.readouterr().out
    assert "\nthroughput " in text and "\ncompiled: failed, no C++ compiler\n" in text


def test_export_hands_on_what_was_asked_for(
    learnt: Learnt, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """The flags alone: what the exporter makes of them is tested beside it."""
    asked: list[Any] = []

    def module(name: str) -> Namespace:
        assert name == "vidt.onnx.export"
        return Namespace(export=lambda *given, **more: asked.append((given, more)) or report)

    monkeypatch.setattr("trainer.commands.export.import_module", module)
    report = Namespace(ok=False, text=lambda: "differs", as_dict=lambda: {"ok": False})
    words = ["export", learnt.weights, tmp_path / "m.onnx", "--size", 64, 96, "--with-decode"]
    words += ["--dynamic", "batch,size", "--images", photos, "--report", tmp_path / "report.json"]
    assert main([str(word) for word in words]) == 1
    ((given, more),) = asked
    assert given == (learnt.weights, tmp_path / "m.onnx")
    assert more["size"] == (64, 96) and more["dynamic"] == ("batch", "size")
    assert more["with_decode"] and not more["half"] and more["dataset_for"] is None
    assert len(more["images"]) == 4
    assert capsys.readouterr().out == "differs\n"
    assert json.loads((tmp_path / "report.json").read_text()) == {"ok": False}


def test_train_is_the_trainer(tiny_data: Path, room: Path) -> None:
    assert main(["train", *argv(tiny_data, room, "--max_steps 1 --eval_interval 9")]) == 0
    assert (room / "best.safetensors").is_file()


@pytest.mark.parametrize("write", [write_result, None])
def test_a_file_is_there_whole_or_not_at_all(
    tmp_path: Path, write: Callable[[Path, bytes], None] | None
) -> None:
    path = tmp_path / "deep/file.txt"
    if write is not None:
        write(path, b"new")
    else:
        with atomic_text(path) as file:
            file.write("new")
            assert not path.exists()
        with pytest.raises(KeyError), atomic_text(path) as file:
            file.write("newer")
            raise KeyError
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_whole_files_need_no_pytorch_and_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path,
) -> None:
    """Those of the command line, which can be made again, are not forced onto it."""
    code = (
        "import os, pathlib, sys; sys.modules['torch'] = None\n"
        "from trainer.commands.command_flags import write_result\n"
        "from vidt.atomic import atomic_write\n"
        "path, forced, real = pathlib.Path(sys.argv[1]), [], os.fsync\n"
        "os.fsync = lambda number: (forced.append(path.exists()), real(number))\n"
        "write_result(path.with_name('result'), b'1')\n"
        "assert forced == []\n"
        "atomic_write(path, b'1')\n"
        "assert forced == [False, True], 'the file, then its folder'\n"
        "assert path.read_bytes() == b'1'\n"
    )
    done = call([sys.executable, "-c", code, str(tmp_path / "file")])
    assert done.returncode == 0, done.stderr


def test_a_stage_is_told_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No clock: timers run at once, or never, as they are told."""
    started: list[Any] = []

    class Timer:
        def __init__(self, seconds: float, call: Callable[[str], None], words: list[str]) -> None:
            self.seconds, self.call, self.words, self.cancelled = seconds, call, words, False
            started.append(self)

        def start(self) -> None: ...

        def cancel(self) -> None:
            self.cancelled = True

    monkeypatch.setattr("trainer.commands.command_flags.threading.Timer", Timer)
    with Stages() as tell:
        tell("reading")
        tell("writing")
        first, second = started
        assert (first.cancelled, second.cancelled) == (True, False)
        second.call(*second.words)
    assert second.cancelled and second.seconds == SILENT
    assert capsys.readouterr().err == "writing ...\n"


def test_progress_without_a_terminal_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.commands.command_flags.BETWEEN_LINES", 0.0)
    with progress_bar(2000, "image") as bar:
        bar.update(1500)
        bar.update()
    with progress_bar(None, "frame") as bar:
        bar.update()
    lines = ["1,500 of 2,000 images ...", "1,501 of 2,000 images ...", "1 frames ..."]
    assert capsys.readouterr().err.splitlines() == lines


def test_every_long_stage_of_check_has_words(
    learnt: Learnt, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Stages, "__call__", lambda self, text: told.append(text))
    ok("check", "--coco_path", learnt.data)
    assert [text.split()[0] for text in told] == ["reading", "reading", "checking", "decoding"]
