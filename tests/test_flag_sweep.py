"""Every flag with values that nobody means: one line that names the flag, or a value that works.

No flag may fork, allocate or wait without a limit: what `parse` accepts is small enough to run.
"""

import math
from collections import Counter
from collections.abc import Iterator

import pytest

from trainer.commands.command_line import COMMANDS, subcommand
from trainer.settings.config import TrainConfig
from trainer.settings.flags import Setting
from trainer.settings.parsing import _MODEL, _TRAIN, parse
from vidt.errors import UserError

pytestmark = pytest.mark.slow

VALUES = (
    *("0", "-1", "-0", "1", "2.5", "1e400", "-1e400", "1e-400", "1" * 30, "1" * 5000),
    *("nan", "NaN", "inf", "-inf", "infinity", "text", "", " ", "none", "None", "true", "0x10"),
    *("1_000", "\u0663", "1,2", "[1", "[]", "[1,2]", "\x00", "\x1b[2J", "two words", "../.."),
    *("/dev/zero", "a\nb", "=", "9007199254740993", "1e308", "-2147483649", "\udc80"),
    "18446744073709551616",
)
LARGEST = 10**9  # of any number that a run may be given, but for those that only scale others
SCALES = {"lr", "min_lr", "weight_decay", "clip_max_norm", "distil_loss_coef"}
SCALES |= {"lr_linear_proj_mult", "lr_backbone_mult"}
SETTINGS = {**_TRAIN, **_MODEL}


def outcome(words: list[str]) -> tuple[object, str]:
    """What a command line gives, and the message of its refusal or ""."""
    try:
        return parse(words, own_data=True), ""
    except UserError as error:
        return None, str(error)


def numbers_in(value: object) -> Iterator[float]:
    if isinstance(value, tuple | list):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, int | float):
        yield float(value)


def test_every_setting_with_every_value() -> None:
    counts, wrong = Counter[str](), []
    for setting in SETTINGS.values():
        for value in VALUES:
            for words in ([f"--{setting.name}", value], [f"--{setting.name}={value}"]):
                parsed, message = outcome(words)
                counts["refused" if message else "accepted"] += 1
                if not (names(setting, message) if message else is_limited(setting, parsed)):
                    wrong.append((words, message))
    print(f"{sum(counts.values()):,} command lines: {dict(counts)}")
    assert not wrong, "\n".join(f"{words!r:.60} {message:.200}" for words, message in wrong)
    assert counts["refused"] > 1000 and counts["accepted"] > 100


def names(setting: Setting, message: str) -> bool:
    """Whether a message is one line about the setting, or about one that depends on it."""
    one_line = message.isprintable() and len(message) < 500
    named = (setting.name, "_path", "unknown flag", "train_json is given without")
    return one_line and any(each in message.replace("-", "_") or each in message for each in named)


def is_limited(setting: Setting, parsed: object) -> bool:
    config, model = parsed  # type: ignore[misc]
    value = getattr(config, setting.name) if setting.name in _TRAIN else model[setting.name]
    largest = {"seed": 2.0**32, **dict.fromkeys(SCALES, math.inf)}.get(setting.name, LARGEST)
    least = -1 if setting.name == "batch_size" else 0  # -1 is auto
    return all(math.isfinite(each) and least <= each <= largest for each in numbers_in(value))


def test_defaults_are_within_the_limits() -> None:
    config, _ = parse([], own_data=True)
    assert config == TrainConfig(**{name: getattr(config, name) for name in _TRAIN})


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_every_flag_of_the_commands(command: str) -> None:
    """Their parsers; what they accept as a number is limited."""
    parser = subcommand(command)[0]()
    needed = ["x"] * sum(1 for each in parser._actions if not each.option_strings)
    for each in parser._actions:
        needed += [each.option_strings[-1], "x"] if each.required and each.option_strings else []
    tried, wrong = 0, []
    for action in parser._actions:
        if not action.option_strings or action.nargs == 0 or "--help" in action.option_strings:
            continue
        flag = action.option_strings[-1]
        count = action.nargs if isinstance(action.nargs, int) else 1
        for value in VALUES:
            given = [flag, *[value] * count] if count > 1 else [f"{flag}={value}"]
            tried += 1
            try:
                found = getattr(parser.parse_args([*needed, *given]), action.dest)
                if not all(0 <= each <= LARGEST for each in numbers_in(found)):
                    wrong.append((given, f"accepted as {found}"))
            except UserError as error:
                plain = str(error).replace("-", "_")
                if flag.lstrip("-") not in plain and "unknown flag" not in plain:
                    wrong.append((given, str(error)))
    print(f"vidt {command}: {tried} command lines")
    assert not wrong, "\n".join(f"{words!r:.60} {message:.200}" for words, message in wrong)
