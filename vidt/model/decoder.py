"""Encoder-free deformable decoder with iterative box refinement (ViDT section 3.2; Deformable DETR,
arXiv 2010.04159).

Differs from Deformable DETR: no encoder, patch maps get no position encoding, and the bare [DET]
tokens make a first prediction before the first layer.

Letters: B batch, Q queries, E extra queries in training, S positions of all levels, C channels, L
pyramid levels, D decoder layers.
Boxes are cxcywh in 0..1 of the unpadded image; reference points are (cx, cy) of the same frame.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidt.model.ram import autocasted
from vidt.model.training_queries import ExtraQueries, attention_mask
from vidt.ops.deformable_attention import DeformableAttention, Levels


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit that stays finite at 0 and 1."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class MLPHead(nn.Module):
    """Three-layer MLP from a query to a prediction: [..., C] -> [..., out_dim]."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        last = nn.Linear(hidden_dim, out_dim)
        self.layers = nn.ModuleList(
            [nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim), last]
        )

    def forward(self, x: Tensor) -> Tensor:
        # Outside autocast: half has three digits, too few for a box, and the head costs little.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(next(self.parameters()).dtype)
            x = F.relu(self.layers[0](x))
            x = F.relu(self.layers[1](x))
            return self.layers[2](x)


def box_head(dim: int, *, size_bias: float = 0.0) -> MLPHead:
    """Predicts the offset of a box in logit space. Initially every offset is (0, 0, size_bias,
    size_bias): the box is centred on its reference, with a default size.
    """
    head = MLPHead(dim, dim, 4)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, 0.0, size_bias, size_bias]))
    return head


class DecoderLayer(nn.Module):
    """Post-norm layer: self-attention of the queries, deformable attention to the maps, an MLP."""

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
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(
            dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        reference: Tensor,
        source: Tensor,
        levels: Levels,
        padding: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """queries and query_pos [B, Q, C]; reference [B, Q, L, 2 or 4]; source [B, S, C]; padding
        [B, S]; mask [Q, Q] bool, True where the row must not attend to the column. Returns [B, Q,
        C].
        """
        with_pos = queries + query_pos
        attended, _ = self.self_attn(
            with_pos, with_pos, queries, need_weights=False, attn_mask=mask
        )
        queries = self.norm2(queries + self.dropout(attended))
        attended = self.cross_attn(queries + query_pos, reference, source, levels, padding)
        queries = self.norm1(queries + self.dropout(attended))
        active = self.dropout(F.relu(self.linear1(queries)))
        return self.norm3(queries + self.dropout(self.linear2(active)))


def valid_ratios(padding: Tensor) -> Tensor:
    """Unpadded share of each side, from the first row and column: padding [B, H, W] -> [B, 2] as
    (x, y).
    """
    height, width = padding.shape[1:]
    x = (~padding[:, 0, :]).sum(1) / width
    y = (~padding[:, :, 0]).sum(1) / height
    return torch.stack([x, y], dim=-1)


class DeformableDecoder(nn.Module):
    """Refines the [DET] tokens layer by layer; returns the states and boxes of all D + 1 prediction
    levels.
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
        look_forward_twice: bool = False,
    ) -> None:
        """look_forward_twice (DINO, arXiv 2203.03605, section 3.5): the loss of a box also moves
        the layer before its own.
        """
        super().__init__()
        self.look_forward_twice = look_forward_twice
        self.reference_points = nn.Linear(dim, 2)
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
        """Xavier for every matrix; then deformable attention initialises itself."""
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
        extra: ExtraQueries | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """queries, query_pos [B, Q, C]; maps [B, C, h, w] and paddings [B, h, w] of each level;
        box_heads, one per prediction level. With refine, a level predicts offsets from the boxes of
        the level before, else from the reference points. extra: queries to append, for training
        with refine.

        Returns D + 1 states [B, Q, C] and boxes [B, Q, 4]; all but the first have Q + E queries.
        """
        source = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        if source.device.type != "cpu":  # `deformable_cpu` reads the source in full precision
            source = autocasted(source)
        padding = torch.cat([level.flatten(1) for level in paddings], dim=1)
        levels = Levels.of([(level.shape[2], level.shape[3]) for level in maps], source.device)
        ratios = torch.stack([valid_ratios(level) for level in paddings], dim=1)[:, None]
        # [B, 1, L, 2 or 4]
        ratios = torch.cat([ratios, ratios], dim=-1) if refine else ratios

        points = self.points(query_pos)
        states, boxes = [queries], [offset_boxes(box_heads[0](queries), points)]
        # With refinement the gradient reaches the points through the first box head only.
        reference = boxes[0].detach() if refine else points
        # With look-forward-twice the base has the same value, and a gradient of the layer before.
        twice = refine and self.look_forward_twice and self.training
        base = boxes[0] if twice else reference
        mask = None
        if extra is not None:
            mask = attention_mask(queries.shape[1], extra.group)
            query_pos = torch.cat([query_pos, extra.position], dim=1)
            queries = torch.cat([queries, extra.content], dim=1)
            base, reference = (torch.cat([each, extra.boxes], dim=1) for each in (base, reference))
        for layer, head in zip(self.layers, box_heads[1:], strict=True):
            scaled = reference[:, :, None] * ratios
            queries = layer(queries, query_pos, scaled, source, levels, padding, mask)
            states.append(queries)
            offsets = head(queries)
            boxes.append(offset_boxes(offsets, base))
            if refine:
                moved = offset_boxes(offsets, reference) if twice else None
                reference = boxes[-1].detach()
                base = reference if moved is None else moved
        return states, boxes

    def points(self, query_pos: Tensor) -> Tensor:
        """Reference points of positions [B, Q, C]: [B, Q, 2] (cx, cy) in 0..1."""
        with torch.autocast(query_pos.device.type, enabled=False):
            query_pos = query_pos.to(self.reference_points.weight.dtype)
            return self.reference_points(query_pos).sigmoid()


def offset_boxes(offsets: Tensor, reference: Tensor) -> Tensor:
    """Adds offsets [B, Q, 4] in logit space to a reference point (cx, cy only) or a reference
    box."""
    base = inverse_sigmoid(reference)
    return (offsets + F.pad(base, (0, 4 - base.shape[-1]))).sigmoid()
