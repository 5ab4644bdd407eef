"""At every instant there is a whole checkpoint, and what is not whole is named and passed over."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import newest_checkpoint
from torch import Tensor

from trainer.loop import resume
from trainer.loop.resume import RunState, load, save

SIZE = 50_000  # numbers in a checkpoint


def tensors(step: int) -> dict[str, Tensor]:
    return {"model/weight": torch.full((SIZE,), float(step))}


def save_step(root: Path, step: int, *, keep: int = 3, **fields: Any) -> Path:
    return save(root, RunState(step=step, **fields), tensors(step), keep=keep)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three checkpoints of a run."""
    for step in (3, 6, 9):
        save_step(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def test_round_trip(tmp_path: Path) -> None:
    state = RunState(step=7, best_metrics={"map50": float("nan")}, scaler={"scale": 2.0})
    path = save(tmp_path, state, tensors(7), keep=1)
    checkpoint = load(path)
    found, loaded = checkpoint.state, checkpoint.tensors
    assert repr(found) == repr(state)
    assert torch.equal(loaded["model/weight"], tensors(7)["model/weight"])


def test_found_by_any_name(root: Path) -> None:
    newest = root / "step-00000009"
    for wanted in (root.parent, root, newest):
        assert newest_checkpoint(wanted) == (newest, [])
    assert newest_checkpoint(root / "step-00000003") == (root / "step-00000003", [])
    assert newest_checkpoint(root.parent / "nowhere") == (None, [])


def cut_tensors(path: Path) -> None:
    os.truncate(path / "tensors.safetensors", 1000)


def flip_a_bit(path: Path) -> None:
    with open(path / "tensors.safetensors", "r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))


def cut_state(path: Path) -> None:
    os.truncate(path / "state.json", 100)


def no_state(path: Path) -> None:
    (path / "state.json").unlink()


def no_tensors(path: Path) -> None:
    (path / "tensors.safetensors").unlink()


def nothing_inside(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a note")


def foreign_json(path: Path) -> None:
    (path / "state.json").write_text('["step", 9]')


def foreign_files(path: Path) -> None:
    (path / "state.json").write_text('{"files": ["tensors.safetensors"], "state": {}}')


def newer_fields(path: Path) -> None:
    content = json.loads((path / "state.json").read_text())
    content["state"]["mood"] = "good"
    (path / "state.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        cut_tensors,
        flip_a_bit,
        cut_state,
        no_state,
        no_tensors,
        nothing_inside,
        a_file,
        foreign_json,
        foreign_files,
        newer_fields,
    ],
)
def test_what_is_not_whole_is_named_and_passed_over(
    root: Path, damage: Callable[[Path], None]
) -> None:
    newest = root / "step-00000009"
    damage(newest)
    path, passed_over = newest_checkpoint(root.parent)
    assert path == root / "step-00000006"
    assert len(passed_over) == 1 and str(newest) in passed_over[0]
    assert "\n" not in passed_over[0]
    # What follows is the newest, and the damaged one does not take a whole one's place.
    save_step(root, 7, keep=2)
    assert newest_checkpoint(root.parent)[0] == root / "step-00000007"
    left = {"step-00000006", "step-00000007"}
    assert set(os.listdir(root)) == left | ({newest.name} if newest.is_file() else set())


def test_nothing_whole_at_all(root: Path) -> None:
    for path in root.iterdir():
        cut_tensors(path)
    path, passed_over = newest_checkpoint(root)
    assert path is None
    assert [line.split()[1] for line in passed_over] == [
        str(root / f"step-0000000{step}") for step in (9, 6, 3)
    ]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save_step(tmp_path, step, keep=keep)
        expected = [f"step-0000000{s}" for s in range(max(1, step - keep + 1), step + 1)]
        assert sorted(os.listdir(tmp_path)) == expected


@pytest.mark.parametrize("keep", [1, 2])
def test_the_same_step_saved_over_and_over(tmp_path: Path, keep: int) -> None:
    save_step(tmp_path, 3, keep=keep)
    for best_step in range(12):
        path = save_step(tmp_path, 4, keep=keep, best_step=best_step)
        assert newest_checkpoint(tmp_path) == (path, [])
        assert load(path).state.best_step == best_step
        assert len(os.listdir(tmp_path)) == keep


def test_leftovers_of_a_kill_are_not_found_and_go_with_the_next_save(root: Path) -> None:
    (root / "step-00000009").rename(root / ".step-00000009.77.unfinished")
    shutil.copytree(root / "step-00000006", root / ".step-00000006.removed")
    assert newest_checkpoint(root) == (root / "step-00000006", [])
    save_step(root, 9)
    assert sorted(os.listdir(root)) == [f"step-0000000{step}" for step in (3, 6, 9)]


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: writing fails as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("num_bytes", [0, 100, SIZE])
def test_a_full_disk_costs_nothing_but_the_new_one(root: Path, num_bytes: int) -> None:
    with full_disk(num_bytes), pytest.raises(OSError, match="step-00000012") as caught:
        save_step(root, 12, keep=1)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(root)) == [f"step-0000000{step}" for step in (3, 6, 9)]
    assert newest_checkpoint(root) == (root / "step-00000009", [])


def test_room_for_the_tensors_but_not_for_the_state(root: Path) -> None:
    settings = {"long": "x" * 8 * SIZE}
    with full_disk(4 * SIZE + 1000), pytest.raises(OSError, match="step-00000012"):
        save_step(root, 12, keep=1, settings=settings)
    assert newest_checkpoint(root) == (root / "step-00000009", [])


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a note")
    with pytest.raises(OSError, match="checkpoints"):
        save_step(tmp_path / "checkpoints", 3)
    assert (tmp_path / "checkpoints").read_text() == "a note"


class Killed(BaseException):
    """The process is gone: from here on nothing it meant to do happens."""


@contextmanager
def killed_at(instant: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every change of the disk counts as an instant; the one given, and all after it, do not take
    place.
    """
    done: list[str] = []

    def mortal(name: str, real: Callable) -> Callable:
        def work(*args: Any, **more: Any) -> Any:
            if len(done) >= instant:
                raise Killed
            done.append(name)
            return real(*args, **more)

        return work

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", mortal("write tensors", resume.save_file))
        for owner, name in (
            (Path, "write_text"),
            (Path, "mkdir"),
            (Path, "rename"),
            (shutil, "rmtree"),
        ):
            patch.setattr(owner, name, mortal(name, getattr(owner, name)))
        yield done


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_any_instant_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """Before each change of the disk, in turn: what is found is the old one or the new one, whole,
    and the next save works.
    """
    instants = 0
    for instant in range(100):
        root = tmp_path / str(instant)
        for step in (1, 2):
            save_step(root, step, keep=keep)
        try:
            with killed_at(instant, monkeypatch) as done:
                save_step(root, 3, keep=keep)
            break
        except Killed:
            instants = len(done)
        path, passed_over = newest_checkpoint(root)
        assert path is not None and passed_over == []
        assert load(path).state.step == (3 if "rename" in done else 2)
        save_step(root, 3, keep=keep)
        checkpoint = load(newest_checkpoint(root)[0])
        state, loaded = checkpoint.state, checkpoint.tensors
        assert state.step == 3 and bool((loaded["model/weight"] == 3).all())
        assert not [name for name in os.listdir(root) if name.startswith(".")]
    assert instants >= 6
