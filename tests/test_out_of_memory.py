"""Memory that runs out: the same images in smaller micro-batches, and the same result."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import argv, differences, end_of, last_checkpoint, run

import trainer.train
from trainer.loop import resume
from trainer.report.progress import Progress
from trainer.step.gradient_sum import GradientSum
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
    assert said[-1].startswith("error: CUDA out of memory.") and "--batch_size" in said[-1]
