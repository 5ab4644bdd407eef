"""Boxes on pictures, and the grid of truth beside prediction."""

import json
import tracemalloc
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from trainer.readers.samples import Sample, SampleTable
from trainer.report.pictures import (
    Comparison,
    compare,
    comparisons,
    save_picture,
    truth_beside_prediction,
)
from vidt.images.drawing import (
    LONGEST_NAME,
    _covered,
    _freest_place,
    class_colour,
    class_text,
    draw_detections,
    object_colours,
    write_labels,
)
from vidt.predict.detections import Detections

NAMES = ["rectangle", "ellipse", "triangle"]
BCCD = Path(__file__).parents[2] / "shared" / "data" / "bccd"


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "#808080")


def colours_in(picture: Image.Image) -> set[str]:
    channels = np.asarray(picture).astype(np.int64)
    return {f"#{code:06x}" for code in np.unique(channels @ [65536, 256, 1])}


def changed(picture: Image.Image) -> np.ndarray:
    """[H, W] bool, where a grey picture was drawn on."""
    return np.any(np.asarray(picture) != 128, axis=2)


def comparison(
    image: Image.Image,
    truth: Sequence[tuple[Sequence[float], int]] = (),
    found: Sequence[tuple[Sequence[float], int, float]] = (),
    name: str = "",
) -> Comparison:
    """True boxes with their labels, and predicted ones with labels and scores."""
    boxes = torch.tensor([box for box, _ in truth], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, label in truth], dtype=torch.int64)
    no_crowd = torch.zeros(len(labels), dtype=torch.bool)
    size = (image.height, image.width)
    sample = Sample(name, 1, size, boxes, labels, torch.ones(len(labels)), no_crowd)
    detections = Detections(
        torch.tensor([score for *_, score in found]),
        torch.tensor([label for _, label, _ in found], dtype=torch.int64),
        torch.tensor([box for box, *_ in found], dtype=torch.float32).reshape(-1, 4),
    )
    return Comparison(image, sample, detections)


def row(width: int, height: int, num_found: int = 2, score: float = 0.9) -> Comparison:
    boxes = [[2, 2, width / 2, height / 2], [width / 3, height / 3, width, height]]
    found = [(box, label, score) for label, box in enumerate(boxes)][:num_found]
    truth = [(box, label) for label, box in enumerate(boxes)]
    return comparison(grey(width, height), truth, found, f"{width}x{height}.jpg")


def drawn_alone(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    scores: Sequence[float] | None,
    panel: int | None = None,
) -> Image.Image:
    """The half of a pair that shows boxes without scores, as the truth, or with them, as the
    prediction; without its caption. For pictures that are no higher than wide.
    """
    if scores is None:
        pictured = comparison(image, truth=list(zip(boxes, labels, strict=True)))
    else:
        pictured = comparison(image, found=list(zip(boxes, labels, scores, strict=True)))
    panel = panel or image.width
    pair = compare(pictured, NAMES, min_score=0.0, panel=panel)
    left = 0 if scores is None else pair.width - panel
    top = pair.height - round(panel * image.height / image.width)
    return pair.crop((left, top, left + panel, pair.height))


def test_box_is_drawn_where_it_is_and_the_image_given_is_left_alone() -> None:
    image = grey(600, 400)
    drawn = drawn_alone(image, [[100, 200, 300, 350]], [1], None)
    assert drawn.size == image.size and not changed(image).any()
    rows, columns = np.nonzero(changed(drawn))
    assert abs(int(columns.min()) - 100) <= 3 and abs(int(columns.max()) - 300) <= 3
    assert abs(int(rows.max()) - 350) <= 3
    assert 170 < rows.min() < 200  # the label stands above
    assert not changed(drawn)[220:340, 120:280].any()  # and the object stays visible
    assert class_colour(1) in colours_in(drawn)


def test_small_picture_is_enlarged_and_its_boxes_with_it() -> None:
    drawn = drawn_alone(grey(128, 96), [[32, 48, 64, 80]], [0], [0.5], panel=480)
    assert drawn.size == (480, 360)
    rows, _ = np.nonzero(changed(drawn))
    assert abs(int(rows.max()) - 80 * 480 / 128) <= 3


def test_every_label_is_written_without_covering_another() -> None:
    boxes = [[100, 100, 140, 140]] * 3
    drawn = drawn_alone(grey(600, 400), boxes, [0, 1, 2], [0.9, 0.8, 0.7])
    pixels = np.asarray(drawn)
    for label in range(3):
        red, green, blue = (int(class_colour(label)[i : i + 2], 16) for i in (1, 3, 5))
        assert (pixels == (red, green, blue)).all(axis=2).sum() > 300  # a label's area, not a line


class Recorder(ImageDraw.ImageDraw):
    """Draws, and remembers the rectangles."""

    def __init__(self, image: Image.Image) -> None:
        super().__init__(image)
        self.written: list[tuple[float, float, float, float]] = []

    def rectangle(self, xy: Any, *args: Any, **more: Any) -> None:
        self.written.append(xy)
        super().rectangle(xy, *args, **more)


@pytest.mark.parametrize("step", [0, 9])
def test_labels_at_the_upper_edge_do_not_cover_each_other(step: int) -> None:
    """Sixteen boxes that begin at one corner, and sixteen along the edge."""
    canvas = grey(640, 480)
    draw = Recorder(canvas)
    labels = [
        ((float(step * number), 0.0, step * number + 60.0, 50.0), f"cat {number}", "#ff0000")
        for number in range(16)
    ]
    write_labels(draw, labels, canvas.size, 12)
    assert len(draw.written) == 16
    for one, other in combinations(draw.written, 2):
        beside = one[2] < other[0] or other[2] < one[0]
        assert beside or one[3] < other[1] or other[3] < one[1], (one, other)
    assert all(x0 >= 0 and y0 >= 0 and x1 < 640 and y1 < 480 for x0, y0, x1, y1 in draw.written)


def test_a_full_picture_still_has_all_labels() -> None:
    canvas = grey(60, 20)
    labels = [((0.0, 0.0, 50.0, 15.0), "a long name 0.50", "#ff0000")] * 9
    write_labels(ImageDraw.Draw(canvas), labels, canvas.size, 12)
    assert changed(canvas).any()


def test_many_labels_take_little_memory() -> None:
    """Four hundred, which do not cover each other: there is room for them."""
    canvas = grey(1200, 900)
    draw = Recorder(canvas)
    corners = np.random.default_rng(0).uniform(0, 800, (400, 2))
    labels = [
        ((float(x), float(y), float(x) + 60, float(y) + 50), "cat", "#ff0000") for x, y in corners
    ]
    tracemalloc.start()
    write_labels(draw, labels, canvas.size, 12)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23
    low, high = np.array(draw.written)[:, :2], np.array(draw.written)[:, 2:]
    apart = ((high[:, None] < low) | (low[:, None] > high)).any(2)
    assert apart.sum() == 400 * 399


def test_a_label_goes_to_the_nearest_place_that_is_free() -> None:
    """As found by comparing every place with every label."""
    generator = np.random.default_rng(0)
    size, width, height = (300, 200), 40.0, 15.0
    for number in (1, 20, 60, 300):  # the last leave no room
        corners = generator.uniform(0, (260, 185), (number, 2))
        placed = np.concatenate([corners, corners + np.array([width, height])], 1)
        box = (*generator.uniform(0, 150, 2), 200.0, 190.0)
        place, covered = _freest_place(box, width, height, size, placed)
        xs = np.arange(0, size[0] - width, width / 4)
        ys = np.arange(0, size[1] - height, (height + 2) / 2)
        found = [
            (_covered(np.array([[x, y, x + width, y + height]]), placed)[0], x, y)
            for y in ys.clip(0, size[1] - 1 - height)
            for x in xs.clip(0, size[0] - 1 - width)
        ]
        least = min(area for area, _, _ in found)
        assert covered == pytest.approx(least) and (least > 0) == (number == 300)
        distances = [
            np.hypot(x - box[0], y - (box[1] - height))
            for area, x, y in found
            if area <= least + 1e-6
        ]
        away = np.hypot(place[0] - box[0], place[1] - (box[1] - height))
        assert away == pytest.approx(min(distances))


def test_objects_of_one_class_have_shades() -> None:
    colours = object_colours([1, 0, 1, 1, 0])
    assert colours[0] == class_colour(1) and colours[1] == class_colour(0)
    assert len(set(colours)) == 5
    drawn = draw_detections(
        grey(300, 200),
        np.array([[10, 30, 100, 100], [120, 30, 220, 100]]),
        [1, 1],
        [0.5, 0.9],
        NAMES,
    )
    first, second = object_colours([1, 1])  # the best has the colour itself
    pixels = np.asarray(drawn)
    shown = ["#" + "".join(f"{each:02x}" for each in pixels[100, x].tolist()) for x in (50, 170)]
    assert shown == [second, first]


@pytest.mark.parametrize(
    "box",
    [
        [-50.0, -50.0, 900.0, 900.0],  # larger than the picture
        [700.0, 500.0, 800.0, 600.0],  # outside
        [50.0, 50.0, 50.0, 50.0],  # a point
        [300.0, 200.0, 100.0, 50.0],  # upside down
        [float("nan"), 0.0, float("inf"), 20.0],
    ],
)
def test_wild_boxes_are_drawn_somehow(box: list[float]) -> None:
    assert changed(drawn_alone(grey(600, 400), [box], [0], [0.1])).any()


def test_no_boxes_is_a_clean_picture() -> None:
    for scores in (None, []):
        assert not changed(drawn_alone(grey(600, 400), [], [], scores)).any()


def test_palette_and_transparent_pictures_can_be_drawn_on() -> None:
    for mode in ("P", "L", "RGBA"):
        drawn = drawn_alone(Image.new(mode, (50, 50)), [[5, 5, 40, 40]], [0], None)
        assert drawn.mode == "RGB" and class_colour(0) in colours_in(drawn)


def test_first_hundred_classes_have_colours_of_their_own() -> None:
    assert len({class_colour(label) for label in range(100)}) == 100


def test_names_are_cut_and_unwritable_ones_numbered() -> None:
    assert class_text(0, NAMES) == "rectangle"
    assert len(class_text(0, ["x" * 50])) == LONGEST_NAME
    assert class_text(0, ["\u732b"]) == "class 0"
    assert class_text(7, NAMES) == "class 7"


def test_pair_leaves_out_what_is_unsure() -> None:
    """Both halves have the same width; only the left one has boxes."""
    pair = compare(row(300, 200, score=0.2), NAMES, min_score=0.3)
    found = np.asarray(pair)[:, pair.width // 2 + 2 :]
    assert class_colour(0) in colours_in(pair)
    assert class_colour(0) not in colours_in(Image.fromarray(found))
    assert pair.tobytes() != compare(row(300, 200, num_found=0), NAMES).tobytes()  # and says so


@pytest.mark.parametrize("number", [1, 2, 3, 16])
def test_grid_of_ragged_sizes(number: int) -> None:
    sizes = [(128, 128), (640, 480), (60, 400), (1000, 50)]
    rows = [row(*sizes[i % 4], num_found=i % 3) for i in range(number)]
    pairs = [compare(each, NAMES, panel=160) for each in rows]
    sheet = truth_beside_prediction(rows, NAMES, pairs, panel=160)
    pair_width = 2 * 160 + 4
    assert sheet.width == (pair_width if number == 1 else 2 * pair_width + 10) + 2 * 10
    assert {class_colour(0), class_colour(1)} <= colours_in(sheet)
    assert class_colour(2) not in colours_in(sheet)  # nor in the legend: it does not occur


def test_grid_of_real_pictures_is_saved_whole(tmp_path: Path) -> None:
    if not BCCD.exists():
        pytest.skip("the blood cell pictures are not here")
    table = json.loads((BCCD / "val.json").read_text())
    rows = []
    for image in table["images"][:2]:
        boxes = [a["bbox"] for a in table["annotations"] if a["image_id"] == image["id"]]
        truth = [([x, y, x + w, y + h], 0) for x, y, w, h in boxes]
        picture = Image.open(BCCD / "images" / image["file_name"])
        rows.append(comparison(picture, truth, [(box, label, 0.5) for box, label in truth]))
    sheet = truth_beside_prediction(rows, ["cell"], [compare(each, ["cell"]) for each in rows])
    path = tmp_path / "out" / "predictions.jpg"
    save_picture(sheet, path)
    save_picture(sheet, path)  # each evaluation replaces it
    assert [file.name for file in path.parent.iterdir()] == ["predictions.jpg"]
    with Image.open(path) as saved:
        saved.load()
        assert saved.format == "JPEG" and saved.size == sheet.size


def test_a_picture_that_is_gone_is_grey(tmp_path: Path) -> None:
    """It was read a moment ago, to be evaluated; the run goes on."""
    boxes = torch.tensor([[1.0, 2.0, 30.0, 20.0]])
    label, no_crowd = torch.tensor([0]), torch.tensor([False])
    path = str(tmp_path / "gone.jpg")
    sample = Sample(path, 1, (30, 40), boxes, label, torch.tensor([522.0]), no_crowd)
    table = SampleTable.from_samples([sample], NAMES, source="here")
    found = Detections(torch.tensor([0.9]), torch.tensor([0]), boxes)
    (pair,) = comparisons(table, {0: found}, {})
    assert pair.image.size == (40, 30) and colours_in(pair.image) == {"#808080"}
    assert compare(pair, NAMES).width > 0
