"""Errors that a user can mend, and a word of their messages."""


class UserError(ValueError):
    """What a user asked for or handed in cannot be used. The message is one line: it names the flag
    or file, its value, and what to do. A program prints it without a traceback and exits with 2;
    every other exception is a fault of ours and keeps its traceback.
    """


def counted(count: int, what: str, several: str = "") -> str:
    """A number and its noun for a message: '1 box', '2,804 boxes'."""
    return f"{count:,} {what if count == 1 else several or what + 's'}"
