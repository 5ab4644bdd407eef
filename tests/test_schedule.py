"""Learning rate, parameter groups, moving average, and what falls due at which step."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from tiny_runs import cpu, last_checkpoint, run, settings
from torch import nn

from trainer.loop import resume
from trainer.loop.clock import Clock
from trainer.loop.optim import (
    ema_decay_of,
    learning_rate,
    make_ema,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from trainer.report.progress import Progress
from trainer.settings.config import TrainConfig
from vidt import ViDT, ViDTConfig
from vidt.model.vidt import build_detector


def test_learning_rate_by_hand() -> None:
    """A warm-up of a third of the run at most, a cosine or a line from lr to min_lr."""
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, 104, config) for step in range(105)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[54] == pytest.approx(0.55) and rates[104] == pytest.approx(0.1)
    assert rates[29] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert all(later < sooner for sooner, later in pairwise(rates[4:]))
    line = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=4, sched="linear")
    rates = [learning_rate(step, 104, line) for step in (3, 4, 29, 54, 104)]
    assert rates == pytest.approx([0.8, 1.0, 0.775, 0.55, 0.1])
    long_warmup = TrainConfig(lr=1.0, min_lr=0.0, warmup_steps=200)
    assert learning_rate(32, 100, long_warmup) < learning_rate(33, 100, long_warmup) == 1.0
    for total in (1, 2):
        rates = [learning_rate(step, total, config) for step in range(total)]
        assert rates[0] == 1.0 and all(0.1 <= rate <= 1.0 for rate in rates)


def test_flat_cosine_by_hand() -> None:
    """At lr for half of the run, then a cosine to min_lr over the other half."""
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=4, sched="flat_cosine")
    rates = [learning_rate(step, 104, config) for step in range(105)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert {*rates[4:53]} == {1.0}
    assert rates[78] == pytest.approx(0.55) and rates[104] == pytest.approx(0.1)
    assert rates[65] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert all(later < sooner for sooner, later in pairwise(rates[52:]))
    for total in (1, 2, 3):
        assert all(0.1 <= learning_rate(step, total, config) <= 1.0 for step in range(total))


@pytest.mark.parametrize(
    ("share", "total", "warmup"), [(0.05, 200, 10), (0.3, 20, 6), (0.01, 9, 0)]
)
def test_the_warm_up_shrinks_with_the_run(share: float, total: int, warmup: int) -> None:
    """A share of the run's steps, whatever --warmup_steps is, and 0 steps if that is less."""
    by_share = TrainConfig(lr=1.0, warmup_share=share, warmup_steps=7)
    by_steps = TrainConfig(lr=1.0, warmup_steps=warmup)
    for step in range(total):
        assert learning_rate(step, total, by_share) == learning_rate(step, total, by_steps)


def test_the_reported_rate_is_the_one_of_the_step(tiny_data: Path, room: Path) -> None:
    rates = {}

    def report(progress: Progress) -> None:
        if progress.event == "step":
            rates[progress.step] = progress.metrics["lr"]

    flags = "--max_steps 5 --epochs 4 --lr 1e-3 --eval_interval 4 --save_interval 4"
    run(tiny_data, room, flags, report=report)
    config, _ = settings(tiny_data, room, flags)
    expected = {step + 1: learning_rate(step, 5, config) for step in range(5)}
    assert rates == pytest.approx(expected)


def test_every_parameter_is_in_one_group(tiny_model: ViDT) -> None:
    groups = parameter_groups(tiny_model, 0.05)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in tiny_model.parameters())
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert set(decays.values()) == {0.05, 0.0}
    names = dict(tiny_model.named_parameters())
    bare = {name for name, parameter in names.items() if decays[id(parameter)] == 0}
    owners = {name: tiny_model.get_submodule(name.rpartition(".")[0]) for name in names}
    for name, owner in owners.items():
        is_norm = isinstance(owner, (nn.LayerNorm, nn.GroupNorm))
        looked_up = name.endswith(("det_token", "det_pos_embed", "relative_position_bias_table"))
        assert (name in bare) == (is_norm or name.endswith("bias") or looked_up), name
    assert {"backbone.det_token", "backbone.det_pos_embed"} <= bare
    matrices = {name for name, parameter in names.items() if parameter.ndim == 4}
    assert matrices and not matrices & bare


def rates_at_half(model: nn.Module, config: TrainConfig) -> dict[str, float]:
    """The rate of each parameter that learns, by name, when the run's is 0.5."""
    optimizer = make_optimizer(model, config)
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_what_places_the_queries_has_a_rate_of_its_own(tiny_model: ViDT) -> None:
    rate = rates_at_half(tiny_model, TrainConfig(lr=1.0, lr_linear_proj_mult=0.1))
    slow = {name for name, value in rate.items() if value == 0.05}
    assert set(rate.values()) == {0.5, 0.05}
    assert slow == {
        *("backbone.det_pos_embed", "decoder.reference_points.weight"),
        *("decoder.reference_points.bias", *(n for n in rate if "sampling_offsets" in n)),
        *(n for n in rate if n.startswith("query_pos_proj")),
    }


def test_tables_of_training_queries_do_not_decay(tiny_config: ViDTConfig) -> None:
    model = ViDT(replace(tiny_config, query_groups=3, label_embedding=True))
    groups = parameter_groups(model, 0.05, position_mult=0.1, fan_in_power=0.5)
    found = {id(p): (g["weight_decay"], g["lr_mult"]) for g in groups for p in g["params"]}
    names = {name: found[id(p)] for name, p in model.named_parameters()}
    assert names["group_pos"] == names["backbone.det_pos_embed"] == (0.0, 0.1)
    assert names["label_enc.weight"] == names["backbone.det_token"] == (0.0, 1.0)


def test_the_body_has_a_rate_of_its_own(tiny_model: ViDT) -> None:
    config = TrainConfig(lr=1.0, lr_backbone_mult=0.25, lr_linear_proj_mult=0.1)
    rate = rates_at_half(tiny_model, config)
    assert rate.pop("backbone.det_pos_embed") == 0.05  # it says where queries look
    assert {value for name, value in rate.items() if name.startswith("backbone")} == {0.125}
    assert {value for name, value in rate.items() if "backbone" not in name} == {0.5, 0.05}


def test_narrow_matrices_have_higher_rates(tiny_model: ViDT) -> None:
    config = TrainConfig(lr=1.0, lr_fan_in_power=0.5, lr_linear_proj_mult=0.1)
    rate = rates_at_half(tiny_model, config)
    assert rate["backbone.patch_embed.proj.weight"] == 0.5 * (256 / 48) ** 0.5  # 3 x 4 x 4 inputs
    assert rate["backbone.patch_embed.proj.bias"] == 0.5
    assert rate["backbone.det_token"] == 0.5
    layer = tiny_model.get_parameter("decoder.layers.0.linear2.weight")
    assert rate["decoder.layers.0.linear2.weight"] == 0.5 * (256 / layer.shape[1]) ** 0.5
    placing = tiny_model.get_parameter("decoder.reference_points.weight")
    assert rate["decoder.reference_points.weight"] == 0.5 * 0.1 * (256 / placing.shape[1]) ** 0.5


def test_depthwise_filters_have_no_width() -> None:
    coat = build_detector(ViDTConfig(num_classes=1, backbone_name="coat_lite_tiny", dec_layers=1))
    groups = parameter_groups(coat, 0.05, fan_in_power=0.5)
    mults = {id(p): group["lr_mult"] for group in groups for p in group["params"]}
    filters = [p for p in coat.parameters() if p.ndim == 4 and p.shape[1] == 1]
    assert filters and {mults[id(p)] for p in filters} == {1.0}


# The layers of each backbone from below, by the beginnings of their parameters' names.
def swin_layers(*depths: int) -> list[list[str]]:
    layers = [["patch_embed."]]
    for stage, depth in enumerate(depths):
        layers += [[f"layers.{stage}.blocks.{block}."] for block in range(depth)]
        if stage < 3:  # the fourth merging is new, not of an ImageNet backbone
            layers[-1].append(f"layers.{stage}.downsample.")
    return layers


def coat_layers(*depths: int) -> list[list[str]]:
    layers: list[list[str]] = [[]]
    for stage, depth in enumerate(depths):
        layers[-1].append(f"stages.{stage}.patch_embed.")
        layers += [[f"stages.{stage}.serial_blocks.{block}."] for block in range(depth)]
        shared = ("cls_token", "cpe.", "crpe.")
        layers[-depth] += [f"stages.{stage}.{part}" for part in shared]
    return layers


@pytest.mark.parametrize("method", ["vidt", "vidt_wo_neck"])
@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("swin_test", swin_layers(1, 1, 1, 1)),
        ("swin_nano", swin_layers(2, 2, 6, 2)),
        ("coat_lite_tiny", coat_layers(2, 2, 2, 2)),
        ("coat_lite_small", coat_layers(3, 4, 6, 3)),
    ],
)
def test_rates_decay_over_the_depth_of_the_backbone(
    backbone: str, layers: list[list[str]], method: str
) -> None:
    """Lowest for the patch embedding, one decay below the decoder's for the last block; [DET]
    tokens and what serves them alone, and what is not the backbone's, keep theirs.
    """
    fields = {"num_classes": 1, "backbone_name": backbone, "method": method, "dec_layers": 1}
    with torch.device("meta"):
        model = build_detector(ViDTConfig(**fields))
    config = TrainConfig(
        lr=1.0, lr_layer_decay=0.5, lr_backbone_mult=0.25, lr_linear_proj_mult=0.125
    )
    rate = rates_at_half(model, config)
    expected = {}
    for depth, names in enumerate(reversed(layers), 1):
        for start in names:
            found = [n for n in rate if n.startswith(f"backbone.{start}") and "det_" not in n]
            assert found, start
            expected |= dict.fromkeys(found, 0.5 * 0.25 * 0.5**depth)
    plain = rates_at_half(model, replace(config, lr_layer_decay=1.0))
    assert rate == plain | expected
    full = {name for name in rate if name.startswith("backbone") and name not in expected}
    kinds = ("det_token", "det_pos_", "det_exp", "layers.3.downsample", "patch_embed5")
    assert all(any(kind in name for kind in kinds) for name in full)


def test_adamw_averages_as_told(tiny_model: ViDT) -> None:
    optimizer = make_optimizer(tiny_model, TrainConfig(adam_beta2=0.98))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}


def test_weight_decay_shrinks_matrices_alone() -> None:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.bias.fill_(1.0)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(layer, TrainConfig(lr=1.0, weight_decay=0.1))
    set_learning_rate(optimizer, 0.5)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(layer.weight, before * 0.95)
    assert torch.equal(layer.bias, torch.ones(3))


def test_a_step_that_the_loss_scaler_refuses_is_known_to_be_skipped() -> None:
    """The run counts such steps, and leaves the average of the weights alone."""
    cpu()  # Accelerate's optimiser asks for the state that this makes
    layer, scaler = nn.Linear(2, 2), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(
        make_optimizer(layer, TrainConfig(lr=1.0), scaled=True), scaler=scaler
    )
    for factor, refused in ((float("inf"), True), (1.0, False)):
        before = layer.weight.detach().clone()
        scaler.scale(layer(torch.ones(1, 2)).sum() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped is refused
        assert torch.equal(layer.weight, before) is refused


def test_the_average_follows_closely_at_first() -> None:
    """How much of the way to the weights it goes, at each step: all of it, then less and less."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    ema, ways = make_ema(layer, 0.9), []
    for step in range(60):
        nn.init.zeros_(ema.module.weight)
        ema.update(layer, step=step)
        ways.append(ema.module.weight.item())
    assert ways[0] == 1.0 and ways[1] > 0.5
    assert all(later <= sooner for sooner, later in pairwise(ways))
    assert ways[-1] == pytest.approx(0.1)


def test_the_automatic_average_looks_back_a_share_of_the_run() -> None:
    for steps, back in ((50, 2), (1000, 40), (125_000, 5000)):
        assert 1 / (1 - ema_decay_of(steps)) == pytest.approx(back)
    assert ema_decay_of(1) == ema_decay_of(20) == 0


def test_the_average_is_what_is_evaluated_and_saved(tiny_data: Path, room: Path) -> None:
    run(tiny_data, room, "--max_steps 3 --ema_decay 0.99 --lr 1e-2 --clip_max_norm 0")
    tensors = resume.load(last_checkpoint(room)).tensors
    saved = load_file(room / "last.safetensors")
    averaged = {n.removeprefix("ema/module."): t for n, t in tensors.items() if n.startswith("ema")}
    trained = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model")}
    assert saved.keys() == averaged.keys() == trained.keys()
    assert all(torch.equal(saved[name], averaged[name]) for name in saved)
    assert any(not torch.equal(saved[name], trained[name]) for name in saved)


@pytest.mark.parametrize(
    ("total", "every", "evaluations"),
    [(12, 1, [3, 6, 9, 12]), (12, 2, [6, 12]), (10, 2, [6, 10]), (2, 1, [2]), (7, 5, [7])],
)
def test_when_to_evaluate(total: int, every: int, evaluations: list[int]) -> None:
    """Three steps an epoch."""
    clock = Clock(3, total, 4, 5, every)
    assert [step for step in range(total + 1) if clock.evaluation_due(step)] == evaluations
    assert clock.epoch(1) == clock.epoch(3) == 0 and clock.epoch(4) == 1
    done = [clock.fraction(step) for step in range(total + 1)]
    assert done == sorted(done) and done[0] == 0
    for step in evaluations:
        during = [clock.fraction(step, part / 4) for part in range(5)]
        assert during == sorted(during)
        if step < total:
            assert during[-1] < clock.fraction(step + 1)
    assert clock.fraction(total, 1.0) == 1.0


@pytest.mark.parametrize(
    ("flags", "saves"),
    [
        ("--save_interval 1", [3, 6, 9, 10]),
        ("--save_interval 2", [6]),
        ("--save_interval 2 --save_steps 4", [4, 6, 8]),
        ("--save_interval 100", []),
    ],
)
def test_when_to_save(flags: str, saves: list[int], tmp_path: Path) -> None:
    """Ten steps, three an epoch; the last step is saved whatever is due."""
    clock, (config, _) = Clock(3, 10, 4, 5, 1), settings(tmp_path, tmp_path, flags)
    found = [step for step in range(11) if clock.save_due(step, config)]
    assert [step for step in found if step < 10] == [step for step in saves if step < 10]
    due = {*saves, *(step for step in range(11) if clock.evaluation_due(step))}
    assert all(clock.pause_due(step, config) for step in due)
