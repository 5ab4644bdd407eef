"""The CoaT-lite bodies: number for number on the golden data, and filled from ImageNet files."""

import copy
import math
from functools import cache
from pathlib import Path

import golden
import pytest
import timm
import torch
from conftest import Compare
from safetensors.torch import save_file
from torch import Tensor, nn

from vidt import SetCriterion, ViDT, ViDTConfig
from vidt.coat import Block, CoatBody
from vidt.convert import released_name, released_vidt
from vidt.criterion import log_values
from vidt.pretrained import TIMM_NAMES, added_by_vidt, load_imagenet
from vidt.variants import COAT_VARIANTS

VARIANT = "vidt_coat_lite_tiny"


@cache
def model() -> ViDT:
    config = golden.config_of(f"{VARIANT}/meta.json")
    built = ViDT(config)
    built.load_state_dict(released_vidt(golden.weights(VARIANT), config), strict=True)
    return built.eval()


@cache
def run(name: str) -> dict:
    """Outputs, and under `body` what the body gives."""
    seen: dict[str, Tensor] = {}

    def body(_: object, __: object, out: tuple) -> None:
        maps, det, det_pos = out
        seen.update({f"backbone.feat{level}": feature for level, feature in enumerate(maps)})
        seen["backbone.det_tgt"], seen["backbone.det_pos"] = det.mT, det_pos.mT

    hook = model().backbone.register_forward_hook(body)
    with torch.no_grad():
        outputs = model()(*golden.inputs(name))
    hook.remove()
    return {**outputs, "body": seen}


@golden.present
@pytest.mark.parametrize("name", ["pair", "single", "odd"])
def test_outputs(name: str, compare: Compare) -> None:
    meta = golden.read_json(f"{VARIANT}/meta.json")
    stated = {what: 5 * limit for what, limit in meta["fp32_max_abs_diff"][name].items()}
    facts, stored = meta["tensors"][name], golden.read_arrays(f"{VARIANT}/{name}.npz")
    outputs = run(name)
    for what, limit in stated.items():
        compare(what, outputs[what], stored[what], limit)
        for level, aux in enumerate(outputs["aux_outputs"]):
            if f"aux{level}.{what}" in stored:
                part = golden.stored_part(aux[what], facts[f"aux{level}.{what}"]["slice"])
                compare(f"aux {what}", part, stored[f"aux{level}.{what}"], limit)
    # Inner tensors have no stated limit: that of the logits, in proportion to their spread.
    relative = stated["pred_logits"] / facts["pred_logits"]["std"]
    for what, expected in stored.items():
        if what.startswith("backbone."):
            part = golden.stored_part(outputs["body"][what], facts[what]["slice"])
            compare(what, part, expected, relative * facts[what]["std"])


@golden.present
@pytest.mark.parametrize("case", ["pair", "single", "odd", "pair_last_image_empty"])
def test_losses_and_matchings(case: str, compare: Compare) -> None:
    name = case.partition("_")[0]
    targets = golden.targets(name, 91, empty=() if name == case else (1,))
    expected = golden.read_json(f"{VARIANT}/losses.json")[case]
    weights = golden.read_json(f"{VARIANT}/meta.json")["weight_dict"]
    outputs, criterion = run(name), SetCriterion()
    matches = criterion.match(outputs, targets)
    terms = criterion(outputs, targets, sum(len(target["labels"]) for target in targets))
    found = {what: term / weights[what] for what, term in terms.items()}
    found |= log_values(outputs, targets, matches)
    assert found.keys() == expected["losses"].keys()
    for what, value in expected["losses"].items():
        kind, scale = what.rstrip("_0123456789") + ", relative", max(value, 1)
        compare(kind, found[what] / scale, torch.tensor(value / scale), 2e-5)
    total = torch.stack(list(terms.values())).sum() / expected["weighted_total"]
    compare("total, relative", total, torch.tensor(1.0), 2e-5)
    if "matching_final" in expected:
        wanted = [*expected["matching_aux"], expected["matching_final"]]
        assert [golden.pairs(matches, i, len(targets)) for i in range(len(wanted))] == wanted


@golden.present
def test_gradients(compare: Compare) -> None:
    """In float64: float32 is off by up to 5e-3 here, where a sampled place falls into the
    neighbouring cell.
    """
    facts = golden.read_json(f"{VARIANT}/grads.json")["float64"]
    exact = copy.deepcopy(model()).double().train()
    images, padding = golden.inputs("pair")
    terms = SetCriterion()(exact(images.double(), padding), golden.targets("pair", 91), 10)
    torch.stack(list(terms.values())).sum().backward()
    expected = {released_name(name): values for name, values in facts["grads"].items()}
    assert expected.pop(None) is None  # where we have no tensor, the reference has no gradient
    assert expected.keys() == {name for name, _ in exact.named_parameters()}
    for name, parameter in exact.named_parameters():
        gradient, (norm, total) = parameter.grad, expected[name]
        compare("norm, relative", gradient.norm() / norm, torch.tensor(1.0), 2e-6)
        # An error of length e * norm changes a sum of n numbers by at most sqrt(n) * e * norm.
        share = (gradient.sum() - total) / (norm * gradient.numel() ** 0.5)
        compare("sum, relative", share, torch.tensor(0.0), 2e-6)


@golden.present
def test_parameter_count() -> None:
    """All released parameters but the table of levels, which the released code never reads."""
    facts = golden.read_json(f"{VARIANT}/keys.json")
    unread = math.prod(facts["keys"]["transformer.level_embed"][1])
    ours = sum(parameter.numel() for parameter in model().parameters())
    assert ours == facts["parameter_count"] - unread


def body_of(name: str) -> CoatBody:
    return CoatBody(COAT_VARIANTS[name], det_token_num=4, pos_dim=8, cross_indices=(3,)).eval()


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
    assert isinstance(block, Block)
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
    body = CoatBody(
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
