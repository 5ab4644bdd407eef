"""The console command `vidt`: finds the subcommand, and says what went wrong in one line.

A subcommand is a file of its own with `run(argv)`, imported when it is asked for: help must not
wait for PyTorch.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from trainer.commands.command_flags import HELP
from trainer.settings.wording import nearest
from vidt.errors import UserError

COMMANDS = {
    "train": "train a detector on your data",
    "check": "look a dataset over: what is wrong with it, and what would be done about it",
    "evaluate": "COCO's numbers of a detector on annotated images",
    "predict": "find objects in images, draw them, write them down",
    "info": "what a weights file holds, and how it was trained",
    "export": "a weights file to an ONNX model, and the proof that both agree",
    "benchmark": "how fast a detector is here",
}
USER_ERROR, NOTHING_READ, BROKEN_PIPE, INTERRUPTED = 2, 1, 141, 130


def help_page() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "vidt COMMAND ...: object detection, from a folder of pictures to boxes",
            "",
            *lines,
            "",
            "vidt COMMAND --help teaches a command, with examples. The usual way:",
            "",
            "  vidt check --coco_path data/coco",
            "  vidt train --coco_path data/coco --output_dir output",
            "  vidt evaluate output/best.safetensors --json data/coco/annotations/"
            "instances_val2017.json --images data/coco/val2017",
            "  vidt predict output/best.safetensors photos/ --out found",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 nothing could be read, or a check that failed, 2 a user's error, told
    in one line that starts with `error:`, 130 stopped by Ctrl-C, and `vidt predict` 143 by SIGTERM.
    `vidt train` has those of the trainer.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt as error:
        sys.stderr.write("stopped; what was finished is written\n")
        return getattr(error, "exit_code", INTERRUPTED)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = in_words(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        return getattr(error, "exit_code", USER_ERROR)


def _run(words: list[str]) -> int:
    help_words = ("help", *HELP)
    if all(word in help_words for word in words[:2]):
        sys.stdout.write(help_page())
        return 0
    if words[0] in help_words:
        words = [words[1], "--help"]
    if words[0] == "--version":
        import vidt

        sys.stdout.write(f"vidt {vidt.__version__}\n")
        return 0
    if words[0] not in COMMANDS:
        meant = nearest(words[0], COMMANDS)
        hint = f"the nearest is {meant}, and " if meant else ""
        raise UserError(f"there is no command {words[0]}; {hint}vidt --help shows all")
    return import_module(f"trainer.commands.{words[0]}").run(words[1:])


def in_words(error: BaseException) -> str | None:
    """One line for what a user can mend; None for what only we can."""
    name = type(error).__name__
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory; lower --batch_size, or choose --device cpu"
    if isinstance(error, RuntimeError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'standard output'}: {error.strerror}"
    return " ".join(str(error).split()) or name


if __name__ == "__main__":
    sys.exit(main())
