"""ViDT object detector in plain PyTorch (arXiv 2110.03921).

    import vidt

    detector = vidt.load("best.safetensors")
    detections = detector.predict("street.jpg", threshold=0.3)
    detections.plot().save("seen.jpg")

What is named here is imported when it is first asked for: PyTorch takes seconds, and a model in
ONNX's format is run without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidt.loading import load
    from vidt.losses.criterion import SetCriterion
    from vidt.losses.matcher import HungarianMatcher
    from vidt.model.vidt import ViDT, ViDTConfig
    from vidt.predict.detections import Detections, decode_top_k
    from vidt.predict.predictor import Predictor

__all__ = [
    "Detections",
    "HungarianMatcher",
    "Predictor",
    "SetCriterion",
    "ViDT",
    "ViDTConfig",
    "decode_top_k",
    "load",
]
_HOMES = {
    "Detections": "predict.detections",
    "HungarianMatcher": "losses.matcher",
    "Predictor": "predict.predictor",
    "SetCriterion": "losses.criterion",
    "ViDT": "model.vidt",
    "ViDTConfig": "model.config",
    "decode_top_k": "predict.detections",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vidt")
    if name not in _HOMES:
        raise AttributeError(f"module 'vidt' has no attribute {name!r}")
    return getattr(import_module(f"vidt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
