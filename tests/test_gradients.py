"""The gradients of a step do not depend on how its images are dealt out to micro-batches; the same
for processes is in test_two_processes.py.
"""

from pathlib import Path

import pytest
import torch
from tiny_runs import cpu, furthest, gradients_of_step, run, settings, tables
from torch import Tensor

from trainer.data.order import RunSampler
from trainer.report.progress import Progress
from vidt.losses.criterion import SetCriterion

ROUNDING = 2e-5  # of fp32 sums in another order, relative to the largest entry of a tensor
LOSSES = {
    "plain": "",
    "denoising": "--denoising 9",
    "without neck": "--method vidt_wo_neck",
    "plus": "--epff --iou_aware --token_label --with_vector --gt_mask_len 16 --denoising 9",
}


def of_step(data: Path, room: Path, micro_batches: int, flags: str, step: int) -> dict[str, Tensor]:
    """Eight images, of which one has no boxes."""
    flags = f"--batch_size 8 --n_iter_to_acc {micro_batches} --dropout 0 {flags}"
    config, fields = settings(data, room, flags)
    return gradients_of_step(config, fields, tables(config, fields)[0], step, cpu())


@pytest.mark.parametrize("flags", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("step", [0, 1], ids=["a step", "the epoch's filled-up last step"])
def test_micro_batches_do_not_matter(masked_data: Path, room: Path, flags: str, step: int) -> None:
    whole = of_step(masked_data, room, 1, flags, step)
    assert all(torch.isfinite(gradient).all() for gradient in whole.values())
    for micro_batches in (2, 4, 8):
        share, name = furthest(of_step(masked_data, room, micro_batches, flags, step), whole)
        assert share < ROUNDING, f"{micro_batches} micro-batches: {name} differs by {share:.1e}"


def test_other_images_are_seen_in_the_gradients(tiny_data: Path, room: Path) -> None:
    """The measure above can fail: another step's gradients are far away."""
    share, _ = furthest(*(of_step(tiny_data, room, 1, "", step) for step in (0, 1)))
    assert share > 0.1


def test_a_normaliser_of_each_portion_would_be_seen(
    tiny_data: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = of_step(tiny_data, room, 1, "", 0)
    forward = SetCriterion.forward

    def normalised_alone(self, outputs, targets, num_boxes):
        return forward(self, outputs, targets, max(sum(len(t["labels"]) for t in targets), 1) * 2)

    monkeypatch.setattr(SetCriterion, "forward", normalised_alone)
    assert furthest(of_step(tiny_data, room, 2, "", 0), whole)[0] > 0.01


def test_the_loop_reports_the_same_first_step(tiny_data: Path, room: Path) -> None:
    """Through `train` itself: loss terms and the norm of the gradients before clipping."""
    seen: list[dict[str, float]] = []

    def report(progress: Progress) -> None:
        if progress.event == "step":
            seen.append(dict(progress.metrics))

    for micro_batches in (1, 4):
        flags = f"--n_iter_to_acc {micro_batches} --dropout 0 --max_steps 1"
        run(tiny_data, room / str(micro_batches), flags, report=report)
    one, four = seen
    names = [name for name in one if name.startswith(("loss", "grad"))]
    assert {name: four[name] for name in names} == pytest.approx(
        {name: one[name] for name in names}, rel=1e-4
    )


def test_an_epoch_shows_every_image_and_fills_up_from_its_start(
    tiny_data: Path, room: Path
) -> None:
    """Twelve images in steps of eight: the second holds the other four, and four seen already."""
    config, _ = settings(tiny_data, room)

    def steps(first: int) -> list[list[int]]:
        sampler = RunSampler(
            12, step_images=8, micro_batch=2, seed=config.seed, steps=range(first, 6)
        )
        batches = list(sampler)
        assert len(batches) == len(sampler) == (6 - first) * 4
        epochs = [{key.epoch for key in batch} for batch in batches]
        assert epochs == [{step // 2} for step in range(first, 6) for _ in range(4)]
        flat = [key.image for batch in batches for key in batch]
        return [flat[start : start + 8] for start in range(0, len(flat), 8)]

    run_of_images = steps(0)
    for epoch in range(3):
        first, second = run_of_images[2 * epoch : 2 * epoch + 2]
        assert sorted([*first, *second[:4]]) == list(range(12))
        assert second[4:] == first[:4]
    assert run_of_images[0] != run_of_images[2] != run_of_images[4]
    assert steps(3) == run_of_images[3:]
