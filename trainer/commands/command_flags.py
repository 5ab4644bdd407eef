"""The flags of `vidt`'s subcommands: argparse that teaches, and complains in one line."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer.settings.wording import nearest
from vidt.errors import UserError

HELP = ("-h", "--help")


class UsageError(UserError):
    """A flag or an argument that cannot be used; one line says which, and what is expected."""


class Flags(argparse.ArgumentParser):
    """The flags of one subcommand. `-` and `_` inside a name mean the same."""

    def __init__(self, command: str, summary: str, examples: str) -> None:
        super().__init__(
            prog=f"vidt {command}",
            description=summary.strip(),
            epilog=examples.strip(),
            formatter_class=_Shape,
            allow_abbrev=False,
        )

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises UsageError; ends the program after `--help`."""
        words = [plain(word) for word in argv]
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                known = [each[2:] for each in self._option_string_actions if each[:2] == "--"]
                meant = nearest(name[2:], known)
                hint = f"; the nearest is --{meant}" if meant else ""
                self.error(f"unknown flag {name}{hint}")
        return self.parse_intermixed_args(words)

    def error(self, message: str) -> None:  # type: ignore[override]
        """One line instead of argparse's page."""
        message = message.removeprefix("argument ").replace(" argument ", " ")
        message = message.replace("following arguments are required", "following is missing")
        raise UsageError(f"{message}; see {self.prog} --help")


class _Shape(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=98)


def plain(word: str) -> str:
    """A flag with underscores; anything else as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def share(text: str) -> float:
    """A flag's value from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 1")
    return value


def count(text: str) -> int:
    """A flag's value of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return value


def side(text: str) -> int:
    """A flag's value in pixels."""
    value = count(text)
    if value < 32:
        raise argparse.ArgumentTypeError(f"{text} is too small; it must be 32 pixels or more")
    return value


def add_detector_flags(flags: argparse.ArgumentParser, batch_size: int) -> None:
    """How a detector computes; what `vidt.load` takes."""
    group = flags.add_argument_group("how to compute")
    group.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one"
    )
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="default fp32; bf16 and fp16 are quicker on a GPU. An .onnx model has its own",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="by torch.compile: slow to start, quicker where many images have one size",
    )
    group.add_argument(
        "--batch_size",
        type=count,
        default=batch_size,
        metavar="N",
        help="images computed together, at most (default %(default)s); it changes no result",
    )


def check_result(flag: str, path: Path | None, read: Iterable[Path]) -> None:
    """Raises UsageError if the file that a flag names cannot be written, or is one of those that
    the command reads, by whatever name.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; name a file")
    if path.resolve() in {each.resolve() for each in read}:
        raise UsageError(f"{flag} {path} would overwrite a file that is read; name another")


def say(text: str) -> None:
    """A line, or several, on standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A line on standard error, out of the way of results."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
