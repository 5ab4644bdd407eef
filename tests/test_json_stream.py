"""JSON read part by part: the same values as read at once, however it is cut; and every damage is
one line.
"""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.readers import json_stream
from trainer.readers.json_stream import NotJSON, read_members

# What looks like the border between two rows, and is none.
TRICKY: dict[str, Any] = {
    "info": {"description": "}, {", "deep": [{"a": 1}, {"b": [{}, {}]}]},
    "images": [
        {"id": 1, "name": "a},{b"},
        {"id": 2, "name": 'quote " and \\ and \n } , { "'},
        {"id": 3, "parts": [{"x": [1, 2]}, {"x": []}], "more": {"y": {}}},
        {},
        {"id": 5, "name": "\u00e4\u4e2d\U0001f600"},
    ],
    "numbers": [1.5, -2e300, True, None, "text"],
    "mixed": [{"a": 1}, 7, [{"b": 2}, {"c": 3}]],
    "nothing": [],
    "count": 123456789,
    "last": [{"id": n, "box": [n, n + 0.25, 1e-3, 0]} for n in range(40)],
}


def together(path: Path) -> dict[str, Any]:
    """All members; a list's parts joined."""
    found: dict[str, Any] = {}
    for key, value in read_members(path):
        if key in found:
            found[key] = found[key] + value
        else:
            found[key] = value
    return found


@pytest.fixture(params=[1, 5, 37, 300, 2**22])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_stream, "FIRST", min(request.param, 2**9))
    monkeypatch.setattr(json_stream, "PART", request.param)
    return request.param


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_values_are_those_of_the_whole(
    tmp_path: Path, part: int, layout: dict[str, Any], ascii_only: bool
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TRICKY, ensure_ascii=ascii_only, **layout), encoding="utf-8")
    assert together(path) == TRICKY
    assert list(together(path)) == list(TRICKY)


def test_long_lists_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"rows": [{"id": number} for number in range(1000)]}))
    monkeypatch.setattr(json_stream, "PART", 100)
    monkeypatch.setattr(json_stream, "FIRST", 20)
    lengths = [len(rows) for _, rows in read_members(path)]
    assert sum(lengths) == 1000 and max(lengths) < 15


@pytest.mark.parametrize(
    "value",
    ["text" * 600, 7, [1] * 800, {"a": {"b": [1, 2]}}, [{"id": 1}], [{"id": 1}, {"id": 2}]],
    ids=range(6),
)
def test_many_members_are_decoded_a_few_times_at_most(
    tmp_path: Path, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a whole part for each of them, which is 4 MiB."""
    document = {f"member {number}": value for number in range(2000)}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    decoded = 0
    text_of = json_stream._text

    def counted(data: json_stream.Bytes, start: int, stop: int) -> str:
        nonlocal decoded
        decoded += stop - start
        return text_of(data, start, stop)

    monkeypatch.setattr(json_stream, "_text", counted)
    assert together(path) == document
    assert decoded < 4 * path.stat().st_size + 2000 * 4 * json_stream.FIRST


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_other_encodings(tmp_path: Path, part: int, encoding: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TRICKY, ensure_ascii=False), encoding=encoding)
    assert together(path) == TRICKY


def test_every_truncation_is_told(tmp_path: Path, part: int) -> None:
    path = tmp_path / "a.json"
    short = {name: TRICKY[name] for name in ("info", "images", "mixed", "count")}
    whole = json.dumps(short, ensure_ascii=False).encode()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(NotJSON) as caught:
            together(path)
        assert "\n" not in str(caught.value)
    assert gc.isenabled()


def test_damage_is_told_as_the_json_module_does(tmp_path: Path, part: int) -> None:
    """A byte replaced by another: an error of both, or the same values from both."""
    random = np.random.default_rng(part)
    path = tmp_path / "a.json"
    whole = np.frombuffer(json.dumps(TRICKY, ensure_ascii=False).encode(), np.uint8)
    outcomes = set()
    for _ in range(200):
        damaged = whole.copy()
        place = random.integers(1, len(whole))
        damaged[place] = random.choice(np.frombuffer(b'{}[],:"x1 \xff', np.uint8))
        path.write_bytes(damaged.tobytes())
        try:
            expected = json.loads(damaged.tobytes())
        except ValueError:
            expected = None
        try:
            found = together(path)
        except NotJSON as error:
            found = None
            assert "\n" not in str(error)
        assert found == expected
        outcomes.add(found is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("no json", "Expecting value at byte 0"),
        ('{"a": 1} 2', "extra data at byte 9"),
        ('{"a": 1, "a": 2}', "'a'"),
        ('{"a" 1}', "':' at byte 5"),
        ('{"a": [{"b": 1} {"b": 2}]}', "',' delimiter at byte 16"),
        ('{"a": ' + "[" * 100_000, "recursion"),
        ('{"a": ' + "9" * 5000 + "}", "after byte 6"),
    ],
)
def test_errors_say_what_and_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(NotJSON, match=message):
        together(path)


@pytest.mark.parametrize("text", ["[1, 2]", "17", '"text"', "{}"])
def test_what_is_no_object_has_no_members(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert together(path) == {}
