"""Resize rule, normalisation, padding and batching of equal canvases."""

import golden
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from vidt.images.canvas import canvas_batches, resize, resized_shape
from vidt.images.preprocessing import Preprocessing, pad_batch, to_pixels


@golden.present
def test_resize_rule() -> None:
    cases = golden.read_json("recipe_cases.json")["resize"]
    assert len(cases) > 50
    for case in cases:
        width, height = case["wh"]
        found = resized_shape(height, width, case["size"], case["max_size"])
        assert list(found[::-1]) == case["out_wh"], case


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5000), (5000, 1), (3, 4000), (7, 6)])
def test_no_shape_resizes_to_nothing(height: int, width: int) -> None:
    for size in (320, 800):
        canvas = Preprocessing(size).canvas(height, width)
        assert min(canvas) >= 16 and max(canvas) <= max(size * 1333 // 800, size)
        assert not canvas[0] % 16 and not canvas[1] % 16


def test_longest_side_keeps_the_released_proportion() -> None:
    assert [Preprocessing(size).max_size for size in (800, 640, 320)] == [1333, 1066, 533]
    assert Preprocessing().canvas(427, 640) == (800, 1184)


def test_normalised_by_hand() -> None:
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 255, 51, 0
    tensor = Preprocessing(32)(Image.fromarray(pixels))
    assert type(tensor) is torch.Tensor and tensor.shape == (3, 32, 48)
    expected = torch.tensor([(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, -0.406 / 0.225])
    assert torch.allclose(tensor, expected[:, None, None].expand(-1, 32, 48), atol=1e-6)


def test_normalised_as_torchvision_does_and_padding_is_nothing() -> None:
    preprocessing = Preprocessing()
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    padding = torch.zeros(2, 4, 256, dtype=torch.bool)
    padding[1, 2:], padding[0, :, 200:] = True, True
    found = preprocessing.normalise(pixels, padding)
    scaled = F.to_dtype(pixels, torch.float32, scale=True)
    expected = F.normalize(scaled, list(preprocessing.mean), list(preprocessing.std))
    assert torch.equal(preprocessing.normalise(pixels), expected)
    assert torch.equal(found, expected.where(~padding[:, None], 0.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalising_leaves_what_it_is_given_alone(dtype: torch.dtype) -> None:
    pixels = torch.full((1, 3, 2, 2), 51, dtype=dtype)
    padding = torch.ones(1, 2, 2, dtype=torch.bool)
    found = Preprocessing().normalise(pixels)
    assert torch.allclose(found[0, :, 0, 0], torch.tensor([-1.2445, -1.1429, -0.9156]), atol=1e-4)
    assert not Preprocessing().normalise(pixels, padding).any()
    assert torch.equal(pixels, torch.full((1, 3, 2, 2), 51, dtype=dtype))


def test_pixels_lie_in_planes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    found = to_pixels(Image.fromarray(noise))
    assert found.is_contiguous() and np.array_equal(found.numpy(), noise.transpose(2, 0, 1))


def test_pixels_are_those_of_pillow() -> None:
    """Antialiased bilinear, as released; a tensor resize would differ."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
    image = Image.fromarray(noise)
    theirs = image.resize((48, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(resize(image, (32, 48))), np.asarray(theirs))


def test_padding_is_right_and_below() -> None:
    images = [torch.ones(3, 2, 5), torch.ones(3, 4, 3)]
    batch, padding = pad_batch(images)
    assert batch.shape == (2, 3, 4, 5) and padding.shape == (2, 4, 5)
    assert torch.equal(batch, (~padding[:, None]).float().expand_as(batch))
    assert padding.sum(dim=(1, 2)).tolist() == [10, 8]
    assert not padding[0, :2].any() and not padding[1, :, :3].any()
    assert pad_batch(images, (8, 6))[1].shape == (2, 8, 6)


def test_batches_hold_equal_canvases_and_every_image_once() -> None:
    canvases = [(32, 48), (48, 32), (32, 48), (32, 48), (16, 16), (48, 32)]
    batches = canvas_batches(canvases, 2)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    for batch in batches:
        assert len(batch) <= 2 and len({canvases[index] for index in batch}) == 1
    assert len(batches) == 4
    assert canvas_batches([], 4) == []
