"""A JSON object read value by value, its long lists of objects some rows at a time: what is in
memory at once is a few megabytes of it, however long the file.

The file is cut where one row seems to end and the next to begin (`}, {`). Whether that is so, and
not inside a text or deeper down, the parser tells: it can read the part as whole rows, or cannot.
"""

import codecs
import gc
import json
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from vidt.errors import UserError

PART = 2**22  # bytes that are parsed at once; more if a single value is longer
# With so many each value and list begins, for most of the first are short; then twice as many, ...
FIRST = 2**9
LONGEST_WORD = 16  # characters: more than any but a text, such as -Infinity
_BETWEEN_ROWS = re.compile(rb"\}[ \t\n\r]*,[ \t\n\r]*(?=\{)")
_BLANK = re.compile(rb"[ \t\n\r]*")
_LIST_OF_OBJECTS = re.compile(rb"\[[ \t\n\r]*(?=\{)")
_DECODER = json.JSONDecoder()

Bytes: TypeAlias = bytes | mmap.mmap


class NotJSON(UserError):
    """What is wrong and at which byte, in one line."""


def read_members(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """The members of the object in a file, as (key, value). A list of objects comes in parts, as
    lists of rows, each with its key. Of a file that holds something else there are no members.

    Raises OSError, or NotJSON, which may come after members that are well-formed.
    """
    with open(path, "rb") as file, _gc_paused():
        if os.fstat(file.fileno()).st_size == 0:
            raise NotJSON("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            encoding = json.detect_encoding(data[:4])
            if encoding == "utf-8":
                yield from _members(data, 0)
            elif encoding == "utf-8-sig":
                yield from _members(data, len(codecs.BOM_UTF8))
            else:
                yield from _members(_as_utf8(data[:], encoding), 0)


def _as_utf8(data: bytes, encoding: str) -> bytes:
    try:
        return data.decode(encoding).encode()
    except UnicodeDecodeError as error:
        raise NotJSON(f"{error.reason} at byte {error.start}") from error


@contextmanager
def _gc_paused() -> Iterator[None]:
    """No garbage collection: it would walk the many objects of a part again and again though none
    of them is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _members(data: Bytes, start: int) -> Iterator[tuple[str, Any]]:
    at = _after(_BLANK, data, start)
    if data[at : at + 1] == b"[":
        return
    if data[at : at + 1] != b"{":
        _, at = _value(data, at)
        _check_end(data, at)
        return
    at = _after(_BLANK, data, at + 1)
    keys: set[str] = set()
    more = data[at : at + 1] != b"}"
    while more:
        key, at = _value(data, at)
        if not isinstance(key, str) or key in keys:
            raise NotJSON(f"{key!r} before byte {at} is no key, or one for the second time")
        keys.add(key)
        at = _after(_BLANK, data, _expect(data, at, b":"))
        rows = _LIST_OF_OBJECTS.match(data, at)
        if rows:
            at, over, size = rows.end(), False, FIRST
            while not over:
                start = at
                part, at, over = _part(data, start, min(size, PART))
                size *= 2
                yield key, part
                _forget(data, start, at)
        else:
            value, at = _value(data, at)
            yield key, value
        at = _after(_BLANK, data, at)
        more = data[at : at + 1] == b","
        if more:
            at = _after(_BLANK, data, at + 1)
    _check_end(data, _expect(data, at, b"}"))


def _part(data: Bytes, start: int, size: int) -> tuple[list[Any], int, bool]:
    """The rows from `start` on up to about `size` bytes; where the next row starts, or what comes
    after the list; and whether the list is over.
    """
    while True:
        # Between rows if there is such a place near, else anywhere: the list may be over by then.
        limit = min(start + 2 * size, len(data))
        cut = _BETWEEN_ROWS.search(data, min(start + size, limit), limit)
        stop = cut.start() + 1 if cut else limit
        text = "[" + _text(data, start, stop) + ("]" if cut else "")
        try:
            rows, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError) as error:
            if stop == len(data) or not _ends_early(error, text):
                raise _named(error, text, start - 1) from error
            size *= 2  # that was no place between rows
            continue
        if cut and end == len(text):
            return rows, _after(_BETWEEN_ROWS, data, cut.start()), False
        return rows, start + len(text[1:end].encode()), True


def _value(data: Bytes, start: int) -> tuple[Any, int]:
    """A single value, and where it ends."""
    size = min(FIRST, PART)
    while True:
        stop = min(start + size, len(data))
        text = _text(data, start, stop)
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError) as error:
            if stop == len(data) or not _ends_early(error, text):
                raise _named(error, text, start) from error
        else:
            if end < len(text) or stop == len(data):  # else it may go on: a number
                return value, start + len(text[:end].encode())
        size *= 2


def _text(data: Bytes, start: int, stop: int) -> str:
    """As far as whole characters go, if more of the file follows."""
    try:
        return codecs.utf_8_decode(data[start:stop], "strict", stop == len(data))[0]
    except UnicodeDecodeError as error:
        raise NotJSON(f"{error.reason} at byte {start + error.start}") from error


def _ends_early(error: ValueError | RecursionError, text: str) -> bool:
    """Whether more of the file might mend it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos + LONGEST_WORD >= len(text) or error.msg.startswith("Unterminated string")


def _named(error: ValueError | RecursionError, text: str, start: int) -> NotJSON:
    if not isinstance(error, json.JSONDecodeError):  # nested too deeply, too many digits
        return NotJSON(f"{error} after byte {start}")
    return NotJSON(f"{error.msg} at byte {start + len(text[: error.pos].encode())}")


def _expect(data: Bytes, start: int, token: bytes) -> int:
    at = _after(_BLANK, data, start)
    if data[at : at + 1] != token:
        raise NotJSON(f"expecting {token.decode()!r} at byte {at}")
    return at + 1


def _check_end(data: Bytes, start: int) -> None:
    at = _after(_BLANK, data, start)
    if at < len(data):
        raise NotJSON(f"extra data at byte {at}")


def _after(pattern: re.Pattern[bytes], data: Bytes, start: int) -> int:
    found = pattern.match(data, start)
    assert found is not None
    return found.end()


def _forget(data: Bytes, start: int, stop: int) -> None:
    """Lets the system have the memory back of what was read: else the whole file counts as ours."""
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        start -= start % mmap.PAGESIZE
        data.madvise(mmap.MADV_DONTNEED, start, stop - start)
