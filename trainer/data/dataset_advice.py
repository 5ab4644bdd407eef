"""What is usable in a dataset but implausible, or hard to learn: it is reported, and kept.

M boxes.
"""

import filecmp
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from trainer.readers.findings import Finding, fold, listed
from trainer.readers.samples import SampleTable
from vidt.errors import UserError
from vidt.images.batching import reading_threads
from vidt.images.canvas import canvas_of
from vidt.images.files import read_image

FEW_BOXES = 10  # of a class, to learn from
SMALL = 4.0  # pixels, the side of a square object that a detector hardly sees
ALIKE_BITS = 3  # most bits of 64 in which the hashes of near-duplicates differ
LEAST_SET = 8  # bits: a hash of fewer set or unset bits is of a flat picture and says little
_COMPARED = 2**22  # pairs of hashes at once


def implausible_boxes(table: SampleTable, eval_size: int) -> list[Finding]:
    """Boxes below one pixel, coordinates that look normalised, and objects that are small once
    their image is resized for evaluation.
    """
    return [*_below_one_pixel(table), *_small_objects(table, eval_size)]


def _below_one_pixel(table: SampleTable) -> list[Finding]:
    boxes = table.boxes.numpy()
    tiny = (boxes[:, 2:] - boxes[:, :2] < 1).all(1)
    if len(boxes) and (boxes <= 1).all():
        kind = "coordinates that look normalised"
        detail = "all boxes lie in 0..1; this format has them in pixels of the image"
        return [Finding(kind, "warning", "kept", detail, table.source, count=len(boxes))]

    def finding(row: int) -> Finding:
        owner = int(table.box_owners[row])
        corners = ", ".join(f"{value:g}" for value in boxes[row].tolist())
        return Finding(
            "box below one pixel",
            "warning",
            "kept",
            f"corners [{corners}]",
            table.source,
            table.path(owner),
            int(table.image_ids[owner]),
            int(table.annotation_ids[row]),
        )

    return listed(np.flatnonzero(tiny).tolist(), finding)


def _small_objects(table: SampleTable, eval_size: int) -> list[Finding]:
    sizes, inverse = np.unique(table.sizes.numpy(), axis=0, return_inverse=True)
    scales = [canvas_of(h, w, eval_size)[0] / h for h, w in sizes.tolist()]
    scale = np.array(scales)[inverse.reshape(-1)][table.box_owners.numpy()]
    boxes = table.boxes.numpy()
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)) * scale
    rows = np.flatnonzero((sides < SMALL) & ~table.crowd.numpy())
    if not len(rows):
        return []
    first = int(table.box_owners[rows[0]])
    detail = (
        f"{len(rows) / len(boxes):.1%} of the boxes are smaller than {SMALL:g} x {SMALL:g} pixels "
        f"at --eval_size {eval_size}; the first is annotation {int(table.annotation_ids[rows[0]])}"
    )
    kind, image_id = "object too small to be found", int(table.image_ids[first])
    file, count = table.path(first), len(rows)
    return [Finding(kind, "warning", "kept", detail, table.source, file, image_id, count=count)]


def rare_classes(train: SampleTable) -> list[Finding]:
    """Classes with a few boxes to learn from; none at all is a finding of the check."""
    counts = np.bincount(train.labels[~train.crowd].numpy(), minlength=len(train.class_names))
    kind = f"class with fewer than {FEW_BOXES} training boxes"
    return [
        Finding(kind, "warning", "kept", f"{name}: {count}", train.source)
        for name, count in zip(train.class_names, counts.tolist(), strict=True)
        if 0 < count < FEW_BOXES
    ]


def near_duplicates(train: SampleTable, val: SampleTable) -> list[Finding]:
    """Validation pictures that look like a training picture, by a hash of 64 bits; files that are
    equal are a finding of the check. This decodes every picture.
    """
    return fold(_near_duplicates(train, val))


def _near_duplicates(train: SampleTable, val: SampleTable) -> Iterator[Finding]:
    ours, theirs = _hashes(train), _hashes(val)
    known = np.flatnonzero(ours[:, 1])
    of_train = ours[known, 0]
    step = max(_COMPARED // max(len(known), 1), 1)
    for start in range(0, len(theirs) if len(known) else 0, step):
        some = theirs[start : start + step]
        differ = np.bitwise_count(some[:, :1] ^ of_train)
        for row in np.flatnonzero((differ <= ALIKE_BITS).any(1) & (some[:, 1] == 1)).tolist():
            twin = int(known[differ[row].argmin()])
            index = start + row
            if filecmp.cmp(train.path(twin), val.path(index), shallow=False):
                continue
            detail = (
                f"looks like {train.path(twin)}, image {int(train.image_ids[twin])} of training"
            )
            yield Finding(
                "near-duplicate of a training image",
                "warning",
                "kept",
                detail,
                val.source,
                val.path(index),
                int(val.image_ids[index]),
            )


def _hashes(table: SampleTable) -> np.ndarray:
    """uint64 [N, 2]: the hash of each picture, and 1 if it says something, else 0."""
    with ThreadPoolExecutor(reading_threads()) as pool:
        sizes: Sequence[tuple[int, int]] = [(h, w) for h, w in table.sizes.tolist()]
        rows = list(pool.map(_hash_of_file, table.paths(), sizes, chunksize=16))
    return np.array(rows, np.uint64).reshape(-1, 2)


def _hash_of_file(
    path: str, size: tuple[int, int], content: bytes | None = None
) -> tuple[int, int]:
    given = None if size == (0, 0) else size  # the check has not filled it in
    try:
        value = difference_hash(read_image(path, given, at_least=(64, 64), content=content))
    except UserError:  # the loader tells of it
        return 0, 0
    return value, int(LEAST_SET <= value.bit_count() <= 64 - LEAST_SET)


def look_alikes(table: SampleTable) -> tuple[np.ndarray, np.ndarray]:
    """The group of each picture, int64 [N] from 0, and a hash of its bytes, uint64 [N]. A chain of
    near-duplicates, equal files or Roboflow's copies of one picture is one group. This decodes
    every picture.
    """
    paths, sizes = list(table.paths()), [(h, w) for h, w in table.sizes.tolist()]
    with ThreadPoolExecutor(reading_threads()) as pool:
        found = pool.map(_prints_of_file, paths, sizes, chunksize=16)
        bar = tqdm(found, "looking for near-duplicates", len(paths), disable=_is_quiet())
        rows = np.array(list(bar), np.uint64).reshape(-1, 3)
    digests, hashes, known = rows[:, 0], rows[:, 1], np.flatnonzero(rows[:, 2])
    every = np.arange(len(rows))
    _, same = np.unique(digests, return_inverse=True)
    _, origin = np.unique([_origin(path) for path in paths], return_inverse=True)
    # A node for each content, and one for each origin.
    edges = [(every, len(rows) + same), (every, 2 * len(rows) + origin)]
    # A node for each hash too: of similar frames of a video, every pair would be an edge.
    different, hashed = np.unique(hashes[known], return_inverse=True)
    edges.append((known, 3 * len(rows) + hashed))
    one, other = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    groups = _components(one, other, 3 * len(rows) + len(different))
    step = max(_COMPARED // max(len(different), 1), 1)
    alike: list[np.ndarray] = []  # pairs of hashes that are not joined yet
    for start in range(0, len(different), step):
        # Each with the later ones.
        differ = np.bitwise_count(different[start : start + step, None] ^ different[start:])
        alike.append(start + np.stack(np.nonzero(differ <= ALIKE_BITS)))
        is_last = start + step >= len(different)
        if is_last or sum(each.shape[1] for each in alike) > _COMPARED:
            one, other = groups[3 * len(rows) :][np.concatenate(alike, axis=1)]
            groups = _components(one, other, len(groups))[groups]
            alike = []
    return np.unique(groups[: len(rows)], return_inverse=True)[1], digests


def _components(one: np.ndarray, other: np.ndarray, nodes: int) -> np.ndarray:
    """The group of each node, int [nodes], of a graph with edges from `one` to `other`."""
    graph = coo_array((np.ones(len(one), np.bool_), (one, other)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1]


def _is_quiet() -> bool:
    return not sys.stderr.isatty()


def _origin(path: str) -> str:
    """The picture of which a file is a copy: Roboflow names changed ones NAME.rf.HASH.jpg."""
    name = os.path.basename(path)
    return name.partition(".rf.")[0] if ".rf." in name else path


def _prints_of_file(path: str, size: tuple[int, int]) -> tuple[int, int, int]:
    """A hash of the file's bytes, of its name if it cannot be read; then what `_hash_of_file`
    returns.
    """
    try:
        content = Path(path).read_bytes()
    except OSError:
        return _digest(os.fsencode(os.path.basename(path))), 0, 0
    return _digest(content), *_hash_of_file(path, size, content)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def difference_hash(image: Image.Image) -> int:
    """dHash: of 9 x 8 grey values, whether each is below its right neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = grey[:, 1:] > grey[:, :-1]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
