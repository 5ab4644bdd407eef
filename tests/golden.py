"""The golden data: outputs of the published implementation for generated weights and inputs."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vidt.losses.matcher import Matches
from vidt.model.vidt import ViDTConfig

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden" / "vidt"
FIELDS = {"labels": "labels", "boxes": "boxes", "masks": "masks", "mask_boxes": "xyxy_boxes"}
present = pytest.mark.skipif(not FOLDER.is_dir(), reason="there is no ../shared/golden/vidt")


@cache
def fill() -> ModuleType:
    """The generator of weights, images and targets that lies beside the data."""
    spec = importlib.util.spec_from_file_location("golden_fill", FOLDER / "fill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def read_json(path: str) -> Any:
    return json.loads((FOLDER / path).read_text())


def read_arrays(path: str) -> dict[str, Tensor]:
    with np.load(FOLDER / path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def config_of(path: str) -> ViDTConfig:
    """The configuration for the `arguments` in a file, without dropout."""
    content = read_json(path)
    arguments = [argument for argument in content["arguments"] if argument != "--masks"]
    flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
    switches = ("aux_loss", "with_box_refine", "epff", "iou_aware", "token_label", "with_vector")
    return ViDTConfig(
        method=flags.get("--method", "vidt"),
        backbone_name=flags["--backbone_name"],
        num_classes=content.get("num_classes", 91),
        det_token_num=int(flags.get("--det_token_num", 100)),
        dec_layers=int(flags.get("--dec_layers", 6)),
        dropout=0.0,
        token_label_shift=False,
        **{name: flags.get(f"--{name}") == "True" for name in switches},
    )


def weights(variant: str) -> dict[str, Tensor]:
    filled = fill().fill(read_json(f"{variant}/keys.json")["keys"])
    return {name: torch.from_numpy(array) for name, array in filled.items()}


def inputs(name: str) -> tuple[Tensor, Tensor]:
    """Images and padding."""
    images, padding = fill().make_input(name)
    return torch.from_numpy(images), torch.from_numpy(padding)


def targets(
    name: str, num_classes: int, first_label: int | None = None, empty: tuple[int, ...] = ()
) -> list[dict[str, Tensor]]:
    """Labels, boxes and masks of each image; none for the images in `empty`."""
    if first_label is None:
        first_label = 1 if num_classes == 91 else 0
    made = fill().make_targets(name, num_classes, first_label)
    return [
        {
            ours: torch.from_numpy(target[theirs])[: 0 if index in empty else None]
            for ours, theirs in FIELDS.items()
        }
        for index, target in enumerate(made)
    ]


def stored_part(tensor: Tensor, part: str) -> Tensor:
    """The stored slice of a tensor; `part` reads like "[:, ::3, :]"."""
    steps = [axis.strip().lstrip(":") for axis in part.strip("[]").split(",")]
    return tensor[tuple(slice(None, None, int(step or 1)) for step in steps)]


def pairs(matches: Matches, level: int, num_images: int) -> list[list[list[int]]]:
    """Matches of a level in the golden files' form: [queries, targets] per image, by query."""
    images = []
    for image in range(num_images):
        here = (matches.level == level) & (matches.image == image)
        order = matches.query[here].argsort()
        images.append([matches.query[here][order].tolist(), matches.target[here][order].tolist()])
    return images
