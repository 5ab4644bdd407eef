"""Which detections are returned: those of the wanted classes that reach a threshold, one for all
classes or one for each. K classes. Does not import PyTorch, which an exported detector does not
need.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vidt.arguments import nearest
from vidt.errors import UserError, shown
from vidt.images.inputs import check_threshold

BEST = "best"  # the threshold that stands for the best one of each class
NO_BEST = 0.3  # of a class of which evaluation found no object


def least_scores(
    threshold: float | str,
    classes: Iterable[str] | None,
    class_names: Sequence[str],
    best: Sequence[float | None],
) -> np.ndarray:
    """The lowest score that is returned of each class, float32 [K]; infinity for a class that is
    not wanted.

    threshold: 0 to 1, or "best": for each class the threshold in `best` [K], which evaluation found
    to have the highest F1, and NO_BEST where it found none. classes: the names to return; None:
    all.

    Raises UserError for a threshold outside 0 to 1, for "best" if `best` is empty, and for an
    unknown name.
    """
    if threshold == BEST:
        least = np.array([NO_BEST if each is None else each for each in best], np.float32)
        if not len(best):
            raise UserError(
                "threshold is best, but these weights hold no thresholds; store them by vidt "
                "evaluate WEIGHTS --save_thresholds, or give a number from 0 to 1"
            )
    else:
        if isinstance(threshold, str):
            raise UserError(f"threshold is {shown(threshold)}; it must be from 0 to 1, or best")
        check_threshold(threshold)
        least = np.full(len(class_names), threshold, np.float32)
    if classes is not None:
        wanted = _labels_of([classes] if isinstance(classes, str) else classes, class_names)
        least[[label for label in range(len(class_names)) if label not in wanted]] = np.inf
    return least


def select(detections: Any, least: np.ndarray) -> Any:
    """The detections on the CPU that reach the least score [K] of their class."""
    scores, labels = np.asarray(detections.scores), np.asarray(detections.labels)
    return detections[scores >= least[labels]]


def _labels_of(classes: Iterable[str], class_names: Sequence[str]) -> set[int]:
    """The labels of the names. Raises UserError for an unknown one, and if there is none."""
    wanted: set[int] = set()
    for name in classes:
        labels = [label for label, known in enumerate(class_names) if known == name]
        if not labels:
            similar = nearest(name, class_names)
            known = ", ".join(map(shown, class_names[:10])) + ", ..." * (len(class_names) > 10)
            hint = f"the nearest is {shown(similar)}" if similar else f"they are {known}"
            raise UserError(f"classes has {shown(name)}, which the weights do not know; {hint}")
        wanted.update(labels)
    if not wanted:
        raise UserError("classes is empty; name at least one class")
    return wanted
