"""Matching and losses: against brute force and sums by hand, and at the edges."""

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from vidt import HungarianMatcher, SetCriterion
from vidt.losses.criterion import criterion_for
from vidt.losses.mask_vectors import encode_squares, square_masks
from vidt.model.config import ViDTConfig

LEVELS, QUERIES, CLASSES = 3, 6, 4


def boxes(*shape: int) -> Tensor:
    """cxcywh inside the image."""
    return torch.cat([0.3 + 0.4 * torch.rand(*shape, 2), 0.1 + 0.3 * torch.rand(*shape, 2)], dim=-1)


def outputs(batch: int, queries: int = QUERIES) -> dict:
    levels = [
        {
            "pred_logits": torch.randn(batch, queries, CLASSES, requires_grad=True),
            "pred_boxes": boxes(batch, queries).requires_grad_(),
        }
        for _ in range(LEVELS)
    ]
    return {**levels[-1], "aux_outputs": levels[:-1]}


def objects(*counts: int) -> list[dict[str, Tensor]]:
    return [{"labels": torch.randint(CLASSES, (n,)), "boxes": boxes(n)} for n in counts]


def cost_by_hand(logits: Tensor, found: Tensor, target: dict[str, Tensor]) -> Tensor:
    """[Q, n] of one image, formula by formula."""
    p = logits.sigmoid()[:, target["labels"]]
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    distance = (found[:, None] - target["boxes"]).abs().sum(-1)
    corners = (box_convert(b, "cxcywh", "xyxy") for b in (found, target["boxes"]))
    return 2 * (positive - negative) + 5 * distance - 2 * generalized_box_iou(*corners)


def test_matching_is_the_cheapest_of_all() -> None:
    predicted, targets = outputs(2), objects(3, 2)
    with torch.no_grad():
        matches = SetCriterion().match(predicted, targets)
        for level, levels in enumerate([*predicted["aux_outputs"], predicted]):
            for image, target in enumerate(targets):
                logits, found = levels["pred_logits"][image], levels["pred_boxes"][image]
                cost = cost_by_hand(logits, found, target)
                columns = torch.arange(cost.shape[1])
                every = permutations(range(QUERIES), cost.shape[1])
                cheapest = min(cost[list(rows), columns].sum().item() for rows in every)
                here = (matches.level == level) & (matches.image == image)
                paid = cost[matches.query[here], matches.target[here]].sum().item()
                assert paid == pytest.approx(cheapest, abs=1e-5)
                assert sorted(matches.target[here].tolist()) == columns.tolist()


def test_images_are_matched_alone_as_in_a_batch() -> None:
    predicted, targets = outputs(3), objects(1, 5, 0)
    criterion = SetCriterion()
    together = criterion.match(predicted, targets)
    for image, target in enumerate(targets):
        levels = [
            {
                name: tensor[image : image + 1]
                for name, tensor in level.items()
                if name != "aux_outputs"
            }
            for level in (*predicted["aux_outputs"], predicted)
        ]
        alone = criterion.match({**levels[-1], "aux_outputs": levels[:-1]}, [target])
        here = together.image == image
        for field in ("level", "query", "target"):
            assert torch.equal(getattr(together, field)[here], getattr(alone, field))


@pytest.mark.parametrize("count", [0, 1, 2, 6])
def test_every_object_has_one_query_at_every_level(count: int) -> None:
    targets = objects(count, 2)
    matches = SetCriterion().match(outputs(2), targets)
    for level in range(LEVELS):
        for image, target in enumerate(targets):
            here = (matches.level == level) & (matches.image == image)
            number = len(target["labels"])
            assert torch.bincount(matches.target[here], minlength=number).tolist() == [1] * number
            assert len(matches.query[here].unique()) == here.sum()  # no query twice


def test_with_more_objects_than_queries_every_query_is_taken() -> None:
    predicted, targets = outputs(2), objects(QUERIES + 3, 1)
    matches = SetCriterion().match(predicted, targets)
    here = (matches.image == 0) & (matches.level == LEVELS - 1)
    assert sorted(matches.query[here].tolist()) == list(range(QUERIES))
    assert len(matches.target[here].unique()) == QUERIES


def test_diverged_outputs_reach_the_loss_instead_of_failing_in_the_matcher() -> None:
    predicted = outputs(1)
    predicted["pred_logits"] = torch.full_like(predicted["pred_logits"], float("nan"))
    terms = SetCriterion()(predicted, objects(2), 2)
    assert terms["loss_ce"].isnan()
    assert terms["loss_ce_0"].isfinite()


def test_losses_by_hand() -> None:
    """One image, two queries, one object of class 1, for which query 0 is the clear choice."""
    truth = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    found = torch.tensor([[[0.5, 0.5, 0.2, 0.1], [0.9, 0.9, 0.1, 0.1]]])
    predicted = {"pred_logits": torch.zeros(1, 2, 2), "pred_boxes": found}
    terms = SetCriterion()(predicted, [{"labels": torch.tensor([1]), "boxes": truth}], 4.0)
    log2 = torch.log(torch.tensor(2.0)).item()
    # p = 1/2 everywhere: one positive entry, three negative ones.
    focal = (0.25 + 3 * 0.75) * 0.25 * log2
    assert terms["loss_ce"].item() == pytest.approx(2 * focal / 4)
    assert terms["loss_bbox"].item() == pytest.approx(5 * 0.1 / 4)
    assert terms["loss_giou"].item() == pytest.approx(2 * (1 - 0.5) / 4, rel=1e-5)
    assert terms.keys() == {"loss_ce", "loss_bbox", "loss_giou"}


def test_terms_are_named_by_level() -> None:
    names = {f"loss_{kind}{level}" for kind in ("ce", "bbox", "giou") for level in ("", "_0", "_1")}
    assert SetCriterion()(outputs(1), objects(2), 2).keys() == names


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (QUERIES + 2, 1)])
def test_losses_are_finite_and_reach_every_output(counts: tuple[int, int]) -> None:
    predicted = outputs(2)
    terms = SetCriterion()(predicted, objects(*counts), max(sum(counts), 1))
    torch.stack(list(terms.values())).sum().backward()
    for level in (*predicted["aux_outputs"], predicted):
        for name in ("pred_logits", "pred_boxes"):
            assert level[name].grad.isfinite().all()
    if not any(counts):
        assert all(term == 0 for name, term in terms.items() if "_ce" not in name)


def test_losses_do_not_depend_on_the_order_of_objects() -> None:
    predicted, targets = outputs(1), objects(4)
    turned = [{name: tensor.flip(0) for name, tensor in targets[0].items()}]
    first, second = (SetCriterion()(predicted, some, 4) for some in (targets, turned))
    assert all(torch.allclose(first[name], second[name]) for name in first)


def test_doubling_num_boxes_halves_every_term() -> None:
    predicted, targets = outputs(2), objects(2, 3)
    whole = SetCriterion()(predicted, targets, 5.0)
    half = SetCriterion()(predicted, targets, torch.tensor(10.0))
    assert all(torch.allclose(whole[name], 2 * half[name]) for name in whole)


def test_cost_weights_are_the_callers() -> None:
    predicted, targets = outputs(1), objects(3)
    classes_only = SetCriterion(HungarianMatcher(1.0, 0.0, 0.0)).match(predicted, targets)
    moved = {**predicted, "pred_boxes": boxes(1, QUERIES)}
    again = SetCriterion(HungarianMatcher(1.0, 0.0, 0.0)).match(moved, targets)
    assert torch.equal(classes_only.query, again.query)


def test_matches_are_themselves() -> None:
    first, second = (SetCriterion().match(outputs(2), objects(3, 2)) for _ in range(2))
    assert first == first and first != second and len({first, second}) == 2


TRUTH = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
HALF = torch.tensor([[[0.5, 0.5, 0.2, 0.1], [0.9, 0.9, 0.1, 0.1]]])


def test_the_iou_loss_by_hand() -> None:
    """Its own logit and, as released, the box learn from it."""
    found, ious = HALF.clone().requires_grad_(), torch.zeros(1, 2, 1, requires_grad=True)
    predicted = {"pred_logits": torch.zeros(1, 2, 2), "pred_boxes": found, "pred_ious": ious}
    terms = SetCriterion()(predicted, [{"labels": torch.tensor([1]), "boxes": TRUTH}], 4.0)
    assert terms["loss_iouaware"].item() == pytest.approx(2 * 0.6931472 / 4)
    terms["loss_iouaware"].backward()
    # Half of the truth is covered: that is what a logit of 0 says.
    assert ious.grad.abs().max() < 1e-6
    assert found.grad.abs().max() == 0  # only at a logit of 0: the gradient is -logit
    with torch.no_grad():
        ious += 1
    SetCriterion()(predicted, [{"labels": torch.tensor([1]), "boxes": TRUTH}], 4.0)[
        "loss_iouaware"
    ].backward()
    assert ious.grad[0, 0] > 0 and found.grad[0, 0].abs().max() > 0
    assert ious.grad[0, 1] == 0 and found.grad[0, 1].abs().max() == 0


def drawn() -> dict[str, Tensor]:
    """Two objects in the corners of 16 x 16 pixels, of which the second has no mask."""
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :4, :6] = True
    edges = torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16]])
    return {
        "labels": torch.tensor([0, 1]),
        "boxes": box_convert(edges / 16, "xyxy", "cxcywh"),
        "masks": masks,
        "mask_boxes": edges,
        "has_mask": torch.tensor([True, False]),
    }


def with_vectors(target: dict[str, Tensor], n_keep: int) -> dict:
    """Both objects found where they are, at one level."""
    vectors = torch.randn(1, 2, n_keep, requires_grad=True)
    logits = torch.eye(2)[None] * 9
    return {"pred_logits": logits, "pred_boxes": target["boxes"][None], "pred_vectors": vectors}


@pytest.mark.parametrize("norm", [True, False])
def test_the_vector_loss_by_hand(norm: bool) -> None:
    target = drawn()
    predicted = with_vectors(target, 10)
    criterion = SetCriterion(gt_mask_len=8, vector_loss_norm=norm)
    term = criterion(predicted, [target], 2.0)["loss_vector"]
    wanted = encode_squares(square_masks(target["masks"][:1], target["mask_boxes"][:1], 8), 10)
    distance = (predicted["pred_vectors"][0, :1] - wanted).abs().sum().item()
    assert term.item() == pytest.approx(3 * distance / 2 / (10 if norm else 1), rel=1e-5)
    term.backward()
    assert predicted["pred_vectors"].grad[0, 1].abs().max() == 0  # nobody knows its mask


@pytest.mark.parametrize("objects_left", [2, 0])
def test_without_masks_vectors_stay_and_still_have_a_gradient(objects_left: int) -> None:
    target = {name: drawn()[name][:objects_left] for name in ("labels", "boxes")}
    predicted = with_vectors(drawn(), 10)
    term = SetCriterion(gt_mask_len=8)(predicted, [target], 2.0)["loss_vector"]
    term.backward()
    assert term == 0 and predicted["pred_vectors"].grad.abs().max() == 0


def test_vectors_count_from_the_stage_asked_for() -> None:
    target, levels = drawn(), [with_vectors(drawn(), 10) for _ in range(4)]
    predicted = {**levels[-1], "aux_outputs": levels[:-1]}
    terms = SetCriterion(gt_mask_len=8, vector_start_stage=2)(predicted, [target], 2.0)
    found = {name for name in terms if "vector" in name}
    assert found == {"loss_vector", "loss_vector_2"}


def test_the_criterion_of_a_configuration() -> None:
    config = ViDTConfig(token_label=True, token_label_shift=False, gt_mask_len=32)
    criterion = criterion_for(config)
    assert isinstance(criterion, SetCriterion)
    assert not criterion.token_label_shift and criterion.gt_mask_len == 32
    assert criterion_for(ViDTConfig(method="vidt_wo_neck")).weights["ce"] == 1
