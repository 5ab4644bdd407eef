"""ViDT+ against the published implementation, number for number: what `test_golden` does for ViDT,
and the losses that ViDT+ adds.
"""

import golden
import pytest
import torch
from conftest import Compare
from test_golden import (
    check_parameter_count,
    compare_criterion,
    compare_gradients,
    compare_losses,
    compare_outputs,
    load,
    named_outputs,
    run,
)

from vidt import HungarianMatcher, SetCriterion, decode_top_k
from vidt.criterion import criterion_for
from vidt.model import build_detector

pytestmark = golden.present

TINY, NANO = "vidt_swin_tiny_epff_iou_token_300", "vidt_plus_swin_nano_300"
VARIANTS = (TINY, NANO)
OTHERS = sorted((golden.FOLDER / "keys").glob("*.json"))
KEY_LISTS = [*(f"{name}/keys.json" for name in VARIANTS), *(f"keys/{p.name}" for p in OTHERS)]
INPUTS = ("pair", "single", "odd")
CRITERIA = {
    "iou_aware": SetCriterion(),
    "plus_all": SetCriterion(token_label_shift=False),
    "plus_all_one_image_empty": SetCriterion(token_label_shift=False),
    "plus_all_everything_empty": SetCriterion(token_label_shift=False),
    "vector_loss_sum_norm": SetCriterion(
        vector_loss_norm=False, vector_start_stage=3, vector_loss_coef=0.7
    ),
    "custom_coefficients": SetCriterion(
        HungarianMatcher(1, 3, 4),
        cls_loss_coef=1.5,
        bbox_loss_coef=4,
        giou_loss_coef=3,
        iouaware_loss_coef=0.5,
        focal_alpha=0.4,
    ),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs(variant: str, name: str, compare: Compare) -> None:
    compare_outputs(variant, name, named_outputs(run(variant, name)), compare)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoded_boxes(variant: str, compare: Compare) -> None:
    stored = golden.read_arrays(f"{variant}/pair.npz")
    sizes = torch.tensor(golden.read_json(f"{variant}/meta.json")["postprocess_target_sizes_hw"])
    boxes = {name: stored[name] for name in ("pred_logits", "pred_boxes")}
    # From the stored predictions: of nearly equal scores either may come first.
    for image, found in enumerate(decode_top_k(boxes, sizes)):
        assert torch.equal(found.labels, stored[f"post{image}.labels"])
        compare("scores", found.scores, stored[f"post{image}.scores"], 1e-6)
        compare("boxes in pixels", found.boxes, stored[f"post{image}.boxes"], 1e-3)
    stated = golden.read_json(f"{variant}/meta.json")["fp32_max_abs_diff"]["pair"]["pred_logits"]
    ours = {name: run(variant, "pair")[name] for name in boxes}
    for image, found in enumerate(decode_top_k(ours, sizes)):
        compare("scores of ours", found.scores, stored[f"post{image}.scores"], 5 * stated)


@pytest.mark.parametrize("case", [*INPUTS, "pair_last_image_empty"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_matchings(variant: str, case: str, compare: Compare) -> None:
    name = case.partition("_")[0]
    targets = golden.targets(name, 91, empty=() if name == case else (1,))
    expected = golden.read_json(f"{variant}/losses.json")[case]
    criterion = criterion_for(load(variant).config)
    compare_losses(run(variant, name), targets, expected, compare, 2e-5, criterion)


def test_gradients(compare: Compare) -> None:
    compare_gradients(NANO, compare)


@pytest.mark.parametrize("case", CRITERIA)
def test_criterion_alone(case: str, compare: Compare) -> None:
    compare_criterion(case, CRITERIA[case], compare)


@pytest.mark.parametrize("path", KEY_LISTS)
def test_parameter_count(path: str) -> None:
    """Of the configurations that are given as lists of names only, too."""
    with torch.device("meta"):
        model = build_detector(golden.config_of(path.replace("keys.json", "meta.json")))
    check_parameter_count(path, model)
