"""Dropout (Srivastava et al., JMLR 15, 2014) that costs a CPU less.

PyTorch draws a float64 for each value, one after the other unless the processor is Intel's: of a
decoder's learning step that is some 2 %. Here a value takes 16 of the generator's bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidt.tracing import is_tracing

CHANCES = 2**16  # of a draw; the rate is rounded to a whole number of them
DRAWS = 4  # in the 64 bits that the generator gives at once


def drop(x: Tensor, rate: float) -> Tensor:
    """x with each value zeroed with probability rate, the others scaled so that the mean stays. The
    draws are those of PyTorch's generator, hence of its seed.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or is_tracing():
        return F.dropout(x, rate)
    dropped = min(round(rate * CHANCES), CHANCES - 1)
    count = x.numel()
    bits = torch.empty(-(-count // DRAWS), dtype=torch.int64).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[:count].view(x.shape)  # from -CHANCES / 2 on
    kept = drawn >= dropped - CHANCES // 2
    return x * kept.to(x.dtype).mul_(CHANCES / (CHANCES - dropped))


class Dropout(nn.Module):
    """`drop` in training, nothing otherwise."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, and the same again."""
        return drop(x, self.rate) if self.training and self.rate else x

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
