"""Foreign state dicts to ours: all knowledge of other projects' key names, as pure functions.

The only module that knows how the released ViDT (github.com/naver-ai/vidt) and the ImageNet Swin
files name their tensors.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vidt.model import ViDTConfig
from vidt.swin import SWIN_VARIANTS

# Released name -> ours. First match wins.
RENAMED = (
    (re.compile(r"^transformer\.decoder\.layers\."), "decoder.layers."),
    (re.compile(r"^transformer\.reference_points\."), "decoder.reference_points."),
)
# Tensors that the released forward pass never reads, or that follow from the configuration.
UNUSED = re.compile(
    r"^transformer\.level_embed$"
    r"|^backbone\.norm[123]\.(weight|bias)$"
    r"|^backbone\.layers\.\d\.downsample\.(expansion|norm2)\."
    r"|\.relative_position_index$"
    r"|^transformer\.decoder\.bbox_embed\."  # an alias of bbox_embed
)
# ImageNet classifiers: the head and the final norm have no place in a detector.
CLASSIFIER = re.compile(r"^(head\.|norm\.)|\.relative_position_index$|\.attn_mask$")


def released_name(name: str) -> str | None:
    """Our name of a released tensor, or None for one that is not used."""
    if UNUSED.search(name):
        return None
    for pattern, replacement in RENAMED:
        if pattern.search(name):
            return pattern.sub(replacement, name)
    return name


def released_vidt(state_dict: Mapping[str, Tensor], config: ViDTConfig) -> dict[str, Tensor]:
    """A released ViDT's state dict under our names, for a strict load into `ViDT(config)`.

    Raises ValueError if heads that the configuration shares between levels differ.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        ours = released_name(name)
        if ours is None:
            continue
        if not config.with_box_refine:
            shared = re.sub(r"^(class_embed|bbox_embed)\.\d+\.", r"\1.0.", ours)
            if shared != ours:
                original = state_dict[shared]
                if not torch.equal(tensor, original):
                    raise ValueError(
                        f"{name} differs from {shared}: the file has heads of its own for every "
                        "level; load it with with_box_refine=True"
                    )
                ours = shared
        converted[ours] = tensor
    return converted


def imagenet_swin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin classifier's state dict (Microsoft's, ViDT's or timm's names) as tensors of our
    `backbone`.

    timm keeps the merging at the start of the next stage, the others at the end of the stage as we
    do.
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


def released_config(state_dict: Mapping[str, Tensor]) -> ViDTConfig:
    """The configuration of a released vanilla ViDT, from names and shapes alone.

    Raises ValueError for a file of another kind (ViDT+, CoaT, no neck), naming what it holds.
    """
    foreign = (
        "fusion.",
        "vector_embed.",
        "iou_embed.",
        "transformer.token_embed.",
        "backbone.cls_token",
    )
    for name in state_dict:
        if name.startswith(foreign):
            raise ValueError(f"it holds {name}, of a model that this version does not build")
    for name in ("class_embed.0.weight", "backbone.det_token"):
        if name not in state_dict:
            raise ValueError(f"it holds no {name}")
    levels = {int(name.split(".")[1]) for name in state_dict if name.startswith("class_embed.")}
    dim = state_dict["backbone.det_token"].shape[-1]
    depths = tuple(
        1
        + max(
            int(name.split(".")[4])
            for name in state_dict
            if name.startswith(f"backbone.layers.{i}.blocks.")
        )
        for i in range(4)
    )
    bodies = [
        name
        for name, body in SWIN_VARIANTS.items()
        if (body.embed_dim, body.depths) == (dim, depths)
    ]
    if not bodies:
        raise ValueError(f"its body has width {dim} and depths {depths}, which no known body has")
    first = state_dict["bbox_embed.0.layers.0.weight"]
    return ViDTConfig(
        backbone_name=bodies[0],
        num_classes=state_dict["class_embed.0.weight"].shape[0],
        det_token_num=state_dict["backbone.det_token"].shape[1],
        reduced_dim=first.shape[1],
        dec_layers=max(levels),
        dim_feedforward=state_dict["transformer.decoder.layers.0.linear1.weight"].shape[0],
        with_box_refine="transformer.decoder.bbox_embed.0.layers.0.weight" in state_dict,
    )
