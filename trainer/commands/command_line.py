"""The console command `vidt`: finds the subcommand and prints errors as one line.

A subcommand is a file with `run(argv)`, imported when it is needed: help must not wait for PyTorch.
`vidt train` is the trainer itself, so it stands here.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from vidt.arguments import HELP, OneLineParser, nearest
from vidt.errors import UserError, escaped

COMMANDS = {
    "train": "train a detector on your data",
    "plan": "the settings that --preset auto chooses for a dataset, and why",
    "check": "check a dataset: what is wrong with it, and what a training would do about it",
    "evaluate": "COCO's metrics of a detector on annotated images",
    "audit": "annotations that a detector disagrees with: forgotten, misplaced, mislabelled",
    "predict": "detect objects in images, draw them, write them to files",
    "info": "what a weights file holds, and how it was trained",
    "models": "the published models, which --load_from and WEIGHTS take by name",
    "push": "share a weights file on the Hugging Face Hub, with a model card",
    "export": "export a weights file to an ONNX model, and verify that both agree",
    "benchmark": "measure how fast a detector is on this machine",
}
# The file of each of the others has the command's name.
SHARED_FILES = {"models": "hub", "push": "hub", "plan": "check"}
HELP_PAGE = """\
vidt COMMAND ...: object detection, from a folder of images to boxes

{commands}

vidt COMMAND --help explains a command, with examples. The usual order:

  vidt check --data photos
  vidt train --data photos --output_dir output
  vidt evaluate output/best.safetensors --data photos
  vidt predict output/best.safetensors photos/ --out found
"""
TRAIN_PAGE = """usage: vidt train [--NAME VALUE ...]

Trains a detector: checks the data, trains, evaluates after every epoch or as planned, and saves the
best weights. A run that was stopped or killed continues with --resume. One process, on this
machine's GPU or its CPU; for several processes, run trainer/train.py by accelerate launch or
torchrun, with these flags.

examples:
  vidt train
      on synthetic images of coloured shapes, as a first try
  vidt train --data photos --output_dir output/photos
      a folder of images with COCO, YOLO or Pascal VOC annotations in any layout
  vidt train --coco_path data/coco --output_dir output/coco
  vidt train --train_json train.json --train_images images --val_json val.json \\
      --val_images images --backbone_name swin_tiny --epochs 30 --output_dir output/mine
  vidt train --yolo_path data/yolo --load_from output/coco/best.safetensors \\
      --output_dir output/tuned
  vidt train --config output/mine/config.yaml --resume

exit code: 0 done, 2 a mistake that the line "error: ..." names, 3 the loss is not finite, 130 or
143 stopped by Ctrl-C or SIGTERM with everything saved.
"""
# Of a write to standard output, for which Python names no file.
OUTPUT_FAULTS = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EPIPE, errno.EDQUOT, errno.EFBIG)
USER_ERROR, BROKEN_PIPE, INTERRUPTED = 2, 141, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 no image could be read, or the exported model differs, 2 a user's
    error, printed as one line that starts with `error:`, 130 stopped by Ctrl-C, and `vidt predict`
    143 by SIGTERM. `vidt train` has those of the trainer.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt as error:
        print("stopped", file=sys.stderr)
        return getattr(error, "exit_code", INTERRUPTED)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = message_of(error)
        if message is None:
            raise
        print(f"error: {escaped(message)}", file=sys.stderr)
        return getattr(error, "exit_code", USER_ERROR)


def _run(words: list[str]) -> int:
    help_words = ("help", *HELP)
    if all(word in help_words for word in words[:2]):
        commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        print(HELP_PAGE.format(commands=commands), end="")
        return 0
    if words[0] in help_words:
        words = [words[1], "--help"]
    if words[0] == "--version":
        import vidt

        print(f"vidt {vidt.__version__}")
        return 0
    if words[0].startswith("--"):
        similar = nearest(words[0], ("--version", "--help"))
        hint = f"did you mean {similar}?" if similar else "vidt --help shows the commands"
        raise UserError(f"unknown option {words[0]}; {hint}")
    if words[0] not in COMMANDS:
        similar = nearest(words[0], COMMANDS)
        hint = f"the nearest is {similar}, and " if similar else ""
        raise UserError(f"there is no command {words[0]}; {hint}vidt --help shows all")
    if words[0] == "train":
        return _train(words[1:])
    return subcommand(words[0])[1](words[1:])


def subcommand(name: str) -> tuple[Callable[[], OneLineParser], Callable[[Sequence[str]], int]]:
    """The parser and the program of every subcommand but train: `flags` and `run` of its file, or
    `models_flags` and `run_models` where commands share one.
    """
    module = import_module(f"trainer.commands.{SHARED_FILES.get(name, name)}")
    if name in SHARED_FILES:
        return getattr(module, f"{name}_flags"), getattr(module, f"run_{name}")
    return module.flags, module.run


def _train(argv: Sequence[str]) -> int:
    """The trainer on one process, with the exit codes of `trainer.train.main`."""
    from trainer.settings.parsing import help_text, parse_or_exit

    if any(word in HELP for word in argv):
        print(f"{TRAIN_PAGE}\n{help_text()}", end="")
        return 0
    try:
        parse_or_exit(argv)  # a mistake in a flag does not wait for PyTorch
        from trainer.train import main

        main(argv)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def message_of(error: BaseException) -> str | None:
    """One line for an error that the user can mend; None for a fault of ours."""
    name = type(error).__name__
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory; smaller batches need less, where the command has --batch_size"
    if isinstance(error, RuntimeError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        unnamed = "standard output" if error.errno in OUTPUT_FAULTS else "the system refuses"
        return f"{error.filename or unnamed}: {error.strerror}"
    return " ".join(str(error).split()) or name


if __name__ == "__main__":
    sys.exit(main())
