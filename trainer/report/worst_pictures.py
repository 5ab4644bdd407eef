"""The images on which a detector errs most, drawn: truth, and what was found.

What is right stays in the background; what is wrong is bright and named. Boxes are xyxy in pixels
of the image they belong to.
"""

from collections.abc import Sequence

from torch import Tensor

from trainer.readers.run_lengths import RunLengths
from trainer.readers.samples import SampleTable
from trainer.report.pictures import Mark, class_text, draw_marks, picture_of
from trainer.report.progress import Pair
from trainer.scoring.mistakes import CROWD, NOTHING, JudgedImage

# Told apart by any eye, on pictures of any colour.
RIGHT, WRONG = "#56b4e9", "#ffb000"
PANEL = 480  # pixels of the longer side


def worst_pictures(samples: SampleTable, worst: Sequence[JudgedImage]) -> list[Pair]:
    """Truth and prediction of each."""
    return [_pair(samples, judged) for judged in worst]


def _pair(samples: SampleTable, judged: JudgedImage) -> Pair:
    sample, names = samples[judged.index], samples.class_names
    image = picture_of(sample)
    scale = PANEL / max(image.size)
    truth = _marks(
        sample.boxes,
        [class_text(label, names) for label in sample.labels.tolist()],
        [one in (label, CROWD) for one, label in _rows(judged.truth_as, sample.labels)],
        sample.masks,
    )
    found = judged.found
    texts = []
    for (true, label), score in zip(
        _rows(judged.found_as, found.labels), found.scores.tolist(), strict=True
    ):
        text = f"{class_text(label, names)} {score:.2f}"
        texts.append(text if true == NOTHING else f"{text} is {class_text(true, names)}")
    right = [one in (label, CROWD) for one, label in _rows(judged.found_as, found.labels)]
    predicted = _marks(found.boxes, texts, right, judged.masks)
    return draw_marks(image, truth, scale), draw_marks(image, predicted[::-1], scale)


def _rows(first: Tensor, second: Tensor) -> list[tuple[int, int]]:
    return list(zip(first.tolist(), second.tolist(), strict=True))


def _marks(
    boxes: Tensor, texts: list[str], right: list[bool], masks: Sequence[RunLengths] | None
) -> list[Mark]:
    drawn: Sequence[RunLengths | None] = masks or [None] * len(texts)
    return [
        Mark(box, "" if good else text, RIGHT if good else WRONG, mask or None, quiet=good)
        for box, text, good, mask in zip(boxes.numpy(), texts, right, drawn, strict=True)
    ]


def caption(judged: JudgedImage) -> str:
    """'3 missed, 1 false, 2 of the wrong class'."""
    counts = (
        (judged.num_missed, "missed"),
        (judged.num_false, "false"),
        (judged.num_confused, "of the wrong class"),
    )
    return ", ".join(f"{count} {what}" for count, what in counts if count)
