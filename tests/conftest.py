"""Fixtures and settings of all tests, and the table of largest differences after them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: the machine may be shared

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vidt.model import ViDT, ViDTConfig

Compare = Callable[[str, Tensor, Tensor, float], None]
DIFFERENCE = "largest difference: "


@pytest.fixture(autouse=True)
def one_thread_one_seed() -> Iterator[None]:
    """So that a test gives the same numbers alone and among others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compare(record_property: Callable[[str, object], None]) -> Compare:
    """compare(what, found, expected, allowed): fails above `allowed`, and tells the summary."""

    def check(what: str, found: Tensor, expected: Tensor, allowed: float) -> None:
        assert found.shape == expected.shape, f"{what}: {found.shape}, not {expected.shape}"
        difference = (found.double() - expected.double()).abs().max().item()
        record_property(DIFFERENCE + what, (difference, allowed))
        assert difference <= allowed, f"{what} differs by {difference:.2e}, {allowed:.2e} allowed"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """For everything that was compared, the case that came nearest to its limit."""
    nearest: dict[tuple[str, str], tuple[float, float, float, str]] = {}
    for report in (one for some in terminalreporter.stats.values() for one in some):
        test, _, case = getattr(report, "nodeid", "").rpartition("::")[2].partition("[")
        for name, value in getattr(report, "user_properties", ()):
            if name.startswith(DIFFERENCE):
                difference, allowed = value
                share = difference / allowed if allowed else difference
                row = (test, name.removeprefix(DIFFERENCE))
                entry = (share, difference, allowed, case.rstrip("]"))
                nearest[row] = max(nearest.get(row, entry), entry)
    if nearest:
        terminalreporter.section("largest differences, of those allowed")
    for (test, what), (_, difference, allowed, case) in nearest.items():
        terminalreporter.line(f"{test:<40} {what:<27} {difference:.1e} of {allowed:.1e}  {case}")


@pytest.fixture(scope="session")
def tiny_config() -> ViDTConfig:
    """The smallest body with the smallest decoder that still has every part."""
    return ViDTConfig(
        num_classes=3,
        det_token_num=7,
        reduced_dim=64,
        pos_dim=16,
        dec_layers=2,
        dim_feedforward=64,
        dropout=0.0,
    )


@pytest.fixture
def tiny_model(tiny_config: ViDTConfig) -> ViDT:
    return blurred(ViDT(tiny_config)).eval()


def blurred(model: ViDT) -> ViDT:
    """Noise on every weight: the zeros that a detector starts with hide what depends on what."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model
