"""Whether what is computed now is being recorded rather than computed: then nothing may be kept for
later, since it belongs to the recording.
"""

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_tracing() -> bool:
    """True under `torch.compile`, export and tracing, and inside modes such as fake tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _get_current_dispatch_mode() is not None
