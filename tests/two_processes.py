"""One of two processes that test_two_processes.py starts: plays all scenes and saves the results.

Usage: RANK=0 WORLD_SIZE=2 ... python two_processes.py FOLDER
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_plus import PLUS
from tiny_runs import (
    argv,
    cpu,
    differences,
    end_of,
    gradients_of_step,
    numbers_of,
    run,
    settings,
    swapped,
    tables,
)

import trainer.train
from trainer.augmentation.recipe import Augmentation
from trainer.backward import gradient_sum
from trainer.backward.gradient_sum import GradientSum
from trainer.backward.memory import Probe
from trainer.data.dataset_check import BadDataset
from trainer.data.loader import DetectionDataset
from trainer.loop import set_up, step
from trainer.loop.agreement import Agreement
from trainer.loop.step import check_readable
from trainer.loop.stopping import Stopped
from trainer.report.progress import Progress
from trainer.scoring.evaluation import evaluate
from vidt.images.preprocessing import Preprocessing
from vidt.losses.criterion import SetCriterion
from vidt.model.vidt import ViDT
from vidt.weights.checkpoint import load_model

LOSSES = {"plain": "", "denoising": "--denoising 9"}
MICRO_BATCHES = {"plain": 1, "denoising": 2}
FROZEN = "--batch_size 2 --dropout 0 --max_steps 3 --freeze 2 --repeat_thresh 1 --load_from"
VALIDATION = (1, 3, 6)  # images to share among two
NON_FINITE_STEP = 2
BUCKET_BYTES = (1, 40, 2**20)  # a bucket for each parameter, a few, one


def step_gradients(data: Path, room: Path, flags: str) -> list[dict[str, torch.Tensor]]:
    """Gradients of the first step and of the epoch's last step, which is filled up."""
    config, fields = settings(data, room, "--dropout 0", flags)
    train_set, _ = tables(config, fields)
    return [gradients_of_step(config, fields, train_set, step, cpu()) for step in (0, 1)]


def play(folder: Path, rank: int) -> dict[str, Any]:
    data, room = folder / "data", folder / "results"
    seen: dict[str, Any] = {}
    for name, flags in LOSSES.items():
        dealt = f"--batch_size 4 --n_iter_to_acc {MICRO_BATCHES[name]} {flags}"
        seen[f"gradients {name}"] = step_gradients(data, room, dealt)
    taught = f"--batch_size 4 --n_iter_to_acc 2 --distil_model_path {folder}/learnt.safetensors"
    seen["gradients with a teacher"] = step_gradients(data, room, taught)
    seen["gradients without boxes"] = step_gradients(folder / "bare", room, "--batch_size 2")
    everything = f"--batch_size 2 --n_iter_to_acc 2 {PLUS} --distil_model_path {folder}/plus"
    seen["gradients of all parts without boxes"] = step_gradients(folder / "bare", room, everything)
    seen["evaluations"] = evaluations(folder)
    seen["training"] = training(data, room / "training", "--batch_size 2 --dropout 0 --max_steps 3")
    seen["bare training"] = training(folder / "bare", room / "bare", "--batch_size 1 --max_steps 3")
    seen["frozen"] = training(data, room / "frozen", f"{FROZEN} {folder}/learnt.safetensors")
    seen["out of memory"] = out_of_memory(data, room / "memory", rank)
    seen["out of memory once"] = out_of_memory_once(data, room / "memory", rank)
    seen["probe"] = probe(data, room / "memory", rank)
    seen["gradient sums"] = {size: gradient_sums(size, rank) for size in BUCKET_BYTES}
    seen["unreadable"] = unreadable(data, room)
    seen["stopped"] = stopped(data, room / "stopped", rank)
    seen["bad dataset"] = bad_dataset(folder / "bad", room / "bad")
    return seen


def evaluations(folder: Path) -> dict[int, list[dict[str, float]]]:
    """`numbers_of` the learnt weights by number of validation images, for batches of 1, 2 and 5."""
    model, info = load_model(folder / "learnt.safetensors")
    metrics: dict[int, list[dict[str, float]]] = {}
    for count in VALIDATION:
        data = folder / f"val{count}"
        _, val_set = tables(*settings(data, folder))
        metrics[count] = [
            numbers_of(
                evaluate(
                    model,
                    val_set,
                    info.preprocessing,
                    cpu(),
                    Agreement(cpu()),
                    batch_size=batch_size,
                    num_workers=0,
                )
            )
            for batch_size in (1, 2, 5)
        ]
    return metrics


def training(data: Path, output: Path, flags: str) -> dict[int, dict[str, float]]:
    """Loss terms by step, on the main process; under -1 the best metrics, on every process."""
    losses: dict[int, dict[str, float]] = {}

    def report(progress: Progress) -> None:
        if progress.event == "step":
            losses[progress.step] = dict(progress.metrics)

    losses[-1] = run(data, output, flags, report=report)
    return losses


def out_of_memory(data: Path, output: Path, rank: int) -> list[str]:
    """The second process has memory for one image at a time: both must take smaller micro-batches.

    Returns, on the process that writes files, what differs from a run that was started with them.
    """
    forward = ViDT.forward

    def short_of_memory(self, images, *rest, **more):
        if rank == 1 and self.training and len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, images, *rest, **more)

    flags = "--batch_size 2 --max_steps 2"
    with swapped(ViDT, "forward", short_of_memory):
        run(data, output / "short", flags)
    run(data, output / "planned", f"{flags} --n_iter_to_acc 2")
    return [] if rank else differences(end_of(output / "short"), end_of(output / "planned"))


def out_of_memory_once(data: Path, output: Path, rank: int) -> list[str]:
    """The second process runs out of memory once, in the backward pass of the second step's last
    micro-batch, when the sums of most gradients are on their way: both repeat the step.

    Returns, on the process that writes files, what differs from a run with enough memory.
    """
    calls, broken = 0, []

    def fails(gradient: torch.Tensor) -> None:
        broken.append(calls)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def short_of_memory(self, *images, **more):
        nonlocal calls
        calls += self.training
        first = next(self.parameters())
        if rank == 1 and calls == 4:
            handles.append(first.register_hook(fails))
        elif handles:
            handles.pop().remove()
        return forward(self, *images, **more)

    forward, handles = ViDT.forward, []
    flags = "--batch_size 2 --n_iter_to_acc 2 --max_steps 3"
    small_buckets = partial(GradientSum, bucket_bytes=2**14)
    with swapped(set_up, "GradientSum", small_buckets):
        run(data, output / "enough", flags)
        with swapped(ViDT, "forward", short_of_memory):
            run(data, output / "once", flags)
    assert broken == [4] * rank
    return [] if rank else differences(end_of(output / "once"), end_of(output / "enough"))


def probe(data: Path, output: Path, rank: int) -> list[int]:
    """The second process has room for two images in the probe alone. The numbers of images that
    this process was asked to compute, in order, for four a step.
    """
    forward, sizes = ViDT.forward, []

    def short_of_memory(self, images, *rest, **more):
        sizes.append(len(images))
        if rank == 1 and len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, images, *rest, **more)

    with swapped(ViDT, "forward", short_of_memory), swapped(Probe, "possible", lambda self: True):
        run(data, output / "probe", "--batch_size 4 --max_steps 1 --eval_batch_size 1")
    return sizes


def gradient_sums(bucket_bytes: int, rank: int) -> dict[str, Any]:
    """Four layers: no process uses the first, one alone the second, both the others. Each process's
    own gradients, what was summed, and in which order things happened.
    """
    torch.manual_seed(rank)
    layers = [torch.nn.Linear(3, 3) for _ in range(4)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    events: list[str] = []
    all_reduce = gradient_sum.dist.all_reduce

    def noted(*tensors, **how):
        events.append("sum")
        return all_reduce(*tensors, **how)

    layers[2].bias.register_hook(lambda gradient: events.append("reached"))
    sums, agreement = GradientSum(parameters, 2, bucket_bytes), Agreement(cpu())
    used = layers[1:] if rank else layers[2:]
    output = torch.nn.Sequential(*used)(torch.randn(5, 3))
    with swapped(gradient_sum.dist, "all_reduce", noted):
        sums.begin()
        output.square().sum().backward()
        own = [gradient_or_zero(parameter) for parameter in parameters]
        sums.finish()
        sums.take(agreement.gather(*sums.present()).any(0).tolist())
    summed = [gradient_or_zero(parameter) for parameter in parameters]
    return {"own": own, "summed": summed, "events": events}


def gradient_or_zero(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros(1) if parameter.grad is None else parameter.grad.clone()


def unreadable(data: Path, room: Path) -> list[str]:
    """Each process meets bad images: the first three, the second five, one of them the same. What
    both hear for a limit of six tenths, and for one that is less than the union of seven.
    """
    config, fields = settings(data, room)
    train_set, _ = tables(config, fields)
    heard = []
    for limit in (0.6, 0.5):
        dataset = DetectionDataset(
            train_set, Augmentation.from_config(config), Preprocessing(64), seed=0
        )
        bad = [8, 9, 10] if os.environ["RANK"] == "0" else [1, 2, 3, 4, 8]
        dataset.unreadable[bad] = True
        with swapped(step.logger, "warning", heard.append):
            try:
                check_readable(dataset, limit, Agreement(cpu()))
            except ValueError as error:
                heard.append(str(error))
    return heard


def stopped(data: Path, output: Path, rank: int) -> str:
    """Signal only the second process; both must stop after the same step."""
    forward, calls = ViDT.forward, 0

    def signalled(self, *images, **more):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *images, **more)

    try:
        with swapped(ViDT, "forward", signalled):
            run(data, output, "--batch_size 2")
    except Stopped as error:
        return str(error)
    return "not stopped"


def bad_dataset(data: Path, output: Path) -> str:
    """The error that the main process finds in the files; it is raised on both."""
    config, fields = settings(data, output)
    try:
        trainer.train.train_from_settings(config, fields, cpu())
    except ValueError as error:
        assert not isinstance(error, BadDataset) or error.findings
        return str(error)
    return "nothing wrong"


def non_finite_on(rank: int) -> Callable:
    """A forward of the criterion that returns NaN in the third step of the second process."""
    forward, calls = SetCriterion.forward, 0

    def poisoned(self, *args, **more):
        nonlocal calls
        calls += 1
        terms = forward(self, *args, **more)
        if rank == 1 and calls == NON_FINITE_STEP + 1:
            terms["loss_ce"] = terms["loss_ce"] * float("nan")
        return terms

    return poisoned


def main() -> None:
    """Plays the scenes; ends as `python trainer/train.py` does when the loss becomes NaN."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.save(play(folder, rank), folder / f"rank{rank}.pt")
    words = argv(folder / "data", folder / "results/non-finite", "--batch_size 2 --save_steps 1")
    (folder / f"begin{rank}").touch()
    with (
        swapped(SetCriterion, "forward", non_finite_on(rank)),
        swapped(sys, "argv", ["train.py", *words]),
    ):
        trainer.train.main()
    raise AssertionError("the run went on")


if __name__ == "__main__":
    main()
