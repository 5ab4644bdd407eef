"""Values as annotation files write them: text, numbers, truth values, XML, file names.

A value that can only mean one thing is read, whatever its form; readers tell so in a finding.
"""

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)
_FALSE, _TRUE = ("", "0", "0.0", "false", "no", "n", "f"), ("1", "1.0", "true", "yes", "y", "t")
_TRUTH = {**dict.fromkeys(_FALSE, False), **dict.fromkeys(_TRUE, True)}
_ENCODING = re.compile(rb"\s*<\?xml[^>]*encoding\s*=\s*[\"']([^\"'>]*)[\"'][^>]*\?>")
_DECLARATION = re.compile(r"\s*<\?xml[^>]*\?>")
_BARE_AND = re.compile(r"&(?!#?\w{1,8};)")


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file without its byte order mark: UTF-8, or UTF-16 with a mark. Bytes that are not
    UTF-8 become surrogates, as in file names. Raises OSError.
    """
    return text_of(Path(path).read_bytes())


def text_of(data: bytes) -> str:
    """The text of a file's bytes, see `read_text`."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def number_of(value: Any) -> float:
    """The value of a number, or of a text that is one; NaN for anything else."""
    try:
        if isinstance(value, (int, float)):
            return float(value)
        is_number = isinstance(value, str) and _NUMBER.fullmatch(value)
        return float(value) if is_number else float("nan")
    except OverflowError:  # an integer of more than 300 digits
        return float("inf")


def whole_number(value: Any) -> int | None:
    """An integer of 64 bits: 1, 1.0 or "1"; None for anything else. JSON's true is not 1."""
    if type(value) is int:
        return value if -(2**63) <= value < 2**63 else None
    if isinstance(value, str) and _NUMBER.fullmatch(value) and len(value) < 40:
        digits = value.strip()
        return whole_number(int(digits) if digits.lstrip("+-").isdigit() else float(digits))
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return None


def truth(value: Any) -> bool | None:
    """A truth value, or a number or text that means one; None for anything else."""
    if value is None:
        return False
    if isinstance(value, (bool, int, float, str)):
        return _TRUTH.get(str(value).strip().lower())
    return None


def shortened(value: Any, most: int = 80) -> str:
    """A value for a message, of a bounded length."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def existing_name(folder: str | os.PathLike[str], name: str) -> str:
    """A file name as written, or with / for each backslash if only that file exists."""
    if "\\" not in name or os.path.exists(os.path.join(folder, name)):
        return name
    slashed = name.replace("\\", "/")
    return slashed if os.path.exists(os.path.join(folder, slashed)) else name


def walk(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """Each folder from this one down, with the names of its files; without those inside whose name
    starts with a dot. Links to folders are followed, after the folders that are no links, and no
    folder comes twice.
    """
    waiting, visited = [os.fspath(folder)], set[str]()
    for start in waiting:  # grows meanwhile
        for top, folders, names in os.walk(start):
            real = os.path.realpath(top)
            folders[:] = sorted(n for n in folders if not n.startswith(".") and real not in visited)
            if real not in visited:
                visited.add(real)
                paths = (os.path.join(top, name) for name in folders)
                waiting += [path for path in paths if os.path.islink(path)]
                yield top, names


def parse_xml(data: bytes) -> tuple[ElementTree.Element, str]:
    """The root of an XML document, and a remark on how it was read, "" if as it stands.

    Python decodes it, because expat knows four encodings. Raises ElementTree.ParseError, or
    ValueError for bytes that are not of the declared encoding and for declared entities, which
    could expand without limit.
    """
    text, remark = _xml_text(data)
    if "<!ENTITY" in text:
        raise ValueError("it declares entities")
    text = _DECLARATION.sub("", text, count=1)
    try:
        return ElementTree.fromstring(text), remark
    except ElementTree.ParseError:
        mended = _BARE_AND.sub("&amp;", text)
        if mended == text:
            raise
        return ElementTree.fromstring(mended), 'a bare "&" is read as "&amp;"'


def _xml_text(data: bytes) -> tuple[str, str]:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16"), ""
    data = data.removeprefix(codecs.BOM_UTF8)
    declared = _ENCODING.match(data)
    name = declared[1].decode("latin-1") if declared else "utf-8"
    wide = re.match(r"utf[-_]?(16|32)|ucs", name, re.IGNORECASE)
    try:
        if declared and wide:  # its own declaration has one byte a letter
            raise LookupError("it has one byte a letter")
        return data.decode(name), ""
    except (LookupError, UnicodeError) as error:
        try:
            remark = f"it declares the encoding {name!r} and is read as UTF-8"
            return data.decode("utf-8"), remark
        except UnicodeDecodeError:
            raise ValueError(f"its text is not of the encoding {name!r} ({error})") from None
