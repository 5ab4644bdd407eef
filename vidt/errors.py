"""Errors that a user can mend."""


class UserError(ValueError):
    """What a user asked for or handed in cannot be used. The message is one line: it names the flag
    or file, its value, and what to do. A program prints it without a traceback and exits with 2;
    every other exception is a fault of ours and keeps its traceback.
    """
