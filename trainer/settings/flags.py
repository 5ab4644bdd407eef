"""Generates flags, YAML keys and help texts from the fields of dataclasses.

A field may be bool, int, float or str, a tuple of one of these, and any of them with `| None`. Its
metadata may hold `help` (one line), `group` (a heading of the help text, above this field), `bare`
(the value of a flag that is given without one) and `words` (words that stand for a value).
"""

import argparse
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from trainer.settings.yaml_text import BadYAML, load_yaml
from vidt.arguments import HELP, OneLineParser, is_flag, nearest, plain
from vidt.errors import UserError, shown


class ConfigError(UserError):
    """A setting that cannot be used: one line naming it, its value and what is expected."""


class HelpRequested(ConfigError):
    """`--help` was among the flags; an error for callers that show no help."""


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass. `kind` is the type of one value; if `many`, it takes several."""

    name: str
    kind: type
    many: bool
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def expected(self) -> str:
        one, several = _EXPECTED[self.kind]
        words = "".join(f" or {word}" for word in self.words)
        return (several if self.many else one) + words + (" or none" if self.optional else "")

    @property
    def words(self) -> Mapping[str, Any]:
        """Words that stand for a value, such as auto."""
        return self.metadata.get("words", {})

    def as_yaml(self, value: Any) -> Any:
        """The value as a YAML file holds it: the inverse of `read_value`."""
        word = next((word for word, meant in self.words.items() if meant == value), None)
        return word or (list(value) if isinstance(value, tuple) else value)


LARGEST = 10**12  # of whole numbers; each setting has its own limit below it
_EXPECTED = {
    bool: ("True or False", "True or False, once or more"),
    int: ("a whole number", "whole numbers, such as 2,3"),
    float: ("a number", "numbers, such as 0.5,1"),
    str: ("text", "words, such as a,b"),
}
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def settings_of(config_class: type) -> dict[str, Setting]:
    """The fields of a dataclass, by name and in order."""
    hints = get_type_hints(config_class)
    settings = {}
    for item in fields(config_class):
        kind, optional = hints[item.name], False
        if get_origin(kind) in (Union, UnionType):
            (kind,) = (part for part in get_args(kind) if part is not type(None))
            optional = True
        many = get_origin(kind) is tuple
        kind = get_args(kind)[0] if many else kind
        assert kind in _EXPECTED, f"no flag can be made of {config_class.__name__}.{item.name}"
        settings[item.name] = Setting(item.name, kind, many, optional, item.default, item.metadata)
    return settings


def read_value(setting: Setting, raw: object, where: str) -> Any:
    """Text of the command line, or anything out of a YAML file, as the setting's type."""
    word = raw.lower() if isinstance(raw, str) else ""
    if setting.optional and (raw is None or word in ("none", "null")):
        return None
    if word in setting.words:
        return setting.words[word]
    try:
        if setting.many:
            return tuple(_scalar(setting.kind, part) for part in _parts(raw))
        value = _scalar(setting.kind, raw)
        if value in setting.words.values():  # only the word stands for it
            raise ValueError(raw)
        return value
    except (ValueError, OverflowError):
        raise ConfigError(f"{where} is {_quoted(raw)}; it must be {setting.expected}") from None


def _quoted(raw: object) -> str:
    """The value as Python writes it, shortened."""
    return shown(repr(raw) if isinstance(raw, str) else raw)


def _scalar(kind: type, raw: object) -> Any:
    """One value of the kind; raises ValueError for anything else.

    YAML reads 1e-4 as text, so text may be a number; to Python True is 1, so that is ruled out.
    """
    if kind is bool and isinstance(raw, bool | int | str) and str(raw).strip().lower() in _TRUTH:
        return _TRUTH[str(raw).strip().lower()]
    if kind is int and isinstance(raw, int | str) and not isinstance(raw, bool):
        number = int(raw)
        if abs(number) <= LARGEST:
            return number
    if kind is float and isinstance(raw, int | float | str) and not isinstance(raw, bool):
        value = float(raw)
        if math.isfinite(value):
            return value
    if kind is str and raw is False:
        return "no"  # which YAML reads as False unless it is quoted
    if kind is str and isinstance(raw, str) and raw.strip():
        return raw
    raise ValueError(raw)


def _parts(raw: object) -> list[object]:
    """The values of a tuple: a list, one value, or text such as `2 3`, `2,3` and `[2, 3]`."""
    if isinstance(raw, list | tuple):
        return list(raw)
    if not isinstance(raw, str):
        return [raw]
    text = raw.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
        return [*re.split(r"\s*,\s*|\s+", text)] if text else []
    return [*re.split(r"\s*,\s*|\s+", text)]


def read_flags(
    argv: Sequence[str], settings: Mapping[str, Setting], elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Settings given as flags; the last of repeated flags counts. `elsewhere` maps names that are
    not settings to a hint on what to use instead.

    Raises ConfigError, and HelpRequested for `--help`.
    """
    for word in argv:
        name = plain(word).partition("=")[0]
        hint = (elsewhere or {}).get(name.removeprefix("--"))
        if hint is not None and is_flag(word):
            raise ConfigError(f"unknown flag {name}; {hint}")
    try:
        namespace, unexpected = _parser(settings).parse_known_args([*_words(argv)])
    except UserError as error:
        raise ConfigError(str(error)) from None
    if unexpected:
        hint = f"; is it --data {shown(unexpected[0])!r}?" if os.path.exists(unexpected[0]) else ""
        raise ConfigError(f"unexpected {unexpected[0]!r}; settings are --name value{hint}")
    given = vars(namespace)
    if given.pop("help"):
        raise HelpRequested("--help shows the settings; a run does not take it")
    return {name: _flag_value(settings[name], *flag) for name, flag in given.items()}


def help_lines(settings: Mapping[str, Setting]) -> list[str]:
    """Flags with defaults and descriptions under the headings of their groups."""
    return _parser(settings).format_help().splitlines()


class _Words(argparse.Action):
    """Stores a flag with the words that follow it, for `read_value` to read as it reads YAML."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        words = [word[1:] if word.startswith(" -") else word for word in values]
        setattr(namespace, self.dest, (option_string, words))


def _parser(settings: Mapping[str, Setting]) -> OneLineParser:
    parser = OneLineParser("vidt train", usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument(*HELP, action="store_true", help=argparse.SUPPRESS)
    options: dict[str, Any] = {"action": _Words, "nargs": "*", "default": argparse.SUPPRESS}
    group = parser.add_argument_group()
    for name, setting in settings.items():
        if "group" in setting.metadata:
            group = parser.add_argument_group(setting.metadata["group"])
        default = setting.default if setting.many and setting.default else [setting.default]
        text = setting.metadata.get("help", setting.expected)
        group.add_argument(f"--{name}", metavar=" ".join(map(str, default)), help=text, **options)
        if setting.kind is bool:
            group.add_argument(f"--no_{name}", dest=name, help=argparse.SUPPRESS, **options)
    return parser


def _words(argv: Sequence[str]) -> Iterator[str]:
    """Flags and values as separate words. A space before a minus keeps argparse from reading -1e-4
    as a flag.
    """
    for word in argv:
        if is_flag(word):
            flag, equals, word = word.partition("=")
            yield flag
            if not equals:
                continue
        yield f" {word}" if word.startswith("-") else word


def _flag_value(setting: Setting, flag: str, words: list[str]) -> Any:
    if flag == f"--no_{setting.name}":
        if words:
            raise ConfigError(f"{flag} takes no value; it has {' '.join(words)}")
        return False
    if not words:
        value = True if setting.kind is bool else setting.metadata.get("bare")
        if value is None:
            raise ConfigError(f"{flag} has no value; it must be {setting.expected}")
        return value
    if len(words) > 1 and not setting.many:
        text = " ".join(words)
        raise ConfigError(f"{flag} takes one value; it has {text}; quote a path with blanks")
    return read_value(setting, " ".join(words), flag)


def read_yaml(
    text: str,
    settings: Mapping[str, Setting],
    source: str,
    elsewhere: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Settings of a YAML text; `source` names it in errors, `elsewhere` is that of `read_flags`.
    Raises ConfigError.
    """
    try:
        loaded = load_yaml(text, source)
    except BadYAML as error:
        raise ConfigError(str(error)) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source} holds no settings; it must have lines such as lr: 1e-4")
    given = {}
    for key, raw in loaded.items():
        name = shown(key).replace("-", "_")
        if name not in settings:
            similar = nearest(name, settings)
            hint = f"the nearest is {similar}" if similar else "vidt train --help lists all"
            hint = (elsewhere or {}).get(name, hint)
            raise ConfigError(f"{source}: unknown setting {shown(key)}; {hint}")
        given[name] = read_value(settings[name], raw, f"{source}: {name}")
    return given
