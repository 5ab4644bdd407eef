"""How a model is run, without a change to what it computes: compiled, with activations computed
anew, with memory that the process keeps.
"""

import ctypes
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vidt import coat, decoder, swin

BLOCKS = (swin.Block, coat.Block, decoder.DecoderLayer)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in the GNU C library
COMPILED_SHAPES = 64  # more than `compiled_side` leaves of any run


def keep_freed_memory() -> None:
    """Has the C library keep the memory that tensors leave, for the next ones.

    It would return large blocks to the system, and every step would pay for each page of them
    anew. Does nothing where there is no GNU C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def checkpoint_activations(model: nn.Module) -> None:
    """Blocks of the body and layers of the decoder keep their inputs only, and are computed again
    in the backward pass: less memory for a third more time.

    Their forward is replaced, rather than they wrapped, so that weights keep their names. A copy
    of the model made later would run the original's blocks.
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


def compiled_side(side: int, eval_size: int) -> int:
    """A side of a batch, in pixels, grown so that a run of many scales has few shapes: to the next
    multiple of about a quarter of eval_size, which itself stays.
    """
    granule = max(round(eval_size / 4 / 32) * 32, 32)
    return side if side == eval_size else -(-side // granule) * granule
