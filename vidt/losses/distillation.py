"""Distillation by token matching (ViDT, arXiv 2110.03921): a student's tokens are drawn to those of
a frozen teacher.

The released code takes the root of the batch mean; here each image has its own root, so a step's
loss does not depend on how its images are distributed. With one image the two agree.

Letters: B images, Q [DET] tokens, C channels, D + 1 prediction levels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vidt.errors import UserError
from vidt.model.config import ViDTConfig

# Settings in which a teacher and its student must agree: their tokens are compared one by one.
SHARED = ("method", "det_token_num", "reduced_dim", "dec_layers", "epff")
SMALLEST = 1e-12  # keeps the gradient of sqrt finite when student equals teacher


def token_distances(student: dict[str, Any], teacher: dict[str, Any]) -> Tensor:
    """The distance between the `distil_tokens` of two detectors per image: [B], float32.

    It is the mean distance of two corresponding tokens, summed over the projected maps
    [B, C, H, W], the projected [DET] tokens [B, Q, C] and the prediction levels [D + 1, B, Q, C].
    """
    maps = zip(student["patch_token"], teacher["patch_token"], strict=True)
    distances = [_lengths(ours, theirs, dim=1).flatten(1).mean(1) for ours, theirs in maps]
    distances += _lengths(_det_tokens(student), _det_tokens(teacher), dim=-1).mean(2).unbind()
    return torch.stack(distances).sum(0)


def _det_tokens(tokens: dict[str, Any]) -> Tensor:
    """[DET] tokens of the backbone and of each prediction level: [D + 2, B, Q, C]."""
    return torch.cat([tokens["body_det_token"][None], tokens["neck_det_token"]])


def _lengths(ours: Tensor, theirs: Tensor, *, dim: int) -> Tensor:
    return torch.linalg.vector_norm(ours.float() - theirs.detach().float(), dim=dim)


def require_pair(student: ViDTConfig, teacher: ViDTConfig, source: str) -> None:
    """Raises UserError, naming the first flag that differs, if this student cannot learn from the
    teacher.
    """
    if teacher.method != "vidt":
        raise UserError(f"the teacher {source} has method {teacher.method}; choose one with vidt")
    for name in SHARED:
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            raise UserError(
                f"the teacher {source} has {name} {theirs}, this run {ours}; pass --{name} {theirs}"
            )


class TokenMatching:
    """A frozen teacher and the weighted distillation loss. `teacher` is a `ViDT`, which may be
    prepared for a device and a precision.
    """

    def __init__(self, teacher: nn.Module, *, distil_loss_coef: float = 4.0) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.distil_loss_coef = distil_loss_coef

    def __call__(
        self, images: Tensor, padding: Tensor, outputs: dict[str, Any], num_images: float
    ) -> dict[str, Tensor]:
        """images [B, 3, H, W], padding [B, H, W] and the student's `outputs` of them; num_images is
        the normaliser, the images of the whole optimiser step. Returns `loss_distil`.
        """
        with torch.no_grad():
            teacher_tokens = self.teacher(images, padding)["distil_tokens"]
        distances = token_distances(outputs["distil_tokens"], teacher_tokens)
        roots = distances.clamp(min=SMALLEST).sqrt()
        return {"loss_distil": self.distil_loss_coef * roots.sum() / num_images}
