"""What is learned from a small dataset in a given time, beside YOLO11n with its own defaults.

    python benchmarks/small_data.py --data ../shared/data/raccoon --seconds 300
    python benchmarks/small_data.py --data shapes --seconds 155 --seeds 42 43 44 --yolo python

Trains by `vidt train --preset auto --hours`, random weights, and prints COCO's map50 and map of the
last weights (their moving average) on the validation images, and the seconds of the whole command.
With --yolo PYTHON, an interpreter that has `ultralytics`, yolo11n.yaml is trained for as long from
random weights with its own defaults, batch 8; its last weights (EMA) are scored by pycocotools on
detections down to a score of 0.001, at most 100 an image. Both use --threads threads. With
--together they train at the same time, so that a machine whose speed changes is as fast for both;
give each its own cores by --threads.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HOUR = 3600

YOLO = """
import json, sys
from ultralytics import YOLO
data, folder, side, seconds, seed, names = sys.argv[1:]
model = YOLO("yolo11n.yaml")
model.train(data=data, imgsz=int(side), batch=8, time=float(seconds) / 3600, seed=int(seed),
            pretrained=False, device="cpu", workers=0, project=folder, name="run", plots=False,
            verbose=False)
model = YOLO(f"{folder}/run/weights/last.pt")
found = []
for id_, path in json.loads(open(names).read()):
    (result,) = model.predict(path, imgsz=int(side), conf=0.001, max_det=100, verbose=False)
    rows = zip(result.boxes.xyxy.tolist(), result.boxes.conf.tolist(), result.boxes.cls.tolist())
    for (x0, y0, x1, y1), score, label in rows:
        box = [x0, y0, x1 - x0, y1 - y0]
        found.append({"image_id": id_, "category_id": int(label), "bbox": box, "score": score})
open(f"{folder}/found.json", "w").write(json.dumps(found))
"""


def environment(threads: int) -> dict[str, str]:
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
    return {**os.environ, **passive, "OMP_NUM_THREADS": str(threads)}


def clocked(command: list[str], threads: int, log: Path) -> float:
    """Runs a command and returns its seconds. Raises CalledProcessError if it fails."""
    began = time.monotonic()
    with log.open("w") as out:
        subprocess.run(
            command, check=True, stdout=out, stderr=subprocess.STDOUT, env=environment(threads)
        )
    return time.monotonic() - began


def ours(data: list[str], seconds: float, seed: int, threads: int, more: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(ROOT / "trainer/train.py"), *data, "--preset", "auto"]
        words += ["--pre_trained", "none", "--hours", f"{seconds / HOUR:.6f}"]
        words += ["--seed", str(seed), "--output_dir", folder, *more]
        took = clocked(words, threads, Path(folder) / "log.txt")
        lines = (Path(folder) / "metrics.csv").read_text().splitlines()
        row = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
        scores = f"map50 {float(row['map50']):.3f}  map {float(row['map']):.3f}"
        return f"{scores}  {took:.0f} s  epoch {row['epoch']}"


def yolos(data: list[str], seconds: float, seed: int, threads: int, given: Any) -> str:
    from trainer.data.load import read_datasets
    from trainer.settings.parsing import parse

    config, _ = parse(data)
    train, val, _ = read_datasets(config, num_queries=10_000, num_classes=None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, table in (("train", train), ("val", val)):
            write_yolo(table, folder / "data", part)
        names = dict(enumerate(train.class_names))
        text = json.dumps({"path": str(folder / "data"), "train": "images/train",
                           "val": "images/val", "names": names})  # fmt: skip
        (folder / "data.yaml").write_text(text)
        images = [
            (index, str(folder / "data/images/val" / f"{index}{Path(val.path(index)).suffix}"))
            for index in range(len(val))
        ]
        (folder / "images.json").write_text(json.dumps(images))
        words = [given.yolo, "-c", YOLO, str(folder / "data.yaml"), name, str(given.imgsz)]
        words += [str(seconds), str(seed), str(folder / "images.json")]
        took = clocked(words, threads, folder / "log.txt")
        map50, mean = score(val, json.loads((folder / "found.json").read_text()))
        epochs = len((folder / "run/results.csv").read_text().splitlines()) - 1
        return f"map50 {map50:.3f}  map {mean:.3f}  {took:.0f} s  epoch {epochs}"


def write_yolo(table: Any, folder: Path, part: str) -> None:
    """A split as images and labels in YOLO's layout; images are linked."""
    for kind in ("images", "labels"):
        (folder / kind / part).mkdir(parents=True)
    for index in range(len(table)):
        sample, path = table[index], Path(table.path(index)).resolve()
        (folder / "images" / part / f"{index}{path.suffix}").symlink_to(path)
        height, width = sample.size
        lines = [
            f"{label} {(x0 + x1) / 2 / width} {(y0 + y1) / 2 / height} "
            f"{(x1 - x0) / width} {(y1 - y0) / height}"
            for (x0, y0, x1, y1), label in zip(
                sample.boxes.tolist(), sample.labels.tolist(), strict=True
            )
        ]
        (folder / "labels" / part / f"{index}.txt").write_text("\n".join(lines))


def score(table: Any, found: list[dict[str, Any]]) -> tuple[float, float]:
    """map50 and map by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    for index in range(len(table)):
        sample = table[index]
        for (x0, y0, x1, y1), label, area in zip(
            sample.boxes.tolist(), sample.labels.tolist(), sample.areas.tolist(), strict=True
        ):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index, "category_id": label,
                 "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "iscrowd": 0}
            )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": index} for index in range(len(table))],
            "categories": [{"id": label} for label in range(len(table.class_names))],
            "annotations": annotations,
        }
        truth.createIndex()
        if not found:
            return 0.0, 0.0
        scored = COCOeval(truth, truth.loadRes(found), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return float(scored.stats[1]), float(scored.stats[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help="folder of a dataset, or shapes")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--yolo", metavar="PYTHON", help="interpreter with ultralytics")
    parser.add_argument("--imgsz", type=int, default=320, help="of YOLO11n")
    parser.add_argument("--together", action="store_true", help="train both at the same time")
    given, more = parser.parse_known_args()
    data = [] if given.data == "shapes" else ["--data", given.data]
    with ThreadPoolExecutor(2 if given.together else 1) as pool:
        for seed in given.seeds:
            common = (data, given.seconds, seed, given.threads)
            told = {"vidt": pool.submit(ours, *common, more)}
            if given.yolo:
                told["YOLO11n"] = pool.submit(yolos, *common, given)
            for name, line in told.items():
                print(f"{given.data} seed {seed}  {name:<8} {line.result()}", flush=True)


if __name__ == "__main__":
    main()
