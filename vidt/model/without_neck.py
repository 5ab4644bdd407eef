"""ViDT without its neck: boxes and classes straight from the backbone's [DET] tokens (arXiv
2110.03921, section 4.2), trained like DETR (arXiv 2005.12872) with a softmax over the classes and a
background.

Letters: B batch, H x W padded image, Q [DET] tokens, K classes, C = reduced_dim.
"""

from torch import Tensor, nn
from torchvision.ops import box_convert

from vidt.model.backbone import build_backbone
from vidt.model.config import WITHOUT_NECK, ViDTConfig, require
from vidt.model.decoder import MLPHead
from vidt.model.epff import projection


class ViDTWithoutNeck(nn.Module):
    """Images to class logits and boxes of a fixed number of [DET] tokens."""

    def __init__(self, config: ViDTConfig) -> None:
        super().__init__()
        require(config.method == WITHOUT_NECK, "method", config.method, WITHOUT_NECK)
        self.config = config
        dim = config.reduced_dim
        self.backbone = build_backbone(config)
        self.input_proj = projection(self.backbone.num_channels[-1], dim)
        self.class_embed = MLPHead(dim, dim, config.num_classes + 1)
        self.bbox_embed = MLPHead(dim, dim, 4)

    def forward(
        self,
        images: Tensor,
        padding: Tensor,
        denoising_boxes: Tensor | None = None,
        *,
        detections_only: bool = False,
    ) -> dict[str, Tensor]:
        """images [B, 3, H, W] normalised; padding [B, H, W] bool, True where padded.

        Returns `pred_logits` [B, Q, K + 1] (before the softmax, the background last) and
        `pred_boxes` [B, Q, 4] (cxcywh in 0..1 of the unpadded image). Raises ValueError for
        denoising_boxes: there is no decoder to denoise them. The output is the same with and
        without detections_only.
        """
        if denoising_boxes is not None:
            raise ValueError(
                f"denoising_boxes need a decoder to denoise them; method {WITHOUT_NECK} has none"
            )
        _, det, _ = self.backbone(images, padding)
        queries = self.input_proj(det.mT[..., None])[..., 0].mT  # [B, Q, C]
        return {
            "pred_logits": self.class_embed(queries).float(),
            "pred_boxes": self.bbox_embed(queries).float().sigmoid(),
        }


def decode_best_class(outputs: dict[str, Tensor], sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best class of every [DET] token, background excluded; every token is returned.

    outputs of `ViDTWithoutNeck`; sizes [B, 2] as (height, width) of the original images, in pixels.
    Returns scores [B, Q], labels [B, Q] and boxes [B, Q, 4] (xyxy, pixels of the original image,
    not clipped to it), in the order of the tokens.
    """
    scores, labels = outputs["pred_logits"].softmax(-1)[..., :-1].max(-1)
    boxes = box_convert(outputs["pred_boxes"], "cxcywh", "xyxy")
    scale = sizes.to(boxes, non_blocking=True).flip(1).repeat(1, 2)  # [B, 4] as (w, h, w, h)
    return scores, labels, boxes * scale[:, None]
