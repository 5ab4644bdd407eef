"""Ways to run a model that may change its time and memory, and nothing else."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.fx.experimental._config as shapes
from tiny_runs import ROOT, blurred, differences, end_of, environment, furthest, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from trainer.backward.memory import checkpoint_activations
from vidt.images.preprocessing import Preprocessing
from vidt.model.config import ViDTConfig
from vidt.model.ram import shift_mask
from vidt.model.swin import SwinBlock
from vidt.model.vidt import build_detector, compile_blocks
from vidt.predict.predictor import Predictor
from vidt.weights.weights_file import WeightsInfo

SMALL = {
    "num_classes": 3,
    "det_token_num": 5,
    "reduced_dim": 64,
    "pos_dim": 16,
    "dec_layers": 1,
    "dim_feedforward": 64,
    "dropout": 0.0,
}
MEMBERS = {
    "vidt": {"backbone_name": "swin_test"},
    "plus": {
        "backbone_name": "swin_test",
        **dict.fromkeys(("epff", "iou_aware", "token_label", "with_vector"), True),
    },
    "coat": {"backbone_name": "coat_lite_tiny"},
    "no neck": {"backbone_name": "swin_test", "method": "vidt_wo_neck"},
}


def detector(member: str) -> nn.Module:
    torch.manual_seed(0)
    return blurred(build_detector(ViDTConfig(**{**SMALL, **MEMBERS[member]}))).train()


def batch(height: int = 64, width: int = 96) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, :, width - 20 :] = True
    return torch.randn(2, 3, height, width), padding


def gradients_through(model: nn.Module, images: Tensor, padding: Tensor) -> dict[str, Tensor]:
    outputs = model(images, padding)
    (outputs["pred_logits"].square().mean() + outputs["pred_boxes"].square().mean()).backward()
    named = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {name.removeprefix("_orig_mod."): gradient for name, gradient in named.items()}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs and settings of a test stay in it."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8), shapes.patch(use_duck_shape=True):
        yield
    torch._dynamo.reset()


def compiled_eagerly(model: nn.Module) -> CompileCounter:
    """Compiles the blocks except for the last step, which takes minutes on a CPU."""
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    return counter


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_compiled_blocks_compute_the_same(member: str, fresh_compiler: None) -> None:
    model = detector(member)
    names = model.state_dict().keys()
    counter = compiled_eagerly(model)
    torch._dynamo.utils.counters.clear()
    ours = gradients_through(model, *batch())
    plain = gradients_through(detector(member), *batch())
    difference, worst = furthest(ours, plain)
    assert difference < 1e-4, worst
    assert counter.frame_count and model.state_dict().keys() == names
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_compilations_do_not_grow_with_the_canvases(fresh_compiler: None) -> None:
    """Twenty canvases, as of pictures of any shape at the scales of the default recipe."""
    torch.manual_seed(0)
    block = SwinBlock(24, 2, shift=3, drop_path=0.1, pos_dim=16).train()
    counter = compiled_eagerly(block)
    random = np.random.default_rng(0)
    grids = [(int(h), int(w)) for h, w in random.integers(60, 200, (20, 2))]
    assert len({*grids}) == 20
    for grid in grids:
        tokens = torch.randn(2, grid[0] * grid[1] + 5, 24, requires_grad=True)
        mask = shift_mask(grid, 7, 3, tokens.device)
        block(tokens, torch.zeros(1, 5, 16), grid, mask, None, None).sum().backward()
    assert 1 <= counter.frame_count <= 4  # whole windows in either direction or not


@pytest.mark.slow
def test_compiled_blocks_recompute_activations(fresh_compiler: None) -> None:
    model = detector("vidt")
    checkpoint_activations(model)
    counter = compiled_eagerly(model)
    ours = gradients_through(model, *batch())
    assert counter.frame_count
    difference, worst = furthest(ours, gradients_through(detector("vidt"), *batch()))
    assert difference < 1e-4, worst


@pytest.mark.parametrize("member", ["vidt", "coat"])
def test_activations_are_computed_anew_and_gradients_stay(member: str) -> None:
    kept: dict[str, int] = {}

    def gradients(name: str, model: nn.Module) -> dict[str, Tensor]:
        def pack(tensor: Tensor) -> Tensor:
            kept[name] = kept.get(name, 0) + tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return gradients_through(model, *batch())

    plain, frugal = detector(member), detector(member)
    checkpoint_activations(frugal)
    assert frugal.state_dict().keys() == plain.state_dict().keys()
    found, expected = gradients("frugal", frugal), gradients("plain", plain)
    assert not differences(found, expected)
    assert kept["frugal"] < 0.7 * kept["plain"]


def test_a_run_with_less_memory_ends_with_the_same_weights(tiny_data: Path, room: Path) -> None:
    flags = "--epochs 1 --dropout 0.1 --backbone_name swin_test_drop"
    run(tiny_data, room / "plain", flags)
    run(tiny_data, room / "frugal", flags, "--activation_checkpointing")
    assert not differences(end_of(room / "plain"), end_of(room / "frugal"))


@pytest.mark.slow
def test_mixed_precision_compiles_too() -> None:
    """Accelerate wraps the forward pass; the blocks inherit its autocast."""
    program = (
        "import test_execution as here, torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator(cpu=True, mixed_precision='bf16')\n"
        "model = here.detector('vidt')\n"
        "counter = here.compiled_eagerly(model)\n"
        "model = accelerator.prepare_model(model, evaluation_mode=True)\n"
        "outputs = model(*here.batch())\n"
        "assert counter.frame_count\n"
        "assert outputs['pred_logits'].dtype == torch.float32"
    )
    tests = str(Path(__file__).parent)
    call = [sys.executable, "-c", program]
    subprocess.run(call, env=environment(PYTHONPATH=tests), cwd=ROOT, check=True)


@pytest.mark.slow
def test_a_predictor_stays_compiled_over_twelve_canvases(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounter()
    monkeypatch.setattr(
        "vidt.predict.predictor.compile_blocks", partial(compile_blocks, backend=counter)
    )
    model = detector("vidt")
    info = WeightsInfo(model.config, ("disc", "square", "star"), Preprocessing(256))
    predictor = Predictor(model, info, compile=True)
    pictures = [np.zeros((64, 64 + 8 * i, 3), np.uint8) for i in range(12)]
    torch._dynamo.utils.counters.clear()
    predictor(pictures[:1])
    first = counter.frame_count
    predictor(pictures)
    # Each kind at most four times: whole windows in either direction or not.
    assert 1 <= first <= counter.frame_count <= 4 * first
    assert not torch._dynamo.utils.counters["graph_break"]
