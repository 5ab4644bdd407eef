"""Our weights file: safetensors with the configuration, class names, preprocessing and metrics in
its header; and the safe reading of the pickled files of others.

Never unpickles what a stranger wrote: safetensors, or `torch.load(weights_only=True)` with
`argparse.Namespace` allowed by name, for the released ViDT files.
"""

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vidt.atomic import atomic_write
from vidt.errors import UserError
from vidt.images.preprocessing import Preprocessing
from vidt.model.config import ViDTConfig

FORMAT = "vidt-weights-1"
# Tensors of a converted file that our model has no use for; they serve the way back.
KEPT = "released."


class UnusableWeights(UserError):
    """A weights file that is missing, damaged, of another kind or of another architecture; one line
    names it.
    """


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says of itself."""

    config: ViDTConfig
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    metrics: dict[str, float] = field(default_factory=dict)
    # How it was trained, in words and numbers for people; what is in it decides nothing.
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PickledWeights:
    """A `.pth` file: its tensors, and what it says of them beside."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]  # flags of the run that wrote it, its `args`; as they were found
    class_names: tuple[str, ...]  # none unless our own writer left them there
    metrics: dict[str, float]  # likewise


def save_weights(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    info: WeightsInfo,
    kept: Mapping[str, Tensor] | None = None,
) -> None:
    """At every instant `path` is absent or whole. `kept` are a released file's unread tensors.
    Raises OSError naming the file if it cannot be written.
    """
    header = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(info.config)),
        "class_names": json.dumps(info.class_names),
        "preprocessing": json.dumps(dataclasses.asdict(info.preprocessing)),
        "metrics": json.dumps(info.metrics),
        "training": json.dumps(info.training),
    }
    named = {**state_dict, **{KEPT + name: tensor for name, tensor in (kept or {}).items()}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    # Not safetensors' own writer: a kill would leave a file whose name nobody knows.
    atomic_write(path, save(tensors, metadata=header))


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Tensors and header of a weights file of ours. Raises UnusableWeights, naming the file, if it
    is anything else.
    """
    info = read_info(path)
    tensors = _read_tensors(path)
    return {name: t for name, t in tensors.items() if not name.startswith(KEPT)}, info


def load_kept(path: str | Path) -> dict[str, Tensor]:
    """The released file's unread tensors in a file of ours that was converted from it, by their
    released names. Raises UnusableWeights as `load_weights`.
    """
    tensors = _read_tensors(path)
    return {name.removeprefix(KEPT): t for name, t in tensors.items() if name.startswith(KEPT)}


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise UnusableWeights(f"{path} cannot be read as ViDT weights: {error}") from error


def read_info(path: str | Path) -> WeightsInfo:
    """The header alone of a weights file of ours. Raises UnusableWeights as `load_weights`."""
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
        preprocessing = json.loads(header["preprocessing"])
        return WeightsInfo(
            config=ViDTConfig(**json.loads(header["config"])),
            class_names=tuple(json.loads(header["class_names"])),
            preprocessing=Preprocessing(
                preprocessing["eval_size"],
                tuple(preprocessing["mean"]),
                tuple(preprocessing["std"]),
            ),
            metrics=json.loads(header["metrics"]),
            training=dict(json.loads(header.get("training", "{}"))),  # older files have none
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableWeights(f"{path} has a header that cannot be read: {error}") from error


def is_ours(path: str | Path) -> bool:
    """Whether a file, by its first bytes, is safetensors: eight bytes of length, then JSON. Raises
    UnusableWeights if there is no such file.
    """
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UnusableWeights(f"{path} {found}; give the path of a weights file")
    with open(path, "rb") as file:
        return file.read(9)[8:9] == b"{"


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file, those under `model` if it has such an entry. Beside them it may
    hold nothing but plain values and `argparse.Namespace`.

    Raises UnusableWeights naming the file for anything else in it, damaged files included.
    """
    return read_pickled_file(path).tensors


def read_pickled_file(path: str | Path) -> PickledWeights:
    """`read_pickled`, and what is beside the tensors."""
    content = _unpickle(path)
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UnusableWeights(
            f"{path} holds no dictionary of tensors, neither bare nor under model"
        )
    args, names, metrics = (content.get(name) for name in ("args", "class_names", "metrics"))
    named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    scored = isinstance(metrics, dict) and all(isinstance(x, float) for x in metrics.values())
    return PickledWeights(
        tensors,
        settings=vars(args) if isinstance(args, argparse.Namespace) else {},
        class_names=tuple(names) if named else (),
        metrics=metrics if scored else {},
    )


def _unpickle(path: str | Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or refused file
        raise UnusableWeights(
            f"{path} cannot be read safely as PyTorch weights: {_reason(path, error)}"
        ) from error


def _reason(path: str | Path, error: Exception) -> str:
    """Why, in words of ours: PyTorch's own advise to run whatever code is in the file."""
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:
        return f"it holds a {foreign[1]}, and nothing but tensors and plain values is read"
    if isinstance(error, OSError):
        return str(error)
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"PK" or start[:1] == b"\x80":  # an archive, or a bare pickle
        return "it is damaged, or holds more than tensors and plain values"
    return "it is of another kind"


def fill_strictly(model: nn.Module, tensors: dict[str, Tensor], source: object) -> None:
    """Loads tensors that must be the model's, one for one. Raises UnusableWeights naming `source`
    and what is missing, left over or misshapen.
    """
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300)  # of torch's many lines, one
        raise UnusableWeights(f"{source} does not hold the tensors it should: {reason}") from error
