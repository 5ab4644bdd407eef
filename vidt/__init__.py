"""ViDT object detector in plain PyTorch (arXiv 2110.03921)."""

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
