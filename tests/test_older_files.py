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
from trainer.settings.config import TrainConfig
from trainer.settings.parsing import parse, resolved
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
    """And nothing of settings that the older version had not, whose defaults change nothing."""

    def changed(*flags: str) -> dict[str, str]:
        config, fields = settings(tmp_path, tmp_path, *flags)
        new = replace(checkpoint.state, settings=resolved(config, fields))
        lines = changed_settings(checkpoint.state, new)
        named = {line.split()[2]: line for line in lines}
        return {name: named[name] for name in named.keys() - {"coco_path", "output_dir"}}

    checkpoint, _ = find(OLDER)
    assert checkpoint is not None
    lines = changed()
    assert lines.keys() == {"scale_per", "group_by_aspect", "mixed_precision", "tf32"}
    assert "scale_per step, it was image" in lines["scale_per"]
    assert "group_by_aspect True, it was False" in lines["group_by_aspect"]
    released = ("--scale_per", "image", "--no-group_by_aspect", "--mixed_precision", "no")
    assert changed(*released, "--no-tf32") == {}


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
