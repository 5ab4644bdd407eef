"""`vidt info`: what is stored in a weights file or in an exported model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.commands.command_flags import add_allow_http, command_parser, say, weights_file
from vidt.arguments import OneLineParser
from vidt.errors import UserError, counted, escaped

SUMMARY = """
Prints what is in a weights file: the detector, its classes, how images are prepared for it, its
metrics, and how it was trained. Takes our .safetensors files, the released .pth files, and exported
.onnx models.
"""
EXAMPLES = """
examples:
  vidt info output/best.safetensors
  vidt info output/best.safetensors --json
  vidt info model.onnx

exit code: 0 done, 2 a mistake that the line "error: ..." names.
"""
MAIN_METRICS = ("map50", "map", "map75", "map_small", "map_medium", "map_large", "segm_map")


def flags() -> OneLineParser:
    parser = command_parser("info", SUMMARY, EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help=".safetensors, released .pth, or .onnx")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_allow_http(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    given = flags().parse_args(argv)
    path = weights_file(given.weights, given.allow_http)
    facts = _facts_of_onnx(path) if path.suffix == ".onnx" else _facts_of_weights(path)
    say(json.dumps(facts, indent=1) if given.json else page(facts))
    return 0


def _facts_of_weights(path: Path) -> dict[str, Any]:
    from vidt.weights.checkpoint import load_model

    model, info = load_model(path)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "parameters": sum(each.numel() for each in model.parameters()),
        "config": asdict(info.config),
        "class_names": list(info.class_names),
        "preprocessing": asdict(info.preprocessing) | {"max_size": info.preprocessing.max_size},
        "metrics": info.metrics,
        "thresholds": list(info.thresholds),
        "training": info.training,
    }


def _facts_of_onnx(path: Path) -> dict[str, Any]:
    """The inputs and outputs, and the metadata that the exporter wrote, parsed where it is JSON."""
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError:
        raise UserError(
            f"{path} needs onnxruntime, which is not installed; pip install onnxruntime"
        ) from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises exceptions of many unrelated classes
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as an ONNX model: {reason}") from None
    metadata = session.get_modelmeta().custom_metadata_map
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "inputs": _shapes(session.get_inputs()),
        "outputs": _shapes(session.get_outputs()),
        **{name: _parsed(value) for name, value in sorted(metadata.items())},
    }


def _shapes(tensors: Sequence[Any]) -> dict[str, list[str]]:
    return {each.name: list(map(str, each.shape)) for each in tensors}


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def page(facts: Mapping[str, Any]) -> str:
    """The facts as text, the most important first."""
    lines = [f"{facts['file']}: {facts['bytes'] / 2**20:.1f} MiB"]
    if "parameters" in facts:
        lines[0] += f", {facts['parameters'] / 1e6:.2f} M parameters"
    names = facts.get("class_names", [])
    if isinstance(names, list):
        lines += [f"classes ({len(names)}): {', '.join(escaped(str(name)) for name in names)}"]
    metrics = facts.get("metrics") or {}
    if metrics:
        scored = {name: metrics.get(name, -1.0) for name in MAIN_METRICS}
        shown = [f"{name} {value:.3f}" for name, value in scored.items() if value >= 0]
        lines += [f"metrics when it was saved: {', '.join(shown)}"] if shown else []
    training = dict(facts.get("training") or {})
    if training:
        lines += ["", "training", *_training_lines(training)]
    for part in ("config", "preprocessing", "inputs", "outputs"):
        if isinstance(facts.get(part), Mapping):
            lines += ["", part, *_pairs(facts[part])]
    if training.get("settings"):
        lines += ["", "training settings", *_pairs(training["settings"])]
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _training_lines(training: Mapping[str, Any]) -> list[str]:
    lines = [
        f"  {name:<12} {each['source']}: {counted(each['images'], 'image')}, "
        f"{counted(each['boxes'], 'box', 'boxes')}"
        for name, each in training.get("data", {}).items()
    ]
    known = {"epochs_done": "epochs", "steps_done": "steps", "date": "saved", "version": "vidt"}
    shown = {text: training[name] for name, text in known.items() if name in training}
    return [*lines, *(f"  {text:<12} {value}" for text, value in shown.items())]


def _pairs(values: Mapping[str, Any]) -> list[str]:
    width = max(map(len, values), default=0)
    return [f"  {name:<{width}}  {_shown(value)}" for name, value in values.items()]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
