"""The CoaT-lite bodies: filled from ImageNet files, and against timm's attention. Number for number
they are in test_golden.py.
"""

from pathlib import Path

import pytest
import timm
import torch
from conftest import Compare
from safetensors.torch import save_file
from torch import Tensor, nn

from vidt import ViDTConfig
from vidt.model.coat import CoatBackbone, CoatBlock
from vidt.model.config import COAT_VARIANTS
from vidt.weights.pretrained import TIMM_NAMES, added_by_vidt, load_imagenet


def body_of(name: str) -> CoatBackbone:
    return CoatBackbone(COAT_VARIANTS[name], det_token_num=4, pos_dim=8, cross_indices=(3,)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", COAT_VARIANTS)
def test_a_timm_file_fills_the_whole_body(name: str, tmp_path: Path) -> None:
    source = timm.create_model(TIMM_NAMES[name], pretrained=False)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tensors = dict(source.named_parameters())  # a safetensors file names a shared tensor once
    save_file(tensors, tmp_path / "model.safetensors")
    body = body_of(name)
    before = {key: tensor.clone() for key, tensor in body.state_dict().items()}
    load_imagenet(body, name, str(tmp_path / "model.safetensors"))
    kept = {key for key, tensor in body.state_dict().items() if torch.equal(tensor, before[key])}
    assert kept == {key for key in before if added_by_vidt(key)}
    # The authors' files have every alias, and norms and a head that a detector has no use for.
    released = {**source.state_dict(), "norm1.weight": torch.ones(64)}
    torch.save({"model": released}, tmp_path / "released.pth")
    again = body_of(name)
    load_imagenet(again, name, str(tmp_path / "released.pth"))
    for key, tensor in again.state_dict().items():
        assert added_by_vidt(key) or torch.equal(tensor, body.state_dict()[key]), key


def test_the_attention_of_patches_is_timms(tmp_path: Path, compare: Compare) -> None:
    """One block of each: ours places patches after the norm, so timm is given an identity there."""
    source = timm.create_model(TIMM_NAMES["coat_lite_tiny"], pretrained=False).eval()
    tensors = dict(source.named_parameters())
    save_file(tensors, tmp_path / "model.safetensors")
    body = body_of("coat_lite_tiny")
    load_imagenet(body, "coat_lite_tiny", str(tmp_path / "model.safetensors"))
    theirs, ours = source.serial_blocks2[1], body.stages[1]
    block = ours.serial_blocks[1]
    assert isinstance(block, CoatBlock)
    tokens, det = torch.randn(2, 1 + 5 * 7, 128), torch.randn(2, 4, 128)
    theirs.cpe = StandStill()
    still = StandStill()
    with torch.no_grad():
        found = block(
            torch.cat([tokens, det], 1), torch.randn(1, 4, 8), (5, 7), still, ours.crpe, None, None
        )
        compare("block", found[:, : 1 + 5 * 7], theirs(tokens, (5, 7)), 1e-5)


class StandStill(nn.Module):
    """A position encoding that adds nothing."""

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens


@pytest.mark.parametrize("method", ["vidt", "vidt_wo_neck"])
def test_every_parameter_is_trained(method: str) -> None:
    config = ViDTConfig(method=method, backbone_name="coat_lite_tiny", num_classes=3)
    body = CoatBackbone(
        COAT_VARIANTS[config.backbone_name],
        det_token_num=4,
        pos_dim=8,
        cross_indices=config.cross_indices,
        pyramid=method == "vidt",
    )
    maps, det, _ = body(torch.randn(1, 3, 45, 64), torch.zeros(1, 45, 64, dtype=torch.bool))
    assert tuple(level.shape[1] for level in maps) == body.num_channels
    read = [det, *maps] if method == "vidt" else [det]
    sum(tensor.square().sum() for tensor in read).backward()
    assert [name for name, p in body.named_parameters() if p.grad is None] == []
