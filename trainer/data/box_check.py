"""Which boxes can be used, and what becomes of them: judged alike by the check before training and
by `vidt evaluate`. NumPy alone.

M boxes, xyxy in pixels of the annotated image.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class JudgedBoxes:
    """Boxes inside their images, and what was wrong with them as they were."""

    boxes: np.ndarray  # float32 [M, 4], clipped
    areas: np.ndarray  # float32 [M], of the objects: at most those of their boxes
    finite: np.ndarray  # bool [M]
    empty: np.ndarray  # bool [M], without area
    outside: np.ndarray  # bool [M], without area in their image
    excess: np.ndarray  # float32 [M], pixels by which they stick out

    @property
    def usable(self) -> np.ndarray:
        return self.finite & ~self.empty & ~self.outside


def judge_boxes(boxes: np.ndarray, areas: np.ndarray, sizes: np.ndarray) -> JudgedBoxes:
    """boxes float32 [M, 4] and areas [M] as annotated; sizes [M, 2] are (height, width) of the
    image of each, infinite where they are not known.
    """
    corner = np.tile(sizes[:, ::-1].astype(np.float32), 2)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities, of boxes that go
        clipped = np.minimum(np.maximum(boxes, 0), corner)
        box_areas = (clipped[:, 2:] - clipped[:, :2]).prod(1)
        excess = np.abs(boxes - clipped).max(1, initial=0)
    # The area of a mask is smaller than its box; one that is not cannot be of what is left.
    areas = np.where(areas > 0, np.minimum(areas, box_areas), box_areas)
    finite = np.isfinite(boxes).all(1)
    return JudgedBoxes(clipped, areas, finite, _empty(boxes), _empty(clipped), excess)


def _empty(boxes: np.ndarray) -> np.ndarray:
    return np.any(boxes[:, 2:] <= boxes[:, :2], axis=1)
