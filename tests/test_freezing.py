"""Frozen stages of a backbone: their weights stay, [DET] tokens learn, and nothing else changes."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import Watch
from tiny_runs import blurred, differences, end_of, last_checkpoint, run
from torch import Tensor, nn

from trainer.backward.freezing import freeze_stages, stage_of
from trainer.backward.memory import checkpoint_activations, missing_moments
from trainer.loop import resume
from trainer.loop.optim import make_optimizer
from trainer.loop.stopping import Stopped
from trainer.settings.config import TrainConfig
from trainer.settings.flags import ConfigError
from trainer.settings.parsing import parse
from vidt.losses.criterion import criterion_for
from vidt.model.vidt import ViDTConfig, build_detector

SMALL = ViDTConfig(
    backbone_name="swin_test",
    num_classes=2,
    det_token_num=5,
    reduced_dim=32,
    pos_dim=8,
    dec_layers=1,
    dim_feedforward=16,
    dropout=0.0,
)
BACKBONES = ("swin_test", "swin_test_drop", "coat_lite_tiny")
METHODS = ("vidt", "vidt_wo_neck")


def config_of(backbone: str, method: str = "vidt", **more: object) -> ViDTConfig:
    return replace(SMALL, backbone_name=backbone, method=method, **more)


def detector(config: ViDTConfig) -> nn.Module:
    torch.manual_seed(0)
    return blurred(build_detector(config)).double().train()


def gradients_of(model: nn.Module, autocast: bool = False) -> dict[str, Tensor]:
    """By name, of one step on two random images of one object each."""
    torch.manual_seed(1)
    images, padding = torch.randn(2, 3, 64, 96).double(), torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 64:] = True
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]]).double()}
    criterion = criterion_for(model.config)
    counts = {"num_boxes": 2.0, "num_images": 2.0}
    if autocast:
        model, images = model.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(images, padding)
    terms = criterion(outputs, [target, target], **{n: counts[n] for n in criterion.normalised_by})
    sum(terms.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() <= expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in found.items():
        scale = max(float(expected[name].abs().max()), 1e-3 * largest)
        assert (tensor - expected[name]).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("backbone", ["swin_test", "coat_lite_tiny"])
def test_the_stage_of_each_weight_by_hand(backbone: str) -> None:
    swin = {
        "backbone.patch_embed.norm.bias": 0,
        "backbone.layers.0.blocks.0.attn.qkv.weight": 1,
        "backbone.layers.0.downsample.reduction.weight": 1,
        "backbone.layers.3.blocks.0.mlp.fc1.bias": 4,
        "backbone.layers.3.downsample.norm.weight": None,
        "backbone.layers.1.blocks.0.det_pos_linear.weight": None,
    }
    coat = {
        "backbone.stages.0.patch_embed.proj.weight": 1,
        "backbone.stages.2.patch_embed.proj.weight": 3,
        "backbone.stages.1.cls_token": 2,
        "backbone.stages.3.serial_blocks.1.factoratt_crpe.proj.bias": 4,
        "backbone.stages.1.crpe.conv_list.0.weight": 2,
        "backbone.stages.1.det_exp.0.weight": None,
        "backbone.patch_embed5.proj.weight": None,
    }
    others = {"backbone.det_token": None, "backbone.det_pos_embed": None}
    others["bbox_embed.0.layers.0.weight"] = None
    names = dict(build_detector(config_of(backbone)).named_parameters())
    for name, stage in ((swin if backbone == "swin_test" else coat) | others).items():
        assert name in names and stage_of(name) == stage, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_gradients_of_what_learns_are_those_without_freezing(
    backbone: str, method: str, stages: int
) -> None:
    """Drop path is off in frozen stages only, so here the others have none either."""
    plain, frozen = (detector(config_of(backbone, method)) for _ in range(2))
    for module in plain.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    freeze_stages(frozen, stages)
    for module in frozen.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    found, expected = gradients_of(frozen), gradients_of(plain)
    close(found, expected)
    kept = {name for name in expected if stage_of(name) not in range(stages + 1)}
    assert found.keys() == kept
    assert {"backbone.det_token", "backbone.det_pos_embed"} <= kept
    assert any("det_pos_linear" in name for name in kept)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("cross", [(3,), (0, 3), (0, 1, 2, 3)])
def test_stages_whose_tokens_see_the_patches_freeze_too(
    backbone: str, cross: tuple[int, ...]
) -> None:
    if backbone == "swin_test_drop":
        return
    plain, frozen = (detector(config_of(backbone, cross_indices=cross)) for _ in range(2))
    freeze_stages(frozen, 2)
    close(gradients_of(frozen), gradients_of(plain))


@pytest.mark.parametrize("backbone", ["swin_test", "coat_lite_tiny"])
def test_gradients_in_bf16_and_with_activation_checkpointing(backbone: str) -> None:
    """Autocast caches its copies of weights: a copy made without a graph would end the gradient."""
    models = [detector(config_of(backbone)) for _ in range(3)]
    freeze_stages(models[0], 2)
    freeze_stages(models[1], 2)
    checkpoint_activations(models[1])
    close(gradients_of(models[1]), gradients_of(models[2]))
    assert gradients_of(models[0], autocast=True).keys() == gradients_of(models[1]).keys()


@pytest.mark.parametrize("backbone", ["swin_test", "coat_lite_tiny"])
def test_no_graph_is_kept_for_frozen_patches(backbone: str) -> None:
    """The maps of frozen stages need no gradient; less is kept for the backward pass."""

    def kept(stages: int, side: int) -> int:
        model, size = detector(config_of(backbone)), 0
        if stages:
            freeze_stages(model, stages)

        def note(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            padding = torch.zeros(1, side, side, dtype=torch.bool)
            maps, det, _ = model.backbone(torch.randn(1, 3, side, side).double(), padding)
        assert det.requires_grad and maps[0].requires_grad == (stages < 2)
        return size

    def grown(stages: int) -> int:  # weights are kept at any size
        return kept(stages, 256) - kept(stages, 128)

    assert grown(2) < 0.4 * grown(0)


def test_the_optimiser_holds_what_learns_alone() -> None:
    model = detector(SMALL)
    freeze_stages(model, 2)
    optimizer = make_optimizer(model, TrainConfig(lr=1.0, weight_decay=0.1))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    moments = sum(each.numel() for each in missing_moments(optimizer))
    assert moments == 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)


FLAGS = "--backbone_name swin_test_drop --freeze 2 --lr 1e-2 --clip_max_norm 0 --weight_decay 0.1"


@pytest.fixture(scope="module")
def start(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("start")
    run(tiny_data, output, "--backbone_name swin_test_drop --max_steps 1")
    return output / "last.safetensors"


@pytest.mark.parametrize("more", ["", "--no-ema --activation_checkpointing"])
def test_frozen_weights_stay_and_tokens_learn(
    tiny_data: Path, room: Path, start: Path, more: str
) -> None:
    run(tiny_data, room, f"{FLAGS} --max_steps 3 --load_from {start} {more}")
    before, after = load_file(start), load_file(room / "last.safetensors")
    trained = resume.load(last_checkpoint(room)).tensors
    for name, tensor in before.items():
        frozen = stage_of(name) in (0, 1, 2)
        assert torch.equal(trained[f"model/{name}"], tensor) == frozen, name
        assert torch.equal(after[name], tensor) == frozen, name
        assert (f"optimizer/exp_avg/{name}" in trained) != frozen, name


@pytest.mark.slow
def test_a_frozen_run_that_is_resumed_ends_as_if_left_alone(
    tiny_data: Path, room: Path, start: Path
) -> None:
    run(tiny_data, room / "whole", FLAGS, f"--load_from {start}")
    with pytest.raises(Stopped):
        run(
            tiny_data,
            room / "cut",
            FLAGS,
            f"--load_from {start}",
            report=Watch("step", 2, signal.SIGTERM),
        )
    run(tiny_data, room / "cut", FLAGS, "--resume")
    assert differences(end_of(room / "cut"), end_of(room / "whole")) == []


def test_thawing_and_freezing_on_resume_is_told(
    tiny_data: Path, room: Path, start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny_data, room, FLAGS, f"--load_from {start} --max_steps 1")
    run(tiny_data, room, FLAGS.replace("--freeze 2", "--freeze 0"), "--resume --max_steps 3")
    assert "resuming with freeze 0, it was 2" in caplog.text
    thawed = load_file(room / "last.safetensors")
    assert all(not torch.equal(thawed[name], t) for name, t in load_file(start).items())
    run(tiny_data, room, FLAGS, "--resume --max_steps 5")
    assert "resuming with freeze 2, it was 0" in caplog.text


def test_random_weights_are_not_frozen() -> None:
    with pytest.raises(ConfigError, match=r"freeze is 2, but .* random weights"):
        parse(["--freeze", "2"])  # the recipe of the embedded pictures starts from nothing
    assert parse(["--freeze", "2", "--load_from", "x"])[0].freeze == 2
    with pytest.raises(ConfigError, match="freeze is 5; it must be at most 4"):
        parse(["--freeze", "5", "--load_from", "x"])
