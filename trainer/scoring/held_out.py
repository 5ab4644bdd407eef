"""Which detectors may judge which images of an audit, and their detections in the dataset's labels.

A detector learns some of the mistakes that it was trained on, so an image is best judged by those
that were not trained on it. K classes.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.data.load import reader_of
from trainer.readers.findings import FilesSeen
from trainer.readers.samples import SampleTable
from trainer.settings.parsing import parse
from vidt.errors import UserError, counted
from vidt.predict.detections import Detections
from vidt.weights.checkpoint import matching_classes
from vidt.weights.weights_file import UnusableWeights, read_info


def seen_by(weights: str, parts: Sequence[SampleTable]) -> set[int] | None:
    """The images, counted through all parts, on which a weights file was trained: the files of its
    training part if the `config.yaml` of its run lies beside it, else each part that its header
    describes by name and numbers; None if neither is known.
    """
    if Path(weights).suffix == ".onnx":
        return None
    try:
        record = read_info(weights).training.get("data", {}).get("training")
    except UnusableWeights:  # a released file, or one that loading will refuse
        return None
    if record is None:
        return None
    trained = _training_files(Path(weights).parent / "config.yaml", record)
    seen: set[int] = set()
    start, is_known = 0, trained is not None
    for table in parts:
        if trained is not None:
            paths = enumerate(table.paths(), start)
            seen |= {index for index, path in paths if _identity(path) in trained}
        elif record == {"source": table.source, "images": len(table), "boxes": len(table.labels)}:
            is_known = True
            seen |= set(range(start, start + len(table)))
        start += len(table)
    return seen if is_known else None


def _training_files(config_file: Path, record: Mapping[str, Any]) -> set[tuple[str, int]] | None:
    """The image files of the run's training part; None if its settings or data cannot be read, or
    are of another part than the record says.
    """
    if not config_file.is_file():
        return None
    try:
        config, _ = parse(["--config", str(config_file)])
        table, _ = reader_of(config)("train", None, False, FilesSeen())
    except (UserError, OSError):
        return None
    if table.source != record.get("source"):
        return None
    return {_identity(path) for path in table.paths()}


def _identity(path: str) -> tuple[str, int]:
    """The name and bytes of a file, which a copy of the dataset shares; -1 bytes if it is gone."""
    return Path(path).name, os.path.getsize(path) if os.path.isfile(path) else -1


def judges_of(
    weights: Sequence[str], seen: Mapping[str, set[int] | None], num_images: int
) -> list[list[str]]:
    """The weights that judge each image: those that were not trained on it, or all, if all were or
    if it is not known.
    """
    judges = []
    for index in range(num_images):
        unseen = [path for path in weights if (of := seen[path]) is not None and index not in of]
        judges.append(unseen or list(weights))
    return judges


def how_judged(
    weights: Sequence[str], seen: Mapping[str, set[int] | None], judges: Sequence[Sequence[str]]
) -> str:
    """A sentence for the page: which detectors judged the images."""
    held_out = sum(
        all((of := seen[path]) is not None and index not in of for path in paths)
        for index, paths in enumerate(judges)
    )
    total = len(judges)
    whose = "the detector" if len(weights) == 1 else "the mean of all detectors"
    if held_out == total:
        return f"All {counted(total, 'image')} are judged by detectors that did not train on them."
    unknown = [Path(path).name for path in weights if seen[path] is None]
    reason = (
        f"{', '.join(unknown)} does not tell which images it was trained on"
        if unknown
        else f"{whose} was trained on them, and learned some of their mistakes"
    )
    return (
        f"{held_out:,} of {counted(total, 'image')} are judged by detectors that did not train on "
        f"them, the others by {whose}: {reason}."
    )


def label_map(path: str, theirs: Sequence[str], ours: Sequence[str]) -> Tensor:
    """The dataset's label of each class of the detector, -1 for none: int64 [K]; see
    `matching_classes`. Raises UserError if they have no class in common.
    """
    pairs = matching_classes(theirs, ours)
    if not pairs:
        raise UserError(
            f"{path} has no class of the dataset: it knows {', '.join(list(theirs)[:5])}, the "
            f"dataset has {', '.join(list(ours)[:5])}; take weights trained on these classes"
        )
    return torch.tensor([pairs.get(label, -1) for label in range(len(theirs))])


def relabelled(detections: Any, labels: Tensor) -> Detections:
    """Detections with the dataset's labels, without those of classes that it does not have."""
    scores, boxes = (torch.as_tensor(each) for each in (detections.scores, detections.boxes))
    own = labels[torch.as_tensor(detections.labels).long()]
    return Detections(scores[own >= 0].float(), own[own >= 0], boxes[own >= 0].float())
