"""The sample table: what goes in comes out, and worker processes share it."""

import gc
import hashlib
import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.readers.samples import Sample, SampleTable


def make_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, count in enumerate([2, 0, 3, 0, 1]):
        corner = torch.rand(count, 2, generator=generator) * 50
        extent = 1 + torch.rand(count, 2, generator=generator) * 20
        samples.append(
            Sample(
                path="images/" + "\u00e9" * index + f"{index}.jpg",
                image_id=100 - index,
                size=(80 + index, 90),
                boxes=torch.cat([corner, corner + extent], 1),
                labels=torch.arange(count) % 2,
                areas=extent.prod(1),
                crowd=torch.arange(count) == 1,
            )
        )
    return samples


def assert_same(first: Sample, second: Sample) -> None:
    for name in ("path", "image_id", "size"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("boxes", "labels", "areas", "crowd"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype


def big_table(num_images: int, boxes_each: int = 3) -> SampleTable:
    num_boxes = num_images * boxes_each
    return SampleTable.from_columns(
        source="big",
        class_names=["a"],
        category_ids=[1],
        paths=[f"some/folder/of/images/{index:012d}.jpg" for index in range(num_images)],
        image_ids=np.arange(num_images),
        sizes=np.full((num_images, 2), 480),
        owners=np.arange(num_boxes) // boxes_each,
        boxes=np.tile([0, 0, 10, 10], (num_boxes, 1)),
        labels=np.zeros(num_boxes),
        areas=np.full(num_boxes, 100),
        crowd=np.zeros(num_boxes),
        annotation_ids=np.arange(num_boxes),
    )


def test_samples_come_back() -> None:
    samples = make_samples()
    table = SampleTable.from_samples(samples, ["a", "b"])
    assert len(table) == 5
    assert table.class_names == ("a", "b")
    assert table.category_ids == (1, 2)
    assert table.box_counts.tolist() == [2, 0, 3, 0, 1]
    assert table.box_owners.tolist() == [0, 0, 2, 2, 2, 4]
    assert table.image_ids.tolist() == [100, 99, 98, 97, 96]
    assert table.sizes.tolist()[1] == [81, 90]
    assert list(table.paths()) == [sample.path for sample in samples]
    for stored, sample in zip(table, samples, strict=True):
        assert_same(stored, sample)
    assert_same(table[-1], samples[-1])
    with pytest.raises(IndexError):
        table[5]


def test_columns_may_come_in_any_order() -> None:
    table = SampleTable.from_columns(
        source="",
        class_names=["a", "b"],
        category_ids=[7, 9],
        paths=["x", "y"],
        image_ids=[1, 2],
        sizes=[(5, 6), (7, 8)],
        owners=[1, 0, 1],
        boxes=[[1, 1, 2, 2], [2, 2, 3, 3], [3, 3, 4, 4]],
        labels=[0, 1, 1],
        areas=[1, 2, 3],
        crowd=[0, 1, 0],
        annotation_ids=[11, 12, 13],
    )
    assert table[0].annotation_ids is not None
    assert table[0].annotation_ids.tolist() == [12]
    assert table[0].crowd.tolist() == [True]
    assert table[1].boxes.tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert table[1].labels.tolist() == [0, 1]


def test_a_sample_is_no_window_into_the_table() -> None:
    table = SampleTable.from_samples(make_samples(), ["a", "b"])
    table[0].boxes.zero_()
    assert_same(table[0], make_samples()[0])


@pytest.mark.parametrize("indices", [[], [3, 0], [2, 2, 4], [0, 1, 2, 3, 4]])
def test_subset(indices: list[int]) -> None:
    samples = make_samples()
    subset = SampleTable.from_samples(samples, ["a", "b"]).subset(indices)
    assert len(subset) == len(indices)
    for stored, index in zip(subset, indices, strict=True):
        assert_same(stored, samples[index])


def test_keep_boxes_keeps_images() -> None:
    table = SampleTable.from_samples(make_samples(), ["a", "b"])
    kept = table.keep_boxes(table.labels == 0)
    assert kept.box_counts.tolist() == [1, 0, 2, 0, 1]
    assert torch.equal(kept[2].boxes, table[2].boxes[[0, 2]])


def test_no_samples() -> None:
    table = SampleTable.from_samples([], ["a"])
    assert len(table) == 0
    assert table.boxes.shape == (0, 4)


def test_a_spawned_worker_is_sent_no_data() -> None:
    table = big_table(50_000)
    assert len(ForkingPickler.dumps(table)) < 10_000


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def walk(table: SampleTable, objects: list[str], connection: Connection) -> None:
    gc.disable()  # a collection would write to every object of the parent
    steps = range(0, len(table), 40)  # several in each page of memory
    for _ in steps:
        table[0]  # what the first calls allocate is not the table's
    start = private_bytes()
    num_boxes = sum(len(table[index].boxes) for index in steps)
    after_table = private_bytes()
    num_characters = sum(len(objects[index]) for index in steps)
    connection.send((num_boxes, after_table - start, num_characters, private_bytes() - after_table))


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory"
)
def test_a_forked_worker_that_walks_the_table_copies_nothing() -> None:
    table = big_table(200_000)
    objects = list(table.paths())
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=walk, args=(table, objects, sender))
    worker.start()
    num_boxes, growth, num_characters, growth_of_objects = receiver.recv()
    worker.join()
    assert num_boxes == 5000 * 3
    assert num_characters == 5000 * len(objects[0])
    assert growth < 2e6
    assert growth_of_objects > 10e6  # what strings cost: the measure would have seen it


def test_the_fingerprint_follows_crowd_regions_and_else_is_that_of_older_versions() -> None:
    """Checkpoints of datasets without crowd regions, from before, must still resume."""
    table = SampleTable.from_samples(make_samples(), ["a", "b"])
    plain = replace(table, crowd=torch.zeros_like(table.crowd))
    assert (
        len({each.fingerprint() for each in (table, plain, replace(table, crowd=~table.crowd))})
        == 3
    )
    digest = hashlib.sha256(b"a\0b")
    for column in (plain.image_ids, plain.sizes, plain.box_offsets, plain.boxes, plain.labels):
        digest.update(column.numpy().tobytes())
    assert plain.fingerprint() == digest.hexdigest()[:16]
