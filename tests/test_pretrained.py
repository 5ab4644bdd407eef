"""ImageNet weights for the body: complete or refused; and the body against timm's own Swin."""

import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from conftest import Compare
from safetensors.torch import save_file
from torch import Tensor, nn

from vidt.model.config import SWIN_VARIANTS
from vidt.model.swin import SwinBackbone
from vidt.weights.pretrained import TIMM_NAMES, URLS, added_by_vidt, load_imagenet


def body_of(name: str) -> SwinBackbone:
    return SwinBackbone(SWIN_VARIANTS[name], det_token_num=4, pos_dim=8, cross_indices=(3,)).eval()


def blurred_state(module: nn.Module) -> dict[str, Tensor]:
    """Random weights that differ from any start in every float tensor."""
    state = module.state_dict()
    return {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def timm_tiny() -> nn.Module:
    """timm's Swin, under the names of timm's files, shifting windows even where there is one."""
    model = timm.create_model(TIMM_NAMES["swin_tiny"], pretrained=False, always_partition=True)
    model.load_state_dict(blurred_state(model))
    return model.eval()


@pytest.fixture(scope="module")
def tiny_body(timm_tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> SwinBackbone:
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(timm_tiny.state_dict(), path)
    body = body_of("swin_tiny")
    load_imagenet(body, "swin_tiny", str(path))
    return body


def microsoft(body: SwinBackbone) -> dict[str, Tensor]:
    """A classifier's file under the names of Swin's authors, which ViDT's swin_nano has as well."""
    state = {name: t for name, t in blurred_state(body).items() if not added_by_vidt(name)}
    width = body.num_channels[2]
    return {
        **state,
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
        "head.weight": torch.zeros(1000, width),
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
    }


def changed(body: SwinBackbone, before: dict[str, Tensor]) -> set[str]:
    return {
        name for name, tensor in body.state_dict().items() if not torch.equal(tensor, before[name])
    }


def test_a_timm_file_fills_the_whole_body(tiny_body: SwinBackbone) -> None:
    torch.manual_seed(1)
    before = body_of("swin_tiny").state_dict()
    # [DET] tokens are random as well, so they differ; zeros and ones of norms would not.
    missed = before.keys() - changed(tiny_body, before)
    assert missed == {"layers.3.downsample.norm.weight", "layers.3.downsample.norm.bias"}


def test_the_body_computes_what_timms_swin_does(
    timm_tiny: nn.Module, tiny_body: SwinBackbone, compare: Compare
) -> None:
    """Patches never see [DET] tokens, so all stages agree; 224 needs no padding to windows."""
    stages: dict[str, list[Tensor]] = {"timm": [], "ours": []}
    hooks = [
        timm_layer.register_forward_hook(lambda _, __, out: stages["timm"].append(out))
        for timm_layer in timm_tiny.layers
    ] + [
        layer.register_forward_hook(lambda _, __, out: stages["ours"].append(out[0]))
        for layer in tiny_body.layers
    ]
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        timm_tiny.forward_features(images)
        tiny_body(images, torch.zeros(1, 224, 224, dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    assert len(stages["timm"]) == len(stages["ours"]) == 4
    for index, (theirs, ours) in enumerate(zip(stages["timm"], stages["ours"], strict=True)):
        scale = theirs.std().item()
        compare(f"stage {index}, of its spread", ours / scale, theirs / scale, 2e-5)


@pytest.mark.parametrize("nested", [True, False])
def test_a_swin_nano_file_fills_the_whole_body(tmp_path: Path, nested: bool) -> None:
    body = body_of("swin_nano")
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    file = microsoft(body)
    torch.save({"model": file} if nested else file, tmp_path / "nano.pth")
    load_imagenet(body, "swin_nano", str(tmp_path / "nano.pth"))
    assert changed(body, before) == {name for name in before if not added_by_vidt(name)}
    assert all(torch.equal(tensor, file[n]) for n, tensor in body.state_dict().items() if n in file)


def test_none_leaves_the_body_as_it_is() -> None:
    body = body_of("swin_nano")
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    load_imagenet(body, "swin_nano", "none")
    assert not changed(body, before)


def refusal(body: SwinBackbone, pre_trained: str) -> str:
    """The one line that says why."""
    with pytest.raises(ValueError) as caught:
        load_imagenet(body, "swin_nano", pre_trained)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_of_other_bodies_are_refused(tmp_path: Path) -> None:
    body, path = body_of("swin_nano"), str(tmp_path / "other.pth")
    file = microsoft(body)
    cases = {
        r"tensor conv1\.weight has no place in swin_nano": {**file, "conv1.weight": torch.ones(1)},
        r"patch_embed\.norm\.bias has shape \(96,\), swin_nano needs \(48,\)": {
            **file,
            "patch_embed.norm.bias": torch.ones(96),
        },
        r"1 tensors of swin_nano are missing, first layers\.2\.blocks\.5\.mlp\.fc1\.bias": {
            name: tensor
            for name, tensor in file.items()
            if name != "layers.2.blocks.5.mlp.fc1.bias"
        },
    }
    for reason, content in cases.items():
        torch.save(content, path)
        line = refusal(body, path)
        assert path in line and re.search(reason, line), line


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    body = body_of("swin_nano")
    assert "no such file" in refusal(body, str(tmp_path / "nowhere.pth"))
    for name in ("torn.safetensors", "torn.pth", "empty.pth", "five.pth"):
        path = tmp_path / name
        path.write_bytes(b"" if name.startswith("empty") else b"no weights at all")
        if name.startswith("five"):
            torch.save({"model": 5}, path)
        assert str(path) in refusal(body, str(path))


@pytest.mark.parametrize("name", ["swin_nano", "swin_tiny"])
def test_without_network_one_line_says_what_to_fetch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that nobody serves and an empty cache: the same with a network and without."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it tries for 48 s
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match="--pre_trained FILE") as caught:
        load_imagenet(body_of(name), name, "imagenet")
    line = str(caught.value)
    assert "\n" not in line and URLS.get(name, f"timm/{TIMM_NAMES.get(name)}") in line
