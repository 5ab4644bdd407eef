"""Dropout by 16 bits a value."""

import pytest
import torch

from vidt.model.dropout import CHANCES, Dropout, drop


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_so_many_are_dropped_and_the_mean_stays(rate: float) -> None:
    count = 1_000_003  # no multiple of what the generator gives at once
    dropped = drop(torch.ones(count), rate)
    kept = dropped[dropped > 0]
    assert len(kept) / count == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / count) ** 0.5)
    assert torch.allclose(kept, torch.tensor(1 / (1 - rate)), rtol=1 / CHANCES / (1 - rate))
    assert len(kept.unique()) == 1


def test_draws_of_neighbours_are_independent() -> None:
    """Four come from one draw of the generator."""
    kept = (drop(torch.ones(4_000_000), 0.3) > 0).double() - 0.7
    for distance in (1, 2, 3, 4):
        together = (kept[distance:] * kept[:-distance]).mean() / 0.21
        assert abs(together) < 5 / 2000


def test_gradient_goes_where_the_value_went() -> None:
    x = torch.randn(7, 5, 3, requires_grad=True)
    dropped = drop(x.permute(2, 1, 0), 0.4).permute(2, 1, 0)
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad * x, dropped)
    assert 0 < (x.grad == 0).sum() < x.numel()


def test_the_seed_decides() -> None:
    def outcome(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return drop(torch.ones(2, 50), 0.5)

    assert torch.equal(outcome(1), outcome(1))
    assert not torch.equal(outcome(1), outcome(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_pytorchs(dtype: torch.dtype) -> None:
    x = torch.ones(100, dtype=dtype)
    torch.manual_seed(0)
    ours = drop(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(ours, torch.nn.functional.dropout(x, 0.5))


def test_the_module_drops_in_training() -> None:
    assert 300 < (Dropout(0.5)(torch.ones(1000)) == 0).sum() < 700


def test_the_device_is_that_of_the_values() -> None:
    with torch.device("meta"):
        assert drop(torch.ones(5, device="cpu"), 0.5).device.type == "cpu"


def test_evaluation_and_rate_zero_change_nothing() -> None:
    x = torch.randn(10)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(drop(torch.zeros(0), 0.5), torch.zeros(0))
    assert torch.equal(drop(x, 1 - 1e-9) != 0, torch.zeros(10, dtype=torch.bool))
