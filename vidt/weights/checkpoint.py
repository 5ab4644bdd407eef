"""From a weights file, ours or released, to a model: complete, with fewer decoder layers, or to
fine-tune from.
"""

import dataclasses
import logging
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vidt.errors import UserError
from vidt.images.preprocessing import Preprocessing
from vidt.model.config import ViDTConfig
from vidt.model.vidt import ViDT, build_detector
from vidt.model.without_neck import ViDTWithoutNeck
from vidt.weights.published import NUM_COCO_ROWS, coco_rows
from vidt.weights.released import TOKEN_CLASSES, fitting, released_config, released_vidt
from vidt.weights.weights_file import (
    UnusableWeights,
    WeightsInfo,
    fill_strictly,
    is_safetensors,
    load_weights,
    read_pickled,
)

logger = logging.getLogger(__name__)

# Heads, and tables for training only, that either the file or the run may lack: they do not affect
# boxes and classes. Their settings must agree only if both have them.
OPTIONAL_HEADS = {
    "iou_aware": ("iou_embed.", ()),
    "token_label": ("token_head.", ()),
    "with_vector": ("vector_embed.", ("n_keep", "gt_mask_len", "vector_hidden_dim")),
    "label_embedding": ("label_enc.", ()),
    "query_groups": ("group_pos", ()),
}
# Settings that may differ between detectors that share weights.
INDIFFERENT = ("num_classes", "dropout", "aux_loss", "token_label_shift", "look_forward_twice")
NOT_SHARED = frozenset(
    {*INDIFFERENT, *OPTIONAL_HEADS, *(name for _, more in OPTIONAL_HEADS.values() for name in more)}
)
# Settings for the training of a decoder, as they are without one.
NO_DECODER: dict[str, Any] = {
    "query_groups": 1,
    "label_embedding": False,
    "look_forward_twice": False,
}
# Settings that a detector without neck does not use.
NECK_SETTINGS = ("dec_layers", "nheads", "dim_feedforward", "dec_n_points", "with_box_refine")


@dataclass(frozen=True)
class HeadTransfer:
    """Classes of a fine-tuned model whose head rows are loaded from the file, dropped, or newly
    initialised; `notes` name other parts that are left out or new. `respelled` maps a kept class to
    the file's name of it where only case or outer blanks differ.
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    notes: tuple[str, ...] = ()
    respelled: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [
            f"{name} (as {self.respelled[name]!r}, apart from case and blanks)"
            if name in self.respelled
            else name
            for name in self.kept
        ]
        parts = (("kept", told), ("dropped", self.dropped), ("new", self.new))
        classes = [f"{name} {len(rows)}: {', '.join(rows) or '-'}" for name, rows in parts]
        return "; ".join([*classes, *self.notes])


def load_model(
    path: str | Path, *, dec_layers: int | None = None
) -> tuple[ViDT | ViDTWithoutNeck, WeightsInfo]:
    """A detector from one of our weights files or a released one. With `dec_layers`, only that many
    decoder layers; a log line names those left out. Raises UnusableWeights naming the file.
    """
    tensors, info = load_weights(path) if is_safetensors(path) else _released_weights(path)
    if dec_layers is not None and dec_layers != info.config.dec_layers:
        tensors, config, note = with_fewer_layers(tensors, info.config, dec_layers, path)
        info = dataclasses.replace(info, config=config)
        logger.info(f"{path}: {note}")
    require_shapes(info.config, tensors, path)
    model = build_detector(info.config)
    fill_strictly(model, tensors, path)
    return model, info


def require_shapes(config: ViDTConfig, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Raises UnusableWeights unless the stored tensors have the sizes that the header promises:
    building a detector from a header that lies may take all memory.
    """
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, (tensor, axis, promised) in _defining_sizes(config).items():
        shape = stored.get(tensor, ())
        found = shape[axis] if axis < len(shape) else "missing"
        if found != promised:
            raise UnusableWeights(
                f"{path} has a header that does not fit its tensors: {name} is "
                f"{getattr(config, name)}, but {tensor} has shape {list(shape)}"
            )
    layers = {name.split(".")[2] for name in stored if name.startswith("decoder.layers.")}
    if config.method == "vidt" and len(layers) != config.dec_layers:
        raise UnusableWeights(
            f"{path} has a header that does not fit its tensors: dec_layers is "
            f"{config.dec_layers}, but {len(layers)} are stored"
        )


def _defining_sizes(config: ViDTConfig) -> dict[str, tuple[str, int, int]]:
    """Setting -> a tensor, an axis of it and the size there; one tensor shows each setting."""
    sizes = {
        "det_token_num": ("backbone.det_token", 1, config.det_token_num),
        "pos_dim": ("backbone.det_pos_embed", 2, config.pos_dim),
    }
    if config.method != "vidt":
        sizes["num_classes"] = ("class_embed.layers.2.bias", 0, config.num_classes + 1)
        sizes["reduced_dim"] = ("class_embed.layers.0.weight", 1, config.reduced_dim)
        return sizes
    sizes["num_classes"] = ("class_embed.0.bias", 0, config.num_classes)
    sizes["reduced_dim"] = ("class_embed.0.weight", 1, config.reduced_dim)
    if config.dec_layers:
        points = config.nheads * config.num_feature_levels * config.dec_n_points
        weights = "decoder.layers.0.cross_attn.attention_weights.bias"
        sizes["dim_feedforward"] = ("decoder.layers.0.linear1.bias", 0, config.dim_feedforward)
        sizes["dec_n_points"] = (weights, 0, points)
    if config.with_vector:
        sizes["n_keep"] = ("vector_embed.0.layers.2.bias", 0, config.n_keep)
        sizes["vector_hidden_dim"] = ("vector_embed.0.layers.0.bias", 0, config.vector_hidden_dim)
    return sizes


def _released_weights(path: str | Path) -> tuple[dict[str, Tensor], WeightsInfo]:
    tensors, info = read_released(path)
    if not info.class_names:
        raise UnusableWeights(
            f"{path} does not name its {info.config.num_classes} classes; run "
            f"`python -m vidt.convert {path} OUT.safetensors --class_names a,b,...` to add them"
        )
    return tensors, info


def with_fewer_layers(
    tensors: dict[str, Tensor], config: ViDTConfig, dec_layers: int, source: object
) -> tuple[dict[str, Tensor], ViDTConfig, str]:
    """The weights without the top decoder layers and their heads, the configuration without them,
    and a note for the log. Raises UnusableWeights if there are fewer layers.
    """
    if config.method != "vidt":
        raise UnusableWeights(f"{source} has no decoder layers; drop --dec_layers {dec_layers}")
    if not 0 <= dec_layers <= config.dec_layers:
        raise UnusableWeights(
            f"{source} has {config.dec_layers} decoder layers, not {dec_layers}; pass --dec_layers "
            f"{config.dec_layers} or less"
        )

    def above(name: str) -> bool:
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        head = re.match(r"(?:class|bbox|iou|vector)_embed\.(\d+)\.", name)
        return bool((layer and int(layer[1]) >= dec_layers) or (head and int(head[1]) > dec_layers))

    dropped = [name for name in tensors if above(name)]
    note = (
        f"left out decoder layers {dec_layers + 1} to {config.dec_layers} and the heads above "
        f"them, {len(dropped)} tensors"
    )
    left = {name: tensor for name, tensor in tensors.items() if name not in set(dropped)}
    config = dataclasses.replace(
        config, dec_layers=dec_layers, **({} if dec_layers else NO_DECODER)
    )
    if not dec_layers:
        left = {n: t for n, t in left.items() if not n.startswith(("label_enc.", "group_pos"))}
    return left, config, note


def read_start(path: str | Path) -> tuple[dict[str, Tensor], ViDTConfig, tuple[str, ...] | None]:
    """Weights to fine-tune from, one of our files or a released `.pth` file: tensors under our
    names, their configuration and, if known, class names (COCO's for the released files). Raises
    UnusableWeights naming the file.
    """
    tensors, info = load_weights(path) if is_safetensors(path) else read_released(path)
    require_shapes(info.config, tensors, path)
    return tensors, info.config, info.class_names or None


def read_released(path: str | Path) -> tuple[dict[str, Tensor], WeightsInfo]:
    """A released `.pth` file: tensors under our names, and its header. Settings that do not show in
    the tensors, such as the evaluation size, come from its `args`. Class names are the file's own,
    COCO's for 91 classes without names, else none.

    Raises UnusableWeights naming the file and how it differs from a released detector.
    """
    file = read_pickled(path)
    names = file.class_names
    try:
        config = released_config(file.tensors, file.settings)
        tensors = released_vidt(file.tensors, config)
        preprocessing = Preprocessing(**fitting(Preprocessing, file.settings))
        if names and len(names) != config.num_classes:
            raise UserError(f"it names {len(names)} classes and has {config.num_classes}")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UnusableWeights(
            f"{path} is not a ViDT checkpoint that training can start from: {error}"
        ) from error
    if not names and config.num_classes == NUM_COCO_ROWS:
        names = coco_rows()
    header = (file.metrics, file.training, file.thresholds)
    return tensors, WeightsInfo(config, names, preprocessing, *header)


def start_from(model: nn.Module, path: str | Path, class_names: tuple[str, ...]) -> HeadTransfer:
    """Loads weights for fine-tuning into `model`: class rows by name (see `matching_classes`),
    everything else strictly, except for decoder layers above the model's and optional heads that
    either side lacks. Warns if no class matches.

    Raises UnusableWeights if the architectures differ, naming the first flag that does.
    """
    tensors, config, names = read_start(path)
    own, fresh, notes = model.config, model.state_dict(), []
    assert isinstance(own, ViDTConfig)
    if own.method == config.method == "vidt" and own.dec_layers < config.dec_layers:
        tensors, config, note = with_fewer_layers(tensors, config, own.dec_layers, path)
        notes.append(note)
    _require_same(config, own, path)
    for flag, (prefix, _) in OPTIONAL_HEADS.items():
        theirs_has, ours_has, none = (getattr(each, flag) for each in (config, own, ViDTConfig))
        if theirs_has == ours_has:
            continue
        if theirs_has != none:
            tensors = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
            notes.append(f"left out the weights of {flag}")
        if ours_has != none:
            tensors |= {name: t for name, t in fresh.items() if name.startswith(prefix)}
            notes.append(f"the weights of {flag} start afresh")
    rows = _matching_rows(names, class_names, config.num_classes)
    for name in tensors:
        pairs = _row_pairs(name, rows, own, config)
        if pairs is not None and name in fresh and tensors[name] is not fresh[name]:
            tensors[name] = _merged(fresh[name], tensors[name], pairs)
    fill_strictly(model, tensors, path)
    if not rows:
        _warn_of_a_fresh_head(path, names, class_names)
    theirs = {class_names[ours]: names[row] for ours, row in rows.items()} if names else {}
    return HeadTransfer(
        kept=tuple(class_names[row] for row in rows),
        dropped=tuple(name for name in names or () if name not in theirs.values()),
        new=tuple(name for row, name in enumerate(class_names) if row not in rows),
        notes=tuple(notes),
        respelled={ours: name for ours, name in theirs.items() if ours != name},
    )


def _warn_of_a_fresh_head(
    path: str | Path, names: Sequence[str] | None, class_names: Sequence[str]
) -> None:
    known = "unnamed" if names is None else textwrap.shorten(", ".join(names), 300)
    asked = textwrap.shorten(", ".join(class_names), 300)
    frame = "!" * 80
    logger.warning(
        f"{frame}\nWARNING: no class of {path} matches this dataset: the class head starts from "
        f"random weights.\nIts classes: {known}\nThe dataset's: {asked}\nIf classes should match, "
        f"give them the same names.\n{frame}"
    )


def _require_same(theirs: ViDTConfig, ours: ViDTConfig, path: str | Path) -> None:
    indifferent = {*INDIFFERENT, *OPTIONAL_HEADS}
    for flag, (_, settings) in OPTIONAL_HEADS.items():
        if not (getattr(theirs, flag) and getattr(ours, flag)):
            indifferent |= set(settings)
    if theirs.method == ours.method != "vidt":
        indifferent |= set(NECK_SETTINGS)
    for name, value in dataclasses.asdict(theirs).items():
        own = getattr(ours, name)
        if name not in indifferent and value != own:
            raise UnusableWeights(
                f"{path} has {name} {value}, this run {own}; pass --{name} {_as_flag(value)}"
            )


def _as_flag(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _matching_rows(
    names: tuple[str, ...] | None, class_names: tuple[str, ...], rows: int
) -> dict[int, int]:
    """Our class row -> the file's. Rows of a file without names are used only if their number is
    ours.
    """
    if names is None:
        return {row: row for row in range(rows)} if rows == len(class_names) else {}
    return matching_classes(class_names, names)


def matching_classes(class_names: Sequence[str], known: Sequence[str]) -> dict[int, int]:
    """Index in `class_names` -> index in `known`, in order. Equal names match first, then names
    that differ in case and outer blanks only. No entry of `known` serves two classes.
    """
    pairs = {ours: known.index(name) for ours, name in enumerate(class_names) if name in known}
    taken = set(pairs.values())
    loose = {_plain(name): row for row, name in enumerate(known) if row not in taken}
    for ours, name in enumerate(class_names):
        if ours not in pairs and _plain(name) in loose:
            pairs[ours] = loose.pop(_plain(name))
    return dict(sorted(pairs.items()))


def _plain(name: str) -> str:
    return name.strip().lower()


def _row_pairs(
    name: str, rows: dict[int, int], ours: ViDTConfig, theirs: ViDTConfig
) -> dict[int, int] | None:
    """Our row -> the file's for a tensor whose first axis is the class; None for any other."""
    if re.match(r"class_embed\.\d+\.|label_enc\.", name):
        return rows
    if name.startswith("class_embed.layers.2."):  # without neck: a softmax, background last
        return {**rows, ours.num_classes: theirs.num_classes}
    if name.startswith(TOKEN_CLASSES):
        # Row 0 is the foreground indicator; without a shift it replaces class 0.
        first, their_first = int(ours.token_label_shift), int(theirs.token_label_shift)
        pairs = {row + first: their + their_first for row, their in rows.items()}
        return {0: 0, **{row: their for row, their in pairs.items() if row and their}}
    return None


def _merged(fresh: Tensor, tensor: Tensor, pairs: dict[int, int]) -> Tensor:
    """The fresh tensor with the paired rows of the other; the other as it is if it does not fit,
    for `fill_strictly` to name.
    """
    same_rows = tensor.ndim == fresh.ndim and tensor.shape[1:] == fresh.shape[1:]
    if not same_rows or len(tensor) <= max(pairs.values(), default=-1):
        return tensor
    merged = fresh.clone()
    for ours, theirs in pairs.items():
        merged[ours] = tensor[theirs]
    return merged
