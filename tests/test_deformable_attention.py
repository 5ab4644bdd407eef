"""The sampling against golden float64 results, forward and backward; the module around it."""

import golden
import pytest
import torch
from conftest import Compare
from torch import Tensor

from vidt.deformable_attention import DeformableAttention, deformable_attention

CORE_CASES = (
    "tiny_two_levels",
    "four_levels_8x32",
    "single_level_one_point",
    "grid_two_levels",
    "degenerate_lines_odd_dim",
    "far_outside",
    "three_levels_head_dim_30",
)
LEVELS = [(9, 7), (5, 4), (3, 2), (2, 1)]
EXACT = 1e-6  # results are of order one and were stored as float32


@golden.present
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CORE_CASES)
def test_core(case: str, dtype: torch.dtype, compare: Compare) -> None:
    facts = golden.read_json("deform_core.json")[case]
    stored = golden.read_arrays("deform_core.npz")
    fields = {
        name.partition(".")[2]: array for name, array in stored.items() if name.startswith(case)
    }
    given = [fields[name].to(dtype).requires_grad_() for name in ("value", "locations", "weights")]
    shapes = [tuple(shape) for shape in facts["level_shapes_hw"]]
    output = deformable_attention(given[0], shapes, given[1], given[2])
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
@pytest.mark.parametrize("case", ["single_level_one_point", "grid_two_levels"])
def test_core_gradient_at_pixel_centres(case: str, compare: Compare) -> None:
    """There the gradient jumps; the reference takes the cell right and below, look from there."""
    facts = golden.read_json("deform_core.json")[case]
    stored = golden.read_arrays("deform_core.npz")
    value, locations, weights, grad_output, expected = (
        stored[f"{case}.{name}"].double()
        for name in ("value", "locations", "weights", "grad_output", "grad_locations")
    )
    locations = (locations + 1e-9).requires_grad_()
    shapes = [tuple(shape) for shape in facts["level_shapes_hw"]]
    deformable_attention(value, shapes, locations, weights).backward(grad_output)
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


def test_sampling_by_hand() -> None:
    """One level of 2 x 2 pixels: centres lie at 1/4 and 3/4, and outside is zero."""
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    places = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.0, 0.25], [2.0, 2.0]]
    locations = torch.tensor(places).reshape(1, 6, 1, 1, 1, 2)
    output = deformable_attention(value, [(2, 2)], locations, torch.ones(1, 6, 1, 1, 1))
    assert torch.allclose(output.flatten(), torch.tensor([1.0, 2.0, 3.0, 2.5, 0.5, 0.0]))


def test_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    value, locations, weights = (
        torch.rand(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 10, 2, 3), (1, 2, 2, 2, 2, 2), (1, 2, 2, 2, 2))
    )
    shapes = [(2, 3), (2, 2)]
    assert torch.autograd.gradcheck(
        lambda *given: deformable_attention(given[0], shapes, *given[1:]),
        (value, locations, weights),
    )


def attend(module: DeformableAttention, source: Tensor, padding: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 5, 256, generator=generator)
    reference = torch.rand(2, 5, 4, 4, generator=generator)
    return module(query, reference, source, LEVELS, padding)


def test_padded_positions_are_not_seen(module: DeformableAttention) -> None:
    source = torch.randn(2, 91, 256)
    padding = torch.rand(2, 91) < 0.3
    other = torch.where(padding[..., None], torch.randn_like(source), source)
    assert torch.equal(attend(module, source, padding), attend(module, other, padding))
    assert not torch.allclose(attend(module, source), attend(module, other))


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
