"""How a model runs, without a change to what it computes: with activations recomputed in the
backward pass, and within the memory that there is.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidt.errors import UserError
from vidt.model.vidt import BLOCKS


class OutOfMemory(UserError):
    """Not even one image at a time fits into memory; the message says what reduces it."""


def checkpoint_activations(model: nn.Module) -> None:
    """Blocks of the backbone and layers of the decoder keep their inputs only, and are computed
    again in the backward pass: less memory for a third more time.

    This replaces their `forward` instead of wrapping them, so that weights keep their names. A copy
    of the model made afterwards would run the blocks of the original.
    """
    for module in model.modules():
        if isinstance(module, BLOCKS):
            module.forward = _checkpointed(module.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A function of ours rather than a partial of PyTorch's: `torch.compile` compiles this one.
    def recomputed(*inputs: Any) -> Tensor:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return recomputed
