"""A JSON object read member by member and its lists row by row: memory stays bounded by a few
megabytes, however long the file.

The decoder is the standard library's. ijson (YAJL) takes longer, refuses the NaN that
Python writes and turns half a surrogate pair into "?"; msgspec refuses both and needs three times
the file in memory.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 2**20  # characters read at once; more if a single value is longer
LONGEST_WORD = 16  # characters: longer than any value but a string, such as -Infinity
_BLANK = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_BETWEEN_ROWS = re.compile(r"(?<=\})[ \t\n\r]*,[ \t\n\r]*(?=\{)")
_DECODER = json.JSONDecoder()


class NotJSON(ValueError):
    """What is wrong and at which character, in one line."""


def read_members(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield the members of the object in a file as (key, value). A list comes in parts: as lists
    of its rows, each with the key. A file that holds something else has no members.

    Raises OSError, or NotJSON, which may come after well-formed members.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        if not start:
            raise NotJSON("the file is empty")
        file.seek(0)
        text = io.TextIOWrapper(file, json.detect_encoding(start), newline="")
        try:
            yield from _members(_Stream(text))
        except UnicodeDecodeError as error:
            position = file.tell() - len(error.object) + error.start
            raise NotJSON(f"{error.reason} at byte {position}") from error


class _Stream:
    """A file's text; what lies before the position is dropped with the next chunk."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0  # the position in `_text`
        self._dropped = 0  # characters before `_text`

    def peek(self) -> str:
        """Skip blanks; return the next character without taking it, "" at the end."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def take(self, token: str) -> None:
        """Take a token and the blanks after it, "" at the end of the file. Raises NotJSON if
        something else is next.
        """
        if self.peek() != token:
            raise self.error(f"expecting {token!r}" if token else "extra data")
        self._at += len(token)
        self.peek()

    def value(self) -> Any:
        """Take a value; no blanks are before it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not (self._may_continue(error) and self._read()):
                    raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # too many digits, nested too deeply
                raise self.error(str(error)) from error
            else:
                # A number may continue: of "1e5" the start is a number, too.
                if end + LONGEST_WORD < len(self._text) or not self._read():
                    self._at = end
                    return value

    def rows(self) -> Iterator[list[Any]]:
        """Take a list, in parts of about a chunk."""
        self.take("[")
        rows, chunk = list[Any](), -1
        more = self.peek() != "]"
        while more:
            if self._dropped != chunk:
                if rows:
                    yield rows
                rows, chunk = self._batch(), self._dropped
            rows.append(self.value())
            comma = _COMMA.match(self._text, self._at)
            if comma and comma.end() < len(self._text):
                self._at = comma.end()  # the usual case, for speed
            elif more := self.peek() == ",":
                self.take(",")
        self.take("]")
        yield rows

    def _batch(self) -> list[Any]:
        """Take most rows of the chunk in one call of the decoder, several times as fast as row by
        row. Takes none if the list ends within the chunk, a row is malformed, or the cut is not
        between two rows but inside of one.
        """
        cut = _BETWEEN_ROWS.search(self._text, max(self._at, len(self._text) - CHUNK // 16))
        if cut is not None:
            with contextlib.suppress(ValueError, RecursionError):
                rows: list[Any] = json.loads(f"[{self._text[self._at : cut.start()]}]")
                self._at = cut.end()
                return rows
        return []

    def error(self, message: str, at: int | None = None) -> NotJSON:
        return NotJSON(f"{message} at character {self._dropped + (self._at if at is None else at)}")

    def _may_continue(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may be whole once more of the file is read."""
        is_near_the_end = error.pos + LONGEST_WORD >= len(self._text)
        return is_near_the_end or error.msg.startswith("Unterminated string")

    def _read(self) -> bool:
        """Read on; False at the end of the file."""
        text = self._file.read(max(CHUNK, len(self._text) - self._at))
        if text:
            self._dropped += self._at
            self._text, self._at = self._text[self._at :] + text, 0
        return bool(text)


def _members(stream: _Stream) -> Iterator[tuple[str, Any]]:
    if stream.peek() == "[":
        return
    if stream.peek() != "{":
        stream.value()
        stream.take("")
        return
    stream.take("{")
    keys: set[str] = set()
    more = stream.peek() != "}"
    while more:
        key = stream.value()
        if not isinstance(key, str) or key in keys:
            raise stream.error(f"{key!r} is no key, or a key used twice,")
        keys.add(key)
        stream.take(":")
        if stream.peek() == "[":
            yield from ((key, part) for part in stream.rows())
        else:
            yield key, stream.value()
        more = stream.peek() == ","
        if more:
            stream.take(",")
    stream.take("}")
    stream.take("")
