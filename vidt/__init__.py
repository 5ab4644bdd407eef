"""ViDT object detector in plain PyTorch (arXiv 2110.03921)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidt.criterion import SetCriterion
    from vidt.matcher import HungarianMatcher
    from vidt.model import ViDT, ViDTConfig
    from vidt.predictor import Detections, Predictor, decode_top_k

__all__ = [
    "Detections",
    "HungarianMatcher",
    "Predictor",
    "SetCriterion",
    "ViDT",
    "ViDTConfig",
    "decode_top_k",
]

_FILES = {
    "Detections": "predictor",
    "HungarianMatcher": "matcher",
    "Predictor": "predictor",
    "SetCriterion": "criterion",
    "ViDT": "model",
    "ViDTConfig": "model",
    "decode_top_k": "predictor",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for when it is asked for: exported models run without torch."""
    if name not in _FILES:
        raise AttributeError(f"module 'vidt' has no attribute {name!r}")
    return getattr(import_module(f"vidt.{_FILES[name]}"), name)
