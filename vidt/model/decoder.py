"""Encoder-free deformable decoder with iterative box refinement (ViDT section 3.2; Deformable DETR,
arXiv 2010.04159).

Differs from Deformable DETR: no encoder, patch maps get no position encoding, and the bare [DET]
tokens make a first prediction before the first layer.

Letters: B batch, Q queries, S positions of all levels, C channels, L levels, D decoder layers.
Boxes are cxcywh in 0..1 of the unpadded image; reference points are (cx, cy) of the same frame.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidt.model.dropout import Dropout
from vidt.model.ram import attend, split_heads
from vidt.ops.deformable_attention import DeformableAttention
from vidt.ops.linear import Linear, linear


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit that stays finite at 0 and 1."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class MLPHead(nn.Module):
    """Three-layer MLP from a query to what is predicted of it: [..., C] -> [..., out_dim]."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        last = Linear(hidden_dim, out_dim)
        self.layers = nn.ModuleList([Linear(dim, hidden_dim), Linear(hidden_dim, hidden_dim), last])

    def forward(self, x: Tensor) -> Tensor:
        # Half precision has three digits: boxes are worth more, and the head costs nothing.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(next(self.parameters()).dtype)
            x = F.relu(self.layers[0](x))
            x = F.relu(self.layers[1](x))
            return self.layers[2](x)


def box_head(dim: int, *, size_bias: float = 0.0) -> MLPHead:
    """Offsets of a box in logit space; at the start every box is its reference, `size_bias` larger
    or smaller.
    """
    head = MLPHead(dim, dim, 4)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, 0.0, size_bias, size_bias]))
    return head


class SelfAttention(nn.Module):
    """Softmax attention of queries to each other, with the weights of `nn.MultiheadAttention` and
    their names. So few queries would spend most of their time in what that does around it.
    """

    def __init__(self, dim: int, num_heads: int, *, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, placed: Tensor, queries: Tensor, hidden: Tensor | None) -> Tensor:
        """Who looks and is looked at goes by `placed`, what is seen by `queries`, both [B, Q, C];
        hidden [Q, Q], -inf where the row may not look at the column, else 0. Returns [B, Q, C].
        """
        dim = queries.shape[-1]
        weights = self.in_proj_weight.split([2 * dim, dim])
        biases = self.in_proj_bias.split([2 * dim, dim])
        asked = linear(placed, weights[0], biases[0])
        query, keys = split_heads(asked, self.num_heads, parts=2)
        seen = linear(queries, weights[1], biases[1])
        (values,) = split_heads(seen, self.num_heads, parts=1)
        mask = None if hidden is None else hidden.to(values.dtype)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(query, keys, values, mask, dropout))


class DecoderLayer(nn.Module):
    """Post-norm layer: queries attend to each other, then to the maps, then an MLP."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_levels: int,
        num_points: int,
        dim_feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(
            dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = Linear(dim, dim_feedforward)
        self.linear2 = Linear(dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        reference: Tensor,
        source: Tensor,
        level_shapes: list[tuple[int, int]],
        padding: Tensor,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """queries and query_pos [B, Q, C]; reference [B, Q, L, 2 or 4]; source [B, S, C]; padding
        [B, S]; hidden [Q, Q], -inf where the row may not look at the column, else 0. Returns [B, Q,
        C].
        """
        attended = self.self_attn(queries + query_pos, queries, hidden)
        queries = self.norm2(queries + self.dropout(attended))
        attended = self.cross_attn(queries + query_pos, reference, source, level_shapes, padding)
        queries = self.norm1(queries + self.dropout(attended))
        active = self.dropout(F.relu(self.linear1(queries)))
        return self.norm3(queries + self.dropout(self.linear2(active)))


def valid_ratios(padding: Tensor) -> Tensor:
    """Share of a padded map that is image, by its first row and column: padding [B, H, W] -> [B, 2]
    as (x, y).
    """
    height, width = padding.shape[1:]
    x = (~padding[:, 0, :]).sum(1) / width
    y = (~padding[:, :, 0]).sum(1) / height
    return torch.stack([x, y], dim=-1)


class DeformableDecoder(nn.Module):
    """Refines the [DET] tokens layer by layer; returns the state and the boxes of every level, D +
    1 of them.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_layers: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        dim_feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.reference_points = Linear(dim, 2)
        self.layers = nn.ModuleList(
            DecoderLayer(
                dim,
                num_heads=num_heads,
                num_levels=num_levels,
                num_points=num_points,
                dim_feedforward=dim_feedforward,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every matrix, then the attention's own start (offsets and weights that ignore
        the query).
        """
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.reference_points.bias)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        maps: list[Tensor],
        paddings: list[Tensor],
        box_heads: list[nn.Module],
        refine: bool,
        noised_boxes: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """queries, query_pos [B, Q, C]; maps [B, C, h, w] and paddings [B, h, w] of each level;
        box_heads one per prediction level. With refine every level starts from the boxes of the one
        before; without, from the reference points. noised_boxes [B, N, 4]: extra queries, for
        training (see `denoising_position`).

        Returns D + 1 states [B, Q, C] and boxes [B, Q, 4]; all but the first have Q + N queries.
        """
        source = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        padding = torch.cat([level.flatten(1) for level in paddings], dim=1)
        level_shapes = [(level.shape[2], level.shape[3]) for level in maps]
        ratios = torch.stack([valid_ratios(level) for level in paddings], dim=1)[
            :, None
        ]  # [B, 1, L, 2]
        ratios = torch.cat([ratios, ratios], dim=-1) if refine else ratios

        with torch.autocast(queries.device.type, enabled=False):
            points = self.reference_points(
                query_pos.to(self.reference_points.weight.dtype)
            ).sigmoid()
        states, boxes = [queries], [_offset_boxes(box_heads[0](queries), points)]
        # Without refinement the points stay in the graph; with it only the first box head sees
        # their gradient.
        reference = boxes[0].detach() if refine else points
        hidden = None
        if noised_boxes is not None:
            hidden = hide_noised(queries.shape[1], noised_boxes.shape[1], queries.device)
            position = denoising_position(noised_boxes, queries.shape[-1])
            query_pos = torch.cat([query_pos, position], dim=1)
            queries = torch.cat([queries, torch.zeros_like(position)], dim=1)
            reference = torch.cat([reference, noised_boxes], dim=1)
        for layer, head in zip(self.layers, box_heads[1:], strict=True):
            scaled = reference[:, :, None] * ratios
            queries = layer(queries, query_pos, scaled, source, level_shapes, padding, hidden)
            states.append(queries)
            boxes.append(_offset_boxes(head(queries), reference))
            reference = boxes[-1].detach() if refine else points
        return states, boxes


def denoising_position(boxes: Tensor, dim: int) -> Tensor:
    """Sine encoding of boxes (DAB-DETR, arXiv 2201.12329, equation 4) for queries that are given a
    box, not a token.

    DN-DETR (arXiv 2203.01305) trains a decoder to mend boxes near the truth beside finding them.
    Its queries carry a learned label embedding; ours carry nothing but the place, so that the class
    has to be read off the picture and the weights stay those of the released model. boxes [B, N, 4]
    cxcywh -> [B, N, dim].
    """
    channel = torch.arange(dim // 8, device=boxes.device)
    angle = boxes[..., None] * (2 * math.pi) / 20 ** (channel / (dim // 8))  # [B, N, 4, dim / 8]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)


def hide_noised(num_queries: int, num_noised: int, device: torch.device) -> Tensor:
    """[Q + N, Q + N], -inf = hidden, else 0: a noised query sees itself and the detection queries,
    nobody else sees it.
    """
    total = num_queries + num_noised
    hidden = torch.zeros(total, total, device=device)
    hidden[:, num_queries:] = -math.inf
    return hidden.fill_diagonal_(0)


def _offset_boxes(offsets: Tensor, reference: Tensor) -> Tensor:
    """offsets [B, Q, 4] in logit space on a reference point (moves cx, cy only) or a reference
    box.
    """
    base = inverse_sigmoid(reference)
    return (offsets + F.pad(base, (0, 4 - base.shape[-1]))).sigmoid()
