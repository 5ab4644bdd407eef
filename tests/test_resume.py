"""A run that is broken off and resumed ends bit for bit as one that was left alone.

Whole processes, killed at random, are in test_kill_resume.py; here runs break off at chosen places.
"""

import csv
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    Crash,
    differences,
    end_of,
    last_checkpoint,
    random_pictures,
    run,
    write_coco,
)

from trainer.loop import resume
from trainer.loop.optim import ema_decay_of
from trainer.loop.stopping import Stopped
from trainer.report.progress import CsvLog, Progress
from vidt.errors import UserError
from vidt.weights.weights_file import load_weights

Scores = dict[int, dict[str, float]]
# Three steps an epoch, two epochs. Dropout is on, as by default, and the body drops paths.
PLAIN = "--backbone_name swin_test_drop"
PLUS = "--epff --iou_aware --token_label --denoising 6"
OTHER = "--n_iter_to_acc 2 --denoising 6 --no-ema --dropout 0.3"


class Watch:
    """A report that keeps the scores by step, and breaks the run off at an event of a step."""

    def __init__(self, event: str = "", step: int = -1, signum: int = 0) -> None:
        self.when, self.signum = (event, step), signum
        self.scores: Scores = {}
        self.losses: dict[int, float] = {}
        self.first_step = -1

    def __call__(self, progress: Progress) -> None:
        if progress.event == "start":
            self.first_step = progress.step
        if progress.event == "evaluation":
            self.scores[progress.step] = dict(progress.metrics)
        if progress.event == "step":
            self.losses[progress.step] = progress.metrics["loss"]
        if (progress.event, progress.step) == self.when:
            if not self.signum:
                raise Crash
            os.kill(os.getpid(), self.signum)


@pytest.fixture(scope="module")
def whole_runs(
    tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], Watch]]:
    """What a run with these flags ends with when nothing breaks it off."""
    done: dict[str, tuple[dict[str, Any], Watch]] = {}

    def of(flags: str) -> tuple[dict[str, Any], Watch]:
        if flags not in done:
            output, watch = tmp_path_factory.mktemp("whole"), Watch()
            run(tiny_data, output, flags, report=watch)
            done[flags] = end_of(output), watch
            shutil.rmtree(output)
        return done[flags]

    return of


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("flags", "event", "step", "signum", "resumed_at"),
    [
        (PLAIN, "step", 2, signal.SIGINT, 2),
        (PLAIN, "step", 3, signal.SIGTERM, 3),
        (PLAIN, "evaluating", 6, signal.SIGTERM, 6),
        pytest.param(PLUS, "step", 2, signal.SIGTERM, 2, marks=pytest.mark.slow),
        (PLAIN, "saved", 3, 0, 3),
        (PLAIN, "evaluating", 3, 0, 0),
        (f"{PLAIN} --save_steps 2", "step", 5, 0, 4),
        pytest.param(
            f"{PLAIN} --num_workers 2", "step", 4, signal.SIGTERM, 4, marks=pytest.mark.slow
        ),
        (OTHER, "step", 4, signal.SIGTERM, 4),
    ],
)
def test_broken_off_and_resumed(
    tiny_data: Path,
    room: Path,
    whole_runs: Callable[[str], tuple[dict[str, Any], Watch]],
    flags: str,
    event: str,
    step: int,
    signum: int,
    resumed_at: int,
) -> None:
    first, second = Watch(event, step, signum), Watch()
    with pytest.raises((Crash, Stopped)):
        run(tiny_data, room, flags, report=first)
    run(tiny_data, room, flags, "--resume", report=second)
    assert second.first_step == resumed_at
    whole, whole_watch = whole_runs(PLAIN if flags.startswith(PLAIN + " ") else flags)
    assert differences(end_of(room), whole) == []
    for broken, once in ((first, whole_watch), (second, whole_watch)):
        assert broken.scores.items() <= once.scores.items()
        assert broken.losses.items() <= once.losses.items()
    assert {*first.scores, *second.scores} == {3, 6}


@pytest.mark.slow
def test_a_balanced_run_with_an_automatic_average_is_resumed(
    tiny_data: Path, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An epoch shows 16 pictures instead of 12. The decay is of the run's length, 8 steps, and a
    longer run keeps it: what its last epochs average does not depend on where it was broken off.
    """
    flags = "--repeat_thresh 1 --ema_decay auto --sched flat_cosine --warmup_share 0.2"
    watch = Watch()
    caplog.set_level("INFO")
    run(tiny_data, room / "whole", flags, "--epochs 2", report=watch)
    assert "an epoch shows 16 images instead of 12" in caplog.text
    assert {*watch.scores} == {4, 8}
    settings = resume.load(last_checkpoint(room / "whole")).state.settings
    assert settings["ema_decay"] == ema_decay_of(8)
    assert f"ema_decay: {ema_decay_of(8)}" in (room / "whole/config.yaml").read_text()
    with pytest.raises(Stopped):
        run(tiny_data, room / "cut", flags, report=Watch("step", 5, signal.SIGTERM))
    run(tiny_data, room / "cut", flags, "--resume")
    assert differences(end_of(room / "cut"), end_of(room / "whole")) == []
    caplog.clear()
    run(tiny_data, room / "cut", flags, "--resume --epochs 3")
    assert resume.load(last_checkpoint(room / "cut")).state.settings["ema_decay"] == ema_decay_of(8)
    assert "as in the checkpoint" in caplog.text and "with ema_decay" not in caplog.text
    run(tiny_data, room / "none", "--no-ema --ema_decay auto --epochs 1")
    with pytest.raises(UserError, match="--no-ema"):
        run(tiny_data, room / "none", "--ema_decay auto --epochs 2 --resume")


def test_a_checkpoint_is_read_once(
    tiny_data: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_data, room, "--max_steps 1")
    path, read, hashed = last_checkpoint(room), [], []
    load_file, fingerprint = resume.load_file, resume._fingerprint
    monkeypatch.setattr(resume, "load_file", lambda file: (read.append(file), load_file(file))[1])
    monkeypatch.setattr(
        resume, "_fingerprint", lambda file: (hashed.append(file), fingerprint(file))[1]
    )
    run(tiny_data, room, "--max_steps 1 --resume")
    assert read == hashed == [path / resume.TENSORS]


@pytest.mark.slow
def test_broken_off_again_and_again(
    tiny_data: Path, room: Path, whole_runs: Callable[[str], tuple[dict[str, Any], Watch]]
) -> None:
    """At every step, and twice while evaluating after the same step."""
    flags = f"{PLAIN} --resume --keep 1"
    stops = [("step", 1), ("evaluating", 3), ("evaluating", 3), ("evaluating", 3), ("step", 5)]
    for event, step in [*stops, ("evaluating", 6), ("evaluating", 6)]:
        with pytest.raises(Stopped):
            run(tiny_data, room, flags, report=Watch(event, step, signal.SIGTERM))
    run(tiny_data, room, flags)
    assert differences(end_of(room), whole_runs(PLAIN)[0]) == []
    assert len(os.listdir(room / "checkpoints")) == 1


def test_another_seed_no_dropout_and_no_dropped_paths_end_elsewhere(
    tiny_data: Path, room: Path, whole_runs: Callable[[str], tuple[dict[str, Any], Watch]]
) -> None:
    """What the tests above compare depends on the random numbers that they are about."""
    for flags in ("--seed 43", "--dropout 0", "--backbone_name swin_test"):
        watch = Watch()
        others = flags if "backbone" in flags else f"{PLAIN} {flags}"
        run(tiny_data, room / flags.replace(" ", ""), others, "--max_steps 1", report=watch)
        assert watch.losses[1] != whole_runs(PLAIN)[1].losses[1]


def test_resuming_a_finished_run_changes_nothing_unless_told_to_go_on(
    tiny_data: Path, room: Path
) -> None:
    best = run(tiny_data, room, "--max_steps 2")
    before, watch = end_of(room), Watch()
    assert run(tiny_data, room, "--max_steps 2 --resume", report=watch) == best
    assert differences(end_of(room), before) == []
    assert watch.losses == {} and watch.scores == {}
    run(tiny_data, room, "--max_steps 4", f"--resume {room}", report=watch)
    assert (watch.first_step, list(watch.losses)) == (2, [3, 4])


@pytest.mark.parametrize("flags", [("--ema", "--no-ema"), ("--no-ema", "--ema")])
def test_resume_needs_the_average_exactly_if_the_checkpoint_has_one(
    tiny_data: Path, room: Path, flags: tuple[str, str]
) -> None:
    """Dropping it would lose the weights that the run evaluates and saves."""
    before, now = flags
    run(tiny_data, room, f"--max_steps 1 {before}")
    with pytest.raises(ValueError, match=f"--resume.*{before};") as caught:
        run(tiny_data, room, f"--max_steps 2 --resume {now}")
    assert "\n" not in str(caught.value)


def test_bare_resume_without_anything_is_a_fresh_run(tiny_data: Path, room: Path) -> None:
    watch = Watch()
    run(tiny_data, room, "--max_steps 1 --resume", report=watch)
    assert watch.first_step == 0
    with pytest.raises(ValueError, match="no intact checkpoint") as caught:
        run(tiny_data, room, "--max_steps 1", f"--resume {room / 'nowhere'}")
    assert "nowhere" in str(caught.value) and "\n" not in str(caught.value)


def test_bare_resume_does_not_start_anew_over_damaged_checkpoints(
    tiny_data: Path, room: Path
) -> None:
    run(tiny_data, room, "--max_steps 1")
    (last_checkpoint(room) / resume.STATE).write_text("{")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        run(tiny_data, room, "--max_steps 1 --resume")
    assert last_checkpoint(room).exists()


def test_without_anything_to_score_the_latest_is_the_best() -> None:
    state = resume.RunState(n_iter_to_acc=1, step=1)
    assert state.note_evaluation({"map50": -1.0})
    state.step = 2
    assert state.note_evaluation({"map50": -1.0}) and state.best_step == 2
    state.step = 3
    assert state.note_evaluation({"map50": 0.5}) and not state.note_evaluation({"map50": 0.5})


def test_the_best_by_another_metric() -> None:
    """A resumed run that changes it compares with the best evaluation's value of that metric."""
    state = resume.RunState(step=1, settings={"best_by": "map"})
    assert state.note_evaluation({"map50": 0.6, "map": 0.2})
    state.step = 2
    assert not state.note_evaluation({"map50": 0.7, "map": 0.2})
    assert state.note_evaluation({"map50": 0.5, "map": 0.3}) and state.best_step == 2
    state.settings = {"best_by": "map50"}
    assert not state.note_evaluation({"map50": 0.5, "map": 0.4})
    assert state.note_evaluation({"map50": 0.55, "map": 0.1})


def test_another_best_by_when_resuming_is_told(
    tiny_data: Path, one_step: Path, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny_data, room, f"--max_steps 2 --best_by map --resume {one_step}")
    assert "resuming with best_by map, it was map50" in caplog.text


@pytest.mark.slow
def test_a_fresh_run_in_a_used_folder(
    tiny_data: Path, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checkpoints count, though the old ones are of later steps; so does a branch's."""
    run(tiny_data, room, "--keep 1")
    assert "already holds a run" not in caplog.text
    with pytest.raises(Crash):
        run(tiny_data, room, "--keep 2 --seed 7 --save_steps 1", report=Watch("step", 3))
    assert "already holds a run" in caplog.text
    assert len(os.listdir(room / "earlier" / "checkpoints")) == 1, "nothing of the first is lost"
    names = sorted(os.listdir(room / "checkpoints"))
    assert names == ["step-00000001", "step-00000002"]
    branch = f"--resume {room / 'checkpoints/step-00000001'}"
    with pytest.raises(Crash):
        run(tiny_data, room, "--keep 1 --seed 7 --save_steps 1", branch, report=Watch("saved", 2))
    assert last_checkpoint(room).name == "step-00000002.1"


@pytest.mark.slow
def test_a_run_set_aside_goes_on_as_if_left_alone(tiny_data: Path, room: Path) -> None:
    flags = "--epochs 2 --dropout 0.1"
    run(tiny_data, room / "alone", flags)
    with pytest.raises(Crash):  # in the second epoch
        run(tiny_data, room / "used", flags, "--save_steps 1", report=Watch("step", 4))
    first = (room / "used" / "best.safetensors").read_bytes()
    run(tiny_data, room / "used", "--max_steps 1", f"--load_from {room}/used/best.safetensors")
    earlier = room / "used" / "earlier"
    assert (earlier / "best.safetensors").read_bytes() == first
    assert (room / "used" / "best.safetensors").read_bytes() != first
    run(tiny_data, earlier, flags, "--resume")
    assert differences(end_of(earlier), end_of(room / "alone")) == []


def test_a_start_that_fails_leaves_the_earlier_run_where_it_is(tiny_data: Path, room: Path) -> None:
    run(tiny_data, room, "--max_steps 1")
    before = last_checkpoint(room)
    for flags in (f"--load_from {room}/best.safetensors --reduced_dim 128", "--copy_paste 0.5"):
        with pytest.raises(UserError):
            run(tiny_data, room, "--max_steps 1", flags)
        assert last_checkpoint(room) == before and not (room / "earlier").exists()


def test_a_start_from_the_run_before_the_earlier_one(tiny_data: Path, room: Path) -> None:
    """`earlier` is replaced, but only once its weights have been read."""
    for seed in (1, 2):
        run(tiny_data, room, f"--max_steps 1 --seed {seed}")
    first = load_weights(room / "earlier/best.safetensors")[0]
    start = f"--load_from {room}/earlier/best.safetensors"
    run(tiny_data, room, "--max_steps 1 --lr 1e-7 --weight_decay 0 --no-ema", start)
    last = load_weights(room / "best.safetensors")[0]
    assert all(torch.allclose(last[name], tensor, atol=1e-5) for name, tensor in first.items())


def test_best_weights_that_are_gone_are_made_anew(
    tiny_data: Path, one_step: Path, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = room / "own/metrics.csv"
    run(tiny_data, room / "own", "--max_steps 1 --seed 7", report=CsvLog(log))
    shutil.copytree(one_step, room / "other")
    (room / "other/best.safetensors").unlink()
    flags = f"--max_steps 2 --resume {room}/other"
    best = run(tiny_data, room / "own", flags, report=CsvLog(log))
    assert "the next evaluation counts as the best so far" in caplog.text
    with log.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2"], "no row of the run before"
    kept = load_weights(room / "own/best.safetensors")[1]
    assert kept.training["steps_done"] == 2 and kept.metrics["map50"] == best["map50"]


def test_results_that_a_run_does_not_replace_do_not_stay(tiny_data: Path, room: Path) -> None:
    run(tiny_data, room, "--max_steps 1")
    for name in resume.NOT_OF_EVERY_RUN:
        (room / name).write_text("old")
    assert resume.set_aside(room) == room / "earlier"
    for name in resume.NOT_OF_EVERY_RUN:
        assert (room / "earlier" / name).read_text() == "old" and not (room / name).exists()
        (room / name).write_text("of a run without a checkpoint")
    run(tiny_data, room, "--max_steps 1")
    assert not any((room / name).exists() for name in resume.NOT_OF_EVERY_RUN)


def test_killed_while_it_sets_a_run_aside(tiny_data: Path, room: Path) -> None:
    run(tiny_data, room, "--max_steps 1")
    whole = {path.relative_to(room) for path in room.rglob("*") if path.is_file()}
    rename = Path.rename

    def killed(path: Path, place: Path) -> Path:
        if path.name == "checkpoints" or path.name.endswith(".half"):
            raise Crash
        return rename(path, place)

    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Path, "rename", killed)
            resume.set_aside(room)
    (room / "tensorboard").mkdir()  # a run went on in between
    (room / "tensorboard/events").write_text("new")
    assert resume.set_aside(room) == room / "earlier"
    assert (room / "earlier/tensorboard/events").read_text() == "new"
    kept = {path.relative_to(room / "earlier") for path in (room / "earlier").rglob("*")}
    assert whole - kept <= {Path("findings.csv")}
    assert resume.set_aside(room) is None


@pytest.fixture(scope="module")
def one_step(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("one_step")
    run(tiny_data, output, "--max_steps 1 --n_iter_to_acc 4")
    yield output
    shutil.rmtree(output)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--batch_size 2", "images per optimiser step is 4, this run's 2"),
        ("--dec_layers 2", "another architecture"),
    ],
)
def test_what_cannot_be_resumed(tiny_data: Path, one_step: Path, flags: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        run(tiny_data, one_step, "--max_steps 2 --resume", flags)
    assert "\n" not in str(caught.value)


def test_another_dataset_cannot_be_resumed_on(one_step: Path, room: Path) -> None:
    other = write_coco(room, random_pictures(12, 5), random_pictures(1, 6))
    with pytest.raises(ValueError, match="training set"):
        run(other, one_step, "--max_steps 2 --resume")


def test_micro_batches_asked_for_when_resuming_count(
    tiny_data: Path, one_step: Path, room: Path
) -> None:
    run(tiny_data, room, f"--max_steps 2 --n_iter_to_acc 2 --resume {one_step}")
    assert resume.load(last_checkpoint(room)).state.n_iter_to_acc == 2


def test_more_patience_when_resuming(tmp_path: Path, room: Path) -> None:
    """With lr so small that nothing is learnt, the run ends early; told to wait it goes on."""
    data = write_coco(tmp_path / "data", random_pictures(4, 0), random_pictures(2, 1))
    flags = "--epochs 4 --lr 1e-12 --min_lr 0 --no-ema"
    run(data, room, flags, "--patience 1")
    state = resume.load(last_checkpoint(room)).state
    assert state.stopped_early and state.step == 2
    watch = Watch()
    run(data, room, flags, "--patience 3 --resume", report=watch)
    assert list(watch.losses) == [3, 4]


def test_a_finished_run_that_is_resumed_sweeps_what_a_kill_left(
    tiny_data: Path, room: Path
) -> None:
    """Nothing is saved any more, so no later save would do it."""
    first = run(tiny_data, room, "--max_steps 2")
    leftover = room / "checkpoints/.step-00000001.removed"
    leftover.mkdir()
    (leftover / "model.safetensors").touch()
    assert run(tiny_data, room, "--max_steps 2 --resume") == first
    assert not leftover.exists()


@pytest.mark.slow
def test_resuming_into_a_folder_that_holds_another_run_sets_that_run_aside(
    tiny_data: Path, room: Path
) -> None:
    """And the best weights come along, so that the new folder is complete."""
    run(tiny_data, room / "first", "--max_steps 1")
    run(tiny_data, room / "other", "--max_steps 2 --seed 3")
    other = (room / "other/best.safetensors").read_bytes()
    from_first = f"--resume {room / 'first'} --max_steps 1"
    run(tiny_data, room / "other", from_first)
    assert (room / "other/earlier/best.safetensors").read_bytes() == other
    assert resume.checkpoints(room / "other/earlier/checkpoints")
    run(tiny_data, room / "empty", from_first)
    first = (room / "first/best.safetensors").read_bytes()
    for folder in ("other", "empty"):
        assert (room / folder / "best.safetensors").read_bytes() == first
    run(tiny_data, room / "other", "--max_steps 1")
    with pytest.raises(UserError, match="lies inside --output_dir"):
        run(tiny_data, room / "other", f"--resume {room / 'other/earlier'} --max_steps 3")
