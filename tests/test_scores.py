"""Precision, recall and F1 by threshold: by hand, and against pycocotools."""

from pathlib import Path

import numpy as np
import pytest
from simulated import evaluation_of, found_in, nothing_in, pictures_of

from trainer.scoring.scores import MOST_POINTS, Hits, curve, pooled


def hits(scores: list[float], right: list[int], num_truths: int) -> Hits:
    return Hits(np.array(scores), np.array(right, dtype=bool), num_truths)


def test_a_curve_by_hand() -> None:
    """Kept from 0.9 on: 1 of 1 right, 1 of 4 found; from 0.6: 2 of 3, 2 of 4; from 0.2: 3 of 4."""
    found = curve("cell", hits([0.2, 0.9, 0.8, 0.6], [1, 1, 0, 1], 4))
    assert found.thresholds.tolist() == [0.9, 0.8, 0.6, 0.2]
    assert found.precision == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4])
    assert found.recall == pytest.approx([1 / 4, 1 / 4, 2 / 4, 3 / 4])
    assert found.best is not None and found.best.threshold == 0.2
    assert found.best.f1 == pytest.approx(3 / 4)


def test_boxes_of_one_score_are_kept_together() -> None:
    found = curve("cell", hits([0.5, 0.5, 0.5, 0.1], [1, 0, 1, 0], 2))
    assert found.thresholds.tolist() == [0.5, 0.1]
    assert found.precision == pytest.approx([2 / 3, 2 / 4])
    assert found.best is not None and found.best.threshold == 0.5 and found.best.recall == 1


@pytest.mark.parametrize(
    "nothing",
    [hits([], [], 3), hits([], [], 0), hits([0.5], [0], 3), hits([0.5], [0], 0)],
    ids=["nothing found", "nothing there", "nothing right", "nothing there, something found"],
)
def test_there_is_no_best_threshold_without_a_right_box(nothing: Hits) -> None:
    found = curve("cell", nothing)
    assert found.best is None and not found.f1.any() and len(found.f1) == len(found.thresholds)


def test_a_long_curve_is_thinned_and_keeps_its_ends_and_its_best() -> None:
    random = np.random.default_rng(0)
    scores = random.permutation(np.linspace(0, 1, 5000))
    every = Hits(scores, random.random(5000) < scores, 3000)
    found = curve("cell", every)
    assert len(found.thresholds) == MOST_POINTS
    assert found.thresholds[0] == 1 and found.thresholds[-1] == 0
    assert found.best is not None
    kept = every.scores >= found.best.threshold
    precision, recall = every.right[kept].mean(), every.right[kept].sum() / 3000
    assert found.best.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert found.best.f1 >= found.f1.max()


def test_average_precision_of_the_curves_is_that_of_pycocotools(tmp_path: Path) -> None:
    """Its AP50 is the mean, over 101 recalls, of the highest precision from there on."""
    samples = pictures_of(tmp_path, ("a", "b", "c"), count=40)
    evaluation = evaluation_of(samples, found_in(samples, 0.7))
    for each in evaluation.diagnosis.curves:
        best_from_here = np.maximum.accumulate(each.precision[::-1])[::-1]
        places = np.searchsorted(each.recall, np.linspace(0, 1, 101))
        precision = np.append(best_from_here, 0.0)[places].mean()
        assert 0.3 < precision < 0.95
        assert precision == pytest.approx(evaluation.metrics[f"ap50/{each.name}"], abs=1e-6)


def test_all_classes_together_are_their_sum(tmp_path: Path) -> None:
    samples = pictures_of(tmp_path, ("a", "b"))
    diagnosis = evaluation_of(samples, nothing_in(samples)).diagnosis
    assert diagnosis.together.num_truths == len(samples.labels)
    both = pooled([hits([0.9], [1], 2), hits([0.4, 0.3], [0, 1], 5)])
    assert both.num_truths == 7 and sorted(both.scores.tolist()) == [0.3, 0.4, 0.9]
    assert both.right.sum() == 2
