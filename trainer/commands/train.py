"""`vidt train`: the trainer on one process."""

import sys
from collections.abc import Sequence

from trainer.commands.command_flags import HELP, plain
from trainer.settings.config import help_text

SUMMARY = """usage: vidt train [--NAME VALUE ...]

Trains a detector: checks the data, trains, evaluates after every epoch, keeps the best weights,
and goes on where it was when it is killed (--resume). One process on this machine's GPU, or its
CPU; for several: accelerate launch, or torchrun, with trainer/train.py and the same flags.

examples:
  vidt train
      on embedded pictures of coloured shapes, to see it work
  vidt train --coco_path data/coco --output_dir output/coco
  vidt train --train_json train.json --train_images images --val_json val.json \\
      --val_images images --backbone_name swin_tiny --epochs 30 --output_dir output/mine
  vidt train --yolo_path data/yolo --load_from output/coco/best.safetensors \\
      --output_dir output/tuned
  vidt train --config output/mine/config.yaml --resume

exit code: 0 done, 2 a mistake that the line "error: ..." names, 3 the loss is not finite, 130 or
143 stopped by Ctrl-C or SIGTERM with everything saved.
"""


def run(argv: Sequence[str]) -> int:
    """Ends the program as `trainer.train.main` does."""
    if any(word in HELP for word in map(plain, argv)):
        sys.stdout.write(f"{SUMMARY}\n{help_text()}")
        return 0
    from trainer.train import main

    try:
        main(argv)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
