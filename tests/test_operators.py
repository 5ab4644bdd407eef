"""A training step dispatches no more operators at a canvas that the model never saw."""

import importlib
from pathlib import Path

import pytest

from vidt import ViDTConfig

ROOT = Path(__file__).parent.parent


def test_a_new_canvas_costs_no_more_operators(
    tiny_config: ViDTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    operators = importlib.import_module("operators")
    new, seen = operators.new_over_seen(tiny_config, (96, 128), (112, 144))
    assert seen > 500 and new <= 1.05 * seen


@pytest.mark.slow
def test_the_decoder_layers_share_one_cast(
    tiny_config: ViDTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes cast do not grow by the source with each layer; nothing is cast twice."""
    monkeypatch.syspath_prepend("benchmarks")
    operators = importlib.import_module("operators")

    def bytes_with(layers: int) -> int:
        config = ViDTConfig(**{**vars(tiny_config), "dec_layers": layers})
        return operators.cast_bytes(config, (2, 256, 256)).total()

    positions = sum((256 // stride) ** 2 for stride in (8, 16, 32, 64))
    source = 2 * positions * tiny_config.reduced_dim * (4 + 2)
    assert 0 < bytes_with(3) - bytes_with(2) < source
