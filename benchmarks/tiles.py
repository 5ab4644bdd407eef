"""map50 and recall with and without tiles, on images with more objects than [DET] tokens.

    python benchmarks/tiles.py output/best.safetensors
    python benchmarks/tiles.py output/best.safetensors --images 40 --grid 4 --tile 128 160 --seed 1

The weights are those of the main job, which is trained on the embedded images of 128 pixels with 1
to 6 shapes. An image here is a grid of such images, of a seed that no training uses. Without tiles
it is scored twice: shrunk to the size of the weights, and enlarged by the grid's side, so that
objects are as large as in training; relative to the image they are smaller, and weights of one
training size do not know that. The first line says what the number of [DET] tokens allows.
Recall is that of all detections, and at the single threshold with the highest F1, both at IoU 0.5.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.commands.evaluate import predict, read
from trainer.data.shapes import CLASS_NAMES, draw_picture
from trainer.scoring.coco_scores import box_scores, judge, matches
from trainer.scoring.scores import curve, hits_of, pooled
from vidt.loading import load
from vidt.predict.tiles import OVERLAP

CELL = 128  # pixels


def write_grids(folder: Path, images: int, grid: int, seed: int) -> Path:
    """Images of grid x grid embedded images, and their annotations in COCO's JSON."""
    document: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    document["categories"] = [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, 1)]
    for number in range(1, images + 1):
        canvas = np.zeros((grid * CELL, grid * CELL, 3), np.uint8)
        for cell in range(grid * grid):
            top, left = CELL * (cell // grid), CELL * (cell % grid)
            pixels, shapes = draw_picture(seed, "val", number * grid * grid + cell, CELL)
            canvas[top : top + CELL, left : left + CELL] = pixels
            for shape in shapes:
                x1, y1, x2, y2 = shape.box
                document["annotations"].append(
                    {
                        "id": len(document["annotations"]) + 1,
                        "image_id": number,
                        "category_id": shape.label + 1,
                        "bbox": [left + x1, top + y1, x2 - x1, y2 - y1],
                        "area": int(shape.mask.sum()),
                        "iscrowd": 0,
                    }
                )
        Image.fromarray(canvas).save(folder / f"{number}.png")
        size = {"width": canvas.shape[1], "height": canvas.shape[0]}
        document["images"].append({"id": number, "file_name": f"{number}.png", **size})
    path = folder / "grids.json"
    path.write_text(json.dumps(document))
    return path


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("weights")
    flags.add_argument("--images", type=int, default=40)
    flags.add_argument("--grid", type=int, default=4)
    flags.add_argument("--tile", type=int, nargs="+", default=[128, 160])
    flags.add_argument("--overlap", type=float, default=OVERLAP)
    flags.add_argument("--seed", type=int, default=1000)
    given = flags.parse_args()
    detector = load(given.weights, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = write_grids(Path(folder), given.images, given.grid, given.seed)
        file = read(str(path), folder, detector.class_names)
        objects = np.bincount(file.owners)
        tokens = detector.info.config.det_token_num
        bound = np.minimum(objects, tokens).sum() / objects.sum()
        print(
            f"{given.images} images of {given.grid * CELL} pixels, {objects.min()} to "
            f"{objects.max()} objects; {tokens} [DET] tokens find at most {bound:.3f} of them"
        )
        print("tile      map50  recall  best F1: threshold  precision  recall     F1   s/image")
        plain = detector.preprocessing
        large = replace(plain, eval_size=plain.eval_size * given.grid)
        rows = [("none", None, plain), ("none, big", None, large)]
        for name, tile, preprocessing in rows + [(str(tile), tile, plain) for tile in given.tile]:
            detector.preprocessing = preprocessing
            start = time.monotonic()
            found, _ = predict(detector, file, folder, 8, tile=tile, overlap=given.overlap)
            seconds = (time.monotonic() - start) / given.images
            truth, names = judge(file, found), detector.class_names
            map50 = box_scores(file, truth, found, names)["map50"]
            whole = curve("", pooled(hits_of([matches(file, truth, found, names)], len(names))))
            best = whole.best
            assert best is not None, "no detection is right"
            print(
                f"{name:<9} {map50:.3f}   {whole.recall[-1]:.3f}  {best.threshold:18.2f}"
                f"  {best.precision:9.3f}  {best.recall:6.3f}  {best.f1:5.3f}  {seconds:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
