"""ViDT without neck: its criterion on parts of a batch, its runs. Number for number it is in
test_golden.py.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import run as train_here

from vidt import Predictor, ViDTConfig
from vidt.losses.softmax_criterion import SoftmaxCriterion
from vidt.model.without_neck import ViDTWithoutNeck


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
    with pytest.raises(ValueError, match="denoising_boxes need a decoder"):
        tiny()(images, padding, torch.rand(1, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("body", ["swin_nano", "coat_lite_tiny"])
def test_it_trains_is_evaluated_and_predicts(tiny_data: Path, room: Path, body: str) -> None:
    flags = f"--epochs 1 --method vidt_wo_neck --backbone_name {body} --det_token_num 40"
    assert train_here(tiny_data, room, flags)["map"] >= 0
    found = Predictor.from_checkpoint(room / "best.safetensors")([Image.new("RGB", (90, 60))])[0]
    assert len(found.scores) == 40 and found.scores.diff().max() <= 0
