"""Evaluations without a detector: true boxes are moved, left out or given another class, and false
ones are added; the code that scores detectors scores them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_runs import cpu

from trainer.loop.agreement import Agreement
from trainer.readers.samples import Sample, SampleTable
from trainer.report.progress import Progress
from trainer.report.worst_pictures import worst_pictures
from trainer.scoring.evaluation import Evaluation, score_images, summarise
from trainer.scoring.mistakes import diagnose
from vidt import Detections

PER_EPOCH = 10  # steps


def pictures_of(
    folder: Path, class_names: Sequence[str], count: int = 20, seed: int = 0
) -> SampleTable:
    """Pictures with one to six boxes of 8 to 130 pixels a side; every seventh has no box."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for index in range(count):
        number = 0 if index % 7 == 6 else int(random.integers(1, 7))
        sides = random.uniform(8, 130, (number, 2))
        corners = random.uniform(0, 1, (number, 2)) * (np.array([320, 240]) - sides)
        path = folder / f"{index}.png"
        Image.new("RGB", (320, 240), (120, 130, 140)).save(path)
        samples.append(
            Sample(
                path=str(path),
                image_id=index,
                size=(240, 320),
                boxes=torch.tensor(np.hstack([corners, corners + sides]), dtype=torch.float32),
                labels=torch.from_numpy(random.integers(0, len(class_names), number)),
                areas=torch.tensor(sides.prod(1), dtype=torch.float32),
                crowd=torch.zeros(number, dtype=torch.bool),
            )
        )
    return SampleTable.from_samples(samples, class_names, source=folder.name)


def found_in(samples: SampleTable, skill: float, seed: int = 0) -> dict[int, Detections]:
    """Detections by image; `skill` runs from 0, nothing right, to 1, nearly all right."""
    random, num_classes = np.random.default_rng(seed), len(samples.class_names)
    found = {}
    for index, sample in enumerate(samples):
        rows: list[tuple[float, int, np.ndarray]] = []
        for box, label in zip(sample.boxes.numpy(), sample.labels.tolist(), strict=True):
            if random.random() < skill:
                other = random.random() < 0.1
                taken_for = int(random.integers(num_classes)) if other else label
                moved = box + random.normal(0, 0.08, 4) * (box[2:] - box[:2]).mean()
                rows.append((random.beta(4, 2), taken_for, moved))
        for _ in range(3):
            corner, side = random.uniform(0, 150, 2), random.uniform(10, 80, 2)
            label = int(random.integers(num_classes))
            rows.append((random.beta(1, 5), label, np.concatenate([corner, corner + side])))
        rows.sort(key=lambda row: -row[0])
        found[index] = Detections(
            torch.tensor([score for score, _, _ in rows], dtype=torch.float32),
            torch.tensor([label for _, label, _ in rows]),
            torch.tensor(np.array([box for _, _, box in rows]), dtype=torch.float32),
        )
    return found


def nothing_in(samples: SampleTable) -> dict[int, Detections]:
    nothing = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    return dict.fromkeys(range(len(samples)), nothing)


def evaluation_of(samples: SampleTable, found: dict[int, Detections]) -> Evaluation:
    indices = list(range(len(samples)))
    shares = [score_images(samples, indices, found)]
    agreement = Agreement(cpu())
    diagnosis = diagnose(samples, indices, found, {}, shares, agreement)
    return Evaluation(summarise(samples, shares), found, 0, diagnosis)


def events_of_a_run(
    samples: SampleTable, skills: Sequence[float], first_step: int = 0
) -> list[Progress]:
    """Of one start, an epoch for each skill; "end" is left to the caller."""
    total = first_step + PER_EPOCH * max(len(skills), 1)

    def progress(event: str, step: int, **more: object) -> Progress:
        fraction, epoch = step / total, max(step - 1, 0) // PER_EPOCH
        last = total // PER_EPOCH
        return Progress(event, fraction, epoch, step, total, total_epochs=last, **more)  # type: ignore[arg-type]

    events, best = [progress("start", first_step)], -1.0
    for number, skill in enumerate(skills):
        begin = first_step + PER_EPOCH * number
        for step in range(begin + 2, begin + PER_EPOCH + 1, 2):
            loss = 3 * math.exp(-step / 30)
            terms = {"loss_ce": loss / 3, "loss_giou": loss / 3, "loss_giou_0": loss / 3}
            more = {"lr": 1e-4, "images_per_second": 12.0 + step % 3, "memory_gib": 1.5}
            events.append(progress("step", step, metrics={"loss": loss, **terms, **more}))
        evaluation = evaluation_of(samples, found_in(samples, skill))
        score = evaluation.metrics["map50"]
        worst = worst_pictures(samples, evaluation.diagnosis.worst)
        events.append(progress("evaluating", begin + PER_EPOCH))
        events.append(
            progress(
                "evaluation",
                begin + PER_EPOCH,
                metrics=evaluation.metrics,
                best=score > best,
                diagnosis=evaluation.diagnosis,
                worst=worst,
            )
        )
        best = max(best, score)
    return events


def at_the_end(last: Progress) -> Progress:
    return replace(last, event="end", fraction=1.0, diagnosis=None, worst=())
