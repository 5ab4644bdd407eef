"""What it is when memory runs out, on any device."""

import torch
from accelerate.utils.memory import should_reduce_batch_size

from vidt.errors import UserError


class OutOfMemory(UserError):
    """One image at a time is too much for the memory; says what makes it less."""


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
