"""The images with the most errors, drawn: truth and prediction. Correct boxes stay in the
background; wrong ones are bright and labelled.
"""

from collections.abc import Sequence

from torch import Tensor

from trainer.readers.run_lengths import RunLengths
from trainer.readers.samples import SampleTable
from trainer.report.pictures import Mark, draw_marks, image_of, masks_or_none
from trainer.report.progress import Pair
from trainer.scoring.mistakes import CROWD, NOTHING, JudgedImage
from vidt.errors import counted
from vidt.images.drawing import class_text

# Any eye can tell these apart, on pictures of any colour.
RIGHT, WRONG = "#56b4e9", "#ffb000"
PANEL = 480  # pixels of the longer side


def worst_pictures(samples: SampleTable, worst: Sequence[JudgedImage]) -> list[Pair]:
    """Truth and prediction of each image."""
    return [_pair(samples, judged) for judged in worst]


def _pair(samples: SampleTable, judged: JudgedImage) -> Pair:
    sample, detections, names = samples[judged.index], judged.detections, samples.class_names
    image = image_of(sample)
    scale = PANEL / max(image.size)
    truth_texts = [class_text(label, names) for label in sample.labels.tolist()]
    texts = []
    for label, score, true in zip(
        detections.labels.tolist(),
        detections.scores.tolist(),
        judged.true_class.tolist(),
        strict=True,
    ):
        text = f"{class_text(label, names)} {score:.2f}"
        texts.append(text if true == NOTHING else f"{text} is {class_text(true, names)}")
    truth = _marks(sample.boxes, truth_texts, sample.labels, judged.predicted_class, sample.masks)
    predicted = _marks(detections.boxes, texts, detections.labels, judged.true_class, judged.masks)
    return draw_marks(image, truth, scale), draw_marks(image, predicted[::-1], scale)


def _marks(
    boxes: Tensor,
    texts: Sequence[str],
    labels: Tensor,
    matched: Tensor,
    masks: Sequence[RunLengths] | None,
) -> list[Mark]:
    """Boxes matched to their own class or to a crowd region are right."""
    right = ((matched == labels) | (matched == CROWD)).tolist()
    return [
        Mark(box, "" if good else text, RIGHT if good else WRONG, mask)
        for box, text, good, mask in zip(
            boxes.numpy(), texts, right, masks_or_none(masks, len(texts)), strict=True
        )
    ]


def caption(judged: JudgedImage) -> str:
    """'3 missed, 1 false positive, 2 of the wrong class'."""
    counts = (
        (judged.num_missed, f"{judged.num_missed:,} missed"),
        (judged.num_false, counted(judged.num_false, "false positive")),
        (judged.num_confused, f"{judged.num_confused:,} of the wrong class"),
    )
    return ", ".join(text for count, text in counts if count)
