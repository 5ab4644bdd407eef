"""The decoder's self-attention against PyTorch's own module."""

import pytest
import torch
from torch import Tensor, nn

from vidt.model.decoder import SelfAttention, hide_noised
from vidt.model.ram import attend


@pytest.mark.parametrize("num_noised", [0, 3])
@pytest.mark.parametrize("training", [True, False])
def test_self_attention_is_pytorchs_by_the_same_names(num_noised: int, training: bool) -> None:
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    ours = SelfAttention(16, 4, dropout=0.0).train(training)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours.load_state_dict(theirs.state_dict())
    placed, queries = torch.randn(2, 2, 5 + num_noised, 16)
    hidden = hide_noised(5, num_noised, placed.device) if num_noised else None
    expected = theirs(placed, placed, queries, attn_mask=hidden, need_weights=False)[0]
    assert torch.allclose(ours(placed, queries, hidden), expected, atol=1e-6)


def test_hidden_queries_stay_hidden_in_half_precision() -> None:
    attention = SelfAttention(16, 4, dropout=0.0)
    placed, queries = torch.randn(2, 2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(placed, queries, hide_noised(5, 3, placed.device))
    assert half.dtype is torch.bfloat16
    alone = attention(placed[:, :5], queries[:, :5], None)
    assert torch.allclose(half[:, :5].float(), alone, atol=0.02)


def test_dropout_of_self_attention_spares_evaluation() -> None:
    attention = SelfAttention(16, 4, dropout=0.5)

    def outcomes() -> list[Tensor]:
        placed, queries = torch.ones(2, 1, 5, 16).cumsum(2)
        return [attention(placed, queries, None) for _ in range(2)]

    assert not torch.equal(*outcomes())
    attention.eval()
    assert torch.equal(*outcomes())


def test_dropout_of_attention_is_of_its_weights() -> None:
    """With the identity for values, weights are what comes out."""
    query, keys = torch.randn(2, 2, 4, 8, 16)
    values = torch.eye(8).expand(2, 4, 8, 8)
    hidden = hide_noised(5, 3, query.device)
    exact = attend(query, keys, values, hidden)
    dropped = attend(query, keys, values, hidden, 0.3)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], exact[kept] / 0.7, rtol=1e-4)
    assert 0.2 < 1 - kept.sum() / (exact != 0).sum() < 0.4


def test_half_precision_keeps_full_scores_beside_dropout() -> None:
    query, keys, values = torch.randn(3, 2, 8, 100, 32, dtype=torch.bfloat16)
    query, keys = 3 * query, 3 * keys
    exact = attend(query.double(), keys.double(), values.double(), None)
    half = attend(query, keys, values, None, 1e-9)
    assert half.dtype is torch.bfloat16
    assert (half - exact).square().mean().sqrt() < 0.004  # 0.01 if scores were rounded
