"""The optimiser, the learning rate as a function of the step, the moving average of the weights."""

import math
import sys
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import AdamW, Optimizer

from trainer.backward.freezing import stage_of
from trainer.settings.config import TrainConfig

# Embeddings, which multiply nothing: weight decay would only pull them to zero.
TABLES = (
    *("det_token", "cls_token", "det_pos_embed", "relative_position_bias_table"),
    *("group_pos", "label_enc"),
)

# Weights that determine reference points and sampling positions. The position embedding is small
# (std 0.02) and passes a norm, so a step of the usual size moves all positions at once. Deformable
# DETR (arXiv 2010.04159, appendix A.4) trains its projections to positions at a tenth of the rate.
POSITION_WEIGHTS = (
    *("reference_points", "sampling_offsets", "query_pos_proj", "det_pos_embed"),
    "group_pos",
)

# Inputs of a matrix whose rate --lr_fan_in_power does not change; most matrices of the decoder have
# this number.
COMMON_FAN_IN = 256

# Share of a run that `--sched flat_cosine` trains at lr, warm-up included (RTMDet, arXiv
# 2212.07784).
FLAT_SHARE = 0.5

# Share of a run that the average of `--ema_decay auto` looks back: 1 / (1 - decay) steps. RTMDet
# (arXiv 2212.07784) has 5,000 of 139,000.
EMA_SHARE = 0.04


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    position_mult: float = 1.0,
    backbone_mult: float = 1.0,
    fan_in_power: float = 0.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups: matrices with weight decay; norms, biases, tokens and position tables
    without. (The released recipe also decays the head's biases and norms.) Frozen parameters are in
    none.

    `lr_mult` of a group is its rate relative to the run's: position_mult for POSITION_WEIGHTS,
    backbone_mult for the rest of the backbone, and either times (COMMON_FAN_IN / n) ** fan_in_power
    for a matrix with n inputs. Adam moves each weight by about its rate, so an output that sums n
    weights moves n times as far: one rate for all is too high for wide layers and too low for
    narrow ones. In theory the power is 1 for hidden matrices (Tensor Programs V, arXiv 2203.03466,
    table 3); 0 means one rate for all. A depthwise filter has as many inputs at any width.

    A backbone's layer also takes layer_decay to the power of its depth, see `layer_depths`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    depths = layer_depths(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        bare = parameter.ndim < 2 or any(part in TABLES for part in parts)
        mult = backbone_mult if "backbone" in parts else 1.0
        if any(part in POSITION_WEIGHTS for part in parts):
            mult = position_mult
        depthwise = parameter.ndim == 4 and parameter.shape[1] == 1
        if not bare and not depthwise:
            mult *= (COMMON_FAN_IN / parameter[0].numel()) ** fan_in_power
        mult *= layer_decay ** depths.get(name, 0)
        groups.setdefault((0.0 if bare else weight_decay, mult), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_mult": mult}
        for (decay, mult), parameters in groups.items()
    ]


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """How many layers below the decoder the parameters of a backbone are: 1 for the last block, one
    more for each block before it, and most for the patch embedding (BEiT, arXiv 2106.08254,
    appendix; Swin as in SimMIM, arXiv 2111.09886). Parameters that `stage_of` gives no stage are
    left out.

    A merging or embedding between stages counts as the block before it; what the blocks of a CoaT
    stage share as the first of them.
    """
    places = {n: _place(n, stage) for n in names if (stage := stage_of(n)) is not None}
    blocks = sorted({place for name, place in places.items() if "blocks." in name})
    top = len(blocks) + 1
    return {name: top - bisect_right(blocks, place) for name, place in places.items()}


def _place(name: str, stage: int) -> tuple[int, int]:
    """The stage and the block in it, from 1, of a backbone's parameter; 0: before the first."""
    parts = name.split(".")
    if "patch_embed" in parts:
        return stage, 0
    if "downsample" in parts:
        return stage, sys.maxsize
    return stage, int(parts[4]) + 1 if parts[3].endswith("blocks") else 1


def make_optimizer(model: nn.Module, config: TrainConfig, *, scaled: bool = False) -> AdamW:
    """AdamW; `set_learning_rate` sets its rate before every step.

    scaled: a loss scaler (fp16) will step it. A fused AdamW skips an overflowed step inside its
    kernel, unnoticed; Accelerate has to notice it.
    """
    groups = parameter_groups(
        model,
        config.weight_decay,
        position_mult=config.lr_linear_proj_mult,
        backbone_mult=config.lr_backbone_mult,
        fan_in_power=config.lr_fan_in_power,
        layer_decay=config.lr_layer_decay,
    )
    betas = (0.9, config.adam_beta2)
    return AdamW(groups, lr=config.lr, betas=betas, fused=not scaled, foreach=scaled)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine or a line from lr to min_lr over the rest of the run, per
    optimiser step; flat_cosine stays at lr until FLAT_SHARE of the run is over.

    It depends on the step alone, so there is no state to save, and resumed and multi-process runs
    cannot miscount.
    """
    share = config.warmup_share
    warmup = min(round(share * total_steps) if share else config.warmup_steps, total_steps // 3)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    flat = round(FLAT_SHARE * total_steps) if config.sched == "flat_cosine" else 0
    start = max(warmup, flat)
    done = max(step - start, 0) / max(total_steps - start, 1)
    left = 1 - done if config.sched == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets each group's rate to `rate` times its `lr_mult`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]


def ema_decay_of(total_steps: int) -> float:
    """The decay that `--ema_decay auto` stands for: the average looks back EMA_SHARE of the run.
    That a share suits runs of any length better than a number of steps is shown for diffusion
    models in arXiv 2312.02696, section 3.
    """
    return 1 - 1 / max(EMA_SHARE * total_steps, 1)


def make_ema(model: nn.Module, decay: float) -> ModelEmaV3:
    """timm's average, with its warm-up: it follows the weights closely at first, so that it is of
    use in short runs too.

    Make it before Accelerate prepares the model: a copy of a prepared model calls the original's
    forward.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True)
