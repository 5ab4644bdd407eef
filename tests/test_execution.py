"""Ways to run a model that may change its time and memory, and nothing else."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import ROOT, blurred, differences, end_of, environment, furthest, run, settings
from torch import Tensor, nn

from trainer.data.loader import Augmentation, noise_boxes, noised_batch
from trainer.loop.execution import (
    COMPILED_SHAPES,
    SIDES,
    checkpoint_activations,
    compiled,
    compiled_canvas,
)
from vidt.model.config import ViDTConfig
from vidt.model.vidt import build_detector

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


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_a_model_is_one_graph(member: str) -> None:
    """Compiled for real but for the last step, which would need a C compiler and minutes."""
    model = compiled(detector(member), backend="eager")  # fails at the first break
    ours = gradients_through(model, *batch())
    plain = gradients_through(detector(member), *batch())
    difference, worst = furthest(ours, plain)
    assert difference < 1e-4, worst


@pytest.mark.slow
def test_a_graph_for_each_shape_and_no_more() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = compiled(detector("vidt"), backend=counter)  # type: ignore[arg-type]
    for height, width in [(64, 96), (32, 64), (64, 96), (64, 64), (32, 64)]:
        model(*batch(height, width))
    assert counter.frame_count == 3


SCALES = {
    "released": "--eval_size 640 --train_sizes none",
    "far beyond eval_size": "--eval_size 320 --train_sizes 192,320,480,800 --train_max_size 1333",
    "one": "--eval_size 112 --train_sizes 112",
}


@pytest.mark.parametrize("flags", SCALES.values(), ids=SCALES)
def test_a_run_of_many_scales_has_few_shapes(flags: str) -> None:
    """Pictures of any shape, some with more objects than denoising queries."""
    config, _ = settings(Path("data"), Path("out"), f"{flags} --denoising 100")
    augmentation = Augmentation.from_config(config)
    random = np.random.default_rng(0)
    drawn, grown = set(), set()
    for _ in range(3000):
        sizes = random.integers(200, 1200, (2, 2)).tolist()
        shapes = [augmentation.draw((height, width), random).shape for height, width in sizes]
        height, width = (max(sides) for sides in zip(*shapes, strict=True))
        counts = random.integers(0, 120, 2)
        targets = [{"denoising_boxes": noise_boxes(torch.rand(n, 4), 100, random)} for n in counts]
        noised = noised_batch(targets, config.denoising)
        canvas = compiled_canvas((height, width), config.eval_size, augmentation.max_size)
        assert canvas[0] >= height and canvas[1] >= width and noised is not None
        drawn.add((height, width, max(len(each["denoising_boxes"]) for each in targets)))
        grown.add((*canvas, noised.shape[1]))
    assert len(drawn) > 100
    assert len({shape[:2] for shape in grown}) <= (SIDES + 2) ** 2
    assert len(grown) <= COMPILED_SHAPES
    assert compiled_canvas((640, 641), 640, 1066) == (640, 768)


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
    """Accelerate wraps the forward pass; that must not break the graph either."""
    program = (
        "import test_execution as here, torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator(cpu=True, mixed_precision='bf16')\n"
        "model = accelerator.prepare_model(here.detector('vidt'), evaluation_mode=True)\n"
        "outputs = here.compiled(model.train(), backend='eager')(*here.batch())\n"
        "assert outputs['pred_logits'].dtype == torch.float32"
    )
    tests = str(Path(__file__).parent)
    call = [sys.executable, "-c", program]
    subprocess.run(call, env=environment(PYTHONPATH=tests), cwd=ROOT, check=True)
