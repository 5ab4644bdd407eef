"""Masks to vectors and back: number for number those of the published implementation, and what its
data does not show: any square, boxes beyond the image, no objects.
"""

import copy
import math
import tracemalloc
from dataclasses import replace

import golden
import numpy as np
import pytest
import torch
from conftest import Compare
from golden_compare import load
from PIL import Image
from scipy.fft import dctn
from torch import Tensor

from vidt.images import mask_drawing
from vidt.images.drawing import draw_detections, object_colours, tint
from vidt.images.mask_drawing import zigzag
from vidt.losses.mask_vectors import encode_squares, square_masks
from vidt.model.vidt import ViDTConfig
from vidt.onnx.detector import OnnxDetections
from vidt.predict.detections import Detections, MaskVectors, decode_for

PLUS = "vidt_plus_swin_nano_300"
BOXES = ("pred_logits", "pred_boxes")


def decode_vectors(vectors: Tensor, side: int) -> Tensor:
    return torch.from_numpy(mask_drawing.decode_vectors(vectors.numpy(), side))


def paste_squares(squares: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(mask_drawing.paste_squares(squares.numpy(), boxes.numpy(), size))


def bits(packed: Tensor, *shape: int) -> Tensor:
    """Rows of packed bits, unpacked: bool [n, *shape]."""
    unpacked = np.unpackbits(packed.numpy(), axis=1)[:, : int(np.prod(shape))]
    return torch.from_numpy(unpacked.reshape(-1, *shape).astype(bool))


@golden.present
def test_golden_vectors(compare: Compare) -> None:
    case = golden.read_arrays("dct_case.npz")
    made = golden.fill().targets("dct", 200, 150, 3, 91, 1)
    masks, boxes = torch.from_numpy(made["masks"]), torch.from_numpy(made["xyxy_boxes"])
    squares = bits(case["cropped_packbits"], 128, 128)
    assert torch.equal(square_masks(masks, boxes, 128), squares)
    vectors = encode_squares(square_masks(masks, boxes, 128), 256)
    compare("vectors", vectors, case["vectors"], 1e-5)
    reconstructed = bits(case["reconstructed_packbits"], 128, 128)
    assert torch.equal(decode_vectors(case["vectors"], 128), reconstructed)


@golden.present
def test_golden_zigzag() -> None:
    cases = golden.read_json("recipe_cases.json")
    assert zigzag(128)[:256].tolist() == cases["zigzag_128_first256"]
    assert zigzag(8).tolist() == cases["zigzag_8_all"]


@golden.present
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_masks_of_our_own_vectors(dtype: torch.dtype, compare: Compare) -> None:
    """Areas of all 100 masks of an image, all pixels of the first eight. From the stored logits and
    boxes in float64, as the reference was computed; from predictions that are all ours in float32.
    """
    stored = golden.read_arrays(f"{PLUS}/pair.npz")
    sizes = torch.tensor(golden.read_json(f"{PLUS}/meta.json")["postprocess_target_sizes_hw"])
    model = copy.deepcopy(load(PLUS)).to(dtype)
    images, padding = golden.inputs("pair")
    with torch.no_grad():
        outputs = model(images.to(dtype), padding)
    exact = dtype == torch.float64
    given = {**outputs, **{name: stored[name] for name in BOXES}} if exact else outputs
    for image, found in enumerate(decode_for(model.config)(given, sizes)):
        masks, areas = found.masks, stored[f"post{image}.mask_areas"]
        assert masks is not None and torch.equal(found.labels, stored[f"post{image}.labels"])
        # In float32, cells of the 128 x 128 square flip that lie on the threshold: two at most.
        width, height = (found.boxes[:, 2:] - found.boxes[:, :2]).amax(0).tolist()
        cells = 2 * math.ceil(width / 128) * math.ceil(height / 128)
        compare(f"pixels in a mask, {dtype}", masks.flatten(1).sum(1), areas, 0 if exact else cells)
        first = bits(stored[f"post{image}.masks_packbits_first8"], *sizes[image].tolist())
        differing = (masks[:8] != first).flatten(1).sum(1)
        compare(f"differing, {dtype}", differing, torch.zeros(8), 0 if exact else cells)


@pytest.mark.parametrize("side", [7, 16])
def test_all_coefficients_are_the_whole_mask(side: int) -> None:
    """Also of an odd square; scipy's transform is the measure."""
    masks = torch.rand(3, side, side) > 0.5
    boxes = torch.tensor([[0.0, 0.0, side, side]]).expand(3, 4)
    vectors = encode_squares(square_masks(masks, boxes, side), side * side)
    wanted = dctn(masks.double().numpy(), axes=(1, 2), norm="ortho").reshape(3, -1)
    assert torch.allclose(vectors.double(), torch.from_numpy(wanted)[:, zigzag(side)], atol=1e-5)
    assert torch.equal(decode_vectors(vectors, side), masks)


def disc(height: int, width: int, box: list[float]) -> Tensor:
    """The ellipse that fills a box, xyxy in pixels: bool [1, height, width]."""
    x1, y1, x2, y2 = box
    y = (torch.arange(height) + 0.5 - (y1 + y2) / 2) / ((y2 - y1) / 2)
    x = (torch.arange(width) + 0.5 - (x1 + x2) / 2) / ((x2 - x1) / 2)
    return (y[:, None] ** 2 + x**2 <= 1)[None]


@pytest.mark.parametrize(
    "box", [[30, 20, 90, 60.5], [-20, -10.5, 30, 40], [80, 30, 150, 120], [-5, -5, 135, 105]]
)
def test_there_and_back(box: list[float]) -> None:
    """What lies outside the image is not seen, and comes back as nothing."""
    mask, boxes = disc(100, 130, box), torch.tensor([box])
    vectors = encode_squares(square_masks(mask, boxes, 56), 64)
    back = paste_squares(decode_vectors(vectors, 56), boxes, (100, 130))
    assert back.shape == mask.shape
    assert (back & mask).sum() / (back | mask).sum() > 0.93


def test_pasted_like_torch_samples() -> None:
    """PyTorch's own sampling of whole images, at places of all kinds."""
    squares = torch.rand(40, 9, 9) > 0.5
    corners = torch.rand(40, 2) * 90 - 20
    boxes = torch.cat([corners, corners + torch.rand(40, 2) * 60 + 0.5], 1)
    height, width = 50, 70
    centres = [torch.arange(side) + 0.5 for side in (width, height)]
    x, y = (
        (c - boxes[:, i, None]) / (boxes[:, i + 2] - boxes[:, i])[:, None] * 2 - 1
        for i, c in enumerate(centres)
    )
    grid = torch.stack(
        [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3
    )
    sampled = torch.nn.functional.grid_sample(squares[:, None].float(), grid, align_corners=False)
    close = (sampled[:, 0] - 0.5).abs() < 1e-4  # either is right
    pasted = paste_squares(squares, boxes, (height, width))
    assert torch.equal(pasted | close, (sampled[:, 0] >= 0.5) | close)
    assert pasted.any(2).any(1).sum() > 20


@pytest.mark.parametrize(
    "box", [[5.0, 5.0, 5.0, 9.0], [9.0, 5.0, 5.0, 9.0], [-90.0, 0.0, -80.0, 9.0], [torch.nan] * 4]
)
def test_a_box_that_shows_nothing(box: list[float]) -> None:
    full = torch.ones(1, 8, 8, dtype=torch.bool)
    assert not paste_squares(full, torch.tensor([box]), (20, 30)).any()


def test_no_objects() -> None:
    vectors = encode_squares(square_masks(torch.zeros(0, 9, 8) > 0, torch.zeros(0, 4), 8), 5)
    assert vectors.shape == (0, 5)
    squares = decode_vectors(vectors, 8)
    assert squares.shape == (0, 8, 8)
    assert paste_squares(squares, torch.zeros(0, 4), (9, 8)).shape == (0, 9, 8)


def test_masks_of_detections_are_drawn_when_asked_for() -> None:
    outputs = {
        "pred_logits": torch.randn(1, 6, 2),
        "pred_boxes": torch.rand(1, 6, 4),
        "pred_vectors": torch.randn(1, 6, 10),
    }
    config = ViDTConfig(with_vector=True, n_keep=10, gt_mask_len=16)
    (found,) = decode_for(config)(outputs, torch.tensor([[40, 30]]))
    every, best = found.masks, found.above(float(found.scores[3])).masks
    assert every is not None and best is not None
    assert every.shape == (12, 40, 30) and every.dtype == torch.bool
    assert torch.equal(every[:4], best)
    assert replace(found, mask_vectors=None).masks is None
    del outputs["pred_vectors"]
    assert decode_for(ViDTConfig())(outputs, torch.tensor([[40, 30]]))[0].masks is None


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_masks_are_drawn_one_at_a_time(kind: str) -> None:
    """As if each were laid over the whole image, in memory that does not grow with their number."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * 900 - 50
    boxes = torch.cat([corners, corners + 10 + torch.rand(60, 2, generator=generator) * 200], 1)
    boxes[0] += 5000  # outside
    vectors = torch.randn(60, 10, generator=generator)
    scores, labels = torch.linspace(0.9, 0.3, 60), torch.arange(60) % 3
    size, squares = (800, 1000), boxes + torch.tensor([0.0, 0.0, 40.0, 20.0])
    names = ("a", "b", "c")
    found = Detections(scores, labels, boxes, MaskVectors(vectors, 16, size, squares), names)
    if kind == "onnx":
        columns = (column.numpy() for column in (scores, labels, boxes))
        found = OnnxDetections(
            *columns, names, size, vectors.numpy(), 16, mask_boxes=squares.numpy()
        )
    picture = Image.new("RGB", size[::-1], "#808080")
    tracemalloc.start()
    drawn = found.plot(picture)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * size[0] * size[1]
    expected = picture.copy()
    colours = object_colours(labels.tolist())
    for row in range(59, -1, -1):
        tint(expected, np.asarray(found.masks[row]), colours[row])
    expected = draw_detections(expected, boxes.numpy(), labels.tolist(), scores.tolist(), names)
    assert drawn.tobytes() == expected.tobytes() != picture.tobytes()
