"""Files that an older version wrote still load: weights, a checkpoint and a config.yaml.

tests/data/before_rooms/README.md says how they were made.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import cpu, tables

import vidt
from trainer.loop.resume import changed_settings, find
from trainer.report.progress import Progress
from trainer.settings.config import TrainConfig, parse, resolved
from trainer.train import train

OLDER = Path(__file__).parent / "data/before_rooms"
EXPECTED = json.loads((OLDER / "expected.json").read_text())


def test_weights_give_the_same_detections(tiny_data: Path) -> None:
    detector = vidt.load(OLDER / "weights.safetensors", device="cpu")
    pictures = sorted((tiny_data / "val2017").iterdir())
    for found, expected in zip(
        detector.predict(pictures, threshold=0.0), EXPECTED["detections"], strict=True
    ):
        assert found.labels.tolist() == expected["labels"]
        # Layer norms over two channels, as here, magnify differences of rounding.
        torch.testing.assert_close(
            found.scores, torch.tensor(expected["scores"]), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(found.boxes, torch.tensor(expected["boxes"]), rtol=0, atol=1e-2)


def settings(data: Path, output: Path, *flags: str) -> tuple[TrainConfig, dict[str, Any]]:
    older = ["--config", str(OLDER / "config.yaml"), "--resume", str(OLDER)]
    return parse([*older, "--coco_path", str(data), "--output_dir", str(output), *flags])


def test_a_resumed_run_says_what_newer_defaults_change(tmp_path: Path) -> None:
    """The checkpoint is older than --scale_per and --group_by_aspect."""

    def lines(*flags: str) -> list[str]:
        config, fields = settings(tmp_path, tmp_path, *flags)
        new = replace(checkpoint.state, settings=resolved(config, fields))
        return [
            line
            for line in changed_settings(checkpoint.state, new)
            if "scale_per" in line or "group_by_aspect" in line
        ]

    checkpoint, _ = find(OLDER)
    assert checkpoint is not None
    scale, group = lines()
    assert "scale_per step" in scale and "was image" in scale
    assert "group_by_aspect True" in group and "was False" in group
    assert lines("--scale_per", "image", "--no-group_by_aspect") == []


def test_checkpoint_and_config_continue_the_run(tiny_data: Path, tmp_path: Path) -> None:
    """The losses are those of the older version's own run, which nothing had stopped."""
    released = ["--scale_per", "image", "--no-group_by_aspect"]
    config, fields = settings(tiny_data, tmp_path, *released)
    assert (config.lr, config.ema_decay, config.flip) == (1e-3, 0.9, False)
    assert (fields["backbone_name"], fields["nheads"]) == ("swin_smallest", 4)
    losses: dict[str, float] = {}

    def report(progress: Progress) -> None:
        if progress.event == "step":
            losses[str(progress.step)] = progress.metrics["loss"]

    train(config, fields, *tables(config, fields), report, accelerator=cpu())
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-4)
