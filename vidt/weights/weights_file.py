"""Our weights file: safetensors with the configuration, class names, preprocessing and metrics in
its header; and safe reading of foreign pickled files.

Nothing is unpickled freely: files are safetensors, or are read by `torch.load(weights_only=True)`
with `argparse.Namespace` allowed, which the released ViDT files contain.
"""

import argparse
import dataclasses
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vidt.atomic import atomic_write
from vidt.errors import UserError, shown
from vidt.images.inputs import require_thresholds
from vidt.images.preprocessing import Preprocessing
from vidt.model.config import ViDTConfig
from vidt.weights.published import NUM_COCO_ROWS, coco_rows

FORMAT = "vidt-weights-1"
# Prefix of a converted file's tensors that our model does not use; they are converted back.
UNREAD = "released."


class UnusableWeights(UserError):
    """A weights file is missing, damaged, of another kind or of another architecture; the message
    is one line that names it.
    """


@dataclass(frozen=True)
class WeightsInfo:
    """The header of a weights file."""

    config: ViDTConfig
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    metrics: dict[str, float] = field(default_factory=dict)
    # How it was trained. `category_ids` below reads an entry; the rest is for people.
    training: dict[str, Any] = field(default_factory=dict)
    # The score threshold of each class with the highest F1 in the evaluation of these weights, [K];
    # None for a class without a correct detection. Empty in older files.
    thresholds: tuple[float | None, ...] = ()

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The category ids of the training data, [K]; label + 1 if they are unknown."""
        if len(self.class_names) == NUM_COCO_ROWS and self.class_names == coco_rows():
            return tuple(range(NUM_COCO_ROWS))
        ids = self.training.get("category_ids", ())
        counted = tuple(range(1, len(self.class_names) + 1))
        return tuple(ids) if len(ids) == len(counted) and min(ids) >= 0 else counted


@dataclass(frozen=True)
class PickledWeights:
    """The content of a `.pth` file."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]  # its `args`, the flags of the run that wrote it, unchecked
    class_names: tuple[str, ...]  # empty unless `vidt.convert` wrote the file
    metrics: dict[str, float]  # likewise, as are these
    training: dict[str, Any]
    thresholds: tuple[float | None, ...]


def save_weights(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    info: WeightsInfo,
    unread: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a weights file atomically. `unread` are a released file's tensors that our model does
    not use. Raises OSError naming the file if it cannot be written.
    """
    header = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(info.config)),
        "class_names": json.dumps(info.class_names),
        "preprocessing": json.dumps(dataclasses.asdict(info.preprocessing)),
        "metrics": json.dumps(info.metrics),
        "training": json.dumps(info.training),
        "thresholds": json.dumps(info.thresholds),
    }
    named = {**state_dict, **{UNREAD + name: tensor for name, tensor in (unread or {}).items()}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    # Not safetensors' own writer: killed, it would leave a temporary file of unknown name.
    atomic_write(path, save(tensors, metadata=header))


def store_thresholds(path: str | Path, thresholds: Sequence[float | None]) -> None:
    """Replaces the thresholds of one of our weights files. Raises UnusableWeights, and OSError, as
    reading and writing it do.
    """
    tensors, info = load_weights(path)
    info = dataclasses.replace(info, thresholds=tuple(thresholds))
    save_weights(path, tensors, info, load_unread(path))


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Tensors and header of one of our weights files. Raises UnusableWeights, naming the file, if
    it is anything else.
    """
    info = read_info(path)
    tensors = _read_tensors(path)
    return {name: t for name, t in tensors.items() if not name.startswith(UNREAD)}, info


def load_unread(path: str | Path) -> dict[str, Tensor]:
    """The `unread` tensors that `save_weights` stored, by their released names. Raises
    UnusableWeights as `load_weights`.
    """
    tensors = _read_tensors(path)
    return {name.removeprefix(UNREAD): t for name, t in tensors.items() if name.startswith(UNREAD)}


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise UnusableWeights(f"{path} cannot be read as ViDT weights: {error}") from error


def read_info(path: str | Path) -> WeightsInfo:
    """The header of one of our weights files. Raises UnusableWeights as `load_weights`."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UnusableWeights(f"{path} cannot be read as ViDT weights: {error}") from error
    if header.get("format") != FORMAT:
        raise UnusableWeights(
            f"{path} is a safetensors file but not a ViDT weights file ({FORMAT})"
        )
    try:
        return _parsed(header)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = shown(str(error) or type(error).__name__, 200)
        raise UnusableWeights(f"{path} has a header that cannot be read: {reason}") from error


def _parsed(header: Mapping[str, str]) -> WeightsInfo:
    """The header's values. Raises KeyError, TypeError and ValueError for one that is missing, of
    another type or out of its range.
    """
    older = {"training": "{}", "thresholds": "[]"}  # of files that have none
    header = older | dict(header)
    names = ("config", "preprocessing", "metrics", "training")
    config, preprocessing, metrics, training = (_mapping(header, name) for name in names)
    if not all(isinstance(value, int | float) for value in metrics.values()):
        raise ValueError(f"metrics are {shown(metrics)}; they must be numbers")
    _check_training(training)
    for each in dataclasses.fields(ViDTConfig):
        given, default = config.get(each.name, each.default), each.default
        if type(given) is not type(default) and not isinstance(default, float | tuple):
            raise ValueError(f"{each.name} is {shown(given)}; it must be like {default}")
    info = WeightsInfo(
        config=ViDTConfig(**config),
        class_names=_texts(json.loads(header["class_names"])),
        preprocessing=Preprocessing(
            _whole(preprocessing["eval_size"]),
            _numbers(preprocessing["mean"]),
            _numbers(preprocessing["std"]),
        ),
        metrics=metrics,
        training=training,
        thresholds=tuple(json.loads(header["thresholds"])),
    )
    require_thresholds(info.thresholds, info.class_names)
    if len(info.class_names) != info.config.num_classes:
        raise ValueError(
            f"it names {len(info.class_names)} classes, but num_classes is "
            f"{info.config.num_classes}"
        )
    return info


def _mapping(header: Mapping[str, str], name: str) -> dict[str, Any]:
    values = json.loads(header[name])
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {shown(values)}; it must be a mapping")
    return values


def _check_training(training: Mapping[str, Any]) -> None:
    """Checks what other code reads of the record."""
    ids = training.get("category_ids", [])
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError(f"category_ids are {shown(ids)}; they must be whole numbers")
    for name in ("data", "settings"):
        if not isinstance(training.get(name, {}), dict):
            raise ValueError(f"training.{name} is {shown(training[name])}; it must be a mapping")
    for part in training.get("data", {}).values():
        kinds = {"source": str, "images": int, "boxes": int}
        if not isinstance(part, dict) or not all(type(part.get(n)) is k for n, k in kinds.items()):
            raise ValueError(f"training.data has {shown(part)}; it must tell {', '.join(kinds)}")


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"class_names are {shown(values)}; they must be texts")
    return tuple(values)


def _numbers(values: Any) -> Any:
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError(f"{shown(values)} must be finite numbers")
    return tuple(values)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"eval_size is {shown(value)}; it must be a whole number")
    return value


def is_safetensors(path: str | Path) -> bool:
    """Whether a file starts like safetensors: eight bytes of length, then JSON. Raises
    UnusableWeights if there is no such file.
    """
    if not Path(path).is_file():
        state = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UnusableWeights(f"{path} {state}; give the path of a weights file")
    with open(path, "rb") as file:
        return file.read(9)[8:9] == b"{"


def read_pickled(path: str | Path) -> PickledWeights:
    """Reads a `.pth` file, with its tensors at the top or under `model`. The file may hold only
    tensors, plain values and `argparse.Namespace`.

    Raises UnusableWeights, naming the file, if it is damaged or holds anything else.
    """
    content = _unpickle(path)
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
    ):
        raise UnusableWeights(
            f"{path} holds no dictionary of tensors, neither bare nor under model"
        )
    args, names, metrics = (content.get(name) for name in ("args", "class_names", "metrics"))
    named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    scored = isinstance(metrics, dict) and all(isinstance(x, float) for x in metrics.values())
    training, thresholds = content.get("training") or {}, content.get("thresholds") or ()
    try:
        _check_training(training)
        require_thresholds(thresholds, names if named else ())
    except (AttributeError, TypeError, ValueError):  # another code's words for other things
        training, thresholds = {}, ()
    return PickledWeights(
        tensors,
        settings=vars(args) if isinstance(args, argparse.Namespace) else {},
        class_names=tuple(names) if named else (),
        metrics=metrics if scored else {},
        training=training,
        thresholds=tuple(thresholds),
    )


def _unpickle(path: str | Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or refused file
        raise UnusableWeights(
            f"{path} cannot be read safely as PyTorch weights: {_reason(path, error)}"
        ) from error


def _reason(path: str | Path, error: Exception) -> str:
    """Our own message: PyTorch's advises to run the code in the file."""
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:
        return f"it holds a {foreign[1]}; only tensors and plain values are read"
    if isinstance(error, OSError):
        return str(error)
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"PK" or start[:1] == b"\x80":  # an archive, or a bare pickle
        return "it is damaged, or holds more than tensors and plain values"
    return "it is of another kind"


def fill_strictly(model: nn.Module, tensors: dict[str, Tensor], source: object) -> None:
    """Loads tensors that must match the model's exactly. Raises UnusableWeights that names `source`
    and the missing, unexpected or misshapen tensors.
    """
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300)  # torch's message has many lines
        raise UnusableWeights(f"{source} does not hold the tensors it should: {reason}") from error
