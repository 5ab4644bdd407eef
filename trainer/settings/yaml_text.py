"""YAML from files that nobody vouches for: plain values only, of bounded size, depth and aliases.

A few hundred bytes of aliases stand for millions of values, and PyYAML raises errors of its own
making for a date without a day; here every fault is one line that names the file.
"""

from pathlib import Path
from typing import Any

import yaml

from vidt.errors import UserError, shown

MOST_BYTES = 2**22  # 100,000 class names are half of that
MOST_VALUES = 400_000  # each alias counts as often as it is used
DEEPEST = 50


class BadYAML(UserError):
    """A file that is no YAML, or too large; one line names it."""


def read_limited(path: str | Path) -> bytes:
    """The bytes of a file, at most MOST_BYTES of them. Raises OSError and BadYAML."""
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise BadYAML(f"{path} is larger than {MOST_BYTES:,} bytes; name a smaller YAML file")
    return data


def load_yaml(text: str | bytes, source: object, *, as_text: bool = False) -> Any:
    """The plain values of a YAML text; a byte order mark is ignored. `source` names it in errors.
    as_text: numbers, dates, yes and no stay text. Raises BadYAML.
    """
    try:
        return yaml.load(text, _TextLoader if as_text else _PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadYAML(f"{source} is not YAML: {shown(' '.join(str(error).split()), 200)}") from None
    except BadYAML as error:
        raise BadYAML(f"{source} {error}") from None
    # What PyYAML's constructors of dates, numbers and pairs raise for values that are none.
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        reason = shown(" ".join(str(error).split()), 200)
        raise BadYAML(
            f"{source} is not YAML: it has a value that cannot be read ({reason}); quote it"
        ) from None


class _Bounded(yaml.composer.Composer):
    """Refuses deep nesting and more than MOST_VALUES values, before it makes any."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)  # type: ignore[call-arg]
        self._depth = self._values = 0
        self._sizes: dict[str, int] = {}  # of what each anchor names

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[attr-defined]
        self._depth += 1
        before = self._values
        is_alias = isinstance(event, yaml.AliasEvent)
        self._values += self._sizes.get(event.anchor, 1) if is_alias else 1
        if self._depth > DEEPEST:
            raise BadYAML(f"is nested more than {DEEPEST} levels deep")
        if self._values > MOST_VALUES:
            raise BadYAML(f"stands for more than {MOST_VALUES:,} values; write fewer aliases")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None and not is_alias:
            self._sizes[event.anchor] = self._values - before
        return node


class _PlainLoader(_Bounded, yaml.SafeLoader):
    pass


class _TextLoader(_Bounded, yaml.BaseLoader):
    pass
