"""Optimiser, learning rate as a pure function of the step, and the moving average of the
weights.
"""

import math
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import AdamW, Optimizer

from trainer.config import TrainConfig

# Tables and tokens that are looked up rather than multiplied: decay would only pull them to zero.
TABLES = ("det_token", "det_pos_embed", "relative_position_bias_table")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms, biases, tokens and position tables without.

    (The released recipe also decays the head's biases and norms; that is not kept.)
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        bare = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in TABLES
        (plain if bare else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW; its learning rate is set before every step by `set_learning_rate`."""
    return AdamW(parameter_groups(model, config.weight_decay), lr=config.lr, fused=True)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from lr to min_lr over the rest of the run, per optimiser step.

    A function of the step alone: nothing to save, nothing that a resumed or a multi-process run
    could count wrongly.
    """
    warmup = min(config.warmup_steps, total_steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total_steps - warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """The same rate for all groups, as in the released recipe."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_ema(model: nn.Module, decay: float) -> ModelEmaV3:
    """timm's average, with its warm-up: it follows closely at first, so a short run has a useful
    average too.

    Must be made before Accelerate prepares the model: a copy of a prepared model would call the
    original's forward.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True)
