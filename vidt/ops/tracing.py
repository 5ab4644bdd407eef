"""Whether what is computed now is being recorded rather than computed, and tables that are kept for
later, which depends on that: what is made inside a recording belongs to it.
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


def is_compiled() -> bool:
    """True under `torch.compile` alone, whose graph runs in this process."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def kept(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For functions that make tables of constants: the last `maxsize` are kept, by their arguments.

    Making one anew costs operators and, on a GPU, a copy before which it must finish all its work.
    A compiled graph holds on to those that it was made with; an exported one makes its own.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        # Outside inference mode: what prediction made may serve a training next.
        keep: Callable[..., T] = functools.lru_cache(maxsize)(torch.inference_mode(False)(make))

        @torch.compiler.assume_constant_result
        def keep_for_a_graph(*args: P.args, **kwargs: P.kwargs) -> T:
            return keep(*args, **kwargs)

        @functools.wraps(make)
        def get(*args: P.args, **kwargs: P.kwargs) -> T:
            if is_compiled():
                return keep_for_a_graph(*args, **kwargs)
            return make(*args, **kwargs) if is_tracing() else keep(*args, **kwargs)

        return get

    return decorate
