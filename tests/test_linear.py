"""Linear layers by oneDNN against PyTorch's own, in float64 too."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import asked_of_onednn, needs_onednn
from torch import Tensor, nn

from vidt import ViDT
from vidt.ops import linear
from vidt.ops.linear import Linear, LinearGELU, pack, packed, unpack

SHAPES = [(1, 3, 5), (7, 48, 144), (2, 50, 96, 384), (100, 768, 192), (300, 192, 7)]


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LARGE", 0)


def near(found: Tensor, exact: Tensor) -> bool:
    """float32 as near to float64 as sums of that many products may be expected."""
    return bool((found.double() - exact).abs().max() <= 3e-6 * exact.abs().max())


@needs_onednn
@pytest.mark.parametrize("kind", [Linear, LinearGELU])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (9, 4)])
def test_packed_layers_give_the_same(
    shape: tuple[int, ...], bias: bool, kind: type[Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    *rows, width, out = shape
    layer, x = kind(width, out, bias=bias), torch.randn(*rows, width)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    exact = F.gelu(exact) if kind is LinearGELU else exact
    weights = asked_of_onednn(monkeypatch)
    pack(layer)
    with torch.inference_mode():
        assert near(layer(x), exact)
        strided = x.expand(2, *x.shape).movedim(0, -2)
        assert near(layer(strided).movedim(-2, 0)[1], exact)
    assert len(weights) == 2 and all(weight.is_mkldnn for weight in weights)


@needs_onednn
@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_large_products_and_their_gradients(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    *rows, width, out = shape
    layer, x = Linear(width, out, bias=bias), torch.randn(*rows, width, requires_grad=True)
    along = torch.randn(*rows, out)
    double, exact_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    weights = asked_of_onednn(monkeypatch)
    output, exact = layer(x), double(exact_x)
    assert near(output, exact)
    found = torch.autograd.grad(output, [x, *layer.parameters()], along)
    wanted = torch.autograd.grad(exact, [exact_x, *double.parameters()], along.double())
    assert all(near(*pair) for pair in zip(found, wanted, strict=True))
    assert len(weights) == 2
    with torch.no_grad():
        assert torch.equal(layer(x), output)


@needs_onednn
@pytest.mark.usefixtures("everything_is_large")
def test_what_needs_no_gradient_gets_none() -> None:
    layer, x = Linear(4, 3), torch.randn(5, 4)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and torch.equal(layer.bias.grad, torch.full((3,), 5.0))
    # The sum is made in the memory of the output, as the blocks of the body do.
    output = layer(x[None].requires_grad_())
    output.add_(1).sum().backward()


def _in_place(layer: Linear) -> None:
    with torch.no_grad():
        layer.weight.add_(1)


def _in_place_of_inference(layer: Linear) -> None:
    with torch.inference_mode():
        layer.weight.add_(1)


def _new_memory_where_the_old_was(layer: Linear) -> None:
    shape = layer.weight.shape
    layer.weight.data = torch.empty(0)
    layer.weight.data = torch.ones(shape)


CHANGES: dict[str, Callable[[Linear], object]] = {
    "in place": _in_place,
    "in place of inference": _in_place_of_inference,
    "loaded": lambda layer: layer.load_state_dict(Linear(64, 48).state_dict()),
    "another": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(48, 64))),
    "rounded": lambda layer: layer.bfloat16().float(),
    "new memory": _new_memory_where_the_old_was,
}


@needs_onednn
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_not_answered_from_its_copy(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(5, 64)
    weights = asked_of_onednn(monkeypatch)
    for _ in range(20):  # memory is given out anew as it happens to be free
        layer = Linear(64, 48)
        pack(layer)
        CHANGES[change](layer)
        with torch.inference_mode():
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert not weights
        pack(layer)
        with torch.inference_mode():
            assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-4)
        assert len(weights) == 1
        weights.clear()


@needs_onednn
def test_copies_are_nobodys_but_the_layers() -> None:
    layer, x = Linear(4, 3), torch.randn(5, 4)
    bare = layer(x)
    with packed(nn.Sequential(layer)):
        assert layer._packed is not None and set(layer.state_dict()) == {"weight", "bias"}
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert again._packed is None and torch.equal(again(x), bare)
        with torch.inference_mode():
            assert torch.allclose(layer(x), bare, atol=1e-6)
            assert layer(x[:0]).shape == (0, 3)
        assert torch.equal(layer(x), bare)  # with a gradient
    assert layer._packed is None
    pack(layer)
    with packed(layer):
        pass
    assert layer._packed is not None
    unpack(layer)
    assert layer._packed is None


@pytest.mark.filterwarnings("ignore:TF32")  # said by PyTorch of its own flags
@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("why", ["double", "half", "autocast", "off", "other machine"])
def test_elsewhere_it_is_pytorchs(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = {"double": torch.float64, "half": torch.bfloat16}.get(why, torch.float32)
    layer, x = Linear(4, 3).to(dtype), torch.randn(5, 4, dtype=dtype)
    if why == "other machine":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    linear._onednn_ran.cache_clear()
    try:
        pack(layer)
        weights = asked_of_onednn(monkeypatch)
        with (
            torch.backends.mkldnn.flags(enabled=why != "off"),
            torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
        ):
            expected = F.linear(x, layer.weight, layer.bias)
            assert torch.equal(layer(x), expected)
            with torch.no_grad():
                assert torch.equal(layer(x), expected)
        assert not weights
    finally:
        linear._onednn_ran.cache_clear()


@pytest.mark.usefixtures("everything_is_large")
def test_a_missing_operator_is_named_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = Linear(4, 3), torch.randn(5, 4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(linear, "product", lambda *_, **__: torch.ops.mkldnn.no_such_operator())
    linear._onednn_ran.cache_clear()
    try:
        pack(layer)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    finally:
        linear._onednn_ran.cache_clear()
    assert [
        record.message.startswith("linear layers run without oneDNN: ") for record in caplog.records
    ] == [True]


@needs_onednn
def test_the_trial_is_float32_on_the_cpu_whatever_the_defaults_are() -> None:
    linear._onednn_ran.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert linear.onednn_runs()
    finally:
        torch.set_default_dtype(torch.float32)
        linear._onednn_ran.cache_clear()


@needs_onednn
@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.usefixtures("everything_is_large")
def test_a_whole_detector_predicts_and_learns_the_same(tiny_model: ViDT) -> None:
    images, padding = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)

    def learned() -> tuple[Tensor, list[Tensor]]:
        outputs = tiny_model(images, padding)
        loss = outputs["pred_logits"].sigmoid().sum() + outputs["pred_boxes"].square().sum()
        wanted = [each for each in tiny_model.parameters() if each.requires_grad]
        return loss, [
            each if each is not None else torch.zeros(1)
            for each in torch.autograd.grad(loss, wanted, allow_unused=True)
        ]

    loss, gradients = learned()
    with torch.no_grad():
        outputs = tiny_model(images, padding)
        pack(tiny_model)
        for name, found in tiny_model(images, padding, detections_only=True).items():
            assert torch.allclose(found, outputs[name], atol=1e-5)
        unpack(tiny_model)
    with torch.backends.mkldnn.flags(enabled=False):
        plain_loss, plain = learned()
    assert torch.allclose(loss, plain_loss, rtol=1e-5)
    for found, wanted in zip(gradients, plain, strict=True):
        assert (found - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6
