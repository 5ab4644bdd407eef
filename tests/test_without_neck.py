"""ViDT without neck: number for number on the golden data; its criterion on parts of a batch."""

from functools import cache
from pathlib import Path

import golden
import pytest
import torch
from conftest import Compare
from PIL import Image
from tiny_runs import run as train_here
from torch import Tensor

from vidt import Predictor, ViDTConfig
from vidt.convert import released_vidt
from vidt.criterion import log_values
from vidt.without_neck import SoftmaxCriterion, ViDTWithoutNeck, decode_best_class

VARIANT = "vidt_wo_neck_swin_nano"
CRITERIA = ("without_neck", "without_neck_one_image_empty")


@cache
def model() -> ViDTWithoutNeck:
    config = golden.config_of(f"{VARIANT}/meta.json")
    built = ViDTWithoutNeck(config)
    built.load_state_dict(released_vidt(golden.weights(VARIANT), config), strict=True)
    return built.eval()


@cache
def run(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and what passes between the parts under the golden files' names."""
    seen: dict[str, Tensor] = {}

    def body(_: object, __: object, out: tuple) -> None:
        maps, det, det_pos = out
        seen.update({f"backbone.feat{level}": feature for level, feature in enumerate(maps)})
        seen["backbone.feat3"] = maps[2]  # the released body returns it twice
        seen["backbone.det_tgt"], seen["backbone.det_pos"] = det.mT, det_pos.mT

    hooks = [model().backbone.register_forward_hook(body)]
    for index, layer in enumerate(model().backbone.layers):
        hooks.append(
            layer.register_forward_hook(
                lambda _, __, out, index=index: seen.update(
                    {f"stage{index}.patch": out[0].flatten(1, 2), f"stage{index}.det": out[1]}
                )
            )
        )
    with torch.no_grad():
        outputs = model()(*golden.inputs(name))
    for hook in hooks:
        hook.remove()
    return outputs, seen


@golden.present
@pytest.mark.parametrize("name", ["pair", "single", "odd"])
def test_outputs(name: str, compare: Compare) -> None:
    meta = golden.read_json(f"{VARIANT}/meta.json")
    stated = {what: 5 * limit for what, limit in meta["fp32_max_abs_diff"][name].items()}
    facts = meta["tensors"][name]
    # Inner tensors have no stated limit: that of the logits, in proportion to their spread.
    relative = stated["pred_logits"] / facts["pred_logits"]["std"]
    outputs, seen = run(name)
    for what, expected in golden.read_arrays(f"{VARIANT}/{name}.npz").items():
        if not what.startswith("post"):  # see test_decoded_boxes
            found = golden.stored_part((outputs | seen)[what], facts[what]["slice"])
            allowed = stated.get(what, relative * facts[what]["std"])
            compare(what.rstrip("0123456789"), found, expected, allowed)


@golden.present
def test_decoded_boxes(compare: Compare) -> None:
    stored = golden.read_arrays(f"{VARIANT}/pair.npz")
    sizes = torch.tensor(golden.read_json(f"{VARIANT}/meta.json")["postprocess_target_sizes_hw"])
    scores, labels, boxes = decode_best_class(stored, sizes)
    for image in range(2):
        assert torch.equal(labels[image], stored[f"post{image}.labels"])
        compare("scores", scores[image], stored[f"post{image}.scores"], 1e-6)
        compare("boxes in pixels", boxes[image], stored[f"post{image}.boxes"], 1e-3)
    for image, found in enumerate(decode_best_class(run("pair")[0], sizes)[0]):
        compare("scores of ours", found, stored[f"post{image}.scores"], 1e-5)


def compare_losses(
    outputs: dict, targets: list[dict[str, Tensor]], expected: dict, compare: Compare
) -> dict[str, Tensor]:
    """Every stored loss by name, the total and the matching; returns our weighted terms."""
    criterion = SoftmaxCriterion()
    matches = criterion.match(outputs, targets)
    terms = criterion(outputs, targets, sum(len(target["labels"]) for target in targets))
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    found = {name: term / weights[name] for name, term in terms.items()}
    found |= log_values(outputs, targets, matches)
    assert found.keys() == expected["losses"].keys()
    for name, value in expected["losses"].items():
        scale = max(value, 1)
        compare(f"{name}, relative", found[name] / scale, torch.tensor(value / scale), 2e-6)
    total = torch.stack(list(terms.values())).sum() / expected["weighted_total"]
    compare("total, relative", total, torch.tensor(1.0), 2e-6)
    if "matching_final" in expected:
        assert golden.pairs(matches, 0, len(targets)) == expected["matching_final"]
    return terms


@golden.present
@pytest.mark.parametrize("case", ["pair", "single", "odd", "pair_last_image_empty"])
def test_losses_and_matchings(case: str, compare: Compare) -> None:
    name = case.partition("_")[0]
    targets = golden.targets(name, 91, empty=() if name == case else (1,))
    compare_losses(run(name)[0], targets, golden.read_json(f"{VARIANT}/losses.json")[case], compare)


@golden.present
@pytest.mark.parametrize("case", CRITERIA)
def test_criterion_alone(case: str, compare: Compare) -> None:
    expected = golden.read_json("criterion_cases.json")[case]
    asked = expected["definition"]
    made = golden.fill().synthetic_outputs(asked["tag"], 2, asked["queries"], 92, 1)
    outputs = {name: torch.from_numpy(array).requires_grad_() for name, array in made.items()}
    targets = golden.targets(asked["input"], 91, empty=tuple(asked.get("empty", ())))
    terms = compare_losses(outputs, targets, expected, compare)
    torch.stack(list(terms.values())).sum().backward()
    for name, norm in expected["grad_norms"].items():
        compare(f"gradient of {name}", outputs[name].grad.norm() / norm, torch.tensor(1.0), 2e-6)
    decoded = expected["postprocess"]
    with torch.no_grad():
        found = decode_best_class(outputs, torch.tensor(decoded["target_sizes_hw"]))
    for image, wanted in enumerate(decoded["results"]):
        assert found[1][image].tolist() == wanted["labels"]
        compare("scores", found[0][image], torch.tensor(wanted["scores"]), 1e-6)
        compare("boxes in pixels", found[2][image], torch.tensor(wanted["boxes"]), 1e-3)


def test_a_step_is_the_sum_of_its_portions() -> None:
    """Three images at once, or one by one, one of them empty: the same terms."""
    outputs = {"pred_logits": torch.randn(3, 6, 4), "pred_boxes": torch.rand(3, 6, 4) / 2 + 0.2}
    targets = [
        {"labels": torch.arange(count) % 3, "boxes": torch.rand(count, 4) / 2 + 0.2}
        for count in (2, 0, 3)
    ]
    criterion = SoftmaxCriterion()
    whole = criterion(outputs, targets, 5)
    portions = [
        criterion({name: o[i : i + 1] for name, o in outputs.items()}, targets[i : i + 1], 5, 3)
        for i in range(3)
    ]
    for name, term in whole.items():
        torch.testing.assert_close(sum(portion[name] for portion in portions), term)


def tiny() -> ViDTWithoutNeck:
    config = ViDTConfig(
        method="vidt_wo_neck", num_classes=3, det_token_num=5, reduced_dim=32, pos_dim=16
    )
    return ViDTWithoutNeck(config)


def test_every_parameter_that_is_trained_gets_a_gradient() -> None:
    """The last block's patches are read by nobody; what serves them alone is frozen."""
    detector = tiny()
    images, padding = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    torch.stack(
        list(SoftmaxCriterion()(detector(images, padding), targets, 2).values())
    ).sum().backward()
    without = {name for name, p in detector.named_parameters() if p.grad is None}
    assert without == {name for name, p in detector.named_parameters() if not p.requires_grad}
    assert without == {"backbone.layers.3.blocks.1.attn.relative_position_bias_table"}


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="method is vidt; it must be vidt_wo_neck"):
        ViDTWithoutNeck(ViDTConfig())
    images, padding = torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="noised_boxes need a decoder"):
        tiny()(images, padding, torch.rand(1, 2, 4))


@pytest.mark.parametrize("body", ["swin_nano", "coat_lite_tiny"])
def test_it_trains_is_evaluated_and_predicts(tiny_data: Path, room: Path, body: str) -> None:
    flags = f"--epochs 1 --method vidt_wo_neck --backbone_name {body} --det_token_num 40"
    assert train_here(tiny_data, room, flags)["map"] >= 0
    found = Predictor.from_checkpoint(room / "best.safetensors")([Image.new("RGB", (90, 60))])[0]
    assert len(found.scores) == 40 and found.scores.diff().max() <= 0
