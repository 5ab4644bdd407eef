"""The error that a user can fix, and a helper for messages."""


class UserError(ValueError):
    """The user's input or request is invalid. The message is one line that names the flag or file,
    its value, and what to do. A program prints it without a traceback and exits with 2; every other
    exception is a bug and keeps its traceback.
    """


def counted(count: int, what: str, several: str = "") -> str:
    """A number and its noun, for a message: '1 box', '2,804 boxes'."""
    return f"{count:,} {what if count == 1 else several or what + 's'}"
