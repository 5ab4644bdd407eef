"""Extra queries in training: denoising queries with noise and labels, groups, what they may see and
move; look-forward-twice.
"""

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch import Tensor

from trainer.augmentation.denoising import (
    LABEL_NOISE,
    NOISE,
    Denoising,
    denoising_inputs,
    noise_boxes,
    noise_labels,
)
from trainer.loop.set_up import require_denoising, warn_of_idle_settings
from trainer.settings.config import TrainConfig
from vidt.errors import UserError
from vidt.losses.criterion import SetCriterion, denoising_matches
from vidt.model.config import ViDTConfig
from vidt.model.decoder import inverse_sigmoid
from vidt.model.training_queries import DENOISING, attention_mask
from vidt.model.vidt import ViDT

BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.1, 0.1]])
SIZES = {"det_token_num": 5, "dec_layers": 2, "reduced_dim": 32, "pos_dim": 32, "nheads": 4}


def small_model(**fields: object) -> ViDT:
    torch.manual_seed(0)
    config = ViDTConfig("vidt", "swin_pico", num_classes=3, **{**SIZES, **fields})  # type: ignore[arg-type]
    model = ViDT(config)
    with torch.no_grad():  # initially every box head predicts its reference
        for head in model.bbox_embed:
            head.layers[-1].weight.normal_(std=0.1)  # type: ignore[union-attr, operator]
    return model.eval()


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 64, 64, generator=generator), torch.zeros(2, 64, 64, dtype=torch.bool)


def test_who_attends_to_whom() -> None:
    mask = attention_mask(2, torch.tensor([1, 1, DENOISING, DENOISING]))
    assert (~mask).int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_noised_boxes_are_whole_copies_near_the_truth() -> None:
    for queries, copies in ((7, 3), (2, 1), (1, 1)):
        assert Denoising(queries).copies(len(BOXES)) == copies
        noised = noise_boxes(BOXES, copies, np.random.default_rng(0))
        assert noised.shape == (2 * copies, 4)
        moved = (noised.unflatten(0, (copies, 2)) - BOXES).abs()
        assert bool((moved[..., :2] <= BOXES[:, 2:] / 4 + 1e-6).all())
        assert bool((moved[..., 2:] <= BOXES[:, 2:] / 2 + 1e-6).all())
        assert float(moved.max()) > 0
    none = noise_boxes(BOXES[:0], 5, np.random.default_rng(0))
    assert none.shape == (0, 4)
    for queries, length in ((9, 9), (1, 2)):  # 2 noised boxes; one is the least for two objects
        inputs = denoising_inputs([{"denoising_boxes": noised}, {"denoising_boxes": none}], queries)
        assert list(inputs) == ["denoising_boxes"]
        assert inputs["denoising_boxes"].shape == (2, length, 4)
    assert denoising_inputs([{"labels": BOXES}], 9) == {}


def test_every_second_copy_of_contrastive_noise_is_farther_off() -> None:
    assert Denoising(9, contrastive=True).copies(2) == 4
    boxes = torch.tensor([[0.5, 0.5, 0.1, 0.1]]).expand(50, 4)
    noised = noise_boxes(boxes, 4, np.random.default_rng(0), contrastive=True)
    moved = (noised.unflatten(0, (4, 50)) - boxes) / torch.tensor([0.05, 0.05, 0.1, 0.1])
    near, far = moved[0::2].abs(), moved[1::2].abs()
    assert float(near.max()) <= NOISE + 1e-4 < float(far.max()) <= 2 * NOISE + 1e-4
    assert float(far.min()) >= NOISE - 1e-4


def test_noisy_labels() -> None:
    labels = torch.zeros(4000, dtype=torch.int64)
    noisy = noise_labels(labels, 4, np.random.default_rng(0))
    assert noisy.unique().tolist() == [0, 1, 2, 3]
    assert float((noisy != 0).float().mean()) == pytest.approx(LABEL_NOISE * 3 / 4, abs=0.03)


def test_a_target_with_labels() -> None:
    denoising = Denoising(8, contrastive=True, num_classes=3)
    labels = torch.tensor([1, 2])
    target = denoising.of_target(BOXES, labels, np.random.default_rng(0))
    assert target["denoising_boxes"].shape == (8, 4) and target["denoising_labels"].shape == (8,)
    empty = denoising.of_target(BOXES[:0], labels[:0], np.random.default_rng(0))
    inputs = denoising_inputs([target, empty], 8)
    assert inputs["denoising_labels"][0].tolist() == target["denoising_labels"].tolist()
    assert inputs["denoising_labels"][1].tolist() == [0] * 8
    assert Denoising(0).of_target(BOXES, labels, np.random.default_rng(0)) == {}


@pytest.mark.parametrize("contrastive", [False, True])
def test_pairs_and_weights(contrastive: bool) -> None:
    """Three copies of two objects, or two positive and two negative ones; padding beyond."""
    copies = 4 if contrastive else 3
    targets = [
        {"labels": torch.tensor([1, 2]), "denoising_boxes": BOXES.repeat(copies, 1)},
        {"labels": torch.zeros(0, dtype=torch.int64), "denoising_boxes": BOXES[:0]},
    ]
    matches, weights = denoising_matches(torch.zeros(1, 2, 10, 3), targets, contrastive=contrastive)
    positive = [0, 1, 4, 5] if contrastive else [0, 1, 2, 3, 4, 5]
    assert matches.query.tolist() == positive
    assert matches.target.tolist() == [query % 2 for query in positive]
    used = 2 * copies
    assert weights[0, :used].tolist() == pytest.approx([1 / (len(positive) / 2)] * used)
    assert not weights[0, used:].any() and not weights[1].any()


def test_negatives_learn_background() -> None:
    target = {
        "labels": torch.tensor([0, 1]),
        "boxes": BOXES,
        "denoising_boxes": BOXES.repeat(2, 1),
    }
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    level = {"pred_logits": logits, "pred_boxes": BOXES.repeat(2, 1)[None]}
    outputs = {**{name: each[:, :2] for name, each in level.items()}, "denoising_outputs": [level]}
    terms = SetCriterion(contrastive_denoising=True)(outputs, [target], num_boxes=2)
    (gradient,) = torch.autograd.grad(terms["loss_dn_ce"], logits)
    # Descending raises the logits of the true classes of the positive copy alone.
    assert (gradient[0] < 0).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert float(terms["loss_dn_bbox"]) == 0


def test_extra_queries_change_no_detection() -> None:
    model = small_model(query_groups=3, label_embedding=True, dropout=0.0).train()
    boxes, labels = BOXES[None].expand(2, 2, 4), torch.tensor([[0, 1], [2, 0]])
    with torch.no_grad():
        extended = model(*images(), boxes, labels)
        other = model(*images(), boxes, labels.flip(0))
        plain = model.eval()(*images())
    for name in ("pred_logits", "pred_boxes"):
        assert torch.allclose(plain[name], extended[name], atol=1e-5)
    assert "group_outputs" not in plain and len(extended["group_outputs"]) == 2
    assert len(extended["group_outputs"][0]) == model.config.dec_layers
    assert extended["group_outputs"][0][0]["pred_boxes"].shape == (2, 5, 4)
    denoised, relabelled = (each["denoising_outputs"][-1] for each in (extended, other))
    assert not torch.allclose(denoised["pred_logits"], relabelled["pred_logits"], atol=1e-4)


def test_without_auxiliary_losses_extra_queries_have_the_last_level_alone() -> None:
    model = small_model(query_groups=2, aux_loss=False).train()
    outputs = model(*images(), BOXES[None].expand(2, 2, 4))
    assert "aux_outputs" not in outputs and len(outputs["denoising_outputs"]) == 1
    assert [len(group) for group in outputs["group_outputs"]] == [1]


def test_groups_are_matched_one_by_one() -> None:
    """Each group matches all objects, and the terms are the mean over the groups."""
    generator = torch.Generator().manual_seed(0)
    target = {"labels": torch.tensor([0, 1]), "boxes": BOXES}

    def level() -> dict[str, Tensor]:
        return {
            "pred_logits": torch.randn(1, 5, 3, generator=generator),
            "pred_boxes": torch.rand(1, 5, 4, generator=generator) * 0.4 + 0.2,
        }

    first, second, own = [level()], [level()], level()
    criterion = SetCriterion()
    terms = criterion({**own, "group_outputs": [first, second]}, [target], num_boxes=2)
    alone = [criterion(group[0], [target], num_boxes=2) for group in (first, second)]
    for name in ("ce", "bbox", "giou"):
        mean = sum(float(each[f"loss_{name}"]) for each in alone) / 2
        assert float(terms[f"loss_group_{name}"]) == pytest.approx(mean, rel=1e-5)
        assert float(terms[f"loss_{name}"]) == float(
            criterion(own, [target], num_boxes=2)[f"loss_{name}"]
        )


@pytest.mark.parametrize("twice", [False, True])
def test_look_forward_twice(twice: bool) -> None:
    """The values stay; the loss of a layer's boxes also moves the box head of the layer before it,
    and no head before that.
    """
    settings = {"dec_layers": 3, "dropout": 0.0}
    model = small_model(look_forward_twice=twice, **settings).train()
    plain = small_model(**settings)
    outputs = model(*images())
    assert torch.equal(outputs["pred_boxes"], plain(*images())["pred_boxes"])
    weights = [head.layers[-1].weight for head in model.bbox_embed]  # type: ignore[union-attr]
    gradients = torch.autograd.grad(outputs["pred_boxes"].sum(), weights, allow_unused=True)  # type: ignore[arg-type]
    moved = [gradient is not None and bool(gradient.any()) for gradient in gradients]
    assert moved == [False, False, twice, True]


def test_look_forward_twice_by_hand() -> None:
    """DINO, section 3.5: a box is the sigmoid of its offset and the undetached box before it, which
    is the sigmoid of its offset and the detached one before that.
    """
    offsets = [torch.tensor([0.1, -0.2, 0.3, 0.0], requires_grad=True) for _ in range(3)]
    first = torch.sigmoid(offsets[0])
    second = torch.sigmoid(offsets[1] + inverse_sigmoid(first.detach()))
    third = torch.sigmoid(offsets[2] + inverse_sigmoid(second))
    gradients = torch.autograd.grad(third.sum(), offsets, allow_unused=True)
    assert gradients[0] is None and torch.allclose(gradients[1], gradients[2], atol=1e-6)


def test_training_queries_need_a_refining_decoder() -> None:
    for name, value in (
        ("query_groups", 2),
        ("label_embedding", True),
        ("look_forward_twice", True),
    ):
        for without in ({"with_box_refine": False}, {"dec_layers": 0}, {"method": "vidt_wo_neck"}):
            with pytest.raises(UserError, match=f"{name} is {value}; .* refines boxes"):
                ViDTConfig(**{name: value, **without})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="query_groups"):
        ViDTConfig(query_groups=0)


def test_settings_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="--contrastive_denoising needs --denoising"):
        require_denoising(TrainConfig(denoising=0, contrastive_denoising=True), ViDTConfig())
    PartialState()  # the logger asks it for the main process
    warn_of_idle_settings(TrainConfig(denoising=0), ViDTConfig(label_embedding=True))
    assert "--label_embedding does nothing without --denoising" in caplog.text
    without = ViDTConfig(method="vidt_wo_neck")
    warn_of_idle_settings(TrainConfig(denoising=0, class_loss="varifocal"), without)
    assert "--class_loss varifocal does nothing with method vidt_wo_neck" in caplog.text
