"""What holds for every detector whatever its weights: shapes, gradients, precision, devices."""

import dataclasses
import itertools
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import Compare, blurred
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vidt import SetCriterion, ViDT, ViDTConfig
from vidt.model.config import SWIN_VARIANTS
from vidt.model.ram import ReconfiguredAttention, resize_padding, shift_mask, sine_position
from vidt.model.swin import PatchMerging, SwinBackbone, SwinBlock
from vidt.model.vidt import build_detector
from vidt.model.without_neck import ViDTWithoutNeck
from vidt.weights.pretrained import TIMM_NAMES, added_by_vidt
from vidt.weights.released import imagenet_swin

Targets = list[dict[str, Tensor]]


def unpadded(batch: int, height: int = 64, width: int = 96) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, height, width), torch.zeros(batch, height, width, dtype=torch.bool)


def padded_pair() -> tuple[Tensor, Tensor]:
    """64 x 96, the second image 64 x 64 of it."""
    images, padding = unpadded(2)
    padding[1, :, 64:] = True
    return images * ~padding[:, None], padding


def objects(*counts: int) -> Targets:
    return [
        {"labels": torch.randint(3, (n,)), "boxes": 0.2 + 0.3 * torch.rand(n, 4)} for n in counts
    ]


def trained_names(model: ViDT, targets: Targets) -> set[str]:
    """Parameters that a training step reaches; all losses must be finite."""
    model.train().zero_grad()
    num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
    terms = SetCriterion()(model(*padded_pair()), targets, num_boxes)
    assert all(term.isfinite() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    return set(gradients)


def names(model: ViDT) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def test_outputs_have_the_promised_shapes(tiny_model: ViDT) -> None:
    outputs = tiny_model(*padded_pair())
    assert len(outputs["aux_outputs"]) == tiny_model.config.dec_layers
    for level in (*outputs["aux_outputs"], outputs):
        assert level["pred_logits"].shape == (2, 7, 3)
        assert level["pred_boxes"].shape == (2, 7, 4)
        assert ((level["pred_boxes"] >= 0) & (level["pred_boxes"] <= 1)).all()


def test_a_new_model_expects_nothing_anywhere(tiny_config: ViDTConfig) -> None:
    """Classes near probability 0.01; boxes of the first level as large as sigmoid(-2)."""
    outputs = ViDT(tiny_config).eval()(*unpadded(1))
    probability = outputs["pred_logits"].sigmoid()
    assert 0.001 < probability.mean() < 0.1
    sizes = outputs["aux_outputs"][0]["pred_boxes"][..., 2:]
    assert torch.allclose(sizes, torch.full_like(sizes, 1 / (1 + torch.e**2)))


@pytest.mark.parametrize("num_layers", [0, 1])
def test_levels_without_aux_loss_and_with_few_layers(
    tiny_config: ViDTConfig, num_layers: int
) -> None:
    config = dataclasses.replace(tiny_config, dec_layers=num_layers, aux_loss=False)
    assert ViDT(config)(*unpadded(1)).keys() == {
        "pred_logits",
        "pred_boxes",
        "distil_tokens",
    }


@pytest.mark.parametrize("name", [name for name in TIMM_NAMES if name in SWIN_VARIANTS])
def test_bodies_have_the_shapes_of_timms(name: str) -> None:
    with torch.device("meta"):
        body = SwinBackbone(SWIN_VARIANTS[name], det_token_num=4, pos_dim=8, cross_indices=(3,))
        theirs = timm.create_model(TIMM_NAMES[name], pretrained=False).state_dict()
    shapes = {
        key: value.shape for key, value in body.state_dict().items() if not added_by_vidt(key)
    }
    assert shapes == {key: value.shape for key, value in imagenet_swin(theirs).items()}


def test_alone_and_in_every_batch_the_same_boxes(tiny_model: ViDT, compare: Compare) -> None:
    images, padding = unpadded(5)
    with torch.no_grad():
        alone = [tiny_model(images[i : i + 1], padding[i : i + 1]) for i in range(5)]
        for size in (2, 3, 5):
            together = tiny_model(images[:size], padding[:size])
            for name in ("pred_boxes", "pred_logits"):
                expected = torch.cat([outputs[name] for outputs in alone[:size]])
                compare(name, together[name], expected, 1e-5)


def test_a_permuted_batch_permutes_the_results(tiny_model: ViDT) -> None:
    images, padding = padded_pair()
    with torch.no_grad():
        forward = tiny_model(images, padding)["pred_boxes"]
        backward = tiny_model(images.flip(0), padding.flip(0))["pred_boxes"]
    assert torch.allclose(forward.flip(0), backward, atol=1e-6)


def test_padding_leaks_as_released(tiny_model: ViDT) -> None:
    """Windows and GroupNorm see padded places: in evaluation, unequal canvases share no batch."""
    images, padding = padded_pair()
    noisy = torch.where(padding[:, None], torch.randn_like(images), images)
    with torch.no_grad():
        padded = tiny_model(images, padding)["pred_boxes"]
        alone = tiny_model(images[1:, :, :, :64], padding[1:, :, :64])["pred_boxes"]
        noised = tiny_model(noisy, padding)["pred_boxes"]
    assert (padded[1] - alone[0]).abs().max() > 1e-4
    assert (padded[1] - noised[1]).abs().max() > 1e-4
    assert torch.allclose(padded[0], noised[0], atol=1e-6)


def test_det_tokens_do_not_see_padded_patches() -> None:
    """The one thing in the body that the mask hides; a weight of e^-100 is nothing in float32."""
    attention = ReconfiguredAttention(32, 4, window=7, shift=3)
    mask = shift_mask((5, 6), 7, 3, torch.device("cpu"))
    patches, det = torch.randn(2, 5, 6, 32), torch.randn(2, 3, 32)
    padding = torch.zeros(2, 5, 6, dtype=torch.bool)
    padding[1, :, 4:] = True
    position = sine_position(padding, 32)
    other = torch.where(padding[..., None], torch.randn_like(patches), patches)

    def det_of(patches: Tensor, padding: Tensor) -> Tensor:
        return attention(patches, det, mask, position, padding)[:, 30:]

    expected = det_of(patches, padding.flatten(1))
    assert torch.equal(det_of(other, padding.flatten(1)), expected)
    unpadded = torch.zeros(2, 30, dtype=torch.bool)
    assert not torch.allclose(det_of(other, unpadded)[1], expected[1])


def test_patches_never_see_det_tokens() -> None:
    attention = ReconfiguredAttention(32, 4, window=7, shift=0)
    patches, padding = torch.randn(1, 5, 6, 32), torch.zeros(1, 30, dtype=torch.bool)
    position = sine_position(torch.zeros(1, 5, 6, dtype=torch.bool), 32)
    first, second = (
        attention(patches, torch.randn(1, 3, 32), None, position, padding)[:, :30] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_a_shift_changes_a_map_of_one_window() -> None:
    """As released; other Swin implementations switch the shift off there."""
    still, shifted = (ReconfiguredAttention(32, 4, window=7, shift=shift) for shift in (0, 3))
    shifted.load_state_dict(still.state_dict())
    patches, det = torch.randn(1, 7, 7, 32), torch.randn(1, 2, 32)
    mask = shift_mask((7, 7), 7, 3, patches.device)
    assert not torch.allclose(still(patches, det, None), shifted(patches, det, mask))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_a_merging_takes_squares_column_by_column(size: tuple[int, int]) -> None:
    """Upper left, lower left, upper right, lower right, as the released weights have them."""
    merging = PatchMerging(2, 8)
    merging.norm = merging.reduction = nn.Identity()
    patches = torch.randn(2, *size, 2)
    merged = merging(patches)
    whole = F.pad(patches, (0, 0, 0, size[1] % 2, 0, size[0] % 2))
    assert merged.shape == (2, whole.shape[1] // 2, whole.shape[2] // 2, 8)
    for place, (column, row) in enumerate(itertools.product((0, 1), (0, 1))):
        corner = whole[:, row::2, column::2]
        assert torch.equal(merged[..., 2 * place : 2 * place + 2], corner)


@pytest.mark.parametrize("image", [(slice(0, 2), slice(0, 3)), (slice(1, 4), slice(2, 5))])
def test_sine_position_counts_the_image_only(image: tuple[slice, slice]) -> None:
    """As the released model, which counts in each row and column by itself."""
    padding = torch.ones(2, 4, 6, dtype=torch.bool)
    padding[(0, *image)] = False
    padding[1] = False
    y, x = (padding.logical_not().float().cumsum(axis) for axis in (1, 2))
    y, x = (at / (at.amax(axis, keepdim=True) + 1e-6) for at, axis in ((y, 1), (x, 2)))
    position = sine_position(padding, 8).unflatten(1, (4, 6))
    for at, ours in ((y, position[..., :4]), (x, position[..., 4:])):
        angle = at[..., None] * 2 * math.pi / torch.tensor([1, 1, 100, 100])
        encoded = torch.where(torch.arange(4) % 2 == 0, angle.sin(), angle.cos())
        assert torch.allclose(ours, encoded, atol=1e-5)


def test_padding_is_resized_by_the_floor_rule() -> None:
    padding = torch.tensor([[[False] * 5 + [True] * 3] * 8])
    assert resize_padding(padding, (2, 3))[0, 0].tolist() == [False, False, True]  # columns 0, 2, 5


def test_training_reaches_every_parameter(tiny_model: ViDT) -> None:
    assert trained_names(tiny_model, objects(3, 2)) == names(tiny_model)


def test_training_without_refinement_reaches_every_parameter(tiny_config: ViDTConfig) -> None:
    model = ViDT(dataclasses.replace(tiny_config, with_box_refine=False))
    assert trained_names(model, objects(3, 2)) == names(model)


def test_without_aux_loss_the_heads_of_earlier_levels_learn_nothing(
    tiny_config: ViDTConfig,
) -> None:
    """Refined boxes are detached, so nothing but its own loss trains an earlier head."""
    model = ViDT(dataclasses.replace(tiny_config, aux_loss=False))
    idle = re.compile(r"(class_embed|bbox_embed)\.[01]\.|decoder\.reference_points\.")
    assert names(model) - trained_names(model, objects(3, 2)) == {
        name for name in names(model) if idle.match(name)
    }


@pytest.mark.parametrize("counts", [(3, 0), (0, 3), (0, 0), (9, 20)])
def test_any_number_of_objects_trains_the_same_parameters(
    tiny_model: ViDT, counts: tuple[int, int]
) -> None:
    """No objects, or more than queries: the graph must be equal on every process of a run."""
    assert trained_names(tiny_model, objects(*counts)) == names(tiny_model)


@pytest.mark.parametrize("size", [(16, 16), (20, 300), (300, 20), (1, 1), (33, 35)])
def test_images_of_any_size(tiny_model: ViDT, size: tuple[int, int]) -> None:
    outputs = tiny_model(*unpadded(1, *size))
    assert outputs["pred_boxes"].isfinite().all() and outputs["pred_logits"].isfinite().all()


def test_bfloat16_keeps_boxes_in_float32(tiny_model: ViDT, compare: Compare) -> None:
    given = padded_pair()
    with torch.no_grad():
        exact = tiny_model(*given)
        with torch.autocast("cpu", torch.bfloat16):
            rough = tiny_model(*given)
    for level, expected in zip(
        (*rough["aux_outputs"], rough), (*exact["aux_outputs"], exact), strict=True
    ):
        assert level["pred_boxes"].dtype is level["pred_logits"].dtype is torch.float32
        compare("pred_boxes", level["pred_boxes"], expected["pred_boxes"], 0.02)
        # bfloat16 steps by 0.03 between 4 and 8, where these logits lie: some steps of rounding.
        compare("pred_logits", level["pred_logits"], expected["pred_logits"], 0.25)


def test_forward_reads_no_value_and_stays_on_the_device(tiny_config: ViDTConfig) -> None:
    """Fake tensors have no values: whatever would wait for a GPU, or mix devices, raises."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model, given = ViDT(tiny_config), unpadded(2)
        outputs = model(*given)
        assert outputs["pred_boxes"].device.type == "cuda"
        with pytest.raises(Exception, match=r"item|scalar|data-dependent"):
            outputs["pred_boxes"].sum().item()  # the guard itself works


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_tokens_stay_in_full_precision_beside_half_precision(drop_path: float) -> None:
    """What every block adds to may not lose digits, nor overflow."""
    block = SwinBlock(32, 4, shift=0, drop_path=drop_path, pos_dim=8).train()
    tokens = torch.randn(2, 5 * 6 + 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = block(tokens, torch.randn(1, 3, 8), (5, 6), torch.zeros(1, 49, 49), None, None)
    assert half.dtype is torch.float32


def test_dropped_paths_drop_patches_and_det_tokens_together() -> None:
    """One draw for each image and branch: with everything dropped, a block passes its input on."""
    block = SwinBlock(32, 4, shift=0, drop_path=0.999999, pos_dim=8).train()
    tokens = torch.randn(2, 5 * 6 + 3, 32)
    assert torch.equal(
        block(tokens, torch.randn(1, 3, 8), (5, 6), torch.zeros(1, 49, 49), None, None), tokens
    )


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("method", "detr", "method is detr; it must be one of vidt"),
        ("backbone_name", "swin_huge", "backbone_name is swin_huge; it must be one of swin_nano"),
        ("num_classes", 0, "num_classes is 0; it must be 1 or more"),
        ("det_token_num", 0, "det_token_num is 0"),
        ("reduced_dim", 250, "reduced_dim is 250; it must be a multiple of 32"),
        ("dec_layers", -1, "dec_layers is -1; it must be 0 or more"),
        ("num_feature_levels", 3, "num_feature_levels is 3; it must be 4"),
        ("dropout", 1.0, "dropout is 1.0; it must be 0 or more and below 1"),
        ("cross_indices", (4,), "cross_indices is (4,); it must be distinct stages from 0 to 3"),
        ("n_keep", 128**2 + 1, "n_keep is 16385; it must be at most gt_mask_len squared, 16384"),
        ("gt_mask_len", 0, "gt_mask_len is 0; it must be 1 or more"),
    ],
)
def test_impossible_settings_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ViDTConfig(**{field: value})


@pytest.mark.parametrize("part", ["epff", "iou_aware", "token_label", "with_vector"])
def test_what_needs_a_neck_says_so(part: str) -> None:
    expected = f"{part} is True; it must be False with method vidt_wo_neck"
    with pytest.raises(ValueError, match=expected):
        ViDTConfig(method="vidt_wo_neck", **{part: True})


def test_each_method_is_built_by_its_class() -> None:
    without = ViDTConfig(method="vidt_wo_neck")
    with torch.device("meta"):
        assert isinstance(build_detector(ViDTConfig()), ViDT)
        assert isinstance(build_detector(without), ViDTWithoutNeck)
    with pytest.raises(ValueError, match="method is vidt_wo_neck; it must be vidt"):
        ViDT(without)


@pytest.mark.parametrize("cross_indices", [(), (2, 3), (0, 1, 2, 3)])
def test_other_cross_attention_stages(
    tiny_config: ViDTConfig, cross_indices: tuple[int, ...]
) -> None:
    model = ViDT(dataclasses.replace(tiny_config, cross_indices=cross_indices)).eval()
    with torch.no_grad():
        assert blurred(model)(*padded_pair())["pred_boxes"].isfinite().all()


def test_denoising_queries_do_not_change_the_others(tiny_model: ViDT) -> None:
    """They are hidden from the detection queries, and seen by nobody but themselves."""
    noised = 0.2 + 0.3 * torch.rand(2, 6, 4)
    given = padded_pair()
    with torch.no_grad():
        plain, extended = tiny_model(*given), tiny_model(*given, noised)
        fewer = tiny_model(*given, noised[:, :2])["denoising_outputs"]
    assert torch.allclose(plain["pred_boxes"], extended["pred_boxes"], atol=1e-6)
    assert torch.allclose(plain["pred_logits"], extended["pred_logits"], atol=1e-5)
    assert len(fewer) == tiny_model.config.dec_layers
    for level, few in zip(extended["denoising_outputs"], fewer, strict=True):
        assert level["pred_boxes"].shape == (2, 6, 4)
        assert torch.allclose(level["pred_boxes"][:, :2], few["pred_boxes"], atol=1e-6)
