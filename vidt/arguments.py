"""The parser of every command line: argparse with one-line errors."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from vidt.errors import UserError

HELP = ("-h", "--help")
MIXED_PRECISIONS = ("auto", "no", "fp16", "bf16")  # values of --mixed_precision
MIN_SIMILARITY = 0.65  # difflib's ratio; less similar words are seldom the one that was meant


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line; for a misspelt flag it suggests the nearest one. `-` and
    `_` inside a flag's name are equivalent, and flags cannot be abbreviated.

    Parsing raises UserError; `--help` ends the program.
    """

    def __init__(
        self, prog: str, *, elsewhere: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        """elsewhere: hints for flags of other programs, by name without dashes."""
        super().__init__(prog, formatter_class=_HelpFormatter, allow_abbrev=False, **more)
        self.elsewhere = elsewhere or {}

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Flags may stand between the positional arguments."""
        return self.parse_intermixed_args(args, namespace)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._declared(word) for word in words], namespace)

    def _declared(self, word: str) -> str:
        """A flag as it was declared; any other word unchanged."""
        if not is_flag(word):
            return word
        name, equals, value = word.partition("=")
        flags = {plain(flag): flag for flag in self._option_string_actions}
        if plain(name) not in flags:
            bare = plain(name).lstrip("-")
            similar = nearest(bare, [flag.lstrip("-") for flag in flags])
            hint = f"; the nearest is --{similar}" if similar else ""
            hint = f"; {self.elsewhere[bare]}" if bare in self.elsewhere else hint
            self.error(f"unknown flag {name}{hint}")
        return flags[plain(name)] + equals + value

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(" argument ", " ")
        message = message.replace("the following arguments are required", "missing arguments")
        raise UserError(f"{message}; see {self.prog} --help")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=110)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """Shows `--lr 0.0001` rather than `--lr [0.0001 ...]` if the values are optional."""
        if action.nargs == "*":
            return str(action.metavar)
        return super()._format_args(action, default_metavar)


def is_flag(word: str) -> bool:
    """True for --name and -name; False for `-`, which names standard input, and for numbers."""
    return word.startswith("--") or (word.startswith("-") and word[1:2].isalpha())


def plain(word: str) -> str:
    """A flag with underscores inside its name; any other word unchanged."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most similar to `word`; None if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, MIN_SIMILARITY)), None)
