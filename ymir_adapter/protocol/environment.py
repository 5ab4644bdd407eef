"""`env.yaml`: which task this is, which protocol the platform speaks, and where all files lie."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ymir_exc.env import EnvConfig

from ymir_adapter.protocol.errors import Code, TaskError, one_line
from ymir_adapter.protocol.values import is_given, to_bool, to_text

DEFAULT_ENV_FILE = "/in/env.yaml"
FLAGS = ("run_training", "run_mining", "run_infer")
# Where files lie below the roots unless env.yaml says otherwise.
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
    """What the platform provides; nothing is ever written there."""

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


@dataclass(frozen=True)
class Environment:
    """What `env.yaml` says."""

    task_id: str
    protocol: tuple[int, int, int]  # (0, 0, 0) where none is named
    run_training: bool
    run_mining: bool
    run_infer: bool
    input: InputPaths
    output: OutputPaths


def read_environment(path: str | Path | None = None) -> Environment:
    """`env.yaml`: `path`, else the file that DEFAULT_ENV_FILE_PATH names.

    Raises TaskError naming the file and key.
    """
    path = _env_file(path)
    raw = read_mapping(path)
    env = _checked(path, raw)
    flags = {name: getattr(env, name) for name in FLAGS}
    if not any(flags.values()):
        raise TaskError(Code.CONFIG, f"{path}: one of {', '.join(FLAGS)} must be true")
    if flags["run_training"]:  # the platform never asks for more beside it
        flags |= {"run_mining": False, "run_infer": False}
    return Environment(
        task_id=env.task_id,
        protocol=_protocol(raw),
        **flags,
        input=InputPaths(**_under_root(vars(env.input), INPUT_FILES)),
        output=OutputPaths(**_under_root(vars(env.output), OUTPUT_FILES)),
    )


def read_identity(path: str | Path | None = None) -> tuple[str, Path]:
    """Task id and monitor file as far as they can be told, even of a broken `env.yaml`: a failure
    to read it must be reported too. Never raises.
    """
    path = _env_file(path)
    for needed in (("task_id", "output"), ("output",)):  # another key may be what is wrong
        try:
            raw = read_mapping(path)
            env = _checked(path, {key: raw[key] for key in needed if key in raw})
            paths = _under_root(vars(env.output), OUTPUT_FILES)
            return env.task_id, paths["monitor_file"]
        except TaskError:
            continue
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = {}
    for key in ("task_id", "monitor_file"):
        match = re.search(rf"^\s*{key}\s*:\s*['\"]?([^\s'\"#]+)", text, re.MULTILINE)
        found[key] = match.group(1) if match else ""
    default = EnvConfig()
    monitor = Path(default.output.root_dir) / (found["monitor_file"] or "monitor.txt")
    return found["task_id"] or default.task_id, monitor


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds keys and values; an empty one holds none."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise TaskError(Code.CONFIG, f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise TaskError(Code.CONFIG, f"{path} is not YAML: {one_line(error)}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise TaskError(Code.CONFIG, f"{path} holds no keys and values")
    return {str(key): value for key, value in (loaded or {}).items()}


def _env_file(path: str | Path | None) -> Path:
    return Path(path or os.environ.get("DEFAULT_ENV_FILE_PATH") or DEFAULT_ENV_FILE)


def _checked(path: Path, raw: Mapping[str, Any]) -> EnvConfig:
    """The SDK's model of `env.yaml`. It refuses null and takes only text for text, so both are
    dealt with before; what it does not know is dropped by it.
    """
    try:
        values: dict[str, Any] = {
            name: to_bool(name, raw[name]) for name in FLAGS if is_given(raw, name)
        }
        if is_given(raw, "task_id"):
            values["task_id"] = to_text("task_id", raw["task_id"])
        for side in ("input", "output"):
            paths = {} if raw.get(side) is None else raw[side]
            if not isinstance(paths, dict):
                raise TaskError(Code.CONFIG, f"{side} is {paths!r}; it must hold paths")
            paths = {str(key): value for key, value in paths.items()}
            given = [key for key in paths if is_given(paths, key)]
            root = {"root_dir": getattr(EnvConfig(), side).root_dir}
            values[side] = root | {key: to_text(f"{side}.{key}", paths[key]) for key in given}
    except TaskError as error:
        raise TaskError(error.code, f"{path}: {error}") from None
    # Paths that are not given follow the root, so no default of the SDK may stand in for them.
    blank = {
        "input": dict.fromkeys(INPUT_FILES, ""),
        "output": dict.fromkeys(OUTPUT_FILES, ""),
    }
    return EnvConfig(**{**values, **{side: blank[side] | values[side] for side in blank}})


def _under_root(paths: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Path]:
    """All paths of a side; relative ones and those not given are below its root."""
    root = Path(paths["root_dir"])
    below = {name: root / (paths[name] or default) for name, default in files.items()}
    return {"root_dir": root, **below}


def _protocol(raw: Mapping[str, Any]) -> tuple[int, int, int]:
    """(0, 0, 0) for a platform that names none. YAML reads an unquoted 1.0 as a number."""
    version = str(raw.get("protocol_version") or "")
    match = re.match(r"\s*v?(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    if match:
        major, minor, patch = (int(part or 0) for part in match.groups())
        return major, minor, patch
    newer = version and (
        is_given(raw.get("output") or {}, "executor_log_file") or "manifest_file" in raw
    )
    return (1, 1, 0) if newer else (0, 0, 0)
