"""Classes go by name: whatever ids a dataset gives them, in whatever order its files list them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    Learnt,
    argv,
    main_here,
    random_pictures,
    run,
    settings,
    tables,
    write_coco,
)
from torch import Tensor

from vidt.weights.weights_file import load_weights


def test_ids_with_gaps_are_learnt(learnt: Learnt) -> None:
    """Ids 7, 900 and 3: labels are contiguous, the file says the names, and the boxes are found."""
    _, info = load_weights(learnt.weights)
    assert sorted(info.class_names) == ["blue", "green", "red"]
    assert info.config.num_classes == 3
    train_set, val_set = tables(*settings(learnt.data, learnt.output))
    assert train_set.class_names == val_set.class_names == info.class_names
    assert sorted(train_set.category_ids) == [3, 7, 900]
    assert set(train_set.labels.tolist()) <= {0, 1, 2}
    assert info.metrics["map50"] > 0.5


def renumber(path: Path) -> None:
    """Other ids, and the categories in the opposite order."""
    document = json.loads(path.read_text())
    new_ids = {row["id"]: 1000 - row["id"] for row in document["categories"]}
    for row in document["categories"]:
        row["id"] = new_ids[row["id"]]
    for row in document["annotations"]:
        row["category_id"] = new_ids[row["category_id"]]
    document["categories"].reverse()
    path.write_text(json.dumps(document))


def test_validation_with_ids_and_an_order_of_its_own(learnt: Learnt, room: Path) -> None:
    """The files agree on names alone; and the weights' own order counts when they are evaluated."""
    pictures = random_pictures(4, seed=0)
    data = write_coco(room / "data", pictures, pictures, ids=(7, 900, 3))
    renumber(data / "annotations/instances_val2017.json")
    train_set, val_set = tables(*settings(data, room))
    assert val_set.class_names == train_set.class_names
    assert torch.equal(val_set.labels, train_set.labels)
    assert set(val_set.category_ids) == {993, 100, 997}
    assert main_here(argv(data, room, f"--eval --load_from {learnt.weights}")) == 0
    metrics = json.loads((room / "evaluation.json").read_text())
    assert metrics == pytest.approx(load_weights(learnt.weights)[1].metrics, abs=1e-6)


@pytest.fixture
def head_rows() -> Callable[[Path], dict[str, list[Tensor]]]:
    """The rows of every class head, weights and biases, by class name."""

    def of(path: Path) -> dict[str, list[Tensor]]:
        tensors, info = load_weights(path)
        heads = [tensor for name, tensor in tensors.items() if name.startswith("class_embed.")]
        assert heads
        return {name: [h[row] for h in heads] for row, name in enumerate(info.class_names)}

    return of


def test_fine_tuning_keeps_the_rows_of_equal_names(
    learnt: Learnt,
    room: Path,
    head_rows: Callable[[Path], dict[str, list[Tensor]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pictures, names = random_pictures(4, seed=0), ("blue", "yellow", "red")
    data = write_coco(room / "data", pictures, pictures, ids=(1, 2, 3), names=names)
    caplog.set_level("INFO", logger="trainer")
    # A rate at which one step moves nothing.
    flags = f"--max_steps 1 --lr 1e-12 --min_lr 0 --no-ema --load_from {learnt.weights}"
    run(data, room / "tuned", flags)
    (line,) = [line for line in caplog.messages if "kept" in line]
    assert "kept 2: blue, red; dropped 1: green; new 1: yellow" in line
    before, after = head_rows(learnt.weights), head_rows(room / "tuned/last.safetensors")
    assert list(after) == list(names)
    for name in ("blue", "red"):
        for ours, theirs in zip(after[name], before[name], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
    for name in before:
        for ours, theirs in zip(after["yellow"], before[name], strict=True):
            assert not torch.allclose(ours, theirs, atol=1e-3)


def test_the_same_classes_in_another_order_score_the_same(learnt: Learnt, room: Path) -> None:
    """Fine-tuning that moves nothing: only the rows of the head change places."""
    pictures = random_pictures(4, seed=0)
    data = write_coco(room / "data", pictures, pictures, ids=(9, 2, 4))
    flags = f"--max_steps 1 --lr 1e-12 --min_lr 0 --no-ema --load_from {learnt.weights}"
    metrics = run(data, room / "tuned", flags)
    own, info = load_weights(room / "tuned/last.safetensors"), load_weights(learnt.weights)[1]
    assert own[1].class_names != info.class_names
    assert metrics == pytest.approx(info.metrics, abs=1e-6)
