"""Converts values of web forms and YAML files, one function for each type.

Forms send typed values as text: `'True'`, `'1e-4'`, `'[1, 2]'`, `'8'`; YAML reads `1e-4` as text.
None and blank text count as not given; see `is_given`.
"""

import math
from collections.abc import Mapping
from typing import Any

from trainer.settings.yaml_text import BadYAML, load_yaml
from ymir_adapter.protocol.errors import Code, TaskError

_TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def is_given(values: Mapping[str, Any], key: str) -> bool:
    """False for a key that is absent, null (a cleared number field) or blank text."""
    value = values.get(key)
    return value is not None and not (isinstance(value, str) and not value.strip())


def to_int(key: str, value: object) -> int:
    """8, 8.0, "8" and "8.0" are 8; truth values and fractions are not whole numbers."""
    number = _number(value)
    if number is None or number != int(number):
        raise _refused(key, value, "a whole number")
    return int(number)


def to_float(key: str, value: object) -> float:
    """1e-4 and "1e-4" are numbers; nan, infinity and truth values are not."""
    number = _number(value)
    if number is None:
        raise _refused(key, value, "a number")
    return float(number)


def to_bool(key: str, value: object) -> bool:
    """True, 1, and the words true, yes, on, 1 in any case; likewise for False."""
    word = str(int(value)) if isinstance(value, float) and value in (0, 1) else str(value)
    truth = _TRUTH.get(word.strip().lower())
    if truth is None or isinstance(value, list | tuple | dict):
        raise _refused(key, value, "True or False")
    return truth


def to_text(key: str, value: object) -> str:
    """Stripped text; numbers and truth values as Python prints them."""
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise _refused(key, value, "text")
    return str(value).strip()


def to_precision(key: str, value: object) -> str:
    """Text in lower case. YAML reads `no`, which is fp32, as False unless it is quoted."""
    return "no" if value is False else to_text(key, value).lower()


def to_list(key: str, value: object) -> list[Any]:
    """A list; text such as `[1, 2]` or `1, 2`; one value alone is a list of one."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise _refused(key, value, "a list")
    text = str(value).strip()
    if not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        loaded = load_yaml(text, key)
    except BadYAML:
        loaded = None
    if not isinstance(loaded, list):
        raise _refused(key, value, "a list such as [1, 2]")
    return loaded


def _number(value: object) -> int | float | None:
    """None if the value is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        try:
            number = float(value)
        except ValueError:
            return None
    try:
        return number if math.isfinite(number) else None
    except OverflowError:  # an integer of more than 300 digits
        return None


def _refused(key: str, value: object, expected: str) -> TaskError:
    return TaskError(Code.CONFIG, f"{key} is {value!r}; it must be {expected}")
