"""What a large data set costs: a COCO file of a million images and ten million boxes, written at
random, read, and walked by four workers of a DataLoader.

    python benchmarks/scale.py
    python benchmarks/scale.py --images 100000 --boxes 1000000
    python benchmarks/scale.py --json_file FILE

Reading happens in a process of its own; its memory is the most that it held beyond what it had when
it began to read. The memory of processes together is their PSS: a page that n of them share counts
1/n for each. What a worker has for itself is compared with one that walks a table of a thousand
images: the difference is what the table costs a worker. All this needs Linux's account of memory.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TextIO

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.readers.coco import read_coco
from trainer.readers.samples import SampleTable

WORKERS = 4
CLASSES = 80
CHUNK = 100_000  # rows that are written at once
SMALL = 1000  # images of a table that costs nothing to speak of
BATCHES = 500
VISITS = 50_000  # samples at most that the workers look at, all together: several in each page


@dataclass(frozen=True)
class Result:
    """Seconds, and MiB unless it says bytes."""

    images: int
    boxes: int
    file_mib: float
    open_seconds: float
    peak_mib: float  # while reading
    peak_to_file: float
    table_mib: float
    bytes_per_box: float  # of what there is for each box
    bytes_per_image: float  # of the rest: mostly the path
    alone_mib: float  # PSS of the process that has the table, before there are workers
    together_mib: float  # PSS of it and its workers, after they have walked the table
    worker_mib: float  # what is one worker's alone, on average
    small_table_worker_mib: float  # the same with a table of a thousand images


def write_coco(path: Path, images: int, boxes: int) -> None:
    """As `json.dump` writes it, boxes of an image anywhere in the list."""
    random = np.random.default_rng(0)
    categories = [{"id": number + 1, "name": f"class {number}"} for number in range(CLASSES)]
    with open(path, "w", encoding="ascii") as file:
        file.write('{"info": {}, "images": [')
        write_rows(file, image_rows(images))
        file.write('], "annotations": [')
        write_rows(file, annotation_rows(random, images, boxes))
        file.write(f'], "categories": {json.dumps(categories)}}}')


def write_rows(file: TextIO, chunks: Iterator[list[str]]) -> None:
    for number, rows in enumerate(chunks):
        file.write((", " if number else "") + ", ".join(rows))


def image_rows(images: int) -> Iterator[list[str]]:
    for start in range(0, images, CHUNK):
        yield [
            f'{{"id": {number + 1}, "file_name": "{number:012d}.jpg", "height": 480, "width": 640}}'
            for number in range(start, min(start + CHUNK, images))
        ]


def annotation_rows(random: np.random.Generator, images: int, boxes: int) -> Iterator[list[str]]:
    for start in range(0, boxes, CHUNK):
        count = min(CHUNK, boxes - start)
        owners = random.integers(1, images + 1, count).tolist()
        labels = random.integers(1, CLASSES + 1, count).tolist()
        corners = (random.integers(0, 32000, (count, 4)) / 100).tolist()
        columns = zip(owners, labels, corners, strict=True)
        yield [
            f'{{"id": {number}, "image_id": {owner}, "category_id": {label}, '
            f'"bbox": [{x}, {y}, {w}, {h}], "area": {w * h:.2f}, "iscrowd": 0}}'
            for number, (owner, label, (x, y, w, h)) in enumerate(columns, start + 1)
        ]


class Looks(Dataset):
    """What a worker reads of a sample."""

    def __init__(self, table: SampleTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return min(VISITS, len(self.table))

    def __getitem__(self, number: int) -> int:
        sample = self.table[number * len(self.table) // len(self)]
        return len(sample.path) + len(sample.boxes)


def measure(path: Path, folder: Path) -> Result:
    """Reads and walks, in this process."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # fewer cores than workers
    before = memory_of(os.getpid(), "Rss")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which is the parent's
    start = time.perf_counter()
    table, _ = read_coco(path, folder)
    seconds = time.perf_counter() - start
    peak = most_bytes() - before
    of_boxes, of_images = table_bytes(table)
    alone = memory_of(os.getpid(), "Pss")
    together, private = walked(table)
    _, small_private = walked(table.subset(range(min(SMALL, len(table)))))
    size = path.stat().st_size
    return Result(
        images=len(table),
        boxes=len(table.labels),
        file_mib=size / 2**20,
        open_seconds=seconds,
        peak_mib=peak / 2**20,
        peak_to_file=peak / size,
        table_mib=(of_boxes + of_images) / 2**20,
        bytes_per_box=of_boxes / max(len(table.labels), 1),
        bytes_per_image=of_images / len(table),
        alone_mib=alone / 2**20,
        together_mib=together / 2**20,
        worker_mib=private / 2**20,
        small_table_worker_mib=small_private / 2**20,
    )


def walked(table: SampleTable) -> tuple[float, float]:
    """PSS of this process and its workers once they have read samples from all over the table, and
    what one worker has for itself, in bytes.
    """
    looks = Looks(table)
    loader = DataLoader(looks, batch_size=-(-len(looks) // BATCHES), num_workers=WORKERS)
    batches = iter(loader)
    for _ in range(len(loader) - 1):  # with the last batch the workers would go
        next(batches)
    workers = [worker.pid for worker in batches._workers]  # type: ignore[attr-defined]
    together = sum(memory_of(pid, "Pss") for pid in (os.getpid(), *workers))
    private = sum(memory_of(pid, "Private_Dirty") for pid in workers) / len(workers)
    return together, private


def table_bytes(table: SampleTable) -> tuple[int, int]:
    """Of the columns that have an entry for each box, and of the others."""
    columns = {name: each for name, each in vars(table).items() if isinstance(each, Tensor)}
    sizes = {name: each.numel() * each.element_size() for name, each in columns.items()}
    of_boxes = sum(sizes[name] for name in ("boxes", "labels", "areas", "crowd", "annotation_ids"))
    return of_boxes, sum(sizes.values()) - of_boxes


def most_bytes() -> int:
    """The most that this process held since the peak was last forgotten."""
    return account("/proc/self/status", "VmHWM")


def memory_of(pid: int, kind: str) -> int:
    """Rss, Pss or Private_Dirty in bytes."""
    return account(f"/proc/{pid}/smaps_rollup", kind)


def account(file: str, entry: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 2**10
    raise ValueError(f"{file} does not say {entry}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a large COCO file.")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--boxes", type=int, default=10_000_000)
    parser.add_argument("--json_file", type=Path, help="a COCO file to read, not one made up")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args()
    if given.images < 1 or given.boxes < 0:
        parser.error("--images must be 1 or more, --boxes 0 or more")
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("this system does not tell how much memory processes share")
    with tempfile.TemporaryDirectory() as room:
        path = given.json_file or Path(room) / "large.json"
        if given.json_file is None:
            write_coco(path, given.images, given.boxes)
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                result = pool.submit(measure, path, Path(room)).result()
        except ValueError as error:
            parser.error(str(error))
    for name, value in asdict(result).items():
        print(f"{name:<24}{value:>14,.{2 if isinstance(value, float) else 0}f}")
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(result), indent=1))


if __name__ == "__main__":
    main()
