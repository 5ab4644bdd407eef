"""Progress to console lines, to metrics.csv, to TensorBoard events and to other trackers."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from simulated import events_of_a_run, pictures_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from tiny_runs import argv, main_here

from trainer.report.console import Console, duration, score_table
from trainer.report.progress import (
    CsvLog,
    Event,
    Progress,
    TensorBoard,
    Trackers,
    fan_out,
    require_trackers,
)
from trainer.scoring.average_precision import COCO_NUMBERS
from vidt.atomic import atomic_write
from vidt.errors import UserError

TOTAL = 40


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def progress(event: Event, step: int, metrics: Mapping[str, float] = {}, **more: Any) -> Progress:
    """Ten steps an epoch, four epochs."""
    epoch = min(step // 10, 3) if event in ("start", "step") else max(0, step // 10 - 1)
    return Progress(event, step / TOTAL, epoch, step, TOTAL, metrics, total_epochs=4, **more)


def losses(step: int) -> dict[str, float]:
    names = {"loss": 3.0, "loss_ce": 2.0, "loss_giou": 1.0, "loss_ce_0": 0.5}
    rest = {"lr": 1e-4 * step, "grad_norm": 0.7, "images_per_second": 12.5, "memory_gib": 1.5}
    return {name: value / step for name, value in names.items()} | rest


def scores(map50: float) -> dict[str, float]:
    numbers = dict.fromkeys(COCO_NUMBERS, 0.25) | {"map50": map50, "map_large": -1.0}
    per_class = {"cat": (0.4, 0.6), "hot dog": (math.nan, math.nan)}
    for name, (ap, ap50) in per_class.items():
        numbers |= {f"ap/{name}": ap, f"ap50/{name}": ap50}
    return numbers


def run(
    report: Callable[[Progress], None],
    first: int = 0,
    last: int = TOTAL,
    settings: Mapping[str, Any] = {},
) -> None:
    """The events of a run from step `first` to `last`: a log line every 5, evaluation every 10."""
    report(progress("start", first, settings=settings))
    for step in range(first + 5, last + 1, 5):
        report(progress("step", step, losses(step)))
        if step % 10 == 0:
            report(progress("evaluating", step))
            report(progress("evaluation", step, scores(step / 100), best=True))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def events_of(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def steps_of(directory: Path, tag: str) -> list[int]:
    return [scalar.step for scalar in events_of(directory).Scalars(tag)]


def test_fan_out_calls_all_in_order() -> None:
    seen: list[tuple[str, Progress]] = []
    moment = progress("step", 5)
    fan_out(lambda p: seen.append(("a", p)), lambda p: seen.append(("b", p)))(moment)
    assert seen == [("a", moment), ("b", moment)]


# Console


def test_plain_console_writes_whole_lines_with_all_that_a_person_asks_for() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, clock=clock)
    console(progress("start", 0, message="training on 400 pictures"))
    clock.now += 90
    console(progress("step", 10, losses(10)))
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text
    first, line = text.splitlines()
    assert first.endswith("training on 400 pictures")
    for part in ("epoch 2/4", "step 10/40", "loss 0.3", "lr 0.001", "12.5 img/s", "ETA 4m30s"):
        assert part in line


def test_eta_of_a_resumed_run_counts_only_what_this_process_did() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, clock=clock)
    console(progress("start", 30))
    clock.now += 60
    console(progress("step", 35, losses(35)))
    # 5 steps took a minute, 5 are left; over all 35 steps it would seem to be 9 seconds.
    assert "ETA 1m00s" in stream.getvalue().splitlines()[-1]


def test_eta_before_anything_is_done_is_a_dash() -> None:
    stream = io.StringIO()
    console = Console(stream, clock=Clock())
    console(progress("start", 30))
    console(progress("evaluating", 30))
    console(progress("step", 30, losses(30)))
    assert "ETA -" in stream.getvalue().splitlines()[-1]


def test_a_line_for_each_evaluation_with_the_best_marked() -> None:
    stream = io.StringIO()
    console = Console(stream, clock=Clock())
    console(progress("start", 0))
    console(progress("evaluating", 10))
    console(progress("evaluating", 10))
    console(progress("evaluation", 10, scores(0.5), best=True))
    console(progress("evaluation", 20, scores(0.4) | {"map75": math.nan}))
    begun, best, worse = stream.getvalue().splitlines()
    assert begun.endswith("epoch 1/4  evaluating")
    assert "map50 0.500  map 0.250" in best and "* best so far" in best
    assert "map50 0.400" in worse and "map75 -" in worse and "(best 0.500 in epoch 1)" in worse


def test_end_names_best_epoch_classes_and_the_files_that_exist(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    best = tmp_path / "best.safetensors"
    best.write_bytes(b"")
    console = Console(stream, {"best weights": best, "curves": tmp_path / "gone"}, clock)
    run(console)
    clock.now += 4000
    console(progress("end", TOTAL))
    text = stream.getvalue()
    assert "finished at step 40 of 40, epoch 4/4, 1h06m" in text
    assert "best validation in epoch 4:" in text
    assert f"best weights  {best}" in text and "gone" not in text
    table = [line.split() for line in text.splitlines()]
    assert ["cat", "0.600", "0.400"] in table
    assert ["hot", "dog", "-", "-"] in table
    assert ["all", "classes", "0.400", "0.250"] in table


def test_end_prefers_the_best_that_the_trainer_names() -> None:
    """A resumed run may have had its best evaluation in an earlier process."""
    stream = io.StringIO()
    console = Console(stream, clock=Clock())
    run(console, first=20, last=30)
    console(progress("end", 30, scores(0.9) | {"best_epoch": 0}, message="stopped by SIGTERM"))
    text = stream.getvalue()
    assert "stopped at step 30 of 40" in text and "stopped by SIGTERM" in text
    assert "best validation in epoch 1:" in text and "0.900" in text


def test_end_without_evaluation_says_so() -> None:
    stream = io.StringIO()
    console = Console(stream, clock=Clock())
    console(progress("start", 0))
    console(progress("end", 5))
    assert "no evaluation" in stream.getvalue()


def test_terminal_gets_a_bar_and_the_evaluations_above_it() -> None:
    stream = Terminal()
    console = Console(stream, clock=Clock())
    run(console)
    shown = stream.getvalue().split("\r")
    assert any("step 20/40" in part and "50%|" in part for part in shown)
    evaluations = [part for part in shown if "best so far" in part]
    assert len(evaluations) == 4 and not any("|" in part for part in evaluations)
    console(progress("end", TOTAL))
    assert "best validation in epoch 4:" in stream.getvalue()


def test_closing_twice_is_harmless() -> None:
    stream = Terminal()
    console = Console(stream, clock=Clock())
    run(console, last=10)
    console.close()
    shown = stream.getvalue()
    console.close()
    assert stream.getvalue() == shown and shown.endswith("\n")


def test_a_name_that_the_output_cannot_encode_does_not_end_the_run() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(stream, clock=Clock())
    console(progress("start", 0))
    console(progress("end", 40, scores(0.5) | {"ap/\u732b": 0.5, "ap50/\u732b": 0.75}))
    stream.seek(0)
    assert "?" in stream.read()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *((-1.0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (725.0, "12m05s")),
        *((3599.6, "1h00m"), (11220.0, "3h07m"), (187200.0, "2d04h")),
    ],
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_columns_of_the_table_are_aligned() -> None:
    lines = score_table(scores(0.5) | {"ap/" + "x" * 30: 0.5, "ap50/" + "x" * 30: 1.0}).splitlines()
    assert len({len(line) for line in lines}) == 1


# metrics.csv


def test_csv_has_a_row_for_each_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "out" / "metrics.csv"
    run(CsvLog(path))
    rows = rows_of(path)
    assert [(row["epoch"], row["step"]) for row in rows] == [
        *(("1", "10"), ("2", "20"), ("3", "30"), ("4", "40"))
    ]
    first = rows[0]
    assert float(first["loss_ce"]) == pytest.approx((2 / 5 + 2 / 10) / 2)  # its own epoch only
    assert float(rows[1]["loss_ce"]) == pytest.approx((2 / 15 + 2 / 20) / 2, rel=1e-5)
    assert float(first["lr"]) == pytest.approx(1e-3)
    assert float(first["ap50/cat"]) == pytest.approx(0.6)
    assert first["map_large"] == "" and first["ap/hot dog"] == ""  # nothing to score
    names = list(first)
    assert [name for name in names if name in COCO_NUMBERS] == list(COCO_NUMBERS)
    assert names.index("loss_ce") < names.index("lr") < names.index("map50")
    assert names.index("mar_large") < names.index("ap/cat")


def test_a_mean_loss_counts_each_step_once(tmp_path: Path) -> None:
    """Lines of the log cover different numbers of steps: ten of loss 1, then one of loss 3."""
    log = CsvLog(tmp_path / "metrics.csv")
    log(progress("start", 0))
    log(progress("step", 10, {"loss": 1.0}))
    log(progress("step", 11, {"loss": 3.0}))
    log(progress("evaluation", 11, scores(0.5)))
    (row,) = rows_of(tmp_path / "metrics.csv")
    assert float(row["loss"]) == pytest.approx(13 / 11, rel=1e-5)


def test_resumed_csv_equals_that_of_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    run(CsvLog(whole))
    run(CsvLog(broken), last=30)  # killed after step 30; its last checkpoint is of step 20
    run(CsvLog(broken), first=20)
    assert broken.read_bytes() == whole.read_bytes()


def test_rows_beyond_the_resumed_step_go_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    run(CsvLog(path))
    CsvLog(path)(progress("start", 20))
    assert [row["step"] for row in rows_of(path)] == ["10", "20"]


def test_scoring_the_resumed_step_again_leaves_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    run(CsvLog(path), last=20)
    log = CsvLog(path)
    log(progress("start", 20))
    log(progress("evaluation", 20, scores(0.75)))
    rows = rows_of(path)
    assert [row["step"] for row in rows] == ["10", "20"] and rows[1]["map50"] == "0.75"


def test_fresh_run_starts_its_own_csv(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    run(CsvLog(path))
    run(CsvLog(path), last=10)
    assert [row["step"] for row in rows_of(path)] == ["10"]


def test_foreign_csv_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("a;b\n1;2\n")
    with pytest.raises(ValueError, match=r"metrics\.csv: .*'step'; move it away") as caught:
        CsvLog(path)(progress("start", 20))
    assert "\n" not in str(caught.value)
    assert path.read_text() == "a;b\n1;2\n"


def test_unfinished_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.csv"
    atomic_write(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.read(descriptor, 1))  # fails: write-only
    with pytest.raises(OSError, match=r"metrics\.csv cannot be written"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"


# TensorBoard


def test_tensorboard_holds_curves_and_pictures(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    run(board, last=20)
    picture = Image.new("RGB", (60, 40), "#ff0000")
    board(progress("evaluation", 30, scores(0.5), pictures=[picture, picture]))
    # Read before the end: what was scored is on disk at once.
    events = events_of(tmp_path)
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss_ce", "train_inner/loss_ce_0"} <= tags
    assert {"run/lr", "run/grad_norm", "run/images_per_second", "run/memory_gib"} <= tags
    assert {"val/map50", "val/mar_large", "val_ap/cat", "val_ap50/cat"} <= tags
    assert not {tag for tag in tags if "hot" in tag or "map_large" in tag}  # nothing to score
    assert events.Scalars("train/loss")[1].value == pytest.approx(0.3)
    assert [scalar.step for scalar in events.Scalars("val/map50")] == [10, 20, 30]
    assert set(events.Tags()["images"]) == {"pictures/00", "pictures/01"}
    stored = events.Images("pictures/01")[0]
    assert (stored.step, stored.width, stored.height) == (30, 60, 40)
    decoded = Image.open(io.BytesIO(stored.encoded_image_string))
    red, green, blue = decoded.getpixel((30, 20))  # type: ignore[misc]
    assert decoded.size == (60, 40) and red > 240 and green < 15 and blue < 15
    board.close()


def test_tensorboard_holds_thresholds_confusions_and_worst_images(tmp_path: Path) -> None:
    samples = pictures_of(tmp_path / "val", ("cat", "<b> $x$", "never"))
    samples = samples.keep_boxes(samples.labels != 2)
    board = TensorBoard(tmp_path / "events")
    events = events_of_a_run(samples, (0.0, 0.8))
    for event in events:
        board(event)
    read = events_of(tmp_path / "events")
    diagnosis = events[-1].diagnosis
    assert diagnosis is not None and diagnosis.curves[0].best is not None
    thresholds = [scalar.value for scalar in read.Scalars("val_threshold/cat")]
    assert thresholds[-1] == pytest.approx(diagnosis.curves[0].best.threshold)
    assert read.Scalars("val_f1/all classes")[-1].value > 0.5
    assert {"confusion", "worst/00", "worst/11"} <= set(read.Tags()["images"])
    confusion = Image.open(io.BytesIO(read.Images("confusion")[-1].encoded_image_string))
    assert confusion.getpixel((2, 2)) == (255, 255, 255) and confusion.width > 300
    curves = {tag.partition("/")[2] for tag in read.Tags()["tensors"] if "recall/" in tag}
    assert curves == {"cat", "<b> $x$", "all classes"}
    stored = read.Tensors("precision_recall/all classes")[-1].tensor_proto
    rows = tensor_util.make_ndarray(stored)
    right, false, _, missed, precision, recall = rows
    assert right[0] + missed[0] == len(samples.labels) and right[-1] == false[-1] == 0
    assert (np.diff(recall) <= 0).all()
    at_half = diagnosis.together.thresholds >= 64 / 126
    assert precision[64] == pytest.approx(diagnosis.together.precision[at_half][-1])


@pytest.mark.parametrize(("resumed", "kept"), [(20, [5, 10, 15, 20]), (0, [])])
def test_curves_do_not_double_back(tmp_path: Path, resumed: int, kept: list[int]) -> None:
    board = TensorBoard(tmp_path)
    run(board, last=35)
    board.close()
    for file in tmp_path.iterdir():  # readers go by name: the first process was the earlier one
        file.rename(tmp_path / "events.out.tfevents.0000000001.first")
    run(resumed_board := TensorBoard(tmp_path), first=resumed, last=30)
    resumed_board(progress("end", 30))
    assert steps_of(tmp_path, "train/loss") == kept + list(range(resumed + 5, 31, 5))
    assert steps_of(tmp_path, "val/map50") == [10, 20, 30]


# Trackers


class LinesTracker(GeneralTracker):
    """A tracker of accelerate that writes a line of JSON for everything that it is told."""

    name = "lines"
    requires_logging_directory = True
    fails_at: str | None = None

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.path = run_name, Path(logging_dir) / "lines.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    def tell(self, what: str, content: Any) -> None:
        if what == self.fails_at:
            raise ConnectionError(f"no {what}\ntoday")
        self.path.parent.mkdir(exist_ok=True, parents=True)
        with self.path.open("a") as file:
            file.write(json.dumps([what, content]) + "\n")

    def start(self) -> None:
        self.tell("start", self.run_name)

    def store_init_configuration(self, values: dict) -> None:
        self.tell("settings", values)

    def log(self, values: dict, step: int | None = None, **more: Any) -> None:
        self.tell("log", [step, values])

    def finish(self) -> None:
        self.tell("finish", None)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> type[LinesTracker]:
    """Known to accelerate as `lines`."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "lines", LinesTracker)
    monkeypatch.setattr(LinesTracker, "fails_at", None)
    return LinesTracker


def told(folder: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]


def test_a_tracker_is_told_settings_and_curves(lines: type[LinesTracker], tmp_path: Path) -> None:
    settings = {"lr": 1e-4, "train_sizes": [64, 96], "ema": True, "load_from": None}
    trackers = Trackers(("tensorboard", "lines"), tmp_path)
    run(trackers, settings=settings)
    trackers(progress("end", TOTAL, scores(0.4)))
    trackers.close()
    start, configured, *logged, end = told(tmp_path)
    assert (start, end) == (["start", "vidt"], ["finish", None])
    plain = {"lr": 1e-4, "train_sizes": "[64, 96]", "ema": True, "load_from": "None"}
    assert configured == ["settings", plain]
    by_step: dict[int, dict[str, float]] = {}
    for what, (step, values) in logged:
        assert what == "log"
        by_step.setdefault(step, {}).update(values)
    assert list(by_step) == list(range(5, TOTAL + 1, 5))
    assert by_step[10]["train/loss"] == 0.3 and by_step[10]["val/map50"] == 0.1
    assert by_step[10]["val_ap50/cat"] == 0.6
    assert not {"val/map_large", "val_ap/hot dog"} & set(by_step[10])  # nothing to score


@pytest.mark.parametrize(("moment", "lines_before"), [("start", 0), ("settings", 1), ("log", 2)])
def test_a_failing_tracker_is_told_once_and_ends_nothing(
    lines: type[LinesTracker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    moment: str,
    lines_before: int,
) -> None:
    monkeypatch.setattr(lines, "fails_at", moment)
    trackers = Trackers(("lines",), tmp_path)
    run(trackers, settings={"lr": 1.0})
    trackers.close()
    (line,) = [each.getMessage() for each in caplog.records]
    assert "--report_to lines failed (ConnectionError: no " in line and "\n" not in line
    path = tmp_path / "lines.jsonl"
    assert (len(told(tmp_path)) if path.exists() else 0) == lines_before


def test_trackers_that_cannot_be_used_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_trackers(())
    require_trackers(("tensorboard",))
    monkeypatch.setattr("trainer.report.progress.get_available_trackers", lambda: ["tensorboard"])
    for names, said in (
        (("tensorboard", "wandb"), "--report_to wandb needs a package; pip install wandb"),
        (("comet_ml",), "pip install comet-ml"),
        (("all",), "the trackers are .*tensorboard.*, or none"),
        (("wandbb",), "--report_to wandbb: the trackers are .*wandb"),
    ):
        with pytest.raises(UserError, match=said):
            require_trackers(names)


@pytest.mark.parametrize(
    ("flags", "events", "sent"),
    [("", True, False), ("--report_to none", False, False), ("--report_to lines", False, True)],
)
def test_a_run_reports_to_what_it_is_told(
    lines: type[LinesTracker], tiny_data: Path, room: Path, flags: str, events: bool, sent: bool
) -> None:
    assert main_here(argv(tiny_data, room, "--max_steps 1", flags)) == 0
    assert (room / "tensorboard").exists() == events
    assert (room / "lines.jsonl").exists() == sent
    if sent:
        (_, settings) = told(room)[1]
        assert settings["report_to"] == "['lines']" and settings["epochs"] > 0
        assert any("val/map50" in values for what, (_, values) in told(room)[2:-1])
