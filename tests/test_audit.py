"""`vidt audit`: what it suspects, how it ranks, who judges, and what it writes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from tiny_runs import Learnt

from trainer.commands.command_line import main
from trainer.data.load import read_datasets
from trainer.readers.samples import Sample, SampleTable, concatenated
from trainer.report.audit_page import AuditFacts, as_document, render_audit, shared_out
from trainer.scoring.audit import (
    BOX,
    CLASS,
    DOUBLED,
    FORGOTTEN,
    KINDS,
    UNSUPPORTED,
    Suspicion,
    audit,
    doubled_pictures,
    merged,
    thumbnail,
)
from trainer.scoring.held_out import how_judged, judges_of, label_map, seen_by
from trainer.settings.config import TrainConfig
from vidt import Detections
from vidt.errors import UserError

Row = tuple[Sequence[float], int]
Scored = tuple[Sequence[float], int, float]
A, B, C = [0, 0, 40, 40], [60, 0, 100, 40], [0, 60, 40, 100]
NAMES = ("cat", "dog")
NOTHING = np.zeros((99, 256), np.float32)


def image(truth: Sequence[Row], crowd: Sequence[bool] = (), path: str = "a.png") -> Sample:
    return Sample(
        path=path,
        image_id=7,
        size=(100, 100),
        boxes=torch.tensor([box for box, _ in truth], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([label for _, label in truth], dtype=torch.int64),
        areas=torch.full((len(truth),), 1600.0),
        crowd=torch.tensor(crowd or [False] * len(truth), dtype=torch.bool),
    )


def found(*rows: Scored) -> Detections:
    rows = tuple(sorted(rows, key=lambda row: -row[2]))
    return Detections(
        torch.tensor([score for *_, score in rows]),
        torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        torch.tensor([box for box, *_ in rows], dtype=torch.float32).reshape(-1, 4),
    )


def audited(truth: Sequence[Row], *rows: Scored, crowd: Sequence[bool] = ()) -> list[Suspicion]:
    """Suspicions about the first image; three others show that both classes are known well."""
    good = [(A, 0), (B, 1)]
    samples = SampleTable.from_samples([image(truth, crowd), *[image(good)] * 3], NAMES)
    sure = found((A, 0, 0.9), (B, 1, 0.9))
    detections = {0: found(*rows), 1: sure, 2: sure, 3: sure}
    every = audit(samples, detections, NOTHING)
    assert all(each.index == 0 for each in every), "nothing is wrong with the others"
    return every


def test_annotations_that_agree_raise_no_suspicion() -> None:
    assert audited([(A, 0), (B, 1)], ([1, 1, 41, 41], 0, 0.9), (B, 1, 0.8)) == []


def test_a_forgotten_object() -> None:
    (each,) = audited([(A, 0)], (A, 0, 0.9), (C, 1, 0.8))
    assert (each.kind, each.annotation) == (FORGOTTEN, None)
    assert each.score == pytest.approx(0.8)
    assert each.suggestion is not None and each.suggestion.label == 1


def test_a_forgotten_object_counts_once() -> None:
    """Two classes, or two boxes, of one object are one row."""
    rows = audited([(A, 0)], (A, 0, 0.9), (C, 1, 0.8), (C, 0, 0.7), ([2, 62, 41, 99], 1, 0.6))
    assert [each.kind for each in rows] == [FORGOTTEN]


@pytest.mark.parametrize("shift", [12, 24])
def test_a_box_that_is_elsewhere(shift: int) -> None:
    """IoU 0.54 and 0.25: above and below the one at which evaluation matches."""
    moved = [A[0] + shift, A[1], A[2] + shift, A[3]]
    (each,) = audited([(moved, 0)], (A, 0, 0.9))
    overlap = (40 - shift) / (40 + shift)
    assert (each.kind, each.annotation) == (BOX, 0)
    assert each.score == pytest.approx(0.9 * min(1, (1 - overlap) / 0.6), abs=1e-6)


def test_a_neighbour_of_an_annotated_object_is_forgotten_and_not_misplaced() -> None:
    near = [20, 0, 60, 40]
    (each,) = audited([(A, 0)], (A, 0, 0.8), (near, 0, 0.9))
    assert each.kind == FORGOTTEN and each.score == pytest.approx(0.9 * (1 - 20 / 60), abs=1e-6)


def test_a_class_that_is_swapped() -> None:
    (each,) = audited([(A, 0)], (A, 1, 0.8), (A, 0, 0.2))
    assert (each.kind, each.annotation) == (CLASS, 0)
    assert each.suggestion is not None and each.suggestion.label == 1
    # The cat is found in three of four images.
    assert each.score == pytest.approx(0.75 * (0.8 - 0.2), abs=1e-6)


def test_an_annotation_that_nothing_supports() -> None:
    (each,) = audited([(A, 0), (C, 1)], (A, 0, 0.9))
    assert (each.kind, each.annotation, each.suggestion) == (UNSUPPORTED, 1, None)
    assert each.score == pytest.approx(0.75**2)  # the dog is found in three of four images


def test_a_class_that_the_detector_does_not_know_is_not_suspected() -> None:
    samples = SampleTable.from_samples([image([(A, 0), (C, 1)])] * 3, NAMES)
    assert audit(samples, dict.fromkeys(range(3), found((A, 0, 0.9))), NOTHING) == []


def test_crowd_regions_are_left_alone() -> None:
    everywhere = [0, 0, 100, 100]
    assert audited([(everywhere, 0)], (A, 0, 0.9), crowd=[True]) == []


def test_without_objects_or_detections() -> None:
    assert audited([]) == []
    (each,) = audited([(A, 0)])
    assert each.kind == UNSUPPORTED


def test_the_list_falls_over_all_kinds() -> None:
    rows = audited([(C, 0), (B, 0)], (A, 0, 0.9), (B, 1, 0.7))
    assert {each.kind for each in rows} == {FORGOTTEN, CLASS, UNSUPPORTED}
    scores = [each.score for each in rows]
    assert scores == sorted(scores, reverse=True) and all(0 <= each <= 1 for each in scores)


def photo(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC)


def test_doubled_pictures(tmp_path: Path) -> None:
    """A copy of another size, brighter, and compressed is known; other pictures and plain ones
    are not.
    """
    copy = ImageEnhance.Brightness(photo(1).resize((200, 150))).enhance(1.1)
    copy.save(tmp_path / "copy.jpg", quality=60)
    plain = Image.new("RGB", (64, 64), "grey")
    pictures = [photo(0), photo(1), plain, photo(2), Image.open(tmp_path / "copy.jpg"), plain]
    (each,) = doubled_pictures(np.stack([thumbnail(picture) for picture in pictures]))
    assert (each.kind, each.index, each.twin) == (DOUBLED, 4, 1) and 0.8 < each.score <= 1


def test_several_detectors_are_averaged() -> None:
    one = found((A, 0, 0.9), (C, 1, 0.6))
    other = found(([4, 0, 44, 40], 0, 0.3), (A, 1, 0.5))
    both = merged([one, other])
    assert both.scores.tolist() == pytest.approx([0.6, 0.3, 0.25])
    assert both.labels.tolist() == [0, 1, 1]
    assert both.boxes[0].tolist() == pytest.approx([1, 0, 41, 40])
    assert merged([one]) is one and len(merged([found(), found()])) == 0


def test_who_has_not_seen_an_image_judges_it() -> None:
    seen = {"a": {0, 1}, "b": {1, 2}, "c": None}
    assert judges_of(["a", "b"], seen, 3) == [["b"], ["a", "b"], ["a"]]
    assert judges_of(["a", "c"], seen, 3) == [["a", "c"], ["a", "c"], ["a"]]
    assert "2 of 3 images" in how_judged(["a", "b"], seen, [["b"], ["a", "b"], ["a"]])
    assert "All 2 images" in how_judged(["a", "b"], {"a": {0, 1}, "b": {2}}, [["b"], ["b"]])
    assert "c does not tell" in how_judged(["c"], seen, [["c"]])


def test_a_run_tells_what_it_was_trained_on(learnt: Learnt, tmp_path: Path) -> None:
    """By the header, if names and numbers agree; image by image with its config.yaml, also where
    the audited data is a copy.
    """
    config = TrainConfig(dataset_file="coco", coco_path=str(learnt.data))
    train, _, _ = read_datasets(config, num_queries=100, num_classes=None)
    unknown = SampleTable.from_samples([image([], path="elsewhere.png")], train.class_names)
    weights = tmp_path / "best.safetensors"
    weights.write_bytes(learnt.weights.read_bytes())
    assert seen_by(str(weights), [unknown, train]) == {1, 2, 3, 4}
    assert seen_by(str(weights), [unknown]) is None
    shutil.copytree(learnt.data, tmp_path / "copy")
    (tmp_path / "config.yaml").write_text(f"dataset_file: coco\ncoco_path: {tmp_path / 'copy'}\n")
    assert seen_by(str(weights), [unknown, train.subset([2])]) == {1}
    assert seen_by(str(weights), [unknown]) == set()


def test_classes_are_matched_by_name() -> None:
    assert label_map("w", ["Dog ", "bird"], NAMES).tolist() == [1, -1]
    with pytest.raises(UserError, match=r"bird.*cat"):
        label_map("w", ["bird"], NAMES)


def test_the_page_has_a_hundred_rows_of_all_kinds() -> None:
    ranked = [Suspicion(DOUBLED, 1.0, 0, twin=0)] * 150
    ranked += [Suspicion(kind, 0.5, 0) for kind in KINDS[:4] for _ in range(30)]
    ranks = shared_out(ranked)
    assert len(ranks) == 100 and ranks == sorted(ranks)
    kinds = [ranked[rank - 1].kind for rank in ranks]
    assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 20)
    assert len(shared_out(ranked[:120])) == 100


def test_the_page_shows_and_escapes(tmp_path: Path) -> None:
    """A large picture is cut out around its boxes; a name with letters of HTML stays text."""
    path = tmp_path / "a <b>#1.png"
    Image.new("RGB", (2000, 1000), "grey").save(path)
    names = ("<i>", "dog")
    sample = image([([0, 0, 50, 50], 0), ([900, 900, 990, 990], 1)], path=str(path))
    sample = Sample(**{**vars(sample), "size": (1000, 2000)})
    samples = SampleTable.from_samples([sample], names)
    ranked = audit(samples, {0: found(([0, 0, 50, 50], 1, 0.9))}, NOTHING)
    ranked = [*ranked, Suspicion(CLASS, 0.4, 0, 0, None), Suspicion(DOUBLED, 0.3, 0, twin=0)]
    facts = AuditFacts(tmp_path / "out", ["w"], ["train"], ["a note"])
    text = render_audit(samples, ranked, facts, 1)
    assert "../a%20%3Cb%3E%231.png" in text and "<i>" not in text.split("</style>")[1]
    assert "a note" in text and text.count("<img") >= 3
    document = as_document(samples, ranked, facts, 1)
    assert [each["rank"] for each in document["findings"]] == list(range(1, len(ranked) + 1))
    assert sum(document["counts"].values()) == len(ranked)


def test_tables_are_joined() -> None:
    one = SampleTable.from_samples([image([(A, 0)], path="1"), image([], path="2")], NAMES)
    other = SampleTable.from_samples([image([(B, 1), (C, 0)], path="3")], NAMES)
    both = concatenated([one, other])
    assert list(both.paths()) == ["1", "2", "3"]
    assert [each.labels.tolist() for each in both] == [[0], [], [1, 0]]
    assert both[2].annotation_ids.tolist() == other[0].annotation_ids.tolist()


def test_the_command(learnt: Learnt, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "audit"
    words = ["audit", learnt.weights, "--coco_path", learnt.data, "--output_dir", out]
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    document = json.loads((out / "audit.json").read_text())
    assert document["images"] > 0 and document["weights"] == [learnt.weights.name]
    assert {each["split"] for each in document["findings"]} <= {"train", "val"}
    scores = [each["score"] for each in document["findings"]]
    assert scores == sorted(scores, reverse=True)
    assert "weights 1 of 1" in shown.err and str(out / "audit.html") in shown.out
    assert "judged by" in (out / "audit.html").read_text()


def test_the_command_refuses(
    learnt: Learnt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(learnt.weights)]) == 2
    assert "no dataset is named" in capsys.readouterr().err
    file = tmp_path / "file"
    file.touch()
    words = ["audit", learnt.weights, "--coco_path", learnt.data, "--output_dir", file]
    assert main([str(word) for word in words]) == 2
    assert f"--output_dir {file}" in capsys.readouterr().err
