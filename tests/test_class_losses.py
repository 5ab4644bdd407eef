"""Class losses beside the focal one, against the formulas of their papers written out."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from vidt.errors import UserError
from vidt.losses.criterion import SetCriterion, criterion_for
from vidt.model.config import CLASS_LOSSES, ViDTConfig


def varifocal(p: Tensor, q: Tensor, matched: bool) -> Tensor:
    """arXiv 2008.13367, equation 2, with alpha 0.75 and gamma 2."""
    if matched:
        return -q * (q * p.log() + (1 - q) * (1 - p).log())
    return -0.75 * p**2 * (1 - p).log()


def matchability(p: Tensor, q: Tensor, matched: bool) -> Tensor:
    """DEIM, arXiv 2412.04234, equation 3, with gamma 1.5."""
    if matched:
        return -(q**1.5) * p.log() - (1 - q**1.5) * (1 - p).log()
    return -(p**1.5) * (1 - p).log()


@pytest.mark.parametrize("formula", [varifocal, matchability])
def test_against_the_formula(formula) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, 3, generator=generator, dtype=torch.float64)
    boxes = torch.rand(1, 6, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
    targets = [{"labels": torch.tensor([2, 0]), "boxes": boxes[0, [4, 1]] + 0.02}]
    criterion = SetCriterion(class_loss=formula.__name__)
    outputs = {"pred_logits": logits.float(), "pred_boxes": boxes.float()}
    matches = criterion.match(outputs, targets)
    expected = torch.zeros((), dtype=torch.float64)
    classes = {
        query: (int(targets[0]["labels"][target]), target)
        for query, target in zip(matches.query.tolist(), matches.target.tolist(), strict=True)
    }
    for query, row in enumerate(logits[0]):
        label, target = classes.get(query, (None, 0))
        quality = box_iou(
            box_convert(boxes[0, query][None], "cxcywh", "xyxy"),
            box_convert(targets[0]["boxes"][target][None], "cxcywh", "xyxy"),
        )[0, 0]
        for number, logit in enumerate(row):
            expected += formula(logit.sigmoid(), quality, number == label)
    terms = criterion(outputs, targets, num_boxes=2)
    assert float(terms["loss_ce"]) == pytest.approx(float(2 * expected / 2), rel=1e-5)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_the_class_loss_moves_no_box_and_takes_empty_images(class_loss: str) -> None:
    logits = torch.zeros(1, 4, 2, requires_grad=True)
    boxes = torch.full((1, 4, 4), 0.4, requires_grad=True)
    criterion = SetCriterion(class_loss=class_loss)
    one = {"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}
    none = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    for target in (one, none):
        loss = criterion({"pred_logits": logits, "pred_boxes": boxes}, [target], num_boxes=1)[
            "loss_ce"
        ]
        gradients = torch.autograd.grad(loss, (logits, boxes), allow_unused=True)
        assert gradients[0].isfinite().all()
        assert gradients[1] is None or not gradients[1].any()


def test_names() -> None:
    assert criterion_for(ViDTConfig(), class_loss="varifocal").class_loss == "varifocal"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="class_loss"):
        SetCriterion(class_loss="hinge")
