"""Distillation by token matching: the loss, the pair, and a run with a teacher."""

from collections.abc import Callable
from pathlib import Path

import golden
import pytest
import torch
from conftest import Compare
from tiny_plus import PLUS, save_teacher
from tiny_runs import (
    NAMES,
    Crash,
    Learnt,
    blurred,
    cpu,
    differences,
    end_of,
    furthest,
    gradients_of_step,
    main_here,
    run,
    settings,
    tables,
)
from torch import Tensor, nn

from trainer.loop.agreement import Agreement
from trainer.loop.start import load_teacher
from trainer.report.progress import Progress
from vidt import ViDT, ViDTConfig
from vidt.losses.distillation import TokenMatching, token_distances

ROUNDING = 2e-5


@golden.present
def test_the_released_loss(compare: Compare) -> None:
    """The root of the distances' mean over both images, as the golden case has it."""
    case = golden.read_json("criterion_cases.json")["distillation"]
    asked = case["definition"]

    def made(role: str) -> dict:
        arrays = golden.fill().synthetic_distil(
            f"{asked['tag']}:{role}", 2, asked["queries"], 256, asked["levels"], asked["distil"]
        )
        return {
            name: [torch.from_numpy(one) for one in value]
            if isinstance(value, list)
            else torch.from_numpy(value)
            for name, value in arrays.items()
        }

    distances = token_distances(made("student"), made("teacher"))
    wanted = case["losses"]["loss_distil"]
    share = distances.mean().sqrt() / wanted
    compare("loss_distil, relative", share, torch.tensor(1.0), 1e-6)


def pictures() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(3, 48, 64, dtype=torch.bool)
    padding[1, :, 40:] = True
    return torch.randn(3, 3, 48, 64), padding


def test_the_student_moves_and_the_teacher_does_not(tiny_config: ViDTConfig) -> None:
    student, teacher = blurred(ViDT(tiny_config)).train(), blurred(ViDT(tiny_config)).train()
    matching = TokenMatching(teacher, distil_loss_coef=4.0)
    assert not teacher.training
    images, padding = pictures()
    outputs = student(images, padding)
    term = matching(images, padding, outputs, 3)["loss_distil"]
    with torch.no_grad():
        tokens = teacher(images, padding)["distil_tokens"]
        roots = token_distances(student(images, padding)["distil_tokens"], tokens).sqrt()
    assert term.item() == pytest.approx(4 * roots.mean().item(), rel=1e-5)
    assert len(roots.unique()) == 3  # the images are not alike
    term.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    moved = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"backbone.det_token", "input_proj.3.0.weight", "decoder.layers.1.norm3.bias"} <= moved


class Echo(nn.Module):
    """A teacher whose tokens are given."""

    def __init__(self, outputs: dict) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor, padding: Tensor) -> dict:
        return self.outputs


def test_a_student_that_is_its_teacher_has_finite_gradients(tiny_config: ViDTConfig) -> None:
    """No distance at all: neither a length nor the root has a slope there."""
    model, images = blurred(ViDT(tiny_config)), pictures()
    outputs = model(*images)
    assert not token_distances(outputs["distil_tokens"], outputs["distil_tokens"]).any()
    TokenMatching(Echo(outputs))(*images, outputs, 3)["loss_distil"].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)  # nan is not zero


@pytest.mark.parametrize("kind", ["", PLUS], ids=["vidt", "vidt+"])
def test_portions_do_not_matter(masked_data: Path, room: Path, kind: str) -> None:
    """Neither in a ViDT pair, nor in one of ViDT+; the teacher has other classes."""
    config, fields = settings(masked_data, room, kind)
    teacher = save_teacher(room / "teacher.safetensors", fields, num_classes=5)
    train_set, _ = tables(config, fields)

    def of_step(flags: str) -> dict[str, Tensor]:
        config, fields = settings(masked_data, room, "--batch_size 4 --dropout 0", kind, flags)
        return gradients_of_step(config, fields, train_set, 0, cpu())

    taught = f"--distil_model_path {teacher}"
    whole = of_step(taught)
    for portions in (2, 4):
        share, name = furthest(of_step(f"{taught} --n_iter_to_acc {portions}"), whole)
        assert share < ROUNDING, f"{portions} portions: {name} differs by {share:.1e}"
    alone = of_step("")
    assert furthest({name: whole[name] for name in alone}, alone)[0] > 0.01  # it is there at all


def test_the_teacher_comes_in_the_precision_of_the_run(tiny_data: Path, room: Path) -> None:
    _, fields = settings(tiny_data, room)
    path = save_teacher(room / "teacher.safetensors", fields)
    config, fields = settings(tiny_data, room, f"--distil_model_path {path}")
    student = ViDTConfig(**{**fields, "num_classes": len(NAMES)})
    accelerator = cpu()
    matching = load_teacher(config, student, accelerator, Agreement(accelerator))
    assert matching is not None
    seen: list[torch.dtype] = []
    linear = matching.teacher.decoder.layers[0].linear1
    linear.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    images = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = ViDT(student)(*images)
        matching(*images, tokens, 3)
    assert seen == [torch.bfloat16]


def losses(into: list[float]) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.event == "step":
            into.append(progress.metrics["loss_distil"])

    return report


@pytest.mark.slow
def test_the_loss_falls_and_a_resumed_run_is_the_same(learnt: Learnt, room: Path) -> None:
    flags = (
        f"--distil_model_path {learnt.weights} --lr 1e-3 --clip_max_norm 1 --warmup_steps 0 "
        "--epochs 12 --eval_interval 12 --save_interval 6 --dropout 0.1"
    )
    seen: list[float] = []
    run(learnt.data, room / "whole", flags, report=losses(seen))
    assert len(seen) == 12
    assert sum(seen[-3:]) < 0.9 * sum(seen[:3]), seen

    def breaks(progress: Progress) -> None:
        if (progress.event, progress.step) == ("step", 8):
            raise Crash

    with pytest.raises(Crash):
        run(learnt.data, room / "broken", flags, report=breaks)
    run(learnt.data, room / "broken", flags, "--resume auto")
    assert differences(end_of(room / "whole"), end_of(room / "broken")) == []


@pytest.mark.slow
def test_vidt_plus_with_a_teacher_resumes_exactly(masked_data: Path, room: Path) -> None:
    _, fields = settings(masked_data, room, PLUS)
    teacher = save_teacher(room / "teacher.safetensors", fields, aux_loss=False)
    flags = f"{PLUS} --denoising 6 --save_steps 2 --distil_model_path {teacher}"
    seen: list[float] = []
    run(masked_data, room / "whole", flags, report=losses(seen))
    assert len(seen) == 6 and min(seen) > 0

    def breaks(progress: Progress) -> None:
        if (progress.event, progress.step) == ("step", 5):
            raise Crash

    with pytest.raises(Crash):
        run(masked_data, room / "broken", flags, report=breaks)
    resumed: list[float] = []
    run(masked_data, room / "broken", flags, "--resume", report=losses(resumed))
    assert resumed == seen[4:]
    assert differences(end_of(room / "whole"), end_of(room / "broken")) == []


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"reduced_dim": 32}, "has reduced_dim 32, this run 64; pass --reduced_dim 32"),
        ({"det_token_num": 9}, "has det_token_num 9, this run 8; pass --det_token_num 9"),
        ({"dec_layers": 2}, "has dec_layers 2, this run 1; pass --dec_layers 2"),
        ({"epff": True}, "has epff True, this run False; pass --epff True"),
    ],
)
def test_a_teacher_that_does_not_fit(
    tiny_data: Path, room: Path, changes: dict, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, fields = settings(tiny_data, room)
    path = save_teacher(room / "teacher.safetensors", fields, **changes)
    with pytest.raises(ValueError, match=reason) as caught:
        run(tiny_data, room, f"--distil_model_path {path}")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_teacher_of_another_name(tiny_data: Path, room: Path) -> None:
    _, fields = settings(tiny_data, room)
    path = save_teacher(room / "teacher.safetensors", fields)
    with pytest.raises(ValueError, match="backbone_name swin_test; --distil_model vidt_base has"):
        run(tiny_data, room, f"--distil_model vidt_base --distil_model_path {path}")


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--distil_model vidt_huge", "distil_model is vidt_huge; it must be one of vidt_nano,"),
        ("--distil_loss_coef 0", "distil_loss_coef is 0.0; it must be above 0"),
    ],
)
def test_settings_that_no_run_can_have(
    flags: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_here(flags.split()) == 2
    assert reason in capsys.readouterr().err
