"""Whether what is computed now is being recorded rather than computed: then nothing may be kept for
later, since it belongs to the recording.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")
T = TypeVar("T")


def is_tracing() -> bool:
    """True under `torch.compile`, export and tracing, and inside modes such as fake tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _get_current_dispatch_mode() is not None


def kept(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For functions that make tables: the last `maxsize` are kept, by their arguments.

    Making one anew costs operators and, on a GPU, a copy before which it must finish all its work.
    A recording makes its own.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        def make_for_all(*args: P.args, **kwargs: P.kwargs) -> T:
            with torch.inference_mode(False):  # what prediction made may serve a training next
                return make(*args, **kwargs)

        keep: Callable[..., T] = functools.lru_cache(maxsize)(make_for_all)

        @functools.wraps(make)
        def get(*args: P.args, **kwargs: P.kwargs) -> T:
            return make(*args, **kwargs) if is_tracing() else keep(*args, **kwargs)

        return get

    return decorate
