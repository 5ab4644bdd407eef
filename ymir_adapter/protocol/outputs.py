"""What the platform reads back: training result, mining ranking and inference JSON.

All writes are atomic: after a kill at any instant every weights file that a result names exists and
is complete.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vidt.atomic import atomic_file, atomic_write, unfinished
from ymir_adapter.protocol.task import Task

if TYPE_CHECKING:
    from vidt.predict.detections import Detections

logger = logging.getLogger(__name__)

LATEST_STAGES = 10  # listed beside the best one
# Decimals of a score. On a GPU another batch size changes the order of additions, and so a score by
# up to 1e-6 in float32. Rounding hides this, except for one score in a hundred, which moves by
# 1e-4. Fewer decimals would tie images.
DECIMALS = 4
MAP, MAR = "map50", "mar_100"  # the trainer's names of the platform's mAP and mAR


class TrainingResult:
    """`result.yaml` and the weights that it names: a list of stages, or for old platforms the best
    weights alone.

    The first stage of a run replaces an earlier result in the same folder; with `resumed` the run
    adds to its stages.
    """

    def __init__(self, task: Task, *, resumed: bool = False) -> None:
        self.folder = task.output.models_dir
        self.path = task.output.training_result_file
        self.has_stages = task.has_stages
        listed = self._read()
        self._stale: set[Path] = {file for stage in listed.values() for file in stage["paths"]}
        complete = {
            name: one for name, one in listed.items() if all(p.is_file() for p in one["paths"])
        }
        self._stages: dict[str, dict[str, Any]] = complete if resumed else {}

    @property
    def best(self) -> str | None:
        """The stage with the highest mAP, the latest of equal ones."""
        stages = self._stages.values()
        ranked = [(one["mAP"], one["timestamp"], at) for at, one in enumerate(stages)]
        return list(self._stages)[max(ranked)[2]] if ranked else None

    def add(
        self,
        stage_name: str,
        weights: Path,
        metrics: Mapping[str, float],
        more: Sequence[Path] = (),
    ) -> None:
        """Copies the weights of an evaluated epoch, and `more` files of it, under the name of the
        stage, rewrites the result, and only then removes files that it no longer names.

        `metrics` are those of `trainer.report.progress`; without ground truth (-1, NaN) they count
        as 0. The files may be replaced afterwards, but must not be written to in place.
        """
        assert stage_name.isidentifier() and stage_name != "attachments", stage_name
        latest = max((stage["timestamp"] for stage in self._stages.values()), default=0)
        sources = [weights, *more]
        file_names = [f"{stage_name}{source.suffix}" for source in sources]
        folder = self.folder / stage_name if self.has_stages else self.folder
        places = [folder / file_name for file_name in file_names]
        self._stages.pop(stage_name, None)  # an epoch that is evaluated again is the latest
        self._stages[stage_name] = {
            "stage_name": stage_name,
            "files": file_names,
            "timestamp": max(int(time.time()), latest),
            "mAP": _unit(metrics.get(MAP, 0.0)),
            **({"mAR": _unit(metrics[MAR])} if MAR in metrics else {}),
            "paths": places,
        }
        best = self.best
        latest_names = list(self._stages)[-LATEST_STAGES:]
        if not self.has_stages:  # all files of a flat result are packed together
            latest_names = []
        kept = {n: one for n, one in self._stages.items() if n in latest_names or n == best}
        dropped = [one for name, one in self._stages.items() if name not in kept]
        self._stages = kept
        if stage_name in kept:
            for source, place in zip(sources, places, strict=True):
                _copy_atomically(source, place)
        self._stale |= {file for stage in dropped for file in stage["paths"]}
        atomic_write(self.path, yaml.safe_dump(self._content(), sort_keys=False).encode())
        self._remove_stale()

    def _content(self) -> dict[str, Any]:
        assert self.best is not None
        best = self._stages[self.best]
        if not self.has_stages:
            return {"model": best["files"], "map": best["mAP"]}
        stages = {
            name: {key: value for key, value in stage.items() if key != "paths"}
            for name, stage in self._stages.items()
        }
        return {
            "best_stage_name": self.best,
            "mAP": best["mAP"],
            "model_stages": stages,
            # As COCO: the hundred best boxes of an image, without a threshold.
            "evaluate_config": {"iou_thr": 0.5, "conf_thr": 0.0},
        }

    def _remove_stale(self) -> None:
        named = {file for stage in self._stages.values() for file in stage["paths"]}
        for file in self._stale - named:
            file.unlink(missing_ok=True)
            if file.parent != self.folder:
                with contextlib.suppress(OSError):  # it holds a foreign file
                    file.parent.rmdir()
        self._stale = set()

    def _read(self) -> dict[str, dict[str, Any]]:
        """The stages of the existing result, in order; {} if there is none of ours."""
        try:
            content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
            if not self.has_stages:
                first, *more = content["model"]
                name, score, files = Path(first).stem, float(content["map"]), [first, *more]
                row = {"stage_name": name, "files": files, "timestamp": 0, "mAP": score}
                return {name: {**row, "paths": [self.folder / file for file in files]}}
            return {
                name: {**stage, "paths": [self.folder / name / file for file in stage["files"]]}
                for name, stage in content["model_stages"].items()
            }
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
            return {}


def write_ranking(path: Path, ranked: Iterable[tuple[str, float]]) -> None:
    """Writes `result.tsv`: assets as the index spells them and scores, most informative first.

    Raises ValueError for a score that is not finite or higher than the one before.
    """
    lines = []
    last = math.inf
    for asset, score in ranked:
        if not (math.isfinite(score) and score <= last):
            raise ValueError(f"{asset}: score {score} after {last}; a ranking goes down")
        last = score
        lines.append(f"{asset}\t{float(score)!r}\n")
    atomic_write(path, "".join(lines).encode("utf-8", "surrogateescape"))


class DetectionWriter:
    """Writes `infer-result.json` image by image under a temporary name; `close` puts it in place.

    As a context manager it closes at the end, and discards the file after an exception.
    """

    def __init__(self, task: Task) -> None:
        self.path = task.output.infer_result_file
        self.key = "boxes" if task.has_stages else "annotations"
        self.wanted = frozenset(task.class_names)
        self.count = 0
        self._names: set[str] = set()
        self._files = contextlib.ExitStack()
        self._file = self._files.enter_context(atomic_file(self.path))
        self._file.write(b'{"detection": {')

    def __enter__(self) -> "DetectionWriter":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            self._files.__exit__(kind, error, trace)

    def add(
        self,
        asset: str,
        size: tuple[int, int] | None,
        class_names: Sequence[str],
        detections: "Detections | None",
    ) -> None:
        """Adds an image. `size` is (height, width) of its stored pixels, None if it is unreadable;
        `class_names` are those of the weights, by label. Classes outside the task are left out. Of
        two assets with one base name the platform sees only the first.
        """
        name = os.path.basename(asset)
        if name in self._names:
            logger.warning(f"{asset}: another image has this file name; its boxes are left out")
            return
        self._names.add(name)
        boxes = []
        if size is not None and detections is not None:
            boxes = _boxes(size, class_names, detections, self.wanted)
        entry = f"\n{_json(name)}: {_json({self.key: boxes})}"
        self._file.write(("," * (self.count > 0) + entry).encode())
        self.count += 1

    def close(self) -> None:
        """Finishes the document and puts it in place."""
        self._file.write(b"\n}}\n")
        self._files.close()


def _boxes(
    size: tuple[int, int],
    class_names: Sequence[str],
    detections: "Detections",
    wanted: frozenset[str],
) -> list[dict[str, Any]]:
    """Boxes in whole pixels inside the image, best first. The platform's parser rejects others."""
    height, width = size
    scores = detections.scores.double().tolist()
    rows = zip(scores, detections.labels.tolist(), detections.boxes.double().tolist(), strict=True)
    found = []
    for score, label, corners in rows:
        if not all(math.isfinite(number) for number in (score, *corners)):
            continue
        x1, x2 = (min(max(round(x), 0), width) for x in corners[::2])
        y1, y2 = (min(max(round(y), 0), height) for y in corners[1::2])
        if x2 > x1 and y2 > y1 and class_names[label] in wanted:
            found.append(
                {
                    "box": {"x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1},
                    "class_name": class_names[label],
                    "score": round(min(max(score, 0.0), 1.0), DECIMALS),
                }
            )
    return sorted(found, key=lambda row: -row["score"])


def _json(value: object) -> str:
    """JSON in UTF-8; in ASCII escapes if a name has bytes of another encoding."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def _unit(value: float) -> float:
    """A plain number from 0 to 1; -1 and NaN, for nothing to score, become 0."""
    value = float(value)
    return min(value, 1.0) if value > 0 else 0.0


def _copy_atomically(source: Path, target: Path) -> None:
    """A copy that appears when it is complete: a hard link where the file system allows it, since
    the trainer never writes to a weights file in place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as copy:
        copy.unlink(missing_ok=True)
        try:
            os.link(source, copy)
        except OSError:
            shutil.copyfile(source, copy)
        copy.chmod(0o644)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
        copy.replace(target)
