"""Tiny ViDT+ detectors and teachers: flags, pictures with masks, teacher weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from tiny_runs import NAMES, blurred

from vidt import ViDT, ViDTConfig
from vidt.images.preprocessing import Preprocessing
from vidt.weights.weights_file import WeightsInfo, save_weights

PLUS = "--epff --iou_aware --token_label --with_vector --n_keep 16 --gt_mask_len 32"


def with_masks(data: Path, folder: Path) -> Path:
    """Copy a COCO folder and give every second object a mask, a diamond in its box."""
    shutil.copytree(data, folder)
    for path in (folder / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        for annotation in content["annotations"][::2]:
            x, y, w, h = annotation["bbox"]
            corners = [(x + w / 2, y), (x + w, y + h / 2), (x + w / 2, y + h), (x, y + h / 2)]
            annotation["segmentation"] = [[float(side) for corner in corners for side in corner]]
        path.write_text(json.dumps(content))
    return folder


def save_teacher(path: Path, fields: dict, **changes: object) -> Path:
    """Save random weights of a detector with a run's model fields and these changes."""
    config = dataclasses.replace(
        ViDTConfig(**{**fields, "num_classes": len(NAMES)}),
        **changes,  # type: ignore[arg-type]
    )
    torch.manual_seed(1)
    info = WeightsInfo(config, tuple(f"c{i}" for i in range(config.num_classes)), Preprocessing(64))
    save_weights(path, blurred(ViDT(config)).state_dict(), info)
    return path
