"""Memory that runs out: the same images in smaller micro-batches, and the same result."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import argv, cpu, differences, end_of, last_checkpoint, run, settings, tables

import trainer.train
from trainer.augmentation.denoising import Denoising
from trainer.augmentation.recipe import Augmentation
from trainer.backward.gradient_sum import GradientSum
from trainer.backward.memory import (
    ALLOCATOR_SETTINGS,
    OutOfMemory,
    Probe,
    largest_batch,
    largest_canvas,
    missing_moments,
    use_expandable_segments,
)
from trainer.data.loader import DetectionDataset, micro_batches
from trainer.loop import resume
from trainer.loop.optim import make_optimizer
from trainer.report.progress import Progress
from trainer.settings.config import TrainConfig
from trainer.settings.parsing import parse
from vidt.images.preprocessing import Preprocessing
from vidt.model.vidt import ViDT
from vidt.predict.predictor import is_out_of_memory

MESSAGES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
    torch.OutOfMemoryError("XPU: nothing left"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.92 GiB total)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: can't allocate memory"),
)


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """room_for(n, error, after): training more than n images at once raises the error, from the
    given call on. Returns the sizes that were tried.
    """
    forward = ViDT.forward

    def limit(most: int, error: Exception = MESSAGES[0], after: int = 0) -> list[int]:
        tried: list[int] = []

        def short_of_memory(self, images, *rest, **more):
            if self.training:
                tried.append(len(images))
            outputs = forward(self, images, *rest, **more)
            if self.training and len(images) > most and len(tried) > after:
                raise error
            return outputs

        monkeypatch.setattr(ViDT, "forward", short_of_memory)
        return tried

    return limit


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "out of memory" in line]


def test_smaller_micro_batches_with_the_same_result(
    tiny_data: Path,
    room: Path,
    room_for: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    flags = "--max_steps 2"
    run(tiny_data, room / "planned", flags, "--n_iter_to_acc 2")
    tried = room_for(2)
    run(tiny_data, room / "short", flags)
    assert tried == [4, 4, 2, 2, 2, 2], "once more as it was, then in halves"
    assert differences(end_of(room / "short"), end_of(room / "planned")) == []
    _, line = warnings(caplog)
    assert "2 micro-batches" in line and "--n_iter_to_acc 2" in line and "\n" not in line


@pytest.mark.parametrize("error", MESSAGES, ids=["CUDA", "any device", "older", "CPU"])
def test_one_image_is_too_much(
    tiny_data: Path, room: Path, room_for: Callable[..., list[int]], error: Exception
) -> None:
    tried = room_for(0, error)
    with pytest.raises(ValueError, match="out of memory with one image of") as caught:
        run(tiny_data, room, "--max_steps 1")
    assert tried == [4, 4, 2, 1]
    assert "--eval_size" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("MPS backend out of memory (MPS allocated: 8.00 GB)", True),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed", False),
        ("CUDA error: device-side assert triggered", False),
        ("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", False),
    ],
)
def test_texts_that_mean_out_of_memory(text: str, expected: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) == expected
    assert not is_out_of_memory(ValueError(text))


@pytest.mark.slow
def test_in_the_middle_of_a_run(
    tiny_data: Path,
    room: Path,
    room_for: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the third step on, with workers that have loaded ahead: no image is lost or repeated."""
    losses: dict[str, list[float]] = {"whole": [], "short": []}
    flags = "--dropout 0 --num_workers 1 --max_steps 5"

    def report_to(name: str) -> Callable[[Progress], None]:
        def report(progress: Progress) -> None:
            if progress.event == "step":
                losses[name].append(progress.metrics["loss"])

        return report

    run(tiny_data, room / "whole", flags, report=report_to("whole"))
    tried = room_for(1, after=2)
    run(tiny_data, room / "short", flags, report=report_to("short"))
    assert tried == [4, 4, 4, 4, 2, *[1] * 12]
    assert losses["short"] == pytest.approx(losses["whole"], rel=1e-2)
    assert len(warnings(caplog)) == 3  # four, four again, then two, then one at a time


@pytest.mark.slow
def test_the_next_process_goes_on_with_the_smaller_micro_batches(
    tiny_data: Path, room: Path, room_for: Callable[..., list[int]]
) -> None:
    tried = room_for(2)
    run(tiny_data, room, "--max_steps 1")
    assert resume.load(last_checkpoint(room)).state.n_iter_to_acc == 2
    run(tiny_data, room, "--max_steps 2 --resume")
    assert tried == [4, 4, 2, 2, 2, 2]


def test_other_errors_are_not_taken_for_it(
    tiny_data: Path, room: Path, room_for: Callable[..., list[int]]
) -> None:
    tried = room_for(2, RuntimeError("the size of tensor a (3) must match"))
    with pytest.raises(RuntimeError, match="must match"):
        run(tiny_data, room, "--max_steps 1")
    assert tried == [4]


def test_a_step_that_fails_once_is_repeated_as_it_was(
    tiny_data: Path,
    room: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Twice in a run: the second step may fail once too. With dropout: the same masks are drawn."""
    forward, calls = ViDT.forward, 0

    def fragmented(self, *images, **more):
        nonlocal calls
        calls += self.training
        outputs = forward(self, *images, **more)
        if self.training and calls in (2, 5):
            raise MESSAGES[0]
        return outputs

    flags = "--dropout 0.3 --n_iter_to_acc 2 --max_steps 3"
    run(tiny_data, room / "enough", flags)
    monkeypatch.setattr(ViDT, "forward", fragmented)
    run(tiny_data, room / "once", flags)
    assert calls == 2 * 3 + 2 + 1, "the first step fails in its second micro-batch"
    assert differences(end_of(room / "once"), end_of(room / "enough")) == []
    assert ["step 0" in line for line in warnings(caplog)] == [True, False]


@pytest.mark.parametrize(("fails", "parts"), [(1, 1), (2, 2)])
def test_memory_that_ends_while_a_step_is_loaded(
    tiny_data: Path,
    room: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: int,
    parts: int,
) -> None:
    """The step is loaded again, then in smaller micro-batches; nothing else changes."""
    flags = "--max_steps 4 --eval_interval 9"
    run(tiny_data, room / "whole", flags)
    normalise, calls = Preprocessing.normalise, []

    def short_of_memory(self: Preprocessing, *images: torch.Tensor) -> torch.Tensor:
        calls.append(images)
        if 2 < len(calls) <= 2 + fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return normalise(self, *images)

    with monkeypatch.context() as patch:
        patch.setattr(Preprocessing, "normalise", short_of_memory)
        run(tiny_data, room / "short", flags)
    assert len(warnings(caplog)) == fails
    assert resume.load(last_checkpoint(room / "short")).state.n_iter_to_acc == parts
    if parts == 1:
        assert differences(end_of(room / "short"), end_of(room / "whole")) == []


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a CPU tried as a GPU is."""
    monkeypatch.setattr(Probe, "possible", lambda self: True)


@pytest.mark.slow
@pytest.mark.usefixtures("probed")
def test_the_probe_leaves_no_trace(
    tiny_data: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh start and a resumed one, bit for bit those of runs that try nothing."""
    states, fits = [], Probe.fits

    def watched(self: Probe, images: int, micro_batches: int = 1) -> bool:
        before = torch.get_rng_state()
        answer = fits(self, images, micro_batches)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        states.append(torch.equal(before, torch.get_rng_state()) and not any(gradients))
        return answer

    flags = "--dropout 0.3 --denoising 9"
    with monkeypatch.context() as patch:
        patch.setattr(Probe, "fits", watched)
        run(tiny_data, room / "probed", flags, "--max_steps 1")
        run(tiny_data, room / "probed", flags, "--max_steps 3 --resume")
    assert states == [True, True]
    monkeypatch.undo()
    run(tiny_data, room / "plain", flags, "--max_steps 1")
    run(tiny_data, room / "plain", flags, "--max_steps 3 --resume")
    assert differences(end_of(room / "probed"), end_of(room / "plain")) == []


@pytest.mark.usefixtures("probed")
def test_the_largest_step_determines_the_micro_batches(
    tiny_data: Path,
    room: Path,
    room_for: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = room_for(2)
    run(tiny_data, room / "probed", "--max_steps 1")
    assert tried == [4, 2, 2, 2, 2], "the largest four, the largest as two and two, then a step"
    (line,) = [line for line in caplog.messages if "micro-batches" in line]
    assert "2 micro-batches" in line and "96 x 64" in line and "--n_iter_to_acc 2" in line
    run(tiny_data, room / "planned", "--max_steps 1 --n_iter_to_acc 2")
    assert differences(end_of(room / "probed"), end_of(room / "planned")) == []


@pytest.mark.usefixtures("probed")
def test_a_largest_image_that_does_not_fit_ends_the_run_before_it_begins(
    tiny_data: Path, room: Path, room_for: Callable[..., list[int]]
) -> None:
    for flags in ("", "--batch_size auto"):
        room_for(0)
        with pytest.raises(OutOfMemory, match="one image of 96 x 64 pixels"):
            run(tiny_data, room, flags)


@pytest.mark.usefixtures("probed")
@pytest.mark.parametrize(("most", "expected"), [(1, 1), (3, 2), (100, 8)])
def test_automatic_batch_size(
    tiny_data: Path,
    room: Path,
    room_for: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
    most: int,
    expected: int,
) -> None:
    """The largest power of two that fits and that the twelve images allow; a resumed run keeps
    it, and so do the settings.
    """
    caplog.set_level("INFO")
    room_for(most)
    run(tiny_data, room, "--batch_size auto --max_steps 1")
    (line,) = [line for line in caplog.messages if "--batch_size auto" in line]
    assert f"--batch_size auto: {expected} image" in line and "not scaled" in line
    state = resume.load(last_checkpoint(room)).state
    saved = yaml.safe_load((room / "config.yaml").read_text())
    assert saved["batch_size"] == state.settings["batch_size"] == expected
    assert (state.step_images, state.n_iter_to_acc) == (expected, 1)
    room_for(100)
    run(tiny_data, room, "--batch_size auto --max_steps 2 --resume")
    assert resume.load(last_checkpoint(room)).state.step_images == expected


def test_automatic_batch_size_of_a_cpu(
    tiny_data: Path, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run(tiny_data, room, "--batch_size auto --max_steps 1")
    assert resume.load(last_checkpoint(room)).state.step_images == TrainConfig.batch_size
    assert "only a GPU is tried" in caplog.text


@pytest.mark.parametrize("flags", ["", "--denoising 9", "--with_vector --gt_mask_len 16"])
def test_the_largest_batch_has_the_form_of_a_batch(
    masked_data: Path, room: Path, flags: str
) -> None:
    config, fields = settings(masked_data, room, flags)
    train_set, _ = tables(config, fields)
    dataset = DetectionDataset(
        train_set,
        Augmentation.from_config(config),
        Preprocessing(config.eval_size),
        seed=0,
        denoising=Denoising(config.denoising),
    )
    canvas = largest_canvas(dataset.augmentation, train_set.sizes.tolist(), mixed=False)
    batch = largest_batch(dataset, 2, canvas, torch.device("cpu"))
    loaded = next(micro_batches(dataset, config, 1, range(1), cpu()))
    assert batch.keys() == loaded.keys() and len(batch["targets"]) == 2
    most = max(len(sample.labels) for sample in train_set)
    first, second = batch["targets"]
    assert not {id(each) for each in first.values()} & {id(each) for each in second.values()}
    for target in batch["targets"]:
        assert len(target["labels"]) == most
        for name, real in loaded["targets"][0].items():
            if name != "image_id":
                assert target[name].dtype == real.dtype and target[name].ndim == real.ndim, name
        assert target.keys() == loaded["targets"][0].keys()
    for name in ("images", "padding"):
        assert batch[name].dtype == loaded[name].dtype and batch[name].shape[-2:] == canvas


@pytest.mark.parametrize(
    "flags",
    ["", "--no-crop", "--eval_size 96", "--train_sizes 64,200 --train_max_size 150"],
)
def test_no_augmented_image_is_larger_than_the_largest_canvas(flags: str) -> None:
    random = np.random.default_rng(0)
    config, _ = parse(["--dataset_file", "shapes", *flags.split()])
    augmentation = Augmentation.from_config(config)
    sizes = random.integers(30, 900, (2000, 2)).tolist()
    shapes = [augmentation.draw((size[0], size[1]), random).shape for size in sizes]
    most = max(map(math.prod, shapes))
    alone = largest_canvas(augmentation, sizes, mixed=False)
    assert 0.8 * math.prod(alone) < most <= math.prod(alone)
    heights, widths = zip(*shapes, strict=True)
    height, width = largest_canvas(augmentation, sizes, mixed=True)
    assert 0.8 * height < max(heights) <= height and 0.8 * width < max(widths) <= width


@pytest.mark.parametrize(
    ("flags", "largest"),
    [
        ("", (640, 992)),  # the crop that is least square, 384 x 600
        ("--train_max_size 800", (640, 800)),
        ("--train_max_size 600", (592, 592)),
        ("--no-crop --iou_crop 0.5", (640, 1056)),
    ],
)
def test_the_largest_crop_is_as_long_as_its_longest_side_may_be(
    flags: str, largest: tuple[int, int]
) -> None:
    """A longer one is shrunk on both sides."""
    config, _ = parse(["--dataset_file", "coco", "--coco_path", "x", *flags.split()])
    augmentation = Augmentation.from_config(config)
    canvas = largest_canvas(augmentation, [(300, 300)], mixed=False)
    assert tuple(sorted(canvas)) == largest


def test_square_images_without_crops_are_tried_square() -> None:
    augmentation = Augmentation(sizes=(96, 128), max_size=300, crop=False)
    assert largest_canvas(augmentation, [(50, 50), (70, 70)], mixed=True) == (128, 128)


def test_the_optimisers_state_is_counted() -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = make_optimizer(model, TrainConfig())
    reserved = sum(moment.nbytes for moment in missing_moments(optimizer))
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    state = [value for held in optimizer.state.values() for value in held.values()]
    assert reserved == sum(tensor.nbytes for tensor in state if tensor.ndim)
    assert missing_moments(optimizer) == [], "a resumed run has them already"


@pytest.mark.parametrize("name", ALLOCATOR_SETTINGS)
def test_what_the_user_set_for_the_allocator_stays(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for other in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "backend:native")
    use_expandable_segments()
    given = {name: os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ}
    assert given == {name: "backend:native"}
    monkeypatch.delenv(name)
    use_expandable_segments()
    (value,) = [os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ]
    assert value == "expandable_segments:True"
    for other in ALLOCATOR_SETTINGS:
        os.environ.pop(other, None)


@pytest.fixture
def room_to_evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """room_to_evaluate(n): more than n images at once are too many outside of training. Returns the
    sizes that were tried.
    """
    forward = ViDT.forward

    def limit(most: int) -> list[int]:
        tried: list[int] = []

        def short_of_memory(self, images, *rest, **more):
            if not self.training:
                tried.append(len(images))
                if len(images) > most:
                    raise MESSAGES[0]
            return forward(self, images, *rest, **more)

        monkeypatch.setattr(ViDT, "forward", short_of_memory)
        return tried

    return limit


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--ema", "--no-ema"])
def test_evaluation_in_halves(
    tiny_data: Path, room: Path, room_to_evaluate: Callable[[int], list[int]], flags: str
) -> None:
    """The same metrics, and a model that trains on as before: with dropout."""
    flags += " --epochs 2 --dropout 0.3 --eval_batch_size 3"
    whole = run(tiny_data, room / "whole", flags)
    tried = room_to_evaluate(1)
    halves = run(tiny_data, room / "halves", flags)
    assert {1, 2, 3} >= set(tried) > {1}
    assert halves == pytest.approx(whole)
    assert differences(end_of(room / "halves"), end_of(room / "whole")) == []


def test_one_image_is_too_much_to_evaluate(
    tiny_data: Path, room: Path, room_to_evaluate: Callable[[int], list[int]]
) -> None:
    room_to_evaluate(0)
    with pytest.raises(ValueError, match="at evaluation; lower --eval_size") as caught:
        run(tiny_data, room, "--max_steps 1")
    assert "\n" not in str(caught.value)


def test_memory_that_ends_where_micro_batches_do_not_help(
    tiny_data: Path,
    room: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def nothing_left(*given: object) -> None:
        raise MESSAGES[0]

    monkeypatch.setattr(GradientSum, "take", nothing_left)
    with pytest.raises(SystemExit) as ended:
        trainer.train.main(argv(tiny_data, room, "--max_steps 1"))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[-1].startswith("error: CUDA out of memory.") and "--n_iter_to_acc" in said[-1]
