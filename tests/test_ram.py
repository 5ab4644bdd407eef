"""The reconfigured attention against attention computed token by token."""

import math

import pytest
import torch
from torch import Tensor

from vidt.model.ram import ReconfiguredAttention, shift_mask, sine_position

WINDOW = 3


def attention(shift: int, dim: int = 8, heads: int = 2) -> ReconfiguredAttention:
    torch.manual_seed(0)
    module = ReconfiguredAttention(dim, heads, window=WINDOW, shift=shift).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def by_hand(module: ReconfiguredAttention, patches: Tensor) -> Tensor:
    """Window attention of patches [H, W, C], one query at a time: a token attends to the tokens of
    its window that lie in its own part of the image; tokens of zeros fill the windows up.
    """
    height, width, dim = patches.shape
    rows, columns = (-(-side // WINDOW) * WINDOW for side in (height, width))
    tokens = patches.new_zeros(rows, columns, dim)
    tokens[:height, :width] = patches
    qkv = module.qkv(tokens).unflatten(-1, (3, module.num_heads, -1))
    index = module.relative_position_index.view(WINDOW**2, WINDOW**2)
    output = torch.zeros_like(patches)

    def window_of(position: int, length: int) -> tuple[int, int, bool]:
        moved = (position - module.shift) % length
        return moved // WINDOW, moved % WINDOW, position < module.shift and moved >= length - WINDOW

    for y in range(height):
        for x in range(width):
            (wy, iy, ry), (wx, ix, rx) = window_of(y, rows), window_of(x, columns)
            scores, values = [], []
            for v in range(rows):
                for u in range(columns):
                    (wv, iv, rv), (wu, iu, ru) = window_of(v, rows), window_of(u, columns)
                    if (wy, wx) != (wv, wu):
                        continue
                    bias = module.relative_position_bias_table[
                        index[iy * WINDOW + ix, iv * WINDOW + iu]
                    ]
                    scale = (dim // module.num_heads) ** -0.5
                    score = (qkv[y, x, 0] * qkv[v, u, 1]).sum(-1) * scale + bias
                    scores.append(score if (ry, rx) == (rv, ru) else score - 100)
                    values.append(qkv[v, u, 2])
            weights = torch.stack(scores).softmax(0)  # [T, M]
            output[y, x] = (weights[..., None] * torch.stack(values)).sum(0).flatten()
    return module.proj(output)


@pytest.mark.parametrize("grid", [(3, 3), (6, 9), (4, 5), (2, 1)])
@pytest.mark.parametrize("shift", [0, 1])
def test_windows_against_attention_by_hand(grid: tuple[int, int], shift: int) -> None:
    module = attention(shift)
    patches, det = torch.randn(2, *grid, 8).double(), torch.randn(2, 4, 8).double()
    mask = shift_mask(grid, WINDOW, shift, patches.device) if shift else None
    with torch.no_grad():
        output = module(patches, det, mask)
        expected = torch.stack([by_hand(module, image) for image in patches])
    assert torch.allclose(output[:, : grid[0] * grid[1]], expected.flatten(1, 2), atol=1e-9)


def test_det_tokens_attend_to_unpadded_patches_and_each_other() -> None:
    module = attention(0)
    patches, det = torch.randn(1, 2, 3, 8).double(), torch.randn(1, 4, 8).double()
    padding = torch.tensor([[False, False, True, False, False, True]])
    position = torch.randn(1, 6, 8).double()
    with torch.no_grad():
        output = module(patches, det, None, position, padding)[:, 6:]
        tokens = torch.cat([(patches.flatten(1, 2) + position)[:, ~padding[0]], det], dim=1)
        keys, values = module.qkv(tokens)[0, :, 8:].unflatten(-1, (2, 2, 4)).unbind(1)
        query = module.qkv(det)[0, :, :8].unflatten(-1, (2, 4))
        weights = (torch.einsum("qmd,nmd->mqn", query, keys) / 2).softmax(-1)
        expected = module.proj(torch.einsum("mqn,nmd->qmd", weights, values).flatten(1))
        alone = module(patches, det, None)[:, 6:]
        others = module(torch.randn_like(patches), det, None)[:, 6:]
    assert torch.allclose(output[0], expected, atol=1e-9)
    assert torch.equal(alone, others) and not torch.allclose(alone, output)


def test_sine_position_by_hand() -> None:
    padding = torch.zeros(1, 3, 4, dtype=torch.bool)
    padding[:, 2:], padding[:, :, 3:] = True, True
    position = sine_position(padding, 8).unflatten(1, (3, 4))
    for row, column in [(0, 0), (1, 2)]:
        for part, place, count in [(0, row, 2), (4, column, 3)]:
            angle = 2 * math.pi * (place + 1) / (count + 1e-6)
            expected = [
                f(angle / 10000 ** (2 * j / 4)) for j in (0, 1) for f in (math.sin, math.cos)
            ]
            assert position[0, row, column, part : part + 4].tolist() == pytest.approx(
                expected, abs=1e-5
            )
