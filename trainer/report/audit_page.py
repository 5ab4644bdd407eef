"""`audit.html`: what `vidt audit` suspects, most suspicious first, each with its picture.

The page has at most MOST_ROWS rows, shared among the kinds. Pictures are cut out around the boxes
and shrunk.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from trainer.readers.samples import Sample, SampleTable
from trainer.report.page import environment
from trainer.report.pictures import Mark, draw_marks, image_of
from trainer.report.worst_pictures import RIGHT, WRONG
from trainer.scoring.audit import BOX, CLASS, DOUBLED, FORGOTTEN, KINDS, UNSUPPORTED, Suspicion
from vidt.images.drawing import Rectangle, class_text

Outline: TypeAlias = tuple[Rectangle, str, str]  # box, colour, text
MOST_ROWS = 100
PANEL = 320  # pixels of the longer side of a picture
WHOLE = 640  # pixels; a picture with a longer side is cut out around its boxes
LEAST_SHARE = 0.25  # of the longer side that stays
EXPLAINED = {
    FORGOTTEN: "The detector sees an object, and no annotation is near.",
    BOX: "The detector agrees with the class and places the box differently.",
    CLASS: "The detector is surer of another class at the place of the annotation.",
    UNSUPPORTED: "The detector, which knows the class, finds nothing at the annotation.",
    DOUBLED: "Two pictures look the same. Keep one, or keep both in one split.",
}


@dataclass(frozen=True, eq=False)
class AuditFacts:
    """What was audited: `splits[i]` is the split of image i, `notes` say how it was judged."""

    folder: Path
    weights: Sequence[str]
    splits: Sequence[str]
    notes: Sequence[str]


@dataclass(frozen=True, eq=False)
class AuditRow:
    """A suspicion on the page. Ranks count from 1; pictures are named."""

    suspicion: Suspicion
    rank: int
    text: str
    sample: Sample
    split: str
    annotation_id: int | None
    pictures: Sequence[tuple[str, Image.Image]]


def render_audit(
    samples: SampleTable, ranked: Sequence[Suspicion], facts: AuditFacts, num_images: int
) -> str:
    """The page as text; num_images: how many were audited."""
    rows: dict[str, list[AuditRow]] = {kind: [] for kind in KINDS}
    for rank in shared_out(ranked):
        suspicion = ranked[rank - 1]
        rows[suspicion.kind].append(_row(samples, suspicion, rank, facts))
    counts = {kind: sum(each.kind == kind for each in ranked) for kind in KINDS}
    return (
        environment()
        .get_template("audit.html")
        .render(
            facts=facts,
            title=facts.folder.resolve().name,
            now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            rows=rows,
            counts=counts,
            explained=EXPLAINED,
            num_images=num_images,
            num_total=len(ranked),
        )
    )


def as_document(
    samples: SampleTable, ranked: Sequence[Suspicion], facts: AuditFacts, num_images: int
) -> dict[str, Any]:
    """The content of audit.json."""
    names, ranks = samples.class_names, dict.fromkeys(KINDS, 0)
    findings = []
    for rank, each in enumerate(ranked, 1):
        ranks[each.kind] += 1
        sample, row = samples[each.index], each.annotation
        twin = None if each.twin is None else samples[each.twin]
        seen = each.suggestion
        findings.append(
            {
                "kind": each.kind,
                "score": round(each.score, 4),
                "rank": rank,
                "rank_in_kind": ranks[each.kind],
                "split": facts.splits[each.index],
                "file": sample.path,
                "image_id": sample.image_id,
                "annotation_id": _annotation_id(sample, row),
                "class": None if row is None else names[int(sample.labels[row])],
                "box": None if row is None else _rounded(sample.boxes[row].tolist()),
                "suggested": seen
                and {
                    "class": names[seen.label],
                    "score": round(seen.score, 4),
                    "box": _rounded(seen.box),
                },
                "twin_id": twin and twin.image_id,
                "twin_file": twin and twin.path,
                "text": described(sample, each, names, Path(twin.path).name if twin else ""),
            }
        )
    return {
        "weights": list(facts.weights),
        "images": num_images,
        "notes": list(facts.notes),
        "counts": ranks,
        "findings": findings,
    }


def _annotation_id(sample: Sample, row: int | None) -> int | None:
    """The dataset's own id of an annotation."""
    ids = sample.annotation_ids
    return None if row is None or ids is None else int(ids[row])


def _rounded(box: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in box]


def shared_out(ranked: Sequence[Suspicion], most: int = MOST_ROWS) -> list[int]:
    """The ranks of at most `most` suspicions: the first of each kind, the second of each, and so
    on, in rising order.
    """
    seen: dict[str, int] = dict.fromkeys(KINDS, 0)
    places = []
    for rank, suspicion in enumerate(ranked, 1):
        places.append((seen[suspicion.kind], rank))
        seen[suspicion.kind] += 1
    return sorted(rank for _, rank in sorted(places)[:most])


def described(sample: Sample, suspicion: Suspicion, names: Sequence[str], twin: str = "") -> str:
    """What is suspected, in words; twin: the file name of the other picture."""
    seen, kind = suspicion.suggestion, suspicion.kind
    if kind == DOUBLED:
        return f"looks like {twin}"
    if kind == FORGOTTEN:
        assert seen is not None
        return f"{names[seen.label]} {seen.score:.2f} without an annotation"
    assert suspicion.annotation is not None
    own = names[int(sample.labels[suspicion.annotation])]
    if seen is None:
        return f"annotated as {own}, but nothing like it is found there"
    if kind == CLASS:
        return f"annotated as {own}, looks like {names[seen.label]} {seen.score:.2f}"
    return f"the box of {own} is elsewhere by the detector, score {seen.score:.2f}"


def _row(samples: SampleTable, suspicion: Suspicion, rank: int, facts: AuditFacts) -> AuditRow:
    sample, names = samples[suspicion.index], samples.class_names
    twin = None if suspicion.twin is None else samples[suspicion.twin]
    return AuditRow(
        suspicion,
        rank,
        described(sample, suspicion, names, "" if twin is None else Path(twin.path).name),
        sample,
        facts.splits[suspicion.index],
        _annotation_id(sample, suspicion.annotation),
        _pictures(sample, suspicion, names, twin),
    )


def _pictures(
    sample: Sample, suspicion: Suspicion, names: Sequence[str], twin: Sample | None
) -> list[tuple[str, Image.Image]]:
    """The picture with its annotations and with what the detector sees, or both pictures, named."""
    if twin is not None:
        both = (sample, twin)
        return [(Path(each.path).name, _drawn(each, _annotations(each), None)) for each in both]
    seen, row = suspicion.suggestion, suspicion.annotation
    boxes = _annotations(sample)
    looked_at = [] if seen is None else [seen.box]
    if row is not None:
        box, _, _ = boxes.pop(row)
        boxes.append((box, WRONG, class_text(int(sample.labels[row]), names)))
        looked_at.append(box)
    region = _region(looked_at, sample.size)
    pictures = [("annotations", _drawn(sample, boxes, region))]
    if seen is not None:
        text = f"{class_text(seen.label, names)} {seen.score:.2f}"
        pictures.append(("detector", _drawn(sample, [(seen.box, WRONG, text)], region)))
    return pictures


def _annotations(sample: Sample) -> list[Outline]:
    """The boxes in the background, without text: box, colour, text."""
    return [((x0, y0, x1, y1), RIGHT, "") for x0, y0, x1, y1 in sample.boxes.tolist()]


def _region(boxes: Sequence[Rectangle], size: tuple[int, int]) -> Rectangle | None:
    """Where to look in a picture of `size` (height, width), xyxy: the boxes and as much again on
    each side; None: everywhere.
    """
    height, width = size
    if max(size) <= WHOLE:
        return None
    corners = np.array(boxes)
    low, high = corners[:, :2].min(0), corners[:, 2:].max(0)
    side = max(3 * float((high - low).max()), LEAST_SHARE * max(size))
    middle = (low + high) / 2
    x0, y0 = np.clip(middle - side / 2, 0, [max(width - side, 0), max(height - side, 0)]).tolist()
    return round(x0), round(y0), round(min(x0 + side, width)), round(min(y0 + side, height))


def _drawn(sample: Sample, boxes: Iterable[Outline], region: Rectangle | None) -> Image.Image:
    """The region of the image with boxes, each with its colour and text."""
    image = image_of(sample)
    left, top = (0, 0) if region is None else region[:2]
    if region is not None:
        image = image.crop(region)
    shift = np.array([left, top, left, top])
    marks = [Mark(np.array(box) - shift, text, colour) for box, colour, text in boxes]
    inside = [mark for mark in marks if _is_inside(mark.box, image.size)]
    return draw_marks(image, inside, PANEL / max(image.size))


def _is_inside(box: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether a part of the box is in a picture of `size` (width, height)."""
    return bool((box[:2] < size).all() and (box[2:] > 0).all())
