"""What was taken for what, and the images with the most mistakes."""

from pathlib import Path

import numpy as np
import torch
from simulated import evaluation_of, found_in, pictures_of

from trainer.readers.samples import Sample
from trainer.report.worst_pictures import RIGHT, WRONG, caption, worst_pictures
from trainer.scoring.mistakes import (
    CROWD,
    MOST_IMAGES,
    MOST_ROWS,
    NOTHING,
    JudgedImage,
    condensed,
    judge,
)
from vidt import Detections

LEFT, MIDDLE, RIGHTMOST = [0, 0, 20, 20], [40, 0, 60, 20], [70, 0, 90, 20]


def judged(
    truth: list[tuple[list[int], int]],
    found: list[tuple[list[int], int, float]],
    crowd: list[bool] | None = None,
) -> JudgedImage:
    sample = Sample(
        path="a.png",
        image_id=1,
        size=(100, 100),
        boxes=torch.tensor([box for box, _ in truth], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([label for _, label in truth], dtype=torch.int64),
        areas=torch.full((len(truth),), 400.0),
        crowd=torch.tensor(crowd or [False] * len(truth), dtype=torch.bool),
    )
    detections = Detections(
        torch.tensor([score for _, _, score in found]),
        torch.tensor([label for _, label, _ in found], dtype=torch.int64),
        torch.tensor([box for box, _, _ in found], dtype=torch.float32).reshape(-1, 4),
    )
    return judge(sample, 0, detections, None, torch.tensor([0.5, 0.3, 0.5], dtype=torch.float64))


def test_right_missed_false_and_of_the_wrong_class() -> None:
    truth = [(LEFT, 0), (MIDDLE, 1)]
    result = judged(truth, [(LEFT, 0, 0.9), (MIDDLE, 2, 0.8), (RIGHTMOST, 2, 0.7)])
    assert result.true_class.tolist() == [0, 1, NOTHING]
    assert result.predicted_class.tolist() == [0, 2]
    assert (result.num_missed, result.num_false, result.num_confused) == (0, 1, 1)
    assert caption(result) == "1 false positive, 1 of the wrong class"


def test_a_box_counts_from_the_threshold_of_its_class() -> None:
    result = judged([(LEFT, 0), (MIDDLE, 1)], [(LEFT, 0, 0.4), (MIDDLE, 1, 0.4)])
    assert result.predicted_class.tolist() == [NOTHING, 1] and len(result.detections.scores) == 1


def test_the_own_class_comes_first_and_a_second_box_is_false() -> None:
    """The surer box of another class does not take the object away from a right one."""
    result = judged([(LEFT, 0)], [(LEFT, 2, 0.9), (LEFT, 0, 0.8), (LEFT, 0, 0.7)])
    assert result.true_class.tolist() == [NOTHING, 0, NOTHING]
    assert (result.num_missed, result.num_false, result.num_confused) == (0, 2, 0)


def test_a_crowd_region_is_neither_missed_nor_wrongly_found() -> None:
    result = judged([([0, 0, 60, 60], 0)], [(LEFT, 0, 0.9), (LEFT, 1, 0.9)], crowd=[True])
    assert result.predicted_class.tolist() == [CROWD]
    assert result.true_class.tolist() == [CROWD, NOTHING]
    assert (result.num_missed, result.num_false) == (0, 1)


def test_an_image_without_anything() -> None:
    result = judged([], [])
    assert result.num_mistakes == 0 and caption(result) == ""


def test_what_is_on_an_image_that_cannot_be_read_is_missed(tmp_path: Path) -> None:
    samples = pictures_of(tmp_path, ("a", "b"), count=3)
    result = judge(samples[0], 0, None, None, torch.zeros(2))
    assert result.num_missed == result.num_mistakes == len(samples[0].boxes)


def test_the_table_counts_every_box_once(tmp_path: Path) -> None:
    samples = pictures_of(tmp_path, [f"c{number}" for number in range(30)], count=60)
    diagnosis = evaluation_of(samples, found_in(samples, 0.8)).diagnosis
    per_class = np.bincount(samples.labels.numpy(), minlength=30)
    assert diagnosis.confusion[:-1].sum(1).tolist() == per_class.tolist()
    assert diagnosis.confusion[-1, -1] == 0
    assert diagnosis.confusion[:-1, :-1].trace() > 0.5 * per_class.sum()
    table, rows, columns = condensed(diagnosis)
    assert table.sum() == diagnosis.confusion.sum()
    assert table.shape == (MOST_ROWS + 2, MOST_ROWS + 2)
    assert rows[-2:] == ["18 others", "background"] and columns[-1] == "missed"
    first = diagnosis.class_names.index(rows[0])
    assert table[0].sum() == per_class[first]
    assert table[:, -1].sum() == diagnosis.confusion[:, -1].sum()
    assert diagnosis.rest is not None and len(diagnosis.main) == 6
    shown = sum(each.num_truths for each in diagnosis.main_curves)
    assert shown + diagnosis.rest.num_truths == per_class.sum()


def test_the_worst_images_have_the_most_mistakes_and_show_them(tmp_path: Path) -> None:
    samples = pictures_of(tmp_path, ("a", "b"), count=40)
    diagnosis = evaluation_of(samples, found_in(samples, 0.5)).diagnosis
    mistakes = [each.num_mistakes for each in diagnosis.worst]
    assert len(mistakes) == MOST_IMAGES and mistakes == sorted(mistakes, reverse=True)
    first = diagnosis.worst[0]
    truth, found = worst_pictures(samples, [first])[0]
    missed_or_confused = first.num_missed + first.num_confused
    assert (WRONG in colours_of(truth)) == (missed_or_confused > 0)
    assert (RIGHT in colours_of(found)) == (len(first.detections.scores) > first.num_false)


def colours_of(picture) -> set[str]:
    return {f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in picture.getcolors(9999)}
