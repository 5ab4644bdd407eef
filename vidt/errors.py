"""The error that a user can fix, and how messages show numbers and foreign text."""

import reprlib
import unicodedata


class UserError(ValueError):
    """The user's input or request is invalid. The message is one line that names the flag or file,
    its value, and what to do. A program prints it, or an OSError, without a traceback and exits
    with 2; every other exception is a bug and keeps its traceback.
    """


def counted(count: int, what: str, several: str = "") -> str:
    """A number and its noun, for a message: '1 box', '2,804 boxes'."""
    return f"{count:,} {what if count == 1 else several or what + 's'}"


def shown(value: object, most: int = 80) -> str:
    """A value from a user's file for a message: on one line, without control characters, and cut in
    the middle beyond `most` characters.
    """
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to write these
        return f"a number of {value.bit_length():,} bits"
    text = escaped(value if isinstance(value, str) else _brief.repr(value))
    return text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[-most // 4 :]}"


def printable(text: str, but: str = "\n\t") -> str:
    """Text for a terminal or a log: characters that would command a terminal, those in `but`
    excepted, and bytes that are no text appear escaped, as in Python.
    """
    if text.isprintable():
        return text
    return "".join(each if _is_harmless(each) or each in but else _escape(each) for each in text)


def escaped(text: str) -> str:
    """`printable`, with line breaks and tabs escaped, too: for names and paths inside a line."""
    return printable(text, "")


def _is_harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # wide blanks


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 200
