"""Detectors of every kind against the published implementation, number for number, on the golden
data.
"""

import golden
import pytest
import torch
from conftest import Compare
from golden_compare import (
    FAMILIES,
    INPUTS,
    LOSS_CASES,
    check_parameter_count,
    compare_case,
    compare_criterion,
    compare_decoded,
    compare_gradients,
    compare_outputs,
)
from torch import Tensor

from vidt import HungarianMatcher, SetCriterion
from vidt.losses.softmax_criterion import SoftmaxCriterion
from vidt.model.vidt import build_detector

pytestmark = golden.present

RELEASED_LABELS = SetCriterion(token_label_shift=False)
CRITERIA = {
    "detection": SetCriterion(),
    "detection_three_classes_label_zero": SetCriterion(),
    "iou_aware": SetCriterion(),
    "plus_all": RELEASED_LABELS,
    "plus_all_one_image_empty": RELEASED_LABELS,
    "plus_all_everything_empty": RELEASED_LABELS,
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
    "without_neck": SoftmaxCriterion(),
    "without_neck_one_image_empty": SoftmaxCriterion(),
}
OTHERS = sorted(path.name for path in (golden.FOLDER / "keys").glob("*.json"))
KEY_LISTS = [*(f"{name}/keys.json" for name in FAMILIES), *(f"keys/{name}" for name in OTHERS)]
every_variant = pytest.mark.parametrize("variant", FAMILIES)


def of(family: str, compare: Compare) -> Compare:
    """The same, with a line of its own in the table for each family."""

    def check(what: str, found: Tensor, expected: Tensor, allowed: float) -> None:
        compare(f"{family}: {what}", found, expected, allowed)

    return check


@pytest.mark.parametrize("name", INPUTS)
@every_variant
def test_outputs(variant: str, name: str, compare: Compare) -> None:
    compare_outputs(variant, name, of(FAMILIES[variant], compare))


@every_variant
def test_decoded_boxes(variant: str, compare: Compare) -> None:
    compare_decoded(variant, of(FAMILIES[variant], compare))


@pytest.mark.parametrize("case", LOSS_CASES)
@every_variant
def test_losses_and_matchings(variant: str, case: str, compare: Compare) -> None:
    allowed = 2e-6 if FAMILIES[variant] == "no neck" else 2e-5
    compare_case(variant, case, of(FAMILIES[variant], compare), allowed)


@pytest.mark.parametrize(
    "variant", ["vidt_swin_nano", "vidt_plus_swin_nano_300", "vidt_coat_lite_tiny"]
)
def test_gradients(variant: str, compare: Compare) -> None:
    compare_gradients(variant, of(FAMILIES[variant], compare))


@pytest.mark.parametrize("case", CRITERIA)
def test_criterion_alone(case: str, compare: Compare) -> None:
    compare_criterion(case, CRITERIA[case], compare)


@pytest.mark.parametrize("path", KEY_LISTS)
def test_parameter_count(path: str) -> None:
    """All released parameters but those that the released forward pass never reads."""
    with torch.device("meta"):
        model = build_detector(golden.config_of(path.replace("keys.json", "meta.json")))
    check_parameter_count(path, model)
