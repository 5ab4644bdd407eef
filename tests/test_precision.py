"""Which precision a run takes, its switches, and what stays in float32 under autocast."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from test_model import objects, padded_pair
from tiny_runs import Learnt, cpu, run, settings, swapped, tables
from torch import Tensor, nn

from trainer import evaluate_and_save
from trainer import train as trainer_train
from trainer.loop import set_up
from trainer.loop.launch import choose_precision, make_accelerator, precision_line
from trainer.loop.optim import make_ema
from trainer.report.progress import Progress
from trainer.scoring import evaluation
from trainer.settings.config import TrainConfig
from trainer.settings.flags import ConfigError
from trainer.settings.parsing import given_settings
from vidt import SetCriterion, ViDT, ViDTConfig
from vidt.losses.distillation import TokenMatching
from vidt.ops import deformable_attention
from vidt.ops.precision import best_precision, full_float32, prepare_training, set_tf32
from vidt.predict.predictor import Predictor

GPU = torch.device("cuda", 1)
LAUNCHER = "ACCELERATE_MIXED_PRECISION"


@pytest.fixture(autouse=True)
def switches_and_state() -> Iterator[None]:
    """Every test starts with PyTorch's switches and without an accelerator's shared state."""
    reset = (AcceleratorState._reset_state, PartialState._reset_state)
    before = switches()
    for each in reset:
        each()
    yield
    for each in reset:
        each()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[:2]
    torch.backends.cuda.enable_cudnn_sdp(before[2])


def switches() -> tuple[bool, bool, bool]:
    backends = torch.backends
    return (
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
        backends.cuda.cudnn_sdp_enabled(),
    )


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("capability", "expected", "word"),
    [
        ((9, 0), "bf16", "natively"),
        ((8, 0), "bf16", "natively"),
        ((7, 5), "no", "--mixed_precision fp16 would be faster"),
        ((6, 1), "no", "lacks bf16"),  # its fp16 is slow
    ],
)
def test_auto_depends_on_what_the_gpu_computes_natively(
    capability: tuple[int, int], expected: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def of(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", of)
    precision, reason = best_precision(GPU)
    assert precision == expected and word in reason
    assert asked == [GPU], "another GPU of the machine may be older"
    assert best_precision(torch.device("cpu"))[0] == "no"


@pytest.mark.parametrize(
    ("asked", "launcher", "expected"),
    [
        ("auto", None, "no"),
        ("auto", "no", "no"),  # which the launcher also says unasked
        ("auto", "bf16", "bf16"),
        ("auto", "fp16", "fp16"),
        ("no", "bf16", "no"),
        ("bf16", "no", "bf16"),
        ("fp16", "bf16", "fp16"),
    ],
)
def test_the_script_wins_over_the_launcher_and_the_launcher_over_auto(
    asked: str, launcher: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    if launcher is not None:
        monkeypatch.setenv(LAUNCHER, launcher)
    assert choose_precision(asked, torch.device("cpu"))[0] == expected
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **how: None)
    accelerator = make_accelerator(asked)
    assert accelerator.mixed_precision == expected
    line = precision_line(asked, accelerator)
    assert line.startswith({"no": "fp32 ("}.get(expected, expected))
    assert ("a CPU computes fp32" in line) == (expected == "fp16")


def test_a_cpu_asked_of_the_launcher_beside_a_gpu_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **how: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = make_accelerator()
    assert (accelerator.device.type, accelerator.mixed_precision) == ("cpu", "no")


def test_the_line_of_an_accelerator_made_elsewhere_tells_its_precision() -> None:
    assert precision_line("auto", cpu(mixed_precision="bf16")).startswith("bf16 (as the accel")


def test_settings(tmp_path: Path) -> None:
    assert (TrainConfig().mixed_precision, TrainConfig().tf32) == ("auto", True)
    with pytest.raises(ConfigError, match="mixed_precision is fp8; it must be one of auto, no"):
        TrainConfig(mixed_precision="fp8")
    file = tmp_path / "config.yaml"
    file.write_text("mixed_precision: no\ntf32: no\n")
    given = given_settings(["--config", str(file)])
    assert (given["mixed_precision"], given["tf32"]) == ("no", False)


@pytest.mark.parametrize("precision", ["auto", "no", "fp32"])
def test_a_predictor_on_a_cpu_computes_fp32(learnt: Learnt, precision: str) -> None:
    predictor = Predictor.from_checkpoint(learnt.weights, precision=precision)
    assert predictor.precision == "fp32" and predictor.why_precision


# ---------------------------------------------------------------- the switches


def test_tf32_is_switched_without_a_warning_and_restored_after_an_evaluation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_tf32(True)
        assert switches()[:2] == (True, True)
        torch.backends.cudnn.allow_tf32 = False
        with full_float32(GPU):
            assert switches()[:2] == (False, False)
        assert switches()[:2] == (True, False)
        with pytest.raises(KeyError), full_float32(GPU):
            raise KeyError
        assert switches()[:2] == (True, False)
        torch.backends.cudnn.allow_tf32 = True
        with full_float32(GPU):
            pass
        assert switches()[:2] == (True, True)


def on_gpu(function: Callable[..., Any], device: torch.device, **how: bool) -> Any:
    return function(GPU, **how)


@pytest.mark.parametrize("flag", ["--tf32", "--no-tf32"])
def test_tf32_is_on_in_training_and_off_in_evaluation(
    tiny_data: Path, room: Path, flag: str
) -> None:
    """cuDNN's attention is off: with a mask its gradients were NaN."""
    seen: dict[str, set[tuple[bool, bool, bool]]] = {"step": set(), "score": set()}
    step, evaluate = trainer_train.train_step, evaluate_and_save.evaluate

    def watched_step(*given, **how):
        seen["step"].add(switches())
        return step(*given, **how)

    def watched_evaluate(model, *given, **how):
        hook = model.register_forward_pre_hook(lambda *_: seen["score"].add(switches()))
        try:
            return evaluate(model, *given, **how)
        finally:
            hook.remove()

    with (
        swapped(trainer_train, "train_step", watched_step),
        swapped(evaluate_and_save, "evaluate", watched_evaluate),
        # Switches of a GPU, in a run on the CPU, which ignores them.
        swapped(set_up, "prepare_training", partial(on_gpu, prepare_training)),
        swapped(evaluation, "full_float32", partial(on_gpu, full_float32)),
    ):
        run(tiny_data, room, "--max_steps 2 --eval_interval 1", flag)
    on = flag == "--tf32"
    assert seen == {"step": {(on, on, False)}, "score": {(False, False, False)}}


def test_a_run_on_a_cpu_leaves_the_switches_alone(tiny_data: Path, room: Path) -> None:
    """Some versions of PyTorch take them for a CPU's float32 as well."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    before = switches()
    run(tiny_data, room, "--max_steps 1")
    assert switches() == before


def test_a_run_says_its_precision_and_why(tiny_data: Path, room: Path) -> None:
    told: list[Progress] = []
    config, fields = settings(tiny_data, room, "--max_steps 1 --mixed_precision bf16")
    trainer_train.train(config, fields, *tables(config, fields), told.append)
    assert "precision bf16 (as asked)" in told[0].message


# ---------------------------------------------------------------- what stays in float32


@pytest.fixture
def everything(tiny_config: ViDTConfig) -> ViDT:
    return ViDT(
        dataclasses.replace(
            tiny_config,
            epff=True,
            iou_aware=True,
            token_label=True,
            with_vector=True,
            n_keep=12,
            gt_mask_len=16,
            vector_hidden_dim=24,
        )
    )


def is_kept_in_float32(name: str) -> bool:
    """Modules whose inputs, weights and outputs autocast may not round."""
    heads = ("class_embed.", "bbox_embed.", "iou_embed.", "vector_embed.")
    parts = ("sampling_offsets", "cross_attn.attention_weights", "reference_points")
    return name.startswith(heads) or name.endswith(parts)


def dtypes(value: object) -> set[torch.dtype]:
    """Those of all tensors of numbers in nested outputs."""
    if isinstance(value, Tensor):
        return {value.dtype} if value.is_floating_point() else set()
    values = list(value.values()) if isinstance(value, dict) else value
    return set().union(*map(dtypes, values)) if isinstance(values, list | tuple) else set()


def test_boxes_points_heads_and_criterion_stay_in_float32(everything: ViDT) -> None:
    """Half precision has three digits: too few for boxes, and for a sum of losses."""
    seen: dict[nn.Module, set[torch.dtype]] = {}
    kept = {
        name: module
        for name, module in everything.named_modules()
        if is_kept_in_float32(name) and isinstance(module, nn.Linear)
    }
    for module in kept.values():
        module.register_forward_hook(
            lambda module, given, output: seen.setdefault(module, set()).add(output.dtype)
        )
    criterion, costs, targets, noised = SetCriterion(), [], objects(3, 2), torch.rand(2, 4, 4)
    for target, boxes in zip(targets, noised, strict=True):
        target["denoising_boxes"] = boxes[: len(target["labels"])]
    assign = criterion.matcher.assign

    def watched(cost: Tensor, counts: list[int]) -> Tensor:
        costs.append(cost)
        return assign(cost, counts)

    with torch.autocast("cpu", torch.bfloat16), swapped(criterion.matcher, "assign", watched):
        outputs = everything.train()(*padded_pair(), noised)
        terms = criterion(outputs, targets, 5.0)  # a run computes this outside autocast
    rounded = [name for name, module in kept.items() if seen[module] != {torch.float32}]
    assert len(kept) == 29 and not rounded, rounded
    levels = [outputs, *outputs["aux_outputs"], *outputs["denoising_outputs"]]
    predicted = [level[name] for level in levels for name in level if name.startswith("pred_")]
    assert len(predicted) == 5 * 4 and dtypes(predicted) == {torch.float32}
    assert dtypes(costs) == dtypes(terms) == {torch.float32}
    torch.stack(list(terms.values())).sum().backward()
    assert dtypes([each.grad for each in everything.parameters() if each.grad is not None]) == {
        torch.float32
    }


def test_the_sampling_points_stay_in_float32(
    everything: ViDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    attend = deformable_attention.deformable_attention

    def watched(value, levels, locations, weights, form):
        seen.update((locations.dtype, weights.dtype))
        return attend(value, levels, locations, weights, form)

    monkeypatch.setattr(deformable_attention, "deformable_attention", watched)
    monkeypatch.setattr(deformable_attention, "best_form", lambda device, **sizes: "plain")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        everything(*padded_pair())
    assert seen == {torch.float32}


def test_tokens_are_half_from_the_second_stage_on_as_in_plain_amp(everything: ViDT) -> None:
    """A patch merging ends with a linear layer, whose output is half; blocks add to it."""
    seen: dict[int, set[torch.dtype]] = {}
    for number, stage in enumerate(everything.backbone.layers):
        stage.register_forward_hook(
            lambda stage, given, output, number=number: seen.setdefault(number, set()).update(
                dtypes(output)
            )
        )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        everything.eval()(*padded_pair())
    assert [seen[number] for number in (1, 2, 3)] == [{torch.bfloat16}] * 3


def test_average_and_distillation_stay_in_float32(everything: ViDT) -> None:
    ema = make_ema(everything, 0.9)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = everything(*padded_pair())
        terms = TokenMatching(ema.module)(*padded_pair(), outputs, 2)
        ema.update(everything, step=1)
    assert dtypes(terms) == dtypes(ema.module.state_dict()) == {torch.float32}
