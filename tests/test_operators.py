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
