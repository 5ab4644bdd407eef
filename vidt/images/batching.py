"""Images in, batches of equal canvas out: read ahead by threads, and never more than a few of them
in memory, however many there are.

Without PyTorch, for detectors that do without it too.
"""

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

AHEAD = 2  # items that each thread may be ahead of who takes them
MOST_THREADS = 16
PATIENCE = 0.5  # seconds that a result may wait for more of them where the input is slow
PENDING_BATCHES = 8  # how far an image may fall behind while it waits for others of its canvas

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as a detector takes it: `pixels` uint8 [h, w, 3], resized to its canvas.

    `size` is (height, width) of the original; `index` counts the images as they came.
    """

    index: int
    size: tuple[int, int]
    pixels: np.ndarray

    @property
    def canvas(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]


def reading_threads() -> int:
    """As many as there are cores to run on: Pillow lets go of the interpreter while it decodes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MOST_THREADS)


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Result], threads: int
) -> Iterator[Result]:
    """`read` of each item, in order, computed by threads while the results before are in use. What
    `read` raises is raised here, in its place. Where items come slowly the results do not wait for
    as many as threads can be ahead.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="reader") as pool:
        ahead: deque[Future[Result]] = deque()
        since: deque[float] = deque()  # when each of them was begun
        try:
            for item in items:
                ahead.append(pool.submit(read, item))
                since.append(time.monotonic())
                is_late = ahead[0].done() and since[-1] - since[0] > PATIENCE
                if len(ahead) > threads * AHEAD or is_late:
                    since.popleft()
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # who stops early waits for none but those under way
            for future in ahead:
                future.cancel()


def equal_canvases(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Batches of equal canvas, so that none is padded and none depends on its batch mates.

    A batch goes as soon as it is full, or when its oldest picture has fallen PENDING_BATCHES
    batches behind: what waits is bounded, and so is what a reader needs to restore the order.
    """
    waiting: defaultdict[tuple[int, int], list[Picture]] = defaultdict(list)
    for picture in pictures:
        waiting[picture.canvas].append(picture)
        if len(waiting[picture.canvas]) == batch_size:
            yield waiting.pop(picture.canvas)
        # Dictionaries keep their order: the first canvas has the oldest picture.
        first = next(iter(waiting.values()), None)
        if first and picture.index - first[0].index >= PENDING_BATCHES * batch_size:
            yield waiting.pop(first[0].canvas)
    yield from waiting.values()


def in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Results in the order of their indices, which count from 0 without gaps."""
    early: dict[int, Result] = {}
    wanted = 0
    for index, result in results:
        early[index] = result
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1
    assert not early, f"no result for {wanted}"
