"""Random inputs for every reader: they are read, or refused in one line that names the file.

FUZZ_INPUTS is the number of inputs of all readers together, 2,000 unless given. The same inputs
come each time. With `-s` the number of inputs and of refusals of each reader is printed.
"""

import copy
import io
import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import Learnt, run

from trainer.data.dataset_check import check
from trainer.loop import resume
from trainer.readers.coco import read_coco
from trainer.readers.voc import read_voc
from trainer.readers.yolo import read_yolo
from trainer.report.progress import CsvLog, Progress
from trainer.settings.parsing import parse
from vidt.errors import UserError
from vidt.images.files import probe_image, read_image
from vidt.weights.checkpoint import load_model
from ymir_adapter.dataset.annotations import AnnotationReader
from ymir_adapter.dataset.columns import Columns, Notes
from ymir_adapter.protocol.environment import read_mapping
from ymir_adapter.protocol.errors import TaskError

pytestmark = pytest.mark.slow

INPUTS = int(os.environ.get("FUZZ_INPUTS", "2000"))
MOST_SECONDS = 5.0  # of processor time, for one input
MOST_GROWTH = 500  # MiB, over all inputs of a reader

COCO = json.dumps(
    {
        "images": [
            {"id": 1, "file_name": "a.png", "height": 48, "width": 64},
            {"id": 2, "file_name": "b.png", "height": 48, "width": 64},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 20, 21.5], "iscrowd": 0},
            {
                "id": 2,
                "image_id": 2,
                "category_id": 2,
                "bbox": [1, 1, 9, 9],
                "area": 81,
                "segmentation": [[1, 1, 9, 1, 9, 9]],
            },
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
).encode()
VOC = (
    b"<?xml version='1.0' encoding='utf-8'?><annotation><size><width>64</width><height>48</height>"
    b"<depth>3</depth></size><object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin>"
    b"<ymin>3</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"
)
YOLO = b"0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n"
DATA_YAML = b"path: .\ntrain: images\nval: images\nnc: 2\nnames:\n  0: cat\n  1: dog\n"
RUN_YAML = b"epochs: 3\nlr: 1e-4\ntrain_sizes: [48, 64]\nflip: false\nyolo_path: data\n"
ARK = b"0, 2, 3, 30, 40\n1, 5, 5, 20, 20, 0.9, x\n"
METRICS = b"epoch,step,loss,map50,ap/cat\n1,3,0.5,0.25,\n2,6,0.25,0.5,0.1\n"
# What often breaks readers, put in the place of some bytes.
TOKENS = [
    *(b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b"-", b"-1", b"0", b"1e999", b"nan"),
    *(b"NaN", b"Infinity", b"9" * 30, b"9" * 5000, b"0x" + b"f" * 5000, b'"', b"'", b"[", b"]"),
    *(b"{", b"}", b",", b":", b"null", b"true", b"[" * 2000, b'"\\ud800"', b"\\", b"&a", b"*a"),
    *(b"<", b">", b"&", b"&lt;", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"../", b"/dev/zero", b"!!"),
    *(b"!!timestamp x", b"2020-99-99", b"=1+1", b"\x1b[2J", b"\xf0\x9f\x90\xb1", b"UTF-16"),
]


@dataclass(frozen=True)
class Target:
    """`read` gets a fresh folder's path, in which the input is the file `name`."""

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], object]
    around: Callable[[Path], None] = lambda folder: None


def pictures() -> tuple[bytes, ...]:
    found = []
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        for mode in ("RGB", "L") if kind != "PPM" else ("RGB",):
            data = io.BytesIO()
            Image.linear_gradient("L").resize((24, 18)).convert(mode).save(data, kind)
            found.append(data.getvalue())
    return tuple(found)


def images_in(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 48)).save(folder / name)


def voc_around(folder: Path) -> None:
    images_in(folder / "JPEGImages")
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (folder / "Annotations").mkdir()
    (folder / "Annotations/b.xml").write_bytes(VOC)


def yolo_around(folder: Path) -> None:
    images_in(folder / "images")
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels/b.txt").write_bytes(YOLO)
    (folder / "data.yaml").write_bytes(DATA_YAML)


def table_of(read: tuple) -> object:
    """What the check before training makes of a table."""
    table, findings = read
    return check(table, table, num_queries=10, max_bad_fraction=1.0), findings


def annotations(path: Path) -> None:
    reader, notes = AnnotationReader(["cat", "dog"]), Notes("train")
    reader.read(0, [("a.png", str(path)), ("b.png", str(path))], Columns(), notes)
    notes.findings()


def metrics_of(path: Path) -> None:
    CsvLog(path)(Progress("start", 0.5, 1, 3, 9))


def checkpoint_of(path: Path) -> None:
    resume.load(path.parent)


TARGETS = {
    "COCO": Target(
        "a.json",
        (COCO,),
        lambda path: table_of(read_coco(path, path.parent / "in", masks=True)),
        lambda folder: images_in(folder / "in"),
    ),
    "VOC": Target(
        "Annotations/a.xml",
        (VOC,),
        lambda path: table_of(read_voc(path.parents[1], "train")),
        voc_around,
    ),
    "VOC list": Target(
        "ImageSets/Main/train.txt",
        (b"a\nb\n", b"a 1\nb -1\n"),
        lambda path: table_of(read_voc(path.parents[2], "train")),
        voc_around,
    ),
    "YOLO": Target(
        "labels/a.txt",
        (YOLO,),
        lambda path: table_of(read_yolo(path.parents[1], "train")),
        yolo_around,
    ),
    "YOLO data.yaml": Target(
        "data.yaml",
        (DATA_YAML,),
        lambda path: table_of(read_yolo(path, "train")),
        yolo_around,
    ),
    "ark": Target("a.txt", (ARK,), annotations),
    "YMIR's VOC and COCO": Target("a.xml", (VOC, COCO), annotations),
    "YAML of a run": Target("run.yaml", (RUN_YAML,), lambda path: parse(["--config", str(path)])),
    "YAML of a task": Target("env.yaml", (RUN_YAML, DATA_YAML), read_mapping),
    "metrics.csv": Target("metrics.csv", (METRICS,), metrics_of),
    "images": Target(
        "a.png", pictures(), lambda path: (probe_image(path), read_image(path, at_least=(8, 8)))
    ),
}


# What a JSON document may hold anywhere.
VALUES = [
    *(None, True, False, 0, -1, 1, 2.5, 1e308, -1e-320, 2**31, 2**63, 2**64, -(10**400)),
    *(float("nan"), float("inf"), "", "1", "1.0", "cat", "no", "\ud800", "a\nb", "../a.png"),
    *([], {}, [[]], [{}], {"id": 1}, [1, 2, 3, 4], [1, "2", None, 4], ["1", "2", "3", "4"]),
]


@st.composite
def spoilt_json(draw: st.DrawFn, document: Any) -> Any:
    """A document in which a few values are others, or are missing."""
    for _ in range(draw(st.integers(1, 3))):
        node = document
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.integers(0, 4)):
                node = node[key]
                continue
            if draw(st.integers(0, 4)):
                node[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            else:
                del node[key]
            break
    return document


@st.composite
def spoilt(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A valid file with some bytes replaced by others or moved, or bytes without any sense."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200) | st.lists(st.sampled_from(TOKENS)).map(b"".join))
    data = draw(st.sampled_from(seeds))
    if data.startswith(b"{") and draw(st.booleans()):
        return json.dumps(draw(spoilt_json(json.loads(data)))).encode()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 1, 2, 4, 9, len(data)]))
        token = draw(st.sampled_from(TOKENS) | st.binary(max_size=4) | st.just(data[:at]))
        data = data[:at] + token + data[at + length :]
    return data


def seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


def fuzz(name: str, target: Target, folder: Path, count: int) -> None:
    outcomes, before, slowest = Counter[str](), peak_mib(), 0.0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(data=spoilt(target.seeds))
    def one(data: bytes) -> None:
        nonlocal slowest
        path = folder / target.name
        path.write_bytes(data)
        began = seconds()
        try:
            target.read(path)
            outcomes["read"] += 1
        except (UserError, TaskError) as error:
            names = (str(folder), Path(target.name).name)
            assert any(name in str(error) for name in names), f"it names no file: {error}"
            assert "\n" not in str(error) and len(str(error)) < 2000, str(error)[:3000]
            outcomes["refused"] += 1
        slowest = max(slowest, seconds() - began)
        assert slowest < MOST_SECONDS

    target.around(folder)
    (folder / target.name).parent.mkdir(parents=True, exist_ok=True)
    one()
    grown = peak_mib() - before
    print(
        f"{name}: {sum(outcomes.values()):,} inputs, {outcomes['read']:,} read, "
        f"{outcomes['refused']:,} refused, slowest {slowest:.2f} s, grown {grown} MiB"
    )
    assert grown < MOST_GROWTH


COUNT = -(-INPUTS // (len(TARGETS) + 2))


@pytest.mark.parametrize("name", TARGETS)
def test_random_inputs(name: str, tmp_path: Path) -> None:
    fuzz(name, TARGETS[name], tmp_path, COUNT)


def test_random_states(tiny_data: Path, room: Path) -> None:
    """`state.json` of a checkpoint whose tensors are whole."""
    run(tiny_data, room, "--max_steps 1")
    folder = next((room / "checkpoints").iterdir())
    state = (folder / resume.STATE).read_bytes()
    fuzz("state.json", Target(resume.STATE, (state,), checkpoint_of), folder, COUNT)


def test_random_headers(learnt: Learnt, tmp_path: Path) -> None:
    """The first bytes of a weights file, with its length field and its JSON; the tensors stay."""
    whole = learnt.weights.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")

    def read(path: Path) -> None:
        header, target = path.read_bytes(), path.with_name("w.safetensors")
        # Half of them with a length that fits, so that their JSON is read.
        if len(header) % 2:
            header = (len(header) - 8).to_bytes(8, "little", signed=len(header) < 8) + header[8:]
        target.write_bytes(header + whole[size:])
        load_model(target)

    fuzz("weights", Target("header", (whole[:size],), read), tmp_path, COUNT)
    shutil.rmtree(tmp_path)


def test_the_seeds_are_valid(tmp_path: Path) -> None:
    """Else most inputs would be refused for the same reason."""
    for number, target in enumerate(TARGETS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        target.around(folder)
        (folder / target.name).write_bytes(target.seeds[0])
        target.read(folder / target.name)
