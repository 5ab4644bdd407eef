"""Conversion of foreign state dicts to ours and back, as pure functions.

The only module that knows the tensor names of the released ViDT (github.com/naver-ai/vidt) and of
ImageNet classifiers.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from vidt.errors import UserError
from vidt.model.config import (
    COAT_VARIANTS,
    NECK_PARTS,
    NUM_LEVELS,
    SWIN_VARIANTS,
    WITHOUT_NECK,
    ViDTConfig,
)
from vidt.model.swin import COARSE_DIM, WINDOW

# Prefixes of names, released and ours, for both directions; the first match wins. {} is a digit;
# {+} is larger by 1 in the released name, where CoaT's stages count from 1.
RENAMED = (
    ("transformer.decoder.layers.", "decoder.layers."),
    ("transformer.reference_points.", "decoder.reference_points."),
    ("transformer.enc_output", "token_head.enc_output"),
    ("transformer.token_embed.", "token_head.token_embed."),
    ("fusion.multi_scaler.layer_{}_rn.", "input_proj.project.{}.0."),
    ("fusion.multi_scaler.p_norm_{}.", "input_proj.project.{}.1."),
    ("fusion.multi_scaler.refinenet_{}.", "input_proj.refinenet.{}."),
    ("backbone.patch_embed{+}.", "backbone.stages.{}.patch_embed."),
    ("backbone.cls_token{+}", "backbone.stages.{}.cls_token"),
    ("backbone.cpe{+}.", "backbone.stages.{}.cpe."),
    ("backbone.crpe{+}.", "backbone.stages.{}.crpe."),
    ("backbone.serial_blocks{+}.", "backbone.stages.{}.serial_blocks."),
    # The released CoaT widens [DET] tokens after a stage, ours before the next.
    ("backbone.det_exp_{}.", "backbone.stages.{}.det_exp.0."),
    ("backbone.det_exp_norm_{}.", "backbone.stages.{}.det_exp.1."),
)
TOKEN_CLASSES = "token_head.token_embed."  # a row for each class, and the foreground indicator
# Tensors that the released forward pass never reads, or that the configuration determines.
UNUSED = re.compile(
    r"^transformer\.level_embed$"
    r"|^backbone\.norm[123]\.(weight|bias)$"
    r"|^backbone\.layers\.\d\.downsample\.(expansion|norm2)\."
    r"|^fusion\.multi_scaler\.refinenet_3\.(smoothing|resConfUnit1)\."
    r"|\.relative_position_index$"
)
# Aliases of a tensor in the released state dict, and its first name.
ALIASES = (
    (re.compile(r"^transformer\.decoder\.(bbox_embed\.)"), r"\1"),
    (re.compile(r"^vector_embed\.\d+\."), r"vector_embed.0."),
    (re.compile(r"^(backbone)\.serial_blocks(\d)\.\d+\.(cpe)\."), r"\1.\3\2."),
    (re.compile(r"^(backbone)\.serial_blocks(\d)\.\d+\.factoratt_crpe\.(crpe)\."), r"\1.\3\2."),
)
# Heads that all levels share if boxes are not refined.
SHARED_HEAD = re.compile(r"^(class_embed|bbox_embed|iou_embed)\.\d+\.")
# The head and the final norm of ImageNet classifiers, which a detector does not have.
CLASSIFIER = re.compile(r"^(head\.|norm\.)|\.relative_position_index$|\.attn_mask$")
COAT_CLASSIFIER = re.compile(r"^(head|norm\d?|aggregate)\.")


def our_name(name: str) -> str | None:
    """Our name of a released tensor; None if our model does not use it."""
    if UNUSED.search(name):
        return None
    name = _first_name(name)
    for theirs, ours in RENAMED:
        if match := _pattern(theirs).match(name):
            digit = str(int(match[1]) - ("{+}" in theirs)) if match.groups() else ""
            return ours.replace("{}", digit) + name[match.end() :]
    return name


def name_in_released(name: str) -> str:
    """The first released name of one of our tensors."""
    for theirs, ours in RENAMED:
        if match := _pattern(ours).match(name):
            digit = match[1] if match.groups() else ""
            larger = str(int(digit) + 1) if "{+}" in theirs else ""
            return theirs.replace("{+}", larger).replace("{}", digit) + name[match.end() :]
    return name


def _pattern(beginning: str) -> re.Pattern[str]:
    """The pattern of a prefix in RENAMED, with the stage's digit as a group."""
    escaped = re.escape(beginning)
    return re.compile(escaped.replace(r"\{\+\}", "([1-4])").replace(r"\{\}", "([0-3])"))


def _first_name(name: str) -> str:
    for alias, first in ALIASES:
        name = alias.sub(first, name)
    return name


def released_vidt(state_dict: Mapping[str, Tensor], config: ViDTConfig) -> dict[str, Tensor]:
    """A released ViDT's state dict under our names, for a strict load into the detector of
    `config`.

    Raises UserError if aliases of a tensor differ, or heads that all levels share in `config`.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        ours, first = our_name(name), _first_name(name)
        hint = "the released code shares this tensor; the file is damaged"
        if not config.with_box_refine and SHARED_HEAD.match(name):
            first = SHARED_HEAD.sub(r"\1.0.", name)
            hint = "every level has a head of its own; load it with with_box_refine=True"
        if first != name and not _same(tensor, state_dict.get(first)):
            raise UserError(f"{name} differs from {first}: {hint}")
        if ours is not None and first == name:
            converted[ours] = tensor
    return converted


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(tensor, other)


def unread_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a released state dict that our detector does not use and cannot compute."""
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if UNUSED.search(name) and not name.endswith(".relative_position_index")
    }


def to_released(
    tensors: Mapping[str, Tensor], config: ViDTConfig, unread: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Our state dict as the released code writes it: its names, every alias (one tensor under
    several names) and the tensors that it never reads. Those come from `unread`; by default norm
    scales are 1 and all others 0.
    """
    released: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        first = name_in_released(name)
        released[first] = tensor
        released |= dict.fromkeys(_aliases(first, config), tensor)
    for name, shape in _unread_shapes(config):
        scale = len(shape) == 1 and name.endswith(".weight")
        released[name] = (torch.ones if scale else torch.zeros)(shape)
    released |= {name: tensor for name, tensor in (unread or {}).items() if name in released}
    if config.backbone_name in SWIN_VARIANTS:
        index = get_relative_position_index(WINDOW, WINDOW)
        for block in _swin_blocks(config):
            released[f"{block}.attn.relative_position_index"] = index.clone()
    return released


def _aliases(name: str, config: ViDTConfig) -> Iterator[str]:
    """All aliases of a released tensor."""
    shared = not config.with_box_refine and SHARED_HEAD.match(name)
    if shared or name.startswith("vector_embed."):
        head, _, rest = name.split(".", 2)
        yield from (f"{head}.{level + 1}.{rest}" for level in range(config.dec_layers))
    elif config.method == "vidt" and name.startswith("bbox_embed."):
        yield f"transformer.decoder.{name}"
    if match := re.match(r"backbone\.(cpe|crpe)([1-4])\.(.*)", name):
        part = "cpe" if match[1] == "cpe" else "factoratt_crpe.crpe"
        for block in range(COAT_VARIANTS[config.backbone_name].depths[int(match[2]) - 1]):
            yield f"backbone.serial_blocks{match[2]}.{block}.{part}.{match[3]}"


def _unread_shapes(config: ViDTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the released tensors that no forward pass reads."""
    if config.method == "vidt":
        yield "transformer.level_embed", (config.num_feature_levels, config.reduced_dim)
    if config.backbone_name in SWIN_VARIANTS:
        dims = [SWIN_VARIANTS[config.backbone_name].embed_dim * 2**stage for stage in range(4)]
        outs = [*dims[1:], COARSE_DIM][: 4 if config.method == "vidt" else 3]
        for stage, (dim, out) in enumerate(zip(dims[: len(outs)], outs, strict=True)):
            yield f"backbone.layers.{stage}.downsample.expansion.weight", (out, dim)
            yield f"backbone.layers.{stage}.downsample.norm2.weight", (dim,)
            yield f"backbone.layers.{stage}.downsample.norm2.bias", (dim,)
        for stage in (1, 2, 3):
            yield f"backbone.norm{stage}.weight", (dims[stage],)
            yield f"backbone.norm{stage}.bias", (dims[stage],)
    if config.epff:
        dim, inner = config.reduced_dim, config.reduced_dim // 4
        block = "fusion.multi_scaler.refinenet_3"
        shapes = {
            "smoothing": (dim, dim, 1, 1),
            "resConfUnit1.conv1": (inner, dim, 1, 1),
            "resConfUnit1.conv2": (inner, inner, 3, 3),
            "resConfUnit1.conv3": (dim, inner, 1, 1),
        }
        for part, shape in shapes.items():
            yield f"{block}.{part}.weight", shape
            yield f"{block}.{part}.bias", shape[:1]


def _swin_blocks(config: ViDTConfig) -> Iterator[str]:
    for stage, depth in enumerate(SWIN_VARIANTS[config.backbone_name].depths):
        yield from (f"backbone.layers.{stage}.blocks.{block}" for block in range(depth))


def imagenet_swin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin classifier's state dict (Microsoft's, ViDT's or timm's names) as tensors of our
    `backbone`.

    timm has the merging at the start of the next stage; the others have it at the end of the stage,
    as we do.
    """
    timm_layout = not any(name.startswith("layers.0.downsample.") for name in state_dict)
    converted = {}
    for name, tensor in state_dict.items():
        if CLASSIFIER.search(name):
            continue
        match = re.match(r"layers\.(\d)\.(downsample\..*)", name)
        if match and timm_layout:
            name = f"layers.{int(match[1]) - 1}.{match[2]}"
        converted[name] = tensor
    return converted


def imagenet_coat(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CoaT-lite classifier's state dict (its authors' names, which timm and the released ViDT
    also use) as tensors of our `backbone`.
    """
    converted = {}
    for name, tensor in state_dict.items():
        ours = our_name(f"backbone.{name}")
        if ours is not None and not COAT_CLASSIFIER.search(name):
            converted[ours.removeprefix("backbone.")] = tensor
    return converted


def released_config(
    state_dict: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> ViDTConfig:
    """The configuration of a released detector, from the names and shapes of its tensors.

    Settings that do not show in them (cross_indices, gt_mask_len, dropout, how the decoder's heads
    and points divide their product ...) come from `settings`, the released flags by name, or have
    their defaults. Raises UserError for a file of another kind, naming a missing tensor.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if "backbone.det_token" not in shapes:
        raise UserError("it holds no backbone.det_token")
    flags = fitting(ViDTConfig, settings or {})
    common: dict[str, Any] = {
        "backbone_name": _backbone_name(shapes),
        "det_token_num": shapes["backbone.det_token"][1],
        "pos_dim": shapes["backbone.det_pos_embed"][2],
    }
    if "class_embed.layers.2.weight" in shapes:
        own = {
            "method": WITHOUT_NECK,
            "num_classes": shapes["class_embed.layers.2.weight"][0] - 1,  # the last is background
            "reduced_dim": shapes["class_embed.layers.0.weight"][1],
            **dict.fromkeys(NECK_PARTS, False),
        }
    elif "class_embed.0.weight" in shapes:
        heads = flags.get("nheads", ViDTConfig.nheads)
        own = {"method": "vidt", **_neck_settings(shapes, heads), **_plus_settings(shapes)}
    else:
        raise UserError("it holds no class_embed.0.weight")
    return ViDTConfig(**{**flags, **common, **own})


def fitting(owner: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are fields of a dataclass and have the type of the field's default."""
    defaults = {field.name: field.default for field in dataclasses.fields(owner)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name in defaults and _alike(value, defaults[name])
    }


def _alike(value: object, default: object) -> bool:
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return all(type(each) is type(default[0]) for each in value)
    return type(value) is type(default)


Shapes = Mapping[str, tuple[int, ...]]


def _backbone_name(shapes: Shapes) -> str:
    coat = "backbone.cls_token1" in shapes
    stages = [f"serial_blocks{i + 1}." if coat else f"layers.{i}.blocks." for i in range(4)]
    depths = tuple(_count(shapes, f"backbone.{stage}") for stage in stages)
    if coat:
        dims = tuple(shapes[f"backbone.cls_token{i + 1}"][2] for i in range(4))
        known = {(each.dims, each.depths): name for name, each in COAT_VARIANTS.items()}
    else:
        dims = (shapes["backbone.det_token"][2],)
        known = {((each.embed_dim,), each.depths): name for name, each in SWIN_VARIANTS.items()}
    if (dims, depths) not in known:
        raise UserError(f"no known backbone has width {dims} and depths {depths}")
    return known[dims, depths]


def _count(shapes: Shapes, prefix: str) -> int:
    """The number of modules in a list."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _neck_settings(shapes: Shapes, nheads: int) -> dict[str, Any]:
    layers = _count(shapes, "transformer.decoder.layers.")
    settings: dict[str, Any] = {
        "num_classes": shapes["class_embed.0.weight"][0],
        "reduced_dim": shapes["class_embed.0.weight"][1],
        "dec_layers": layers,
        "with_box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in shapes,
    }
    heads = _count(shapes, "class_embed.")
    if heads != layers + 1:
        raise UserError(f"it holds {layers} decoder layers and {heads} heads, not {layers + 1}")
    if layers:
        weights = shapes["transformer.decoder.layers.0.cross_attn.attention_weights.weight"]
        settings["dim_feedforward"] = shapes["transformer.decoder.layers.0.linear1.weight"][0]
        settings["dec_n_points"], rest = divmod(weights[0], max(nheads, 1) * NUM_LEVELS)
        if rest:
            raise UserError(f"its {weights[0]} attention weights do not fit {nheads} heads")
    return settings


def _plus_settings(shapes: Shapes) -> dict[str, Any]:
    tokens = shapes.get("transformer.token_embed.weight")
    last = shapes.get("vector_embed.0.layers.2.weight")
    settings: dict[str, Any] = {
        "epff": "fusion.multi_scaler.layer_0_rn.weight" in shapes,
        "iou_aware": "iou_embed.0.layers.0.weight" in shapes,
        "token_label": tokens is not None,
        "with_vector": last is not None,
    }
    if tokens:
        settings["token_label_shift"] = tokens[0] == shapes["class_embed.0.weight"][0] + 1
    if last:
        settings |= {"n_keep": last[0], "vector_hidden_dim": last[1]}
    return settings
