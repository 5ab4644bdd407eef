"""The MLP in pieces against timm's."""

import pytest
import timm.layers
import torch
from conftest import asked_of_onednn, needs_onednn
from torch import Tensor, nn

from vidt.model import mlp
from vidt.ops import linear
from vidt.ops.linear import pack


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of all that goes in."""
    output = module(x)
    along = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output, *torch.autograd.grad(output, [x, *module.parameters()], along)]


@pytest.mark.parametrize("by_onednn", [False, pytest.param(True, marks=needs_onednn)])
@pytest.mark.parametrize("rows", [32, 33, 50])
def test_pieces_give_what_the_whole_gives(
    rows: int, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "PIECE", 8)
    monkeypatch.setattr(linear, "LARGE", 0 if by_onednn else linear.LARGE)
    asked = asked_of_onednn(monkeypatch)
    ours = mlp.Mlp(6, hidden_features=24)
    theirs = timm.layers.Mlp(6, hidden_features=24)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, rows, 6, requires_grad=True)
    assert mlp._goes_in_pieces(x)
    pieces = mlp._pieces(rows)
    assert len(pieces) > 3 and max(s.stop - s.start for s in pieces) <= 8
    found, expected = run(ours, x), run(theirs, x)
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)
    assert len(asked) == (4 * len(pieces) if by_onednn else 0)
    with torch.inference_mode():
        assert torch.equal(ours(x), found[0])
        if by_onednn:
            asked.clear()
            pack(ours)
            assert torch.allclose(ours(x), expected[0], rtol=1e-5, atol=1e-6)
            assert len(asked) == 2 * len(pieces)


def test_gradient_of_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "PIECE", 2)
    ours = mlp.Mlp(3, hidden_features=5).double()
    x = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *ours.parameters()))


def test_half_precision_and_few_tokens_go_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "PIECE", 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not mlp._goes_in_pieces(torch.ones(1, 64, 6))
    assert not mlp._goes_in_pieces(torch.ones(1, 31, 6))
