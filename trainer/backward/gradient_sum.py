"""Sums the gradients of all processes while the backward pass still computes.

The gradients travel in buckets, as in DistributedDataParallel (arXiv 2006.15704): when a bucket has
all its gradients, its all-reduce starts, and the backward pass goes on. Unlike there, a process
that runs out of memory still takes part in the remaining all-reduces, so that no other process
waits for it; then all of them discard the step.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # the default of DistributedDataParallel


class GradientSum:
    """All-reduces of a model's gradients. With one process it does nothing.

    Per step: `begin` before the last backward pass, `finish`, `present`, then `take`. Until `take`
    the parameters hold this process's gradients, and the buckets the sums.

    Every process starts every bucket in every step, in one order: which collectives run depends on
    neither the data nor the memory. Buckets follow the parameters from last to first, about the
    order in which the backward pass reaches them.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        num_processes: int,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.buckets: list[_Bucket] = []
        self._in_last_backward = False
        self._works: list[Any] = []  # of the buckets that have started, in order
        if num_processes == 1:
            return
        for number, members in enumerate(buckets_of(trained[::-1], bucket_bytes)):
            self.buckets.append(_Bucket(members))
            for parameter in members:
                parameter.register_post_accumulate_grad_hook(partial(self._accumulated, number))

    def begin(self) -> None:
        """Call it before the last backward pass of a step: its gradients are complete."""
        self._in_last_backward = True
        for bucket in self.buckets:
            bucket.awaited = len(bucket.parameters)

    def _accumulated(self, number: int, parameter: Tensor) -> None:
        """Starts the buckets that are complete, unless one before them is not."""
        if self._in_last_backward:
            self.buckets[number].awaited -= 1
            while self._next is not None and self._next.awaited == 0:
                self._start(self._next)

    @property
    def _next(self) -> "_Bucket | None":
        """The first bucket that has not started."""
        started = len(self._works)
        return self.buckets[started] if started < len(self.buckets) else None

    def _start(self, bucket: "_Bucket") -> None:
        bucket.fill()
        self._works.append(dist.all_reduce(bucket.flat, async_op=True))

    def finish(self) -> None:
        """Starts the remaining buckets and waits for all. Call it in every step, also where the
        backward pass failed. On a GPU only its queue waits, not the host.
        """
        while self._next is not None:
            self._start(self._next)
        for work in self._works:
            work.wait()
        self._works, self._in_last_backward = [], False

    def present(self) -> list[bool]:
        """Whether this process has a gradient for each parameter, in the order of the buckets."""
        return [p.grad is not None for bucket in self.buckets for p in bucket.parameters]

    def take(self, anywhere: Sequence[bool]) -> None:
        """Makes the sums the parameters' gradients, until the next step. `anywhere` is `present` of
        any process: a parameter without a gradient on all processes keeps none.
        """
        pairs = [pair for bucket in self.buckets for pair in bucket.pairs()]
        for (parameter, summed), has_gradient in zip(pairs, anywhere, strict=True):
            if has_gradient:
                parameter.grad = summed


class _Bucket:
    """Some parameters, and memory of its own for their gradients: if it were allocated when it is
    needed, a process that is out of memory could not take part.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.awaited = len(parameters)  # gradients that the backward pass has yet to complete
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self._pieces = self.flat.split(sizes)

    def pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter and its part of the memory, in its shape."""
        pieces = zip(self.parameters, self._pieces, strict=True)
        return [(parameter, piece.view_as(parameter)) for parameter, piece in pieces]

    def fill(self) -> None:
        """Copies the gradients into the memory: zeros where there is none."""
        present = [(own.grad, piece) for own, piece in self.pairs() if own.grad is not None]
        if len(present) < len(self.parameters):
            self.flat.zero_()
        if present:
            gradients, pieces = zip(*present, strict=True)
            torch._foreach_copy_(list(pieces), list(gradients))


def buckets_of(parameters: Sequence[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """The parameters in order, in buckets that are closed once they hold `size` bytes."""
    buckets: list[list[nn.Parameter]] = []
    held = size
    for parameter in parameters:
        if held >= size:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += parameter.numel() * parameter.element_size()
    return buckets
