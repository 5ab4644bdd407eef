"""A run as a whole: what it reports, when it evaluates, saves and ends, and that it learns."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import (
    NAMES,
    Learnt,
    cpu,
    differences,
    last_checkpoint,
    random_pictures,
    run,
    settings,
    tables,
    write_coco,
)

from trainer.loop import resume
from trainer.report.progress import Progress
from trainer.scoring.average_precision import COCO_NUMBERS
from trainer.train import train
from vidt.weights.weights_file import load_weights


def test_four_pictures_are_learnt(learnt: Learnt) -> None:
    assert learnt.scores[40]["map50"] > 0.5 > 0.4 > learnt.scores[20]["map50"]
    assert load_weights(learnt.weights)[1].metrics == learnt.scores[40]


def test_what_is_reported(tiny_data: Path, room: Path) -> None:
    told: list[Progress] = []
    metrics = run(tiny_data, room, "--epochs 3 --eval_interval 2 --keep 2", report=told.append)
    events = [(each.event, each.step) for each in told if each.event != "evaluating"]
    assert events == [
        ("start", 0),
        *[("step", 1), ("step", 2), ("step", 3), ("saved", 3)],
        *[("step", 4), ("step", 5), ("step", 6), ("evaluation", 6), ("saved", 6)],
        *[("step", 7), ("step", 8), ("step", 9), ("evaluation", 9), ("saved", 9)],
        ("end", 9),
    ]
    fractions = [each.fraction for each in told]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert {(each.total_steps, each.total_epochs) for each in told} == {(9, 3)}
    assert [each.epoch for each in told if each.event == "step"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for each in told:
        assert "\n" not in each.message
        if each.event == "step":
            loss = sum(v for name, v in each.metrics.items() if name.startswith("loss_"))
            assert each.metrics["loss"] == pytest.approx(loss)
        if each.event == "evaluation":
            per_class = {f"{kind}/{name}" for kind in ("ap", "ap50") for name in NAMES}
            assert set(each.metrics) == {*COCO_NUMBERS, *per_class}
            assert each.weights == room / "last.safetensors" and each.pictures
    assert metrics == {name: told[-1].metrics[name] for name in metrics}
    assert sorted(path.name for path in (room / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000009",
    ]


@pytest.fixture(scope="module")
def one_step_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that make a batch."""
    root = tmp_path_factory.mktemp("four")
    return write_coco(root, random_pictures(4, 0), random_pictures(2, 1))


def test_the_best_is_kept_when_it_gets_worse(
    one_step_epochs: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of one's own choosing: 0.2, 0.5, 0.4, 0.5; a tie is not better."""
    scripted = iter([0.2, 0.5, 0.4, 0.5])
    note = resume.RunState.note_evaluation

    def scores(self: resume.RunState, metrics: dict[str, float]) -> bool:
        metrics["map50"] = next(scripted)
        return note(self, metrics)

    monkeypatch.setattr(resume.RunState, "note_evaluation", scores)
    told: list[Progress] = []
    best = run(one_step_epochs, room, "--epochs 4", report=told.append)
    evaluations = [each for each in told if each.event == "evaluation"]
    assert [each.best for each in evaluations] == [True, True, False, False]
    assert best["map50"] == 0.5 and told[-1].metrics["best_epoch"] == 1
    assert load_weights(room / "best.safetensors")[1].metrics["map50"] == 0.5
    assert load_weights(room / "last.safetensors")[1].metrics["map50"] == 0.5
    state = resume.load(last_checkpoint(room)).state
    assert (state.best_step, state.stale_evaluations) == (2, 2)


@pytest.mark.parametrize(("patience", "steps"), [(1, 2), (2, 3), (0, 4)])
def test_patience(one_step_epochs: Path, room: Path, patience: int, steps: int) -> None:
    """Nothing is learnt at this rate, so no evaluation is better than the first."""
    told: list[Progress] = []
    flags = f"--epochs 4 --lr 1e-12 --min_lr 0 --no-ema --patience {patience}"
    run(one_step_epochs, room, flags, report=told.append)
    assert told[-1].step == steps
    assert ("stopped early" in told[-1].message) == (patience > 0)
    assert resume.load(last_checkpoint(room)).state.step == steps


def test_max_steps_beyond_and_within_the_epochs(tiny_data: Path, room: Path) -> None:
    for flags, steps in (("--max_steps 4", 4), ("--max_steps 100 --epochs 1", 3)):
        told: list[Progress] = []
        run(tiny_data, room / str(steps), flags, report=told.append)
        assert told[-1].step == told[-1].total_steps == steps
        assert told[-1].metrics["map50"] >= 0, "the end is evaluated"


def test_the_same_seed_the_same_run(tiny_data: Path, room: Path) -> None:
    metrics = [run(tiny_data, room / str(number), "--max_steps 2") for number in range(2)]
    assert metrics[0] == metrics[1]
    weights = [load_file(room / str(number) / "last.safetensors") for number in range(2)]
    assert differences(*weights) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_on_a_cpu(tiny_data: Path, room: Path, precision: str) -> None:
    """bf16 works; fp16 does not, and that is said."""
    told: list[Progress] = []
    config, fields = settings(tiny_data, room, "--max_steps 2 --denoising 6")
    reset = (AcceleratorState._reset_state, PartialState._reset_state)
    try:
        for each in reset:
            each()
        accelerator = cpu(mixed_precision=precision)
        train(config, fields, *tables(config, fields), told.append, accelerator=accelerator)
    finally:
        for each in reset:
            each()
    losses = [each.metrics["loss"] for each in told if each.event == "step"]
    assert len(losses) == 2 and all(0 < loss < 1000 for loss in losses)
    assert ("a CPU computes fp32" in told[0].message) == (precision == "fp16")
    with safe_open(room / "last.safetensors", framework="pt") as file:
        names = list(file.keys())
        kinds = {file.get_tensor(name).dtype for name in names}
    assert {kind for kind in kinds if kind.is_floating_point} == {torch.float32}


def test_everything_switched_the_other_way(tiny_data: Path, room: Path) -> None:
    """Runs without refinement, auxiliary losses, average, clipping or augmentation."""
    off = "--no-aux_loss --no-with_box_refine --no-ema --clip_max_norm 0 --no-flip --no-crop"
    metrics = run(tiny_data, room, f"{off} --max_steps 2 --eval_batch_size 3 --dec_layers 2")
    assert set(COCO_NUMBERS) <= set(metrics)
