"""Files that an older version wrote still load: weights, a checkpoint and a config.yaml.

tests/data/before_rooms/README.md says how they were made.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import cpu, tables

import vidt
from trainer.report.progress import Progress
from trainer.settings.config import parse
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


def test_checkpoint_and_config_continue_the_run(tiny_data: Path, tmp_path: Path) -> None:
    """The losses are those of the older version's own run, which nothing had stopped."""
    older = ["--config", str(OLDER / "config.yaml"), "--resume", str(OLDER)]
    config, fields = parse([*older, "--coco_path", str(tiny_data), "--output_dir", str(tmp_path)])
    assert (config.lr, config.ema_decay, config.flip) == (1e-3, 0.9, False)
    assert (fields["backbone_name"], fields["nheads"]) == ("swin_smallest", 4)
    losses: dict[str, float] = {}

    def report(progress: Progress) -> None:
        if progress.event == "step":
            losses[str(progress.step)] = progress.metrics["loss"]

    train(config, fields, *tables(config, fields), report, accelerator=cpu())
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-4)
