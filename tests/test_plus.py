"""ViDT+: the parts that its switches add, alone and together, at the size of a test."""

import dataclasses

import pytest
import torch
from conftest import Compare
from test_model import names, objects, padded_pair, trained_names, unpadded
from tiny_runs import blurred
from torch._subclasses.fake_tensor import FakeTensorMode

from vidt import ViDT, ViDTConfig

PARTS = {"epff": True, "iou_aware": True, "token_label": True, "with_vector": True}
SMALL = {"n_keep": 12, "gt_mask_len": 16, "vector_hidden_dim": 24}


@pytest.fixture
def plus_config(tiny_config: ViDTConfig) -> ViDTConfig:
    return dataclasses.replace(tiny_config, **PARTS, **SMALL)


@pytest.fixture
def tiny_plus(plus_config: ViDTConfig) -> ViDT:
    return blurred(ViDT(plus_config)).eval()


def test_outputs_have_the_promised_shapes(tiny_plus: ViDT) -> None:
    outputs = tiny_plus(*padded_pair())
    assert len(outputs["aux_outputs"]) == 2
    for level in (*outputs["aux_outputs"], outputs):
        assert level["pred_ious"].shape == (2, 7, 1)
        assert level["pred_vectors"].shape == (2, 7, 12)
    grids = [(1, 2), (2, 3), (4, 6), (8, 12)]
    tokens, distil = outputs["enc_tokens"]["pred_logits"], outputs["distil_tokens"]
    assert [tuple(level.shape) for level in tokens] == [(2, *grid, 4) for grid in grids]
    assert [tuple(level.shape) for level in distil["patch_token"]] == [(2, 64, *g) for g in grids]
    assert distil["body_det_token"].shape == (2, 7, 64)
    assert distil["neck_det_token"].shape == (3, 2, 7, 64)


@pytest.mark.parametrize("refine", [True, False])
def test_detections_alone_are_those_of_all_outputs(plus_config: ViDTConfig, refine: bool) -> None:
    model = blurred(ViDT(dataclasses.replace(plus_config, with_box_refine=refine))).eval()
    images = padded_pair()
    everything, alone = model(*images), model(*images, detections_only=True)
    assert set(alone) == {name for name in everything if name.startswith("pred_")}
    for name, found in alone.items():
        assert torch.equal(found, everything[name]), name
    if not refine:  # then there are no noised boxes
        return
    noised = model(*images, torch.rand(2, 3, 4), detections_only=True)
    assert all(found.shape == alone[name].shape for name, found in noised.items())


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_had_alone(tiny_config: ViDTConfig, part: str) -> None:
    model = ViDT(dataclasses.replace(tiny_config, **SMALL, **{part: True}))
    assert trained_names(model, objects(3, 2)) == names(model)


@pytest.mark.parametrize("counts", [(3, 2), (3, 0), (0, 0), (9, 20)])
@pytest.mark.parametrize("refine", [True, False])
def test_any_number_of_objects_trains_every_parameter(
    plus_config: ViDTConfig, refine: bool, counts: tuple[int, int]
) -> None:
    model = ViDT(dataclasses.replace(plus_config, with_box_refine=refine))
    assert trained_names(model, objects(*counts)) == names(model)


def test_without_refinement_the_levels_share_their_heads(plus_config: ViDTConfig) -> None:
    shared = ViDT(dataclasses.replace(plus_config, with_box_refine=False))
    own = ViDT(plus_config)
    assert len(shared.iou_embed) == 1 and len(own.iou_embed) == 3
    assert len(shared.vector_embed) == len(own.vector_embed) == 1


@pytest.mark.parametrize("part", ["iou_aware", "token_label", "with_vector"])
def test_boxes_do_not_depend_on_the_other_heads(tiny_plus: ViDT, part: str) -> None:
    plain = ViDT(dataclasses.replace(tiny_plus.config, **{part: False})).eval()
    kept, given = tiny_plus.state_dict(), padded_pair()
    plain.load_state_dict({name: kept[name] for name in plain.state_dict()})
    with torch.no_grad():
        with_part, without = tiny_plus(*given), plain(*given)
    assert with_part.keys() - without.keys() == {
        {
            "iou_aware": "pred_ious",
            "token_label": "enc_tokens",
            "with_vector": "pred_vectors",
        }[part]
    }
    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(with_part[name], without[name])


def test_alone_and_in_every_batch_the_same(tiny_plus: ViDT, compare: Compare) -> None:
    images, padding = unpadded(3)
    with torch.no_grad():
        together = tiny_plus(images, padding)
        alone = [tiny_plus(images[i : i + 1], padding[:1]) for i in range(3)]
    for name in ("pred_boxes", "pred_logits", "pred_ious", "pred_vectors"):
        compare(name, together[name], torch.cat([one[name] for one in alone]), 1e-5)


def test_new_mask_vectors_are_zero(plus_config: ViDTConfig) -> None:
    assert ViDT(plus_config)(*unpadded(1))["pred_vectors"].abs().max() == 0


def test_forward_reads_no_value_and_stays_on_the_device(plus_config: ViDTConfig) -> None:
    with FakeTensorMode():
        with torch.device("cuda"):
            model, given = ViDT(plus_config), unpadded(2)
        assert model(*given)["pred_vectors"].device.type == "cuda"


def test_denoising_queries_do_not_change_the_others(tiny_plus: ViDT) -> None:
    given, noised = padded_pair(), 0.2 + 0.3 * torch.rand(2, 6, 4)
    with torch.no_grad():
        plain, extended = tiny_plus(*given), tiny_plus(*given, noised)
    for name in ("pred_logits", "pred_boxes", "pred_ious", "pred_vectors"):
        assert torch.allclose(plain[name], extended[name], atol=1e-5)
    plain, extended = (some["distil_tokens"]["neck_det_token"] for some in (plain, extended))
    assert plain.shape == extended.shape and torch.allclose(plain, extended, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (20, 300)])
def test_images_of_any_size(tiny_plus: ViDT, size: tuple[int, int]) -> None:
    outputs = tiny_plus(*unpadded(1, *size))
    assert outputs["pred_vectors"].isfinite().all()
    assert all(level.isfinite().all() for level in outputs["enc_tokens"]["pred_logits"])
