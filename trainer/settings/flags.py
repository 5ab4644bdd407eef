"""Settings read off the fields of dataclasses: values, flags, YAML keys and help follow from them.

A field may be bool, int, float or str, a tuple of one of these, and either with `| None`. Its
metadata may hold `help` (one line), `group` (heading of the help text that starts with this field)
and `bare` (what the flag means without a value).
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from trainer.settings.wording import nearest
from vidt.errors import UserError


class ConfigError(UserError):
    """A setting that cannot be used: one line naming it, its value and what is expected."""


class HelpRequested(ConfigError):
    """`--help` was among the flags; an error to whoever has no help to show."""


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass. `kind` is the type of one value; with `many` it takes several."""

    name: str
    kind: type
    many: bool
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def expected(self) -> str:
        one, several = _EXPECTED[self.kind]
        return (several if self.many else one) + (" or none" if self.optional else "")


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
    if setting.optional and (raw is None or str(raw).lower() in ("none", "null")):
        return None
    try:
        if setting.many:
            return tuple(_scalar(setting.kind, part) for part in _parts(raw))
        return _scalar(setting.kind, raw)
    except ValueError:
        raise ConfigError(f"{where} is {raw!r}; it must be {setting.expected}") from None


def _scalar(kind: type, raw: object) -> Any:
    """One value of the kind; raises UserError for anything else.

    YAML reads 1e-4 as text, so text may be a number; to Python True is 1, so that is ruled out.
    """
    if kind is bool and isinstance(raw, bool | int | str) and str(raw).strip().lower() in _TRUTH:
        return _TRUTH[str(raw).strip().lower()]
    if kind is int and isinstance(raw, int | str) and not isinstance(raw, bool):
        return int(raw)
    if kind is float and isinstance(raw, int | float | str) and not isinstance(raw, bool):
        number = float(raw)
        if math.isfinite(number):
            return number
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
    """Settings given as flags; of a flag given twice the last counts. `elsewhere` says of names
    that are no settings what does their part.

    Raises ConfigError, and HelpRequested for `--help`.
    """
    negatives = [f"no_{name}" for name, setting in settings.items() if setting.kind is bool]
    names = [*settings, *negatives, "help"]
    given: dict[str, Any] = {}
    for flag, values in _split_flags(argv):
        complaint = f"unknown flag {flag}"
        name = flag.removeprefix("--").replace("-", "_")
        if name in (elsewhere or {}):
            raise ConfigError(f"{complaint}; {(elsewhere or {})[name]}")
        name = _known(name, names, complaint, dashes="--")
        if name == "help":
            raise HelpRequested("--help shows the settings; no run has it")
        if name not in negatives:
            given[name] = _flag_value(settings[name], flag, values)
        elif values:
            raise ConfigError(f"{flag} takes no value; it has {' '.join(values)}")
        else:
            given[name.removeprefix("no_")] = False
    return given


def _split_flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Flags with the words that follow them. A minus without a letter after it begins a number."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word == "-h":
            found.append(("--help", []))
        elif word.startswith("--") or re.match(r"-[A-Za-z]", word):
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError(f"unexpected {word!r}; settings are given as --name value")
    return found


def _flag_value(setting: Setting, flag: str, values: list[str]) -> Any:
    if not values:
        bare = True if setting.kind is bool else setting.metadata.get("bare")
        if bare is None:
            raise ConfigError(f"{flag} has no value; it must be {setting.expected}")
        return bare
    if len(values) > 1 and not setting.many:
        raise ConfigError(f"{flag} takes one value; it has {' '.join(values)}")
    return read_value(setting, " ".join(values), flag)


def read_yaml(text: str, settings: Mapping[str, Setting], source: str) -> dict[str, Any]:
    """Settings of a YAML text; `source` names it in errors. Raises ConfigError."""
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source} holds no settings; it must have lines such as lr: 1e-4")
    given = {}
    for key, raw in loaded.items():
        name = _known(str(key), list(settings), f"{source}: unknown setting {key}")
        given[name] = read_value(settings[name], raw, f"{source}: {name}")
    return given


def _known(name: str, names: Sequence[str], complaint: str, dashes: str = "") -> str:
    """The name with underscores. Raises ConfigError, with what may be meant, if unknown."""
    plain = name.replace("-", "_")
    if plain not in names:
        meant = nearest(plain, names)
        hint = f"the nearest is {dashes}{meant}" if meant else "vidt train --help lists all"
        raise ConfigError(f"{complaint}; {hint}")
    return plain


def help_lines(settings: Mapping[str, Setting]) -> list[str]:
    """Flags with defaults and descriptions under the headings of their groups."""
    lines = []
    for setting in settings.values():
        if "group" in setting.metadata:
            lines += ["", f"{setting.metadata['group']}:"]
        shown = " ".join(
            map(str, setting.default if setting.many and setting.default else [setting.default])
        )
        text = setting.metadata.get("help", setting.expected)
        start = f"  --{setting.name} {shown}".ljust(35) + " "
        lines.append(
            textwrap.fill(text, 110, initial_indent=start, subsequent_indent=" " * len(start))
        )
    return lines
