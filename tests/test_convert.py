"""Names of released checkpoints to ours, on every golden key list; files of another kind."""

import re

import golden
import pytest
import torch
from torch import Tensor

from vidt import ViDT, ViDTConfig
from vidt.convert import imagenet_swin, released_config, released_name, released_vidt

VANILLA = {
    "vidt_swin_nano/keys.json": "vidt_swin_nano/meta.json",
    "vidt_swin_nano_nc3_norefine/keys.json": "vidt_swin_nano_nc3_norefine/meta.json",
    **{
        path: path
        for body in ("nano_dec4", "tiny", "small", "base_win7_22k")
        for path in [f"keys/vidt_swin_{body}.json"]
    },
}
OTHERS = {
    "vidt_plus_swin_nano_300/keys.json": "fusion|vector_embed|iou_embed|token_embed",
    "vidt_swin_tiny_epff_iou_token_300/keys.json": "fusion|iou_embed|token_embed",
    "vidt_wo_neck_swin_nano/keys.json": "it holds no class_embed.0.weight",
    "vidt_coat_lite_tiny/keys.json": "backbone.cls_token",
}


def stored(path: str) -> dict[str, Tensor]:
    """A state dict of the released names and shapes; all zeros, without the memory for them."""
    keys = golden.read_json(path)["keys"]
    return {name: torch.zeros(()).expand(shape) for name, (_, shape, _) in keys.items()}


@golden.present
@pytest.mark.parametrize("path", VANILLA)
def test_every_released_tensor_finds_its_place(path: str) -> None:
    config = golden.config_of(VANILLA[path])
    with torch.device("meta"):
        model = ViDT(config)
    converted = released_vidt(stored(path), config)
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


@golden.present
@pytest.mark.parametrize("path", VANILLA)
def test_configuration_is_read_off_the_tensors(path: str) -> None:
    expected = golden.config_of(VANILLA[path])
    found = released_config(stored(path))
    for field in ("backbone_name", "num_classes", "det_token_num", "dec_layers", "with_box_refine"):
        assert getattr(found, field) == getattr(expected, field), field


@golden.present
@pytest.mark.parametrize("path", OTHERS)
def test_other_models_are_refused_by_what_they_hold(path: str) -> None:
    with pytest.raises(ValueError, match=OTHERS[path]):
        released_config(stored(path))


@golden.present
def test_untied_heads_cannot_become_shared_ones() -> None:
    tensors = stored("vidt_swin_nano/keys.json")
    tensors["class_embed.3.bias"] = torch.ones(91)
    config = ViDTConfig(num_classes=91, with_box_refine=False)
    with pytest.raises(ValueError, match=r"class_embed\.3\.bias differs .* with_box_refine=True"):
        released_vidt(tensors, config)


def test_only_what_the_forward_pass_never_reads_is_dropped() -> None:
    assert released_name("transformer.level_embed") is None
    assert released_name("backbone.norm2.weight") is None
    assert released_name("backbone.layers.1.downsample.norm2.bias") is None
    assert released_name("backbone.layers.0.blocks.1.attn.relative_position_index") is None
    for kept in ("backbone.layers.0.blocks.0.norm2.weight", "backbone.patch_embed.norm.bias"):
        assert released_name(kept) == kept
    ours = "decoder.layers.5.norm2.weight"
    assert released_name("transformer." + ours) == ours


def test_detr_is_not_a_vidt() -> None:
    detr = {
        "class_embed.weight": torch.zeros(92, 256),
        "bbox_embed.layers.0.weight": torch.zeros(1),
    }
    with pytest.raises(ValueError, match=re.escape("it holds no class_embed.0.weight")):
        released_config(detr)


def test_timms_merging_moves_to_the_end_of_the_stage_before() -> None:
    timm = {
        "layers.1.downsample.norm.weight": 1,
        "layers.1.blocks.0.norm1.weight": 2,
        "norm.bias": 3,
    }
    assert imagenet_swin(timm) == {
        "layers.0.downsample.norm.weight": 1,
        "layers.1.blocks.0.norm1.weight": 2,
    }
    microsoft = {"layers.0.downsample.norm.weight": 1, "layers.1.blocks.0.norm1.weight": 2}
    assert imagenet_swin({**microsoft, "head.weight": 3}) == microsoft
