"""The decoder's self-attention against PyTorch's own module."""

import pytest
import torch
from torch import Tensor, nn

from vidt.decoder import SelfAttention, hide_noised


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


def test_dropout_of_self_attention_is_of_its_weights() -> None:
    """Of many draws the mean is what no dropout gives, hidden queries or not."""
    torch.manual_seed(0)
    attention = SelfAttention(16, 4, dropout=0.3)
    placed, queries = torch.randn(2, 1, 8, 16)
    hidden = hide_noised(5, 3, placed.device)
    with torch.no_grad():
        alone = attention(placed, queries, hidden).unsqueeze(0)
        many = attention(placed.expand(4000, -1, -1), queries.expand(4000, -1, -1), hidden)
        attention.eval()
        exact = attention(placed, queries, hidden)
    assert not torch.allclose(alone, exact, atol=1e-2)
    assert torch.allclose(many.mean(0), exact[0], atol=2e-2)
