"""The sampling against golden float64 results, forward and backward; the module around it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from conftest import Compare
from test_benchmarks import run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vidt.ops import deformable_cpu
from vidt.ops.deformable_attention import (
    DeformableAttention,
    Form,
    Levels,
    best_form,
    deformable_attention,
    kernel_runs,
)

CORE_CASES = (
    "tiny_two_levels",
    "four_levels_8x32",
    "single_level_one_point",
    "grid_two_levels",
    "degenerate_lines_odd_dim",
    "far_outside",
    "three_levels_head_dim_30",
)
SHAPES = [(9, 7), (5, 4), (3, 2), (2, 1)]
LEVELS = Levels.of(SHAPES, torch.device("cpu"))
EXACT = 1e-6  # results are of order one and were stored as float32


def attend(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    form: Form,
) -> Tensor:
    """Each form as `deformable_attention`: the CPU's gets the identity as its projection."""
    levels = Levels.of(list(shapes), value.device)
    if form != "cpu":
        return deformable_attention(value, levels, locations, weights, form)
    source = value.flatten(2).to(locations.dtype)
    projection = nn.Linear(source.shape[2], source.shape[2], dtype=locations.dtype)
    nn.init.eye_(projection.weight)
    nn.init.zeros_(projection.bias)
    args = (levels.table, locations, weights, projection)
    return deformable_cpu.attend(source, None, *args).to(value.dtype)


PLAIN: tuple[Form, ...] = ("plain", "cpu")  # what runs on every machine
plain = pytest.mark.parametrize("form", PLAIN)
core_case = pytest.mark.parametrize("case", CORE_CASES)


@golden.present
@plain
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@core_case
def test_core(case: str, dtype: torch.dtype, form: Form, compare: Compare) -> None:
    check_core(case, dtype, form, torch.device("cpu"), compare)


def check_core(
    case: str, dtype: torch.dtype, form: Form, device: torch.device, compare: Compare
) -> None:
    facts = golden.read_json("deform_core.json")[case]
    fields = {
        name.partition(".")[2]: array.to(device)
        for name, array in golden.read_arrays("deform_core.npz").items()
        if name.startswith(case)
    }
    given = [fields[name].to(dtype).requires_grad_() for name in ("value", "locations", "weights")]
    shapes = [tuple(shape) for shape in facts["level_shapes_hw"]]
    output = attend(given[0], shapes, given[1], given[2], form)
    output.backward(fields["grad_output"].to(dtype))

    # float32 places a sample to some 1e-7 of a level, which the slope of the map multiplies.
    allowed = 2e-5 if dtype is torch.float32 else EXACT
    compare("output", output, fields["output"], allowed)
    compare("gradient of value", given[0].grad, fields["grad_value"], allowed)
    compare("gradient of weights", given[2].grad, fields["grad_weights"], allowed)
    if facts["locations"] != "grid":  # see test_core_gradient_at_pixel_centres
        size = max(fields["grad_locations"].abs().max().item(), 1.0)
        expected = fields["grad_locations"] / size
        compare("gradient of locations", given[1].grad / size, expected, allowed)


@golden.present
@plain
@pytest.mark.parametrize("case", ["single_level_one_point", "grid_two_levels"])
def test_core_gradient_at_pixel_centres(case: str, form: Form, compare: Compare) -> None:
    """There the gradient jumps; the reference takes the cell right and below, look from there."""
    facts = golden.read_json("deform_core.json")[case]
    stored = golden.read_arrays("deform_core.npz")
    value, locations, weights, grad_output, expected = (
        stored[f"{case}.{name}"].double()
        for name in ("value", "locations", "weights", "grad_output", "grad_locations")
    )
    locations = (locations + 1e-9).requires_grad_()
    shapes = [tuple(shape) for shape in facts["level_shapes_hw"]]
    attend(value, shapes, locations, weights, form).backward(grad_output)
    compare("gradient of locations", locations.grad, expected, 1e-5)


@pytest.fixture
def module() -> DeformableAttention:
    return DeformableAttention(256, num_heads=8, num_levels=4, num_points=4)


@golden.present
@pytest.mark.parametrize("coordinates", [2, 4])
def test_module(coordinates: int, module: DeformableAttention, compare: Compare) -> None:
    for name, parameter in module.named_parameters():
        filled = golden.fill().fill_tensor(f"attn.{name}", parameter.shape)
        parameter.data = torch.from_numpy(filled)
    stored = golden.read_arrays("deform_module.npz")
    reference = stored[f"reference{coordinates}"]
    output = module(stored["query"], reference, stored["source"], LEVELS, stored["padding_mask"])
    compare("output", output, stored[f"output_ref{coordinates}"], 5e-6)


@plain
def test_sampling_by_hand(form: Form) -> None:
    """One level of 2 x 2 pixels: centres lie at 1/4 and 3/4, and outside is zero."""
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    places = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.0, 0.25], [2.0, 2.0]]
    locations = torch.tensor(places).reshape(1, 6, 1, 1, 1, 2)
    output = attend(value, [(2, 2)], locations, torch.ones(1, 6, 1, 1, 1), form)
    assert torch.allclose(output.flatten(), torch.tensor([1.0, 2.0, 3.0, 2.5, 0.5, 0.0]))


@dataclass(frozen=True)
class Sampling:
    """Random tensors for `deformable_attention`, some samples outside, a few of them far."""

    shapes: tuple[tuple[int, int], ...] = ((5, 7), (3, 2), (1, 1))
    batch: int = 2
    queries: int = 5
    heads: int = 3
    dim: int = 5
    points: int = 3

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """value in the given dtype, locations and weights in float32 at least."""
        generator = torch.Generator().manual_seed(3)

        def drawn(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, dtype=torch.float64)

        positions = sum(height * width for height, width in self.shapes)
        samples = (self.batch, self.queries, self.heads, len(self.shapes), self.points)
        locations = drawn(*samples, 2) * 1.6 - 0.3
        locations[:, :1] *= 1e6
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        value = drawn(self.batch, positions, self.heads, self.dim) - 0.5
        made = [value.to(dtype), locations.to(exact), drawn(*samples).to(exact)]
        return [tensor.to(device).requires_grad_() for tensor in made]

    def call(self, value: Tensor, locations: Tensor, weights: Tensor, form: Form) -> Tensor:
        return attend(value, list(self.shapes), locations, weights, form)


def check_gradient(form: Form, device: str, fast_mode: bool = False) -> None:
    """fast_mode compares one random projection of the gradients."""
    sampling = Sampling(shapes=((2, 3), (2, 2)), batch=1, queries=2, heads=2, dim=3, points=2)
    given = sampling.tensors(torch.float64, device)
    assert torch.autograd.gradcheck(
        lambda *tensors: sampling.call(*tensors, form), given, fast_mode=fast_mode, nondet_tol=1e-12
    )


@plain
def test_gradient_is_that_of_finite_differences(form: Form) -> None:
    check_gradient(form, "cpu")


def check_like_plain(sampling: Sampling, dtype: torch.dtype, form: Form, device: str) -> None:
    """Outputs and gradients equal those of "plain" in float64, as far as the dtype goes."""
    given = sampling.tensors(dtype, device)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in given]
    output = sampling.call(*given, form)
    expected = sampling.call(*exact, "plain")
    assert output.dtype is dtype
    arriving = torch.rand(expected.shape, dtype=torch.float64).to(dtype)
    output.backward(arriving.to(device))
    expected.backward(arriving.double())
    pairs = [(output, expected), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))]
    for found, wanted in pairs:
        # What is returned in half precision is rounded to it; places and sums are exact.
        step = torch.finfo(found.dtype).eps
        size = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        allowed = size * max(step, 1e-5 if dtype is not torch.float64 else 1e-12)
        assert torch.allclose(found.double().cpu(), wanted, rtol=0, atol=allowed)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SAMPLINGS = {
    "odd sizes": Sampling(),
    "one cell": Sampling(shapes=((1, 1),), batch=1, heads=1, dim=1, points=1),
    "no query": Sampling(queries=0),
    "wide head": Sampling(shapes=((4, 4),), batch=1, queries=2, heads=2, dim=70, points=1),
    "many": Sampling(shapes=((9, 8), (4, 4)), batch=1, queries=100, heads=4, dim=40, points=5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_cpu_form_equals_the_plain_form(sampling: Sampling, dtype: torch.dtype) -> None:
    check_like_plain(sampling, dtype, "cpu", "cpu")


@plain
def test_what_is_not_a_number_is_not_hidden(form: Form) -> None:
    """A diverged run has to be noticed, not to read out of bounds."""
    sampling = Sampling()
    value, locations, weights = (tensor.detach() for tensor in sampling.tensors(torch.float32))
    locations[0, 1, 0, 0, 0, 0] = math.nan
    locations[0, 2, 0, 0, 0, 0] = math.inf
    output = sampling.call(value, locations, weights, form)
    assert output[0, 3:].isfinite().all() and output[1].isfinite().all()
    if form == "cpu":
        assert output[0, 1, : sampling.dim].isnan().all()


@pytest.mark.slow
def test_compiles_whole(module: DeformableAttention) -> None:
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    for coordinates in (2, 4):
        given = arguments(coordinates)
        expected, found = module(*given), compiled(*given)
        assert torch.allclose(found, expected, atol=1e-6)
        gradients = [
            torch.autograd.grad(output.sum(), module.value_proj.weight)[0]
            for output in (expected, found)
        ]
        assert torch.allclose(*gradients, rtol=1e-4)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_exports_nothing_of_ours(coordinates: int, module: DeformableAttention) -> None:
    given = arguments(coordinates)
    program = torch.export.export(module.eval(), given)
    graphs = [part.graph for part in program.graph_module.modules()]
    called = {str(node.target) for graph in graphs for node in graph.nodes}
    assert "aten.grid_sampler.default" in called
    assert not [name for name in called if name.startswith("vidt")]
    assert torch.allclose(program.module()(*given), module(*given), atol=1e-6)


@pytest.mark.parametrize(("sums", "form"), [(480, "cpu"), (500, "cpu"), (520, "plain")])
def test_a_cpu_looks_sums_up_where_they_are_few_beside_the_positions(sums: int, form: Form) -> None:
    assert best_form(torch.device("cpu"), sums=sums, positions=1000) == form


@pytest.mark.slow
def test_benchmark_compares_the_forms(tmp_path: Path) -> None:
    flags = ("--size", "1x64x96", "--queries", 3, "--device", "cpu", "--turns", 1)
    printed = run("deformable.py", *flags, "--json", tmp_path / "times.json")
    rows = json.loads((tmp_path / "times.json").read_text())["results"]
    assert [row["form"] for row in rows] == ["plain", "plain", "cpu", "cpu"]
    assert all(row["median"] >= row["fastest"] > 0 for row in rows)
    assert printed.count("1x3x64x96") == len(rows)


def arguments(coordinates: int) -> tuple[Any, ...]:
    """For the module: query, reference, source, level shapes, padding."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 5, 256, generator=generator)
    reference = torch.rand(2, 5, 4, coordinates, generator=generator)
    source = torch.randn(2, 91, 256, generator=generator)
    return query, reference, source, LEVELS, torch.rand(2, 91, generator=generator) < 0.3


def attended(module: DeformableAttention, source: Tensor, padding: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 5, 256, generator=generator)
    reference = torch.rand(2, 5, 4, 4, generator=generator)
    return module(query, reference, source, LEVELS, padding)


def test_padded_positions_are_not_seen(module: DeformableAttention) -> None:
    source = torch.randn(2, 91, 256)
    padding = torch.rand(2, 91) < 0.3
    other = torch.where(padding[..., None], torch.randn_like(source), source)
    assert torch.equal(attended(module, source, padding), attended(module, other, padding))
    assert not torch.allclose(attended(module, source), attended(module, other))


def test_starts_with_equal_weights_around_the_reference(module: DeformableAttention) -> None:
    """Whatever the query; the first head looks to the right, one to four cells away."""
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any() and not module.attention_weights.bias.any()
    offsets = module.sampling_offsets.bias.unflatten(0, (8, 4, 4, 2))
    assert torch.allclose(offsets[0, 2], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    assert torch.allclose(offsets[3, 0, 1], torch.tensor([-2.0, 2.0]))
    assert torch.allclose(offsets.abs().amax(-1)[:, 0, 3], torch.full((8,), 4.0))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="nheads 7 does not divide reduced_dim 256"):
        DeformableAttention(256, num_heads=7, num_levels=4, num_points=4)


@pytest.mark.parametrize("boxes", [2, 4])
@pytest.mark.parametrize("queries", [3, 0])
@pytest.mark.parametrize("padded", [True, False])
def test_sampling_before_projecting_gives_the_same(boxes: int, queries: int, padded: bool) -> None:
    """With padding, places outside, and gradients of everything that is learnt."""
    module = DeformableAttention(32, num_heads=4, num_levels=2, num_points=3).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    shapes = [(5, 4), (3, 2)]
    query = torch.randn(2, queries, 32, dtype=torch.float64)
    reference = torch.rand(2, queries, 2, boxes, dtype=torch.float64)
    source = torch.randn(2, 26, 32, dtype=torch.float64, requires_grad=True)
    padding = torch.rand(2, 26) < 0.3 if padded else None

    def outcome(form: Form) -> list[torch.Tensor]:
        output = module(query, reference, source, Levels.of(shapes, source.device), padding, form)
        learnt = (source, *module.parameters())
        return [output, *torch.autograd.grad(output.square().sum(), learnt)]

    for ours, theirs in zip(outcome("cpu"), outcome("plain"), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_whether_the_kernel_runs_is_not_asked_of_fake_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They cannot run it, and the answer holds for the rest of the process."""
    pytest.importorskip("triton")
    tried = []

    def try_out(device: torch.device) -> None:
        assert not isinstance(torch.empty(1), FakeTensor)
        tried.append(device)

    monkeypatch.setattr("vidt.ops.deformable_triton.try_out", try_out)
    device = torch.device("cuda", 99)
    with FakeTensorMode():
        assert kernel_runs(device)
    assert kernel_runs(device) and tried == [device]
