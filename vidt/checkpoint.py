"""Our weights file: safetensors with the configuration, class names, preprocessing and metrics in
its header.

Never unpickles what a stranger wrote: safetensors, or `torch.load(weights_only=True)` with
`argparse.Namespace` allowed by name, for the released ViDT files.
"""

import argparse
import dataclasses
import json
import os
import textwrap
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidt.convert import released_config, released_vidt
from vidt.model import ViDT, ViDTConfig
from vidt.preprocessing import Preprocessing

FORMAT = "vidt-weights-1"
CLASS_ROWS = ("class_embed.",)  # tensors whose first axis is the class


class UnusableWeights(ValueError):
    """A weights file that is missing, damaged, of another kind or of another architecture; one line
    names it.
    """


class Unreachable(ValueError):
    """Weights that could not be downloaded; one line says how to do without."""


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says of itself."""

    config: ViDTConfig
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadTransfer:
    """Classes of a fine-tuned model whose head rows came from the file, were left behind, or start
    afresh.
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        parts = (("kept", self.kept), ("dropped", self.dropped), ("new", self.new))
        return "; ".join(f"{name} {len(rows)}: {', '.join(rows) or '-'}" for name, rows in parts)


def save_weights(path: str | Path, state_dict: Mapping[str, Tensor], info: WeightsInfo) -> None:
    """Writes the file under a temporary name and renames it: at every instant `path` is absent or
    whole. Raises OSError naming it if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(info.config)),
        "class_names": json.dumps(info.class_names),
        "preprocessing": json.dumps(dataclasses.asdict(info.preprocessing)),
        "metrics": json.dumps(info.metrics),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    temporary = path.with_name(f".{path.name}.tmp")  # what a kill leaves, the next save replaces
    try:
        save_file(tensors, temporary, metadata=header)
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Tensors and header of a weights file of ours. Raises UnusableWeights, naming the file, if it
    is anything else.
    """
    info = read_info(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise UnusableWeights(f"{path} cannot be read as ViDT weights: {error}") from error
    return tensors, info


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
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableWeights(f"{path} has a header that cannot be read: {error}") from error


def load_model(path: str | Path) -> tuple[ViDT, WeightsInfo]:
    """A detector as it was saved. Raises UnusableWeights naming the file."""
    tensors, info = load_weights(path)
    model = ViDT(info.config)
    _fill(model, tensors, path)
    return model, info


def _fill(model: ViDT, tensors: dict[str, Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300)  # of torch's many lines, one
        raise UnusableWeights(f"{path} does not hold the tensors it should: {reason}") from error


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file, those under `model` if it has such an entry. Beside them it may
    hold nothing but plain values and `argparse.Namespace`.

    Raises UnusableWeights naming the file for anything else in it, damaged files included.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or refused file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnusableWeights(
            f"{path} cannot be read safely as PyTorch weights: {reason}"
        ) from error
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UnusableWeights(
            f"{path} holds no dictionary of tensors, neither bare nor under model"
        )
    return tensors


def read_start(path: str | Path) -> tuple[dict[str, Tensor], ViDTConfig, tuple[str, ...] | None]:
    """Weights to fine-tune from: tensors under our names, their configuration and, where known,
    class names.

    Takes our own files and the released ViDT's `.pth` files; told apart by content.
    """
    path = Path(path)
    if not path.is_file():
        raise UnusableWeights(f"{path} does not exist; pass --load_from a weights file")
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        tensors, info = load_weights(path)
        return tensors, info.config, info.class_names
    state_dict = read_pickled(path)
    try:
        config = released_config(state_dict)
        return released_vidt(state_dict, config), config, None
    except (KeyError, ValueError) as error:
        raise UnusableWeights(
            f"{path} is not a ViDT checkpoint that can be started from: {error}"
        ) from error


def local_weights(source: str) -> Path:
    """The file that `source`, a path or a URL, stands for. A URL is fetched once, into torch hub's
    cache.

    Raises Unreachable for a URL that cannot be fetched.
    """
    if "://" not in source:
        return Path(source)
    # Many addresses end in best.safetensors: the file's name alone would mix them up.
    name = f"{zlib.crc32(source.encode()):08x}-{Path(urlparse(source).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:  # torch writes to a temporary name and renames
        torch.hub.download_url_to_file(source, str(path), progress=False)
    except (OSError, RuntimeError) as error:
        raise Unreachable(
            f"{source} cannot be fetched ({error}); fetch it by hand and pass --load_from FILE"
        ) from error
    return path


def start_from(model: ViDT, path: str | Path, class_names: tuple[str, ...]) -> HeadTransfer:
    """Loads weights for fine-tuning into `model`; class rows by name, everything else strictly.

    Raises UnusableWeights where the architectures differ, naming the first flag that does.
    """
    tensors, config, names = read_start(path)
    for setting in dataclasses.fields(ViDTConfig):
        if setting.name in ("num_classes", "dropout", "aux_loss"):
            continue
        theirs, ours = getattr(config, setting.name), getattr(model.config, setting.name)
        if theirs != ours:
            raise UnusableWeights(
                f"{path} has {setting.name} {theirs}, this run {ours}; "
                f"pass --{setting.name} {theirs}"
            )
    fresh = model.state_dict()
    rows = _matching_rows(names, class_names, config.num_classes)
    for name in [name for name in tensors if name.startswith(CLASS_ROWS)]:
        merged = fresh[name].clone()
        for ours, theirs in rows.items():
            merged[ours] = tensors[name][theirs]
        tensors[name] = merged
    _fill(model, tensors, path)
    kept = tuple(class_names[row] for row in rows)
    return HeadTransfer(
        kept=kept,
        dropped=tuple(name for name in names or () if name not in class_names),
        new=tuple(name for name in class_names if name not in kept),
    )


def _matching_rows(
    names: tuple[str, ...] | None, class_names: tuple[str, ...], rows: int
) -> dict[int, int]:
    """Our class row -> the file's. A file without names serves its rows only where their number is
    ours.
    """
    if names is None:
        return {row: row for row in range(rows)} if rows == len(class_names) else {}
    return {ours: names.index(name) for ours, name in enumerate(class_names) if name in names}
