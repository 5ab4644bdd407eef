"""ViDT object detector in plain PyTorch (arXiv 2110.03921).

    import vidt

    detector = vidt.load("best.safetensors")
    detections = detector.predict("street.jpg", threshold=0.3)
    detections.plot().save("seen.jpg")

    run = vidt.train(data="photos", output_dir="output", epochs=20)
    run.detector().predict("street.jpg")

Names are imported on first use: importing PyTorch takes seconds, and an ONNX model runs without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.from_python import train as train
    from vidt.loading import load as load
    from vidt.losses.criterion import SetCriterion as SetCriterion
    from vidt.losses.criterion import criterion_for as criterion_for
    from vidt.losses.matcher import HungarianMatcher as HungarianMatcher
    from vidt.model.vidt import ViDT as ViDT
    from vidt.model.vidt import ViDTConfig as ViDTConfig
    from vidt.model.vidt import build_detector as build_detector
    from vidt.predict.detections import Detections as Detections
    from vidt.predict.detections import decode_top_k as decode_top_k
    from vidt.predict.predictor import Predictor as Predictor

_HOMES = {
    "Detections": "predict.detections",
    "HungarianMatcher": "losses.matcher",
    "Predictor": "predict.predictor",
    "SetCriterion": "losses.criterion",
    "ViDT": "model.vidt",
    "ViDTConfig": "model.config",
    "build_detector": "model.vidt",
    "criterion_for": "losses.criterion",
    "decode_top_k": "predict.detections",
    "load": "loading",
}
__all__ = [*_HOMES, "train"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vidt")
    if name == "train":  # of the trainer, which is installed with this package
        from trainer.from_python import train

        return train
    if name not in _HOMES:
        raise AttributeError(f"module 'vidt' has no attribute {name!r}")
    return getattr(import_module(f"vidt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
