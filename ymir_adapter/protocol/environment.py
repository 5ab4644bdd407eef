"""`env.yaml`: which task this is, which protocol the platform uses, and where its files are."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ymir_exc.env import EnvConfig

from trainer.settings.yaml_text import BadYAML, load_yaml, read_limited
from ymir_adapter.protocol.errors import Code, TaskError
from ymir_adapter.protocol.values import is_given, to_bool, to_text

DEFAULT_ENV_FILE = "/in/env.yaml"
FLAGS = ("run_training", "run_mining", "run_infer")
# Where files are below the roots unless env.yaml says otherwise.
INPUT_FILES = {
    "assets_dir": "assets",
    "annotations_dir": "annotations",
    "models_dir": "models",
    "training_index_file": "train-index.tsv",
    "val_index_file": "val-index.tsv",
    "candidate_index_file": "candidate-index.tsv",
    "config_file": "config.yaml",
}
OUTPUT_FILES = {
    "models_dir": "models",
    "tensorboard_dir": "tensorboard",
    "training_result_file": "models/result.yaml",
    "mining_result_file": "result.tsv",
    "infer_result_file": "infer-result.json",
    "monitor_file": "monitor.txt",
}


@dataclass(frozen=True)
class InputPaths:
    """What the platform provides; the executor never writes there."""

    root_dir: Path
    assets_dir: Path
    annotations_dir: Path
    models_dir: Path
    training_index_file: Path
    val_index_file: Path
    candidate_index_file: Path
    config_file: Path


@dataclass(frozen=True)
class OutputPaths:
    """What the platform reads back."""

    root_dir: Path
    models_dir: Path
    tensorboard_dir: Path
    training_result_file: Path
    mining_result_file: Path
    infer_result_file: Path
    monitor_file: Path


def read_environment(path: str | Path | None = None) -> dict[str, Any]:
    """The fields of a `Task` that `env.yaml` holds; see `read_task`."""
    path = _env_file(path)
    raw = read_mapping(path)
    try:
        flags = {name: is_given(raw, name) and to_bool(name, raw[name]) for name in FLAGS}
        if not any(flags.values()):
            raise TaskError(Code.CONFIG, f"one of {', '.join(FLAGS)} must be true")
        if flags["run_training"]:  # the platform combines training with nothing else
            flags |= {"run_mining": False, "run_infer": False}
        return {
            **flags,
            "task_id": _task_id(raw),
            "protocol": _protocol(raw),
            "input": InputPaths(**_paths(raw, "input", INPUT_FILES)),
            "output": OutputPaths(**_paths(raw, "output", OUTPUT_FILES)),
        }
    except TaskError as error:
        raise TaskError(error.code, f"{path}: {error}") from None


def read_identity(path: str | Path | None = None) -> tuple[str, Path]:
    """Task id and monitor file, as far as they can be read from a broken `env.yaml`, so that its
    failure can be reported too. Never raises.
    """
    path = _env_file(path)
    try:
        raw = read_mapping(path)
        paths = _paths(raw, "output", OUTPUT_FILES)
    except TaskError:
        raw = _salvaged(path)
        paths = _paths(raw, "output", OUTPUT_FILES)
    try:
        return _task_id(raw), paths["monitor_file"]
    except TaskError:
        return _task_id({}), paths["monitor_file"]


def _salvaged(path: Path) -> dict[str, Any]:
    """The two lines that `read_identity` needs, from a file that is not YAML."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    values = {}
    for key in ("task_id", "monitor_file"):
        match = re.search(rf"^\s*{key}\s*:\s*['\"]?([^\s'\"#]+)", text, re.MULTILINE)
        values[key] = match.group(1) if match else None
    return {"task_id": values["task_id"], "output": {"monitor_file": values["monitor_file"]}}


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of keys and values; {} if it is empty. Raises TaskError."""
    try:
        loaded = load_yaml(read_limited(path), path)
    except OSError as error:
        raise TaskError(Code.CONFIG, f"{path} cannot be read: {error.strerror}") from error
    except BadYAML as error:
        raise TaskError(Code.CONFIG, str(error)) from error
    if loaded is not None and not isinstance(loaded, dict):
        raise TaskError(Code.CONFIG, f"{path} holds no keys and values")
    return {str(key): value for key, value in (loaded or {}).items()}


def _env_file(path: str | Path | None) -> Path:
    return Path(path or os.environ.get("DEFAULT_ENV_FILE_PATH") or DEFAULT_ENV_FILE)


def _task_id(raw: Mapping[str, Any]) -> str:
    given = is_given(raw, "task_id")
    return to_text("task_id", raw["task_id"]) if given else EnvConfig().task_id


def _paths(raw: Mapping[str, Any], side: str, files: Mapping[str, str]) -> dict[str, Path]:
    """The paths of "input" or "output". Relative ones and those that are not given are below the
    root. The SDK's own model of `env.yaml` refuses null and numbers, so it only gives the default
    root.
    """
    given = {} if raw.get(side) is None else raw[side]
    if not isinstance(given, dict):
        raise TaskError(Code.CONFIG, f"{side} is {given!r}; it must hold paths")

    def path(key: str, default: str) -> str:
        return to_text(f"{side}.{key}", given[key]) if is_given(given, key) else default

    root = Path(path("root_dir", getattr(EnvConfig(), side).root_dir))
    below = {key: root / path(key, default) for key, default in files.items()}
    return {"root_dir": root, **below}


def _protocol(raw: Mapping[str, Any]) -> tuple[int, int, int]:
    """The protocol version, (0, 0, 0) if the platform names none. YAML reads an unquoted 1.0 as a
    number.
    """
    version = str(raw.get("protocol_version") or "")
    match = re.match(r"\s*v?(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    if match:
        major, minor, patch = (int(part or 0) for part in match.groups())
        return major, minor, patch
    newer = version and (
        is_given(raw.get("output") or {}, "executor_log_file") or "manifest_file" in raw
    )
    return (1, 1, 0) if newer else (0, 0, 0)
