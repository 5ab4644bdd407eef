"""How a model runs, without a change to what it computes: compiled, or with activations recomputed
in the backward pass.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vidt.model import coat, decoder, swin

BLOCKS = (swin.SwinBlock, coat.CoatBlock, decoder.DecoderLayer)
SIDES = 6  # a compiled run has about as many lengths of a side
# More shapes than `compiled_canvas` produces, also if micro-batches become smaller during the run.
COMPILED_SHAPES = 4 * (SIDES + 2) ** 2


def checkpoint_activations(model: nn.Module) -> None:
    """Blocks of the backbone and layers of the decoder keep their inputs only, and are computed
    again in the backward pass: less memory for a third more time.

    This replaces their `forward` instead of wrapping them, so that weights keep their names. A copy
    of the model made afterwards would run the blocks of the original.
    """
    for module in model.modules():
        if isinstance(module, BLOCKS):
            module.forward = partial(  # type: ignore[method-assign]
                checkpoint, module.forward, use_reentrant=False
            )


def compiled(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """The model through torch.compile, a graph for each shape. It shares the weights."""
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    return torch.compile(  # type: ignore[return-value]
        model, dynamic=False, fullgraph=True, backend=backend
    )


def compiled_canvas(canvas: tuple[int, int], eval_size: int, longest: int) -> tuple[int, int]:
    """A batch's height and width in pixels, grown so that a run of many scales has few shapes: each
    to the next multiple of a quarter of eval_size or, if that is more, of a sixth of the longest
    side of the run, both rounded to 32. eval_size itself stays.
    """
    granule = max(round(eval_size / 4 / 32), math.ceil(longest / SIDES / 32), 1) * 32
    height, width = (
        side if side == eval_size else -(-side // granule) * granule for side in canvas
    )
    return height, width
