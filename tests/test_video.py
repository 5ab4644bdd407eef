"""Videos: frames with their timestamps in, and a video with the same timestamps out."""

import csv
import json
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.commands.predict import NothingRead, run
from trainer.commands.predictions import VideoOutput, predict_video, video_names
from vidt import Detections, ViDT
from vidt.errors import UserError
from vidt.images import video
from vidt.images.preprocessing import Preprocessing
from vidt.images.video import VideoReader, VideoWriter, is_video
from vidt.weights.weights_file import WeightsInfo, save_weights

NAMES = ("disc", "square", "star")
# Seconds since the first frame; the rate changes and one frame comes late.
TIMES = [Fraction(ms, 1000) for ms in (0, 40, 80, 200, 210, 500, 533, 1500)]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A bright square that moves, 46 x 63 pixels, at TIMES."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, (46, 63), rate=Fraction(25), time_base=Fraction(1, 1000)) as writer:
        for number, time in enumerate(TIMES):
            pixels = np.zeros((46, 63, 3), np.uint8)
            pixels[10:30, 5 * number : 5 * number + 20] = (250, 200, 20)
            writer.add(Image.fromarray(pixels), time)
    return path


@pytest.fixture
def weights(tiny_model: ViDT, tmp_path: Path) -> str:
    path = str(tmp_path / "tiny.safetensors")
    info = WeightsInfo(tiny_model.config, NAMES, Preprocessing(64))
    save_weights(path, tiny_model.state_dict(), info)
    return path


def record(path: Path, codec: str, pixel_format: str, start: int = 0) -> bytes:
    """50 frames of noise at 25 frames a second, the first one `start` seconds late."""
    av, random = import_module("av"), np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixel_format
        for number in range(50):
            pixels = random.integers(0, 256, (48, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 25 * start + number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def times_of(path: Path) -> list[Fraction]:
    with VideoReader(path) as reader:
        return [frame.time for frame in reader]


def test_timestamps_and_pictures_come_back(clip: Path) -> None:
    with VideoReader(clip) as reader:
        frames = list(reader)
    assert [frame.number for frame in frames] == list(range(len(TIMES)))
    for frame, time in zip(frames, TIMES, strict=True):
        assert abs(frame.time - time) <= Fraction(1, 1000)
        assert frame.picture.size == (64, 46)  # H.264 needs even sides
    first, last = (np.asarray(frames[which].picture, float) for which in (0, -1))
    assert first[20, 10].max() > 150 > 60 > last[20, 10].max()


class Stub:
    """A detector that reports a box around each image, and stops when it is told to."""

    class_names = NAMES

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def stream(self, images: Iterator[Image.Image], **_: Any) -> Iterator[tuple[int, Detections]]:
        for index, image in enumerate(images):
            if index == self.stop_at:
                raise KeyboardInterrupt
            box = torch.tensor([[1.0, 2.0, image.width - 3.0, image.height - 4.0]] * 2)
            scores, labels = torch.tensor([0.9, 0.2]), torch.tensor([1, 2])
            yield index, Detections(scores, labels, box, class_names=NAMES)


LEAST = np.full(3, 0.3, np.float32)


def test_results_of_each_frame_are_in_step(clip: Path, tmp_path: Path) -> None:
    lines = predict_video(Stub(), str(clip), VideoOutput(tmp_path / "out", "a", "json"), LEAST)
    assert lines == [f"{clip}: 8 frames, 8 objects; results in {tmp_path / 'out'}"]
    rows = [json.loads(line) for line in (tmp_path / "out/a.jsonl").read_text().splitlines()]
    drawn = times_of(tmp_path / "out/a.mp4")
    assert [row["frame"] for row in rows] == list(range(8))
    for row, time, expected in zip(rows, drawn, times_of(clip), strict=True):
        assert row["time"] == pytest.approx(float(expected), abs=1e-6)
        assert time == expected
        (found,) = row["detections"]
        assert found["name"] == "square" and found["box"] == [1, 2, 61, 42]
    with VideoReader(tmp_path / "out/a.mp4") as after, VideoReader(clip) as before:
        pairs = zip(after, before, strict=True)
        changed = [np.abs(np.subtract(a.picture, b.picture, dtype=int)).max() for a, b in pairs]
    assert min(changed) > 60  # something is drawn on each


def test_csv_without_a_drawn_video(clip: Path, tmp_path: Path) -> None:
    output = VideoOutput(tmp_path / "out", "a", "csv", pictures=False)
    predict_video(Stub(), str(clip), output, LEAST)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.csv"]
    with open(tmp_path / "out/a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["frame"]) for row in rows] == list(range(8))
    assert float(rows[3]["time"]) == pytest.approx(0.2, abs=1e-3) and rows[0]["name"] == "square"


def test_ctrl_c_leaves_a_playable_file(clip: Path, tmp_path: Path) -> None:
    output = VideoOutput(tmp_path / "out", "a", "json")
    with pytest.raises(KeyboardInterrupt):
        predict_video(Stub(stop_at=5), str(clip), output, LEAST)
    assert times_of(tmp_path / "out/a.mp4") == times_of(clip)[:5]
    assert len((tmp_path / "out/a.jsonl").read_text().splitlines()) == 5


def test_a_failure_leaves_nothing(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "b.mp4", (32, 32)) as writer:
        writer.add(Image.new("RGB", (32, 32)), Fraction(0))
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4"]


def test_a_damaged_end_is_told(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"this is no video at all" * 99)
    with pytest.raises(UserError, match=r"no\.mp4 cannot be read as a video"):
        VideoReader(tmp_path / "no.mp4")
    with pytest.raises(UserError, match=r"gone\.mp4: no such file"):
        VideoReader(tmp_path / "gone.mp4")
    with pytest.raises(UserError, match="webcam:97 cannot be read"):
        VideoReader("webcam:97")


@pytest.mark.parametrize("starts", [(0, 10 * 3600), (5, 0)])
def test_the_drawn_video_does_not_jump_in_time(
    clip: Path, tmp_path: Path, starts: tuple[int, int]
) -> None:
    """Recordings one behind the other: rows have the times of the source, forwards or backwards."""
    parts = [record(tmp_path / f"{start}.ts", "mpeg2video", "yuv420p", start) for start in starts]
    (tmp_path / "day.ts").write_bytes(b"".join(parts))
    output = VideoOutput(tmp_path / "out", "day", "json")
    predict_video(Stub(), str(tmp_path / "day.ts"), output, LEAST)
    rows = [json.loads(line) for line in (tmp_path / "out/day.jsonl").read_text().splitlines()]
    steps = np.diff([row["time"] for row in rows])
    assert len(rows) > 90 and np.abs(steps).max() > 1
    drawn = times_of(tmp_path / "out/day.mp4")
    assert len(drawn) == len(rows)
    assert np.abs(np.diff(np.array(drawn, float)) - 0.04).max() < 0.01


def test_rows_stay_if_the_drawn_video_cannot_be_written(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "out/.a.mp4.part").mkdir(parents=True)  # in the place of a temporary file
    output = VideoOutput(tmp_path / "out", "a", "json")
    with pytest.raises(UserError, match=r"a\.mp4 cannot be written: "):
        predict_video(Stub(), str(clip), output, LEAST)
    assert (tmp_path / "out/a.jsonl").read_text().startswith('{"frame": 0')


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_rows_stay_if_the_disk_is_full(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.a.mp4.part").symlink_to("/dev/full")
    output = VideoOutput(tmp_path / "out", "a", "json")
    with pytest.raises(UserError, match=r"a\.mp4 cannot be written: No space left"):
        predict_video(Stub(), str(clip), output, LEAST)
    assert (tmp_path / "out/a.jsonl").read_text().startswith('{"frame": 0')
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.jsonl"]


def test_damaged_packets_are_skipped_and_counted(clip: Path, tmp_path: Path) -> None:
    path, signature = tmp_path / "a.mov", b"\x89PNG\r\n\x1a\n"
    frames = record(path, "png", "rgb24").split(signature)
    path.write_bytes(b"".join([frames[0], *(signature + each for each in frames[1:])]))
    assert len(times_of(path)) == 50
    damaged = [(bytes(8) if number in (11, 12) else signature) for number in range(1, 51)]
    pairs = zip(damaged, frames[1:], strict=True)
    path.write_bytes(b"".join([frames[0], *(start + rest for start, rest in pairs)]))
    lines = predict_video(Stub(), str(path), VideoOutput(tmp_path / "out", "a", "json"), LEAST)
    assert lines[1:] == [f"{path}: 2 damaged packets were skipped"]
    rows = [json.loads(line) for line in (tmp_path / "out/a.jsonl").read_text().splitlines()]
    times = [round(25 * row["time"]) for row in rows]
    assert len(times) >= 40 and not {10, 11} & set(times) and times[-1] == 49


def test_a_bad_video_stops_no_other(
    clip: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, image = tmp_path / "bad.mp4", tmp_path / "torn.png"
    for path in (bad, image):
        path.write_bytes(b"this is no video at all" * 99)
    out = ["--out", str(tmp_path / "out")]
    assert run([weights, str(image), str(bad), str(clip), *out]) == 0
    told = capsys.readouterr().err
    assert "none of 1 images could be read" in told and "bad.mp4 cannot be read as a" in told
    assert (tmp_path / "out/clip.mp4").is_file() and not (tmp_path / "out/bad.jsonl").exists()
    for words in ([bad], [bad, image]):
        with pytest.raises(NothingRead, match="cannot be read as a") as caught:
            run([weights, *map(str, words), *out])
        assert caught.value.exit_code == 1
    with pytest.raises(UserError, match=r"gone\.mp4: no such file") as error:
        run([weights, str(clip), str(tmp_path / "gone.mp4"), *out])
    assert not isinstance(error.value, NothingRead)


def test_names_and_patterns_of_videos(
    clip: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that FFmpeg takes for an address; the second time results match the pattern."""
    monkeypatch.chdir(tmp_path)
    clip.rename("20240501T12:30:05.mp4")
    for _ in range(2):
        assert run([weights, "20240501T12:30:05.mp4", "--out", "one"]) == 0
        assert run([weights, "**/*05.mp4", "--out", "all"]) == 0
    for folder, number in (("one", 2), ("all", 4)):
        assert len([*Path(folder).iterdir()]) == number


def test_no_video_is_overwritten(clip: Path, weights: str, tmp_path: Path) -> None:
    """Neither one of the command nor, beside it, one that was there before."""
    clip.rename(tmp_path / "clip.mov")
    (tmp_path / "clip.mp4").write_bytes((tmp_path / "clip.mov").read_bytes())
    before = (tmp_path / "clip.mp4").read_bytes()
    for words in (["clip.mov", "clip.mp4"], ["clip.mov"]):
        with pytest.raises(UserError, match=r"--out .* would overwrite .*clip\.mp4; name another"):
            run([weights, *(str(tmp_path / word) for word in words), "--out", str(tmp_path)])
    assert (tmp_path / "clip.mp4").read_bytes() == before
    for _ in range(2):  # a folder of results alone is written anew
        assert run([weights, str(tmp_path / "clip.mov"), "--out", str(tmp_path / "out")]) == 0
    assert len([*(tmp_path / "out").iterdir()]) == 2


def test_the_command_line(
    clip: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [weights, str(clip), "--threshold", "0"]
    assert run([*common, "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.jsonl", "clip.mp4"]
    assert times_of(tmp_path / "out/clip.mp4") == times_of(clip)
    capsys.readouterr()
    assert run([*common, "--tile", "40", "--classes", "star"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{clip} frame 0 at 0.000 s: star ")
    assert "8 frames, " in shown.err
    with pytest.raises(UserError, match="--yolo is for images"):
        run([*common, "--yolo", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="would overwrite"):
        run([*common, "--out", str(tmp_path)])


def test_pyav_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(video, "import_module", missing)
    with pytest.raises(UserError, match=r"needs PyAV.* pip install av$"):
        VideoReader("a.mp4")


def test_what_is_a_video() -> None:
    assert all(map(is_video, ("a.MP4", "b/c.mov", "webcam:0")))
    assert not any(map(is_video, ("a.gif", "webcam", "webcam:x", "mp4", "a.jpg")))
    assert video_names(["a/x.mp4", "b/x.avi", "webcam:0"]) == ["x", "x-2", "webcam-0"]
