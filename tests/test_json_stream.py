"""JSON read row by row: the same values as read at once, however small the chunks; and every damage
is one line.
"""

import json
import tracemalloc
from contextlib import nullcontext
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


@pytest.fixture(params=[1, 37, 2**22])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_stream, "CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_values_are_those_of_the_whole(
    tmp_path: Path, chunk: int, layout: dict[str, Any], ascii_only: bool
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TRICKY, ensure_ascii=ascii_only, **layout), encoding="utf-8")
    assert together(path) == TRICKY
    assert list(together(path)) == list(TRICKY)


def test_long_lists_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"rows": [{"id": number} for number in range(1000)]}))
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    lengths = [len(rows) for _, rows in read_members(path)]
    assert sum(lengths) == 1000 and max(lengths) < 15


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A list of 20 MB, and the same on one line with a fault at its end."""
    path = tmp_path / "a.json"
    row = json.dumps({"id": 1, "box": [1.5] * 40}) + ", "
    for end in ("{}]}", "{]}"):
        path.write_text('{"rows": [' + row * 100_000 + end)
        count = 0
        tracemalloc.start()
        with nullcontext() if end == "{}]}" else pytest.raises(NotJSON, match="character 2"):
            for _, rows in read_members(path):
                count += len(rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count > 90_000
        assert peak < path.stat().st_size


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_other_encodings(tmp_path: Path, chunk: int, encoding: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TRICKY, ensure_ascii=False), encoding=encoding)
    assert together(path) == TRICKY


def test_every_truncation_is_told(tmp_path: Path, chunk: int) -> None:
    path = tmp_path / "a.json"
    short = {name: TRICKY[name] for name in ("info", "images", "mixed", "count")}
    whole = json.dumps(short, ensure_ascii=False).encode()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(NotJSON) as caught:
            together(path)
        assert "\n" not in str(caught.value)


def test_damage_is_told_as_the_json_module_does(tmp_path: Path, chunk: int) -> None:
    """A byte replaced by another: an error of both, or the same values from both."""
    random = np.random.default_rng(chunk)
    path = tmp_path / "a.json"
    whole = np.frombuffer(json.dumps(TRICKY, ensure_ascii=False).encode(), np.uint8)
    outcomes = set()
    for _ in range(100):
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
        ("no json", "Expecting value at character 0"),
        ('{"a": 1} 2', "extra data at character 9"),
        ('{"a": 1, "a": 2}', "'a'"),
        ('{"a" 1}', "':' at character 5"),
        ('{"a": [{"b": 1} {"b": 2}]}', "']' at character 16"),
        ('{"a": ' + "[" * 100_000, "recursion"),
        ('{"a": ' + "9" * 5000 + "}", "at character 6"),
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
