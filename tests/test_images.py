"""Decoding: every kind of file to the right 8-bit RGB pixels, every damage to one line."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from vidt.images.files import UnreadableImage, probe_image, probe_images, read_image
from vidt.images.formats import ENDINGS, ending, is_picture
from vidt.images.inputs import as_picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about damaged metadata


def save(path: Path, values: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def save_oriented(path: Path, orientation: int, height: int = 24, width: int = 40) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, noise(height, width), exif=exif)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_rgb_is_unchanged(tmp_path: Path, name: str) -> None:
    image = read_image(save(tmp_path / name, noise(5, 7), lossless=True))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), noise(5, 7))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "RGBA"])
def test_every_mode_becomes_rgb_near_the_original(tmp_path: Path, mode: str) -> None:
    ramp = np.zeros((16, 16, 3), np.uint8)
    ramp[:, 8:] = 255  # black and white survive every mode
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = read_image(save(path, ramp, mode))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), ramp)
    assert probe_image(path).mode in (mode, "RGB")


def test_alpha_is_dropped_and_not_blended(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., :3] = (10, 200, 30)  # wholly transparent
    assert (np.asarray(read_image(save(tmp_path / "a.png", rgba))) == (10, 200, 30)).all()


@pytest.mark.filterwarnings("error::UserWarning:PIL")
def test_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "a.png", transparency=b"\xff\x00")
    assert (np.asarray(read_image(tmp_path / "a.png")) == (10, 200, 30)).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_over_its_whole_range(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    grey = np.asarray(read_image(save(tmp_path / name, values)))[..., 0]
    assert grey.tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_12_bits_in_16_are_scaled_too(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 819, 2048, 4095]], np.uint16)
    grey = np.asarray(read_image(save(tmp_path / name, values)))[..., 0]
    assert grey.tolist() == [[0, 51, 128, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[0.0, 51.0, 255.0]], np.float32), [0, 51, 255]),
        (np.array([[-1.0, 0.0, np.nan, 1.0]], np.float32), [0, 128, 128, 255]),
        (np.array([[0, 51 * 257, 65535]], np.int32), [0, 51, 255]),
        (np.array([[0, 1_000_000]], np.int32), [0, 255]),
    ],
)
def test_deep_grey_is_scaled_not_clipped(
    tmp_path: Path, values: np.ndarray, expected: list[int]
) -> None:
    grey = np.asarray(read_image(save(tmp_path / "a.tif", values)))[..., 0]
    assert grey.tolist() == [expected]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_only_towards_the_annotated_size(tmp_path: Path, orientation: int) -> None:
    path = save_oriented(tmp_path / "a.png", orientation)
    assert probe_image(path).orientation == orientation
    assert probe_image(path).size == (24, 40)
    assert np.array_equal(np.asarray(read_image(path)), noise(24, 40))
    assert np.array_equal(np.asarray(read_image(path, (24, 40))), noise(24, 40))
    if orientation < 5:
        with pytest.raises(ValueError, match=r"40 x 24 .* 24 x 40"):
            read_image(path, (40, 24))
        return
    stored = noise(24, 40)
    turned = {  # where EXIF says that the first row and the first column of the file belong
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    assert np.array_equal(np.asarray(read_image(path, (40, 24))), turned)


@pytest.mark.parametrize(
    ("name", "at_least", "expected"),
    [
        ("a.jpg", (100, 200), (150, 201)),  # a half would be 75 rows
        ("a.jpg", (75, 100), (75, 101)),
        ("a.jpg", (38, 51), (75, 101)),
        ("a.jpg", (19, 20), (38, 51)),
        ("a.jpg", (1, 1), (19, 26)),
        ("a.jpg", None, (150, 201)),
        ("a.png", (1, 1), (150, 201)),
    ],
)
def test_decoded_no_smaller_than_asked_for(
    tmp_path: Path, name: str, at_least: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    path = save(tmp_path / name, noise(150, 201))
    for size in (None, (150, 201)):
        image = read_image(path, size, at_least=at_least)
        assert (image.height, image.width) == expected and image.mode == "RGB"
    with pytest.raises(ValueError, match="201 x 150"):
        read_image(path, (75, 101), at_least=at_least)


def test_an_image_to_be_turned_is_decoded_whole(tmp_path: Path) -> None:
    path = save_oriented(tmp_path / "a.jpg", 6, 160, 240)
    assert read_image(path, (240, 160), at_least=(8, 8)).size == (160, 240)
    assert read_image(path, (160, 240), at_least=(8, 8)).size == (30, 20)


def test_grey_and_cmyk_photographs_are_decoded_smaller_too(tmp_path: Path) -> None:
    for mode in ("L", "CMYK"):
        image = read_image(save(tmp_path / "a.jpg", noise(64, 64), mode), at_least=(16, 16))
        assert image.mode == "RGB" and image.size == (16, 16)


def test_broken_exif_does_not_spoil_the_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(8, 8), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert probe_image(path).orientation == 1
    assert read_image(path).size == (8, 8)


def test_other_size_names_both(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(5, 7))
    with pytest.raises(ValueError, match=r"a\.png: .*7 x 5 .* 9 x 9") as caught:
        read_image(path, (9, 9))
    assert not isinstance(caught.value, UnreadableImage)


def damaged(path: Path, kind: str) -> Path:
    suffix = path.suffix
    if kind == "missing":
        return path
    save(path, noise(64, 64))
    data = path.read_bytes()
    data = {
        "empty": b"",
        "text": b"<html>404</html>",
        "half": data[: len(data) // 2],
        "header only": data[:40],
    }[kind]
    path.write_bytes(data)
    assert path.suffix == suffix
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "half", "header only"])
def test_damage_is_one_line_with_the_file(tmp_path: Path, suffix: str, kind: str) -> None:
    path = damaged(tmp_path / f"a{suffix}", kind)
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_probe_finds_truncated_files(tmp_path: Path, suffix: str) -> None:
    good, bad = save(tmp_path / f"good{suffix}", noise(64, 64)), tmp_path / f"bad{suffix}"
    bad.write_bytes(good.read_bytes()[:-200])
    first, second = probe_images([str(good), str(bad)])
    assert not isinstance(first, UnreadableImage) and not first.truncated
    if suffix == ".jpg":
        assert not isinstance(second, UnreadableImage) and second.truncated
    else:
        assert isinstance(second, UnreadableImage)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_its_end_is_used_unless_strict(tmp_path: Path, progressive: bool) -> None:
    good = save(tmp_path / "good.jpg", noise(160, 64), quality=90, progressive=progressive)
    whole, bad = np.asarray(read_image(good)), tmp_path / "bad.jpg"
    data = good.read_bytes()
    bad.write_bytes(data[: len(data) * 9 // 10])
    read = np.asarray(read_image(bad))
    assert read.shape == whole.shape
    assert progressive or np.array_equal(read[:96], whole[:96])
    with pytest.raises(UnreadableImage, match="truncated"):
        read_image(bad, strict=True)
    if not progressive:  # a progressive one is there as a whole, blurred
        bad.write_bytes(data[: len(data) * 6 // 10])
        with pytest.raises(UnreadableImage, match="truncated"):
            read_image(bad)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>\n", "it holds text, '<html>not found"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 99, "HEIF, which Pillow does not read"),
        (b"\0" * 4096, "zero bytes"),
        (bytes(range(255, 0, -1)), "not an image, or the file header is damaged"),
    ],
)
def test_the_true_reason_is_told(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason):
        read_image(path)


@pytest.mark.parametrize("name", ["a.gif", "a.ppm", "a.jp2", "a.avif", "a.TIF", "a.apng", "a.jpf"])
def test_what_counts_as_a_picture_can_be_read(tmp_path: Path, name: str) -> None:
    assert is_picture(name) and not is_picture(f".{name}") and not is_picture(f"{name}.txt")
    kind = Image.registered_extensions()[ending(name)]
    Image.fromarray(noise(32, 48)).save(tmp_path / name, kind)
    assert read_image(tmp_path / name).size == (48, 32)
    assert probe_image(tmp_path / name).size == (32, 48)


def test_every_ending_of_a_picture_is_one_that_pillow_reads() -> None:
    Image.init()
    kinds = {Image.registered_extensions()[each] for each in ENDINGS}
    assert kinds - set(Image.OPEN) == {"MPO"}  # which the JPEG reader opens


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_frames_counts(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.x", kind, save_all=True, append_images=frames[1:], lossless=True)
    assert probe_image(tmp_path / "a.x").frames
    assert read_image(tmp_path / "a.x").getpixel((3, 3)) in [(255, 0, 0), (254, 0, 0)]
    frames[0].save(tmp_path / "b.x", kind)
    assert not probe_image(tmp_path / "b.x").frames


@pytest.mark.parametrize("orientation", range(1, 9))
def test_with_exif_an_image_is_turned_as_pillow_turns_it(tmp_path: Path, orientation: int) -> None:
    path = save_oriented(tmp_path / "a.png", orientation)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    read = read_image(path, exif=True)
    assert np.array_equal(np.asarray(read), expected)
    assert np.array_equal(np.asarray(as_picture(path)), expected)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(as_picture(image)), expected)
    assert np.array_equal(np.asarray(as_picture(read)), expected)  # not turned again
    stored = as_picture(read_image(path))
    assert np.array_equal(np.asarray(stored), noise(24, 40))
    assert probe_image(path).shown_size == expected.shape[:2]
    assert read_image(path, exif=True, at_least=(1, 1)).size == (expected.shape[1], len(expected))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_upright_whatever_it_is_stored_as(
    tmp_path: Path, orientation: int, mode: str, compression: str
) -> None:
    stored = noise(24, 40) if mode == "RGB" else noise(24, 40)[:, :, 0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.tif"
    deep = stored.astype(np.uint16) * 257 if mode == "I;16" else stored
    image = Image.fromarray(deep)
    assert image.mode == mode
    image.save(path, exif=exif, compression=compression)
    rgb = Image.fromarray(stored).convert("RGB")
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    expected = np.asarray(rgb if turn is None else rgb.transpose(turn))
    for read in (read_image(path), read_image(path, exif=True), as_picture(path)):
        assert np.array_equal(np.asarray(read), expected)
    assert probe_image(path).size == probe_image(path).shown_size == expected.shape[:2]


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(16, 16))
    path.write_bytes(path.read_bytes() + b"maker's own")
    assert not probe_image(path).ends_whole
    assert not isinstance(next(probe_images([str(path)])), UnreadableImage)


def test_decompression_bomb_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", noise(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="Bomb"):
        read_image(path)


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    failures = 0
    for suffix in (".jpg", ".png", ".tif", ".webp", ".gif", ".bmp"):
        path = save(tmp_path / f"a{suffix}", noise(32, 32))
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(25):
            data = whole.copy()
            data[random.integers(0, min(len(data), 200), 6)] = random.integers(0, 256, 6)
            path.write_bytes(data.tobytes())
            for reader in (probe_image, read_image):
                try:
                    reader(os.fspath(path))
                except UnreadableImage:
                    failures += 1
    assert failures > 20
