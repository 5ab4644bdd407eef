"""A loss that is NaN or infinite ends a run with step, terms and images named, and nothing saved
since.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_runs import cpu, last_checkpoint, run

from trainer.loop import resume
from trainer.loop.agreement import Agreement
from trainer.loop.loss_log import LossLog, NonFiniteLoss
from trainer.report.progress import Progress
from vidt.losses.criterion import SetCriterion


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".safetensors", ".json")
    }


def test_a_diverging_run(tiny_data: Path, room: Path) -> None:
    """With a learning rate of 1e30, of which nobody looks at the losses before the epoch ends."""
    run(tiny_data, room, "--epochs 1")
    before, events = contents(room), []

    def report(progress: Progress) -> None:
        events.append((progress.event, progress.step))

    with pytest.raises(NonFiniteLoss) as caught:
        run(tiny_data, room, "--resume --lr 1e30 --log_interval 100 --keep 5", report=report)
    message = str(caught.value)
    assert "\n" not in message
    # The step from 1e30 on is the fourth (3, counted from 0): the fifth is the first to see it.
    assert message.startswith("the loss is not finite at step 4: loss_")
    (finding,) = json.loads((room / "non_finite.json").read_text())
    assert finding["step"] == 4
    assert len(finding["image_ids"]) == 4 and set(finding["image_ids"]) <= set(range(101, 113))
    assert str(finding["image_ids"]) in message and str(room / "non_finite.json") in message
    bad = {name for name, value in finding["terms"].items() if not math.isfinite(value)}
    assert bad and all(f"{name} " in message for name in bad)
    assert all(name in finding["terms"] for name in ("loss_ce", "loss_bbox", "loss_giou"))
    after = contents(room)
    del after["non_finite.json"]
    assert after == before
    assert events == [("start", 3)]


@pytest.mark.parametrize("clip", ["0.1", "0"])
def test_a_gradient_that_overflows_under_a_finite_loss(
    tiny_data: Path, room: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """It would ruin the weights of the very step that is saved."""
    forward, calls = SetCriterion.forward, []

    def overflowing(self, *args, **more):
        terms = forward(self, *args, **more)
        calls.append(args)
        if len(calls) == 2:
            terms["loss_ce"].register_hook(lambda gradient: gradient * float("inf"))
        return terms

    monkeypatch.setattr(SetCriterion, "forward", overflowing)
    with pytest.raises(NonFiniteLoss, match=r"at step 1: grad_norm (nan|inf); images"):
        run(tiny_data, room, f"--save_steps 1 --clip_max_norm {clip}")
    (finding,) = json.loads((room / "non_finite.json").read_text())
    assert all(math.isfinite(v) for name, v in finding["terms"].items() if name != "grad_norm")
    tensors = resume.load(last_checkpoint(room)).tensors
    assert last_checkpoint(room).name == "step-00000001"
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_it_is_noticed_at_the_next_log_line(tiny_data: Path, room: Path) -> None:
    events = []

    def report(progress: Progress) -> None:
        events.append((progress.event, progress.step))

    with pytest.raises(NonFiniteLoss):
        run(tiny_data, room, "--epochs 5 --lr 1e30 --warmup_steps 0", report=report)
    assert events == [("start", 0), ("step", 1)]
    assert not (room / "checkpoints").exists() and not list(room.glob("*.safetensors"))


def test_the_time_of_an_evaluation_is_not_training_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("trainer.loop.loss_log.time.monotonic", lambda: now)
    log = LossLog(Agreement(cpu()), tmp_path, step_images=6)
    log.add(0, {"loss_ce": torch.ones(())}, torch.ones(()), [1])
    now = 2.0
    with log.paused():
        now = 100.0
    assert log.check()["images_per_second"] == pytest.approx(3)
