"""Packed linear layers against plain ones."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidt import ViDT
from vidt.ops import packing
from vidt.ops.packing import PackedLinear, pack, packed, unpack

needs_onednn = pytest.mark.skipif(
    not packing.onednn_runs(), reason="this PyTorch or processor has no packed products of oneDNN"
)


@pytest.fixture
def packed_products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Grows by the input of every product that oneDNN computes."""
    inputs: list[Tensor] = []
    product = packing._product

    def listening(x: Tensor, *rest: Tensor) -> Tensor:
        inputs.append(x)
        return product(x, *rest)

    monkeypatch.setattr(packing, "_product", listening)
    return inputs


def packed_layer(width: int = 6, out: int = 4, *, bias: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Linear(width, out, bias=bias))
    pack(model)
    return model


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(9, 4), (1, 3, 5), (2, 50, 96, 384), (100, 768, 192)])
def test_packed_layers_give_the_same(
    shape: tuple[int, ...], bias: bool, packed_products: list[Tensor]
) -> None:
    *rows, width, out = shape
    model, x = packed_layer(width, out, bias=bias), torch.randn(*rows, width)
    layer = model[0]
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.inference_mode():
        difference = (model(x).double() - exact).abs().max()
    assert difference <= 3e-6 * exact.abs().max() and len(packed_products) == 1


@needs_onednn
def test_parameters_names_and_gradients_stay(packed_products: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    names, parameters = list(model.state_dict()), list(model.parameters())
    pack(model)
    assert isinstance(model[0], PackedLinear) and list(model.state_dict()) == names
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    model(torch.randn(3, 6)).sum().backward()
    assert parameters[0].grad is not None and not packed_products
    unpack(model)
    assert type(model[0]) is nn.Linear and model[0].weight is parameters[0]


@needs_onednn
@pytest.mark.parametrize("change", ["in place", "new data", "new parameter", "load_state_dict"])
def test_changed_weights_are_used(change: str) -> None:
    model, x = packed_layer(), torch.randn(3, 6)
    new = torch.randn(4, 6)
    layer = model[0]
    with torch.no_grad():
        if change == "in place":
            layer.weight.copy_(new)
        elif change == "new data":
            layer.weight.data = new
        elif change == "new parameter":
            layer.weight = nn.Parameter(new)
        else:
            layer.load_state_dict({"weight": new, "bias": layer.bias.detach()})
        assert torch.equal(model(x), F.linear(x, new, layer.bias))


@needs_onednn
@pytest.mark.parametrize(
    "way", ["deepcopy", "pickle", "double", "training", "autocast", "forbidden"]
)
def test_other_uses_do_without_the_copy(
    way: str, packed_products: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = packed_layer(), torch.randn(3, 6)
    expected = F.linear(x, model[0].weight, model[0].bias)
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif way == "double":
        model, x = model.double(), x.double()
    elif way == "forbidden":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with (
        torch.set_grad_enabled(way == "training"),
        torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"),
    ):
        assert torch.allclose(model(x).to(expected.dtype), expected, atol=0.05)
    assert not packed_products


@needs_onednn
def test_packing_for_a_while() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with packed(model):
        assert isinstance(model[0], PackedLinear)
        with packed(model):
            pass
        assert isinstance(model[0], PackedLinear)
    assert type(model[0]) is nn.Linear


@needs_onednn
def test_a_packed_detector_predicts_the_same(
    tiny_model: ViDT, packed_products: list[Tensor]
) -> None:
    images, padding = torch.randn(2, 3, 96, 80), torch.zeros(2, 96, 80, dtype=torch.bool)
    with torch.no_grad():
        expected = tiny_model.eval()(images, padding, detections_only=True)
        with packed(tiny_model):
            found = tiny_model(images, padding, detections_only=True)
    assert len(packed_products) > 20
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-4), name


def test_without_the_operators_a_warning_and_plain_layers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(packing, "_product", lambda *_: torch.ops.mkldnn.no_such_operator())
    packing._onednn_ran.cache_clear()
    try:
        assert type(packed_layer()[0]) is nn.Linear
    finally:
        packing._onednn_ran.cache_clear()
    assert "without oneDNN" in caplog.text
