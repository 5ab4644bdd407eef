"""Images in, batches of equal canvas out. Threads read ahead, but only a few images are in memory
at any time.

Does not import PyTorch.
"""

import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

AHEAD = 2  # items that each thread may be ahead of the consumer
MOST_THREADS = 16
PATIENCE = 0.5  # seconds after which a finished result is yielded although the input is slow
PENDING_BATCHES = 8  # batches that an image may wait for others of its canvas

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Picture:
    """An image resized to its canvas: `pixels` uint8 [h, w, 3].

    `size` is (height, width) of the original; `index` counts the images in input order.
    """

    index: int
    size: tuple[int, int]
    pixels: np.ndarray

    @property
    def canvas(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reading_threads() -> int:
    """One thread per available core: Pillow releases the GIL while it decodes."""
    return min(available_cores(), MOST_THREADS)


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Result],
    threads: int,
    *,
    weigh: Callable[[Item], float] = lambda item: 0.0,
    heaviest: float = math.inf,
) -> Iterator[Result]:
    """Yields `read(item)` of each item, in order, computed ahead by threads. An exception of `read`
    is raised at the item's turn. If items arrive slowly, finished results are yielded without
    waiting for more items. Items that weigh more than `heaviest` together are not ahead at once.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="reader") as pool:
        ahead: deque[Future[Result]] = deque()
        since: deque[float] = deque()  # when each one was submitted
        weights: deque[float] = deque()
        try:
            for item in items:
                weight = weigh(item)
                while ahead and sum(weights) + weight > heaviest:
                    since.popleft()
                    weights.popleft()
                    yield ahead.popleft().result()
                weights.append(weight)
                ahead.append(pool.submit(read, item))
                since.append(time.monotonic())
                del item  # or the frame would hold it while the consumer works
                is_late = ahead[0].done() and since[-1] - since[0] > PATIENCE
                if len(ahead) > threads * AHEAD or is_late:
                    since.popleft()
                    weights.popleft()
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # a consumer that stops early waits only for running reads
            for future in ahead:
                future.cancel()


def equal_canvases(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Batches of equal canvas, so that none is padded and none depends on its batch mates.

    A batch is yielded when it is full, or when its oldest picture is PENDING_BATCHES batches
    behind. This bounds the waiting pictures and the results that `in_order` holds.
    """
    waiting: defaultdict[tuple[int, int], list[Picture]] = defaultdict(list)
    for picture in pictures:
        waiting[picture.canvas].append(picture)
        if len(waiting[picture.canvas]) == batch_size:
            yield waiting.pop(picture.canvas)
        # Dictionaries are ordered: the first canvas has the oldest picture.
        first = next(iter(waiting.values()), None)
        if first and picture.index - first[0].index >= PENDING_BATCHES * batch_size:
            yield waiting.pop(first[0].canvas)
    yield from waiting.values()


def overlapped(
    items: Iterable[Item], start: Callable[[Item], Callable[[], Result]], ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Yields each item with its result, in order. `start` begins the work on an item and returns
    the function that waits for its result; the next `ahead` items are started before that wait.
    """
    started: deque[tuple[Item, Callable[[], Result]]] = deque()
    for item in items:
        started.append((item, start(item)))
        if len(started) > ahead:
            earliest, result = started.popleft()
            yield earliest, result()
    for item, result in started:
        yield item, result()


def in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Results in the order of their indices, which count from 0 without gaps."""
    early: dict[int, Result] = {}
    following = 0
    for index, result in results:
        early[index] = result
        while following in early:
            yield early.pop(following)
            following += 1
    assert not early, f"no result for {following}"
