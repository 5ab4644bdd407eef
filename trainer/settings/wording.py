"""Words of messages: how many there are of something, and what somebody may have meant."""

import difflib
from collections.abc import Iterable

ALIKE = 0.65  # difflib's ratio; below it, what is nearest is seldom what was meant


def counted(count: int, what: str, several: str = "") -> str:
    """'1 box', '2,804 boxes'."""
    return f"{count:,} {what if count == 1 else several or what + 's'}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is spelt much like this one."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=ALIKE)), None)
