"""Freezing the first stages of a backbone, for fine-tuning.

Frozen weights get no gradient, no weight decay and no state of the optimiser. [DET] tokens and what
serves them alone go on learning, so gradients still run through the frozen stages, but only along
the [DET] tokens.
"""

from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vidt.model.coat import CoatStage
from vidt.model.swin import SwinStage

# Weights that serve [DET] tokens alone. No ImageNet backbone has them.
DET_WEIGHTS = ("det_token", "det_pos_embed", "det_pos_linear", "det_exp")

Stage = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def stage_of(name: str) -> int | None:
    """The stage, from 1 to 4, that a detector's parameter belongs to; 0: the patch embedding before
    the stages. None for the other parameters: those outside the backbone, the stride-64 map, which
    no published backbone has, and DET_WEIGHTS.

    A Swin stage includes the merging that follows it, a CoaT stage the embedding that it begins
    with.
    """
    top, *parts = name.split(".")
    if top != "backbone" or any(part in DET_WEIGHTS for part in parts):
        return None
    if parts[0] == "patch_embed":
        return 0
    stride_64 = parts[1:3] == ["3", "downsample"]
    return int(parts[1]) + 1 if parts[0] in ("layers", "stages") and not stride_64 else None


def freeze_stages(model: nn.Module, stages: int) -> None:
    """Freezes the patch embedding and the first `stages` stages of a detector's backbone, in place.

    Drop path is off in them: it regularises weights that learn, and these do not. Call it before
    the optimiser is made and after the moving average, whose copy would run the original's stages.
    """
    for name, parameter in model.named_parameters():
        if stage_of(name) in range(stages + 1):
            parameter.requires_grad_(False)
    found = [each for each in model.modules() if isinstance(each, SwinStage | CoatStage)]
    for stage in found[:stages]:
        for module in stage.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        if not stage.det_sees_patches:
            corner = _first_patch if isinstance(stage, SwinStage) else _first_pixel
            stage.__dict__["forward"] = _apart(stage.forward, corner)


def _first_patch(patches: Tensor) -> Tensor:
    """Of what a Swin stage takes: [B, H, W, C] -> [B, 1, 1, C]."""
    return patches[:, :1, :1]


def _first_pixel(images: Tensor) -> Tensor:
    """Of what a CoaT stage takes, and pads to one patch: [B, C, H, W] -> [B, C, 1, 1]."""
    return images[..., :1, :1]


def _apart(forward: Stage, corner: Callable[[Tensor], Tensor]) -> Stage:
    """The forward of a frozen stage whose patches and [DET] tokens do not attend to each other: the
    same but for rounding, without a graph for the patches. They are most of the tokens, and joined
    with [DET] tokens they would take part in the backward pass.

    Each pass has one token of the other kind as a stand-in, which changes nothing.
    """

    def frozen(
        patches: Tensor, det: Tensor, det_pos: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return forward(patches, det, det_pos, padding)
        # First the pass that has gradients: autocast keeps its copies of weights for both.
        _, learnt = forward(corner(patches), det, det_pos, padding)
        with torch.no_grad():
            fixed, _ = forward(patches, det[:, :1], det_pos[:, :1], padding)
        return fixed, learnt

    return frozen
